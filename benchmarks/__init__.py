"""Benchmarks; a package, since another one of that name, installed, would come before a plain folder."""
