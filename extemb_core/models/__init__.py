"""The frozen LLM, the embedder that compresses for it, and what passes between them."""
