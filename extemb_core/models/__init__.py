"""Models: the frozen LLM, the embedder that compresses for it, and where their weights come from."""
