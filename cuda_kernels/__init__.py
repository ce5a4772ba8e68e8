"""The arithmetic of LLM.int8(), usable alone: this package never imports int8convert.

An operation has one name in every backend module, and one meaning, fixed by `reference`:

- `row_quantize`: weight rows -> int8 codes and their absmax.

`reference` is NumPy, slow and obvious; `cpu` is Numba; a module of an operation's own name is its CUDA kernels, which
`launch` compiles and runs, and says why it cannot. Import the module you want: importing this package compiles nothing
and asks no device anything, and only the CUDA modules need numba-cuda.
"""
