"""Removable channels of a network: finds them, skips them in training, and removes them from a copy."""
