"""Files of checkpoints."""

AVERAGES = "generator_averages"
"""The key in weights-only checkpoints that holds the states of `GeneratorEMA` callbacks, by their `state_key`."""
