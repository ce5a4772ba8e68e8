"""The kernels as Numba compiles them. `cpu.objects` imports this package only to compile a kernel.

Kernels allocate nothing but what `memory` gives them, and raise nothing.
"""
