"""From documents and a budget of positions to the frozen LLM's input: plan, build prompts, keep conversations going."""
