"""The arithmetic of LLM.int8(), usable alone: this package never imports int8convert.

An operation has one name in every backend and one meaning, which `reference` defines:

- `row_quantize`: weight rows to int8 codes and their absmax.
- `activation_quantize`: tokens to int8 codes, and the outlier columns that stay as they are.
- `int8_matmul`: the product of both, in the dtype of the tokens.
- `dequantize_epilogue`: the same from another library's integer products.
- `dequantize_packed`, `dequantize_reordered`: weights of 2 to 8 bits to float32.

`reference` is NumPy, slow and obvious. `cpu` is Numba on arrays. `cuda` has one module of Numba-CUDA kernels for each
operation; `cuda.launch` compiles and runs them. `ops` offers the operations as torch operators, and `int8_linear` as a
layer. Import the module you need: importing this package compiles nothing and queries no device. Only `cuda` needs
numba-cuda.
"""
