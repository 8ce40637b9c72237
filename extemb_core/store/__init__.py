"""Stores of compressed documents, by ref and fingerprint."""
