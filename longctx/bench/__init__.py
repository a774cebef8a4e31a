"""Measurement: the kernels' speed and memory beside their peers' and beside what the machine can do, in one run."""
