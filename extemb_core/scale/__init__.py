"""Compressing a corpus over many processes and machines."""

ROWS_PER_BATCH = 64
"""Of the input, that a worker compresses at once, when nothing else is asked for."""
