"""PTX instructions that Numba-CUDA lacks, as functions that kernels call."""
