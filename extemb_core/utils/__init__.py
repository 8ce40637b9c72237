"""Helpers that have nothing to do with the method: files, JSON Lines, progress bars and checks."""
