"""Find the weights of LLMs and embedders: in folders, by known names, on a hub."""
