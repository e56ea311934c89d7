"""Runs read back from their logs, their figures, and the command `plot`."""
