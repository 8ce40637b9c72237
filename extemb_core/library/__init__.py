"""Finding the passages that a question is about."""

PASSAGE_TOKENS = 256
"""Of a passage at most, when nothing else is asked for."""

N_PASSAGES = 8
"""Passages found for a question, when nothing else is asked for."""
