"""The operations on CUDA devices: Numba-CUDA kernels, and what compiles, caches and launches them."""
