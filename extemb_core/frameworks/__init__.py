"""Serve frameworks and servers: refs, batched requests, event loops, shared models and settings."""
