"""Compress a corpus over many processes and machines."""

ROWS_PER_BATCH = 64
"""Default number of input rows that a worker compresses at once."""
