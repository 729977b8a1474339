"""Queries: from a log, from titles, written by a language model, from a file; and the pool of a run."""
