"""Files, JSON Lines and progress bars: what has nothing to do with the method."""
