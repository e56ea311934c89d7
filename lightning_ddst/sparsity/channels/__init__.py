"""Channels that can be taken out of a network: found, left out while training, removed for good."""
