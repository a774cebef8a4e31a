"""Routing: which heads a token reads."""
