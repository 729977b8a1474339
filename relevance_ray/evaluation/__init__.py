"""Comparison of models on human judgments, with significance, and the report."""
