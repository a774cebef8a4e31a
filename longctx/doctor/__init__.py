"""Checks and measurements of the machines of a job, before a run: `longctx doctor`."""
