"""Queries and candidate products to label."""
