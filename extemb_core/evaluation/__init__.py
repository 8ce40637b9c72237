"""Measure what extensible embeddings carry, always beside their controls."""
