"""Helpers of the callbacks."""
