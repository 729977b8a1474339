"""Distill an LLM's relevance judgments into a model that scores (query, product) in milliseconds, on a Ray cluster."""
