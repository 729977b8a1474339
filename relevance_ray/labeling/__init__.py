"""Shards through an engine to committed labels."""
