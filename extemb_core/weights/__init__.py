"""Where the weights of LLMs and embedders come from: folders, known names, a hub."""
