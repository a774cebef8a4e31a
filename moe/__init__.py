"""Routing: which heads a token reads, and which experts it takes."""
