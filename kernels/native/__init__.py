"""Native kernels: C++ for CPUs, built by the system's compiler on first use and called through ctypes."""
