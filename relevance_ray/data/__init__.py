"""Readers of the public formats, the demo market, splits by query."""
