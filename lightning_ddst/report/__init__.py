"""Reads runs from their logs, draws their figures, and provides the command ``plot``."""
