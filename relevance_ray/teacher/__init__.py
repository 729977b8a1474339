"""The LLM that learns from the human judgments."""
