"""Heartbeats of the ranks of a run, and the diagnosis of one that hangs."""
