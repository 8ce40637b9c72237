"""Code that the integrations of LangChain and LlamaIndex share."""
