"""Sparse training attached to a GAN, whichever loop trains it: options, hooks, checks, readings and reports."""
