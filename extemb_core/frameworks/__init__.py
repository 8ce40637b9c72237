"""What the integrations of LangChain and LlamaIndex share."""
