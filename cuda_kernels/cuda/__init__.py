"""The operations on CUDA devices: Numba-CUDA kernels, their compilation, cache and launch."""
