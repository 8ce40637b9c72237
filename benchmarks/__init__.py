"""Measurements of the project itself; not part of the package that users install."""
