"""Where compressed documents are kept, by ref and fingerprint."""
