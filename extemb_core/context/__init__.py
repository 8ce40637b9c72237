"""From a budget of positions to the input of the frozen LLM: plan, assemble, keep a session going."""
