"""Kernels of routed layers: token permutation, grouped GEMM, grouped SwiGLU, projections of routed heads."""
