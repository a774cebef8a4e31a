"""Benchmarks: speed and memory of the kernels against peer libraries and machine limits, and of layers over ranks."""
