"""Files, JSON Lines, progress bars and checks: what has nothing to do with the method."""
