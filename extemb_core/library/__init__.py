"""Find the passages that a question is about."""

PASSAGE_TOKENS = 256
"""Default limit on the tokens of a passage."""

N_PASSAGES = 8
"""Default number of passages to find for a question."""
