"""The arithmetic of LLM.int8(), usable alone: this package never imports int8convert.

An operation has one name in every backend module, and one meaning, fixed by `reference`:

- `row_quantize`: weight rows -> int8 codes and their absmax.
- `activation_quantize`: tokens -> int8 codes beside the outlier columns that stay as they are.
- `int8_matmul`: the product of both, in the dtype of the tokens.
- `dequantize_epilogue`: the same from integer products that another library made.
- `dequantize_fp8`: FP8 weights -> float32.

`reference` is NumPy, slow and obvious. `cpu` is Numba on arrays. `cuda` has a module of Numba-CUDA kernels for each
operation; `cuda.launch` compiles and runs them, or says why it cannot. `ops` has the operations as torch operators, and
`int8_linear`, which is a layer. Import the module you want: importing this package compiles nothing and queries no
device. Only `cuda` needs numba-cuda.
"""
