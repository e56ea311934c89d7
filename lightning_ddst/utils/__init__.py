"""Helpers for all other subpackages, on which they do not depend."""
