"""Weights of one model from those of others."""
