"""Equations of the whole model in plain torch, float64: an independent reference for one rank.

Written from the formulas, token by token or dense, and differentiable by autograd. They read the parameters and the
configuration of a model and call nothing of it (`tests/verify/equations`), so a fault that is the same on every rank is
not repeated here.
"""
