"""Compiles a kernel to object code, which needs no Numba to run."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
from numba import types
from numba.core.compiler import Flags, compile_extra
from numba.np.numpy_support import from_dtype

from cuda_kernels.cpu.dtypes import Kind

_FROM_C = {"malloc", "free", "memcpy", "memmove", "memset"}
"""Functions that a kernel may call; the C library, which every process has, defines them."""


def build(module: str, name: str, kinds: tuple[Kind, ...]) -> tuple[str, bytes]:
    """Return the symbol and the object code of a function for arguments of these types.

    Raises:
        RuntimeError: it calls a function that a process without Numba has not, or the processor has no fp16.
    """
    dispatcher = getattr(import_module(f"cuda_kernels.cpu.kernels.{module}"), name)
    target, flags = dispatcher.targetdescr, Flags()
    target.options.parse_as_flags(flags, dispatcher.targetoptions)
    flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    args = tuple(_type_of(kind) for kind in kinds)
    compiled = compile_extra(target.typing_context, target.target_context, dispatcher.py_func, args, None, flags, {})
    code_library = compiled.library
    called = {function.name for function in code_library._final_module.functions if function.is_declaration}
    unknown = {each for each in called - _FROM_C if not each.startswith("llvm.")}
    if unknown:
        raise RuntimeError(f"the kernel {module}.{name} calls {', '.join(sorted(unknown))}")
    code = code_library._codegen._tm.emit_object(code_library._final_module)
    if b"__extendhfsf2" in code or b"__truncsfhf2" in code:
        raise RuntimeError(
            "this processor converts no fp16 (F16C), and the kernels need it: convert bf16 or fp32 weights"
        )
    return compiled.fndesc.llvm_func_name, code


def _type_of(kind: Kind) -> Any:
    if isinstance(kind, tuple):
        return types.Tuple([_type_of(each) for each in kind])
    if kind in ("q", "f"):
        return {"q": types.intp, "f": types.float32}[kind]
    dtype, _, form = kind.partition(":")
    value = from_dtype(np.dtype(dtype))
    return types.Array(value, int(form[0]), form[1]) if form else value
