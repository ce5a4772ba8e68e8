"""Runs a kernel's parts on torch's own threads.

torch's threads spin for a while after each operation. Other threads would share the cores with them: the prompt of a
model took as long on two cores as on one. A spinning thread also starts within 2 microseconds, a sleeping one within 20
to 60.

torch's Linux builds bring GNU OpenMP's library, whose `GOMP_parallel` runs a function on every thread of the caller's
team. `team` is None if torch uses another library, or is not loaded.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

Team = tuple[int, int, int]
"""Addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads."""


_is_forked_child = False


def team() -> Team | None:
    """The functions of the library that `import torch` has loaded into this process."""
    return None if _is_forked_child else _find()


@cache
def _find() -> Team | None:
    process = ctypes.CDLL(None)
    try:
        functions = (process.GOMP_parallel, process.omp_get_thread_num, process.omp_get_num_threads)
    except AttributeError:
        return None
    start, thread_num, num_threads = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)
    return start, thread_num, num_threads


def _note_fork() -> None:
    """Mark a forked child, which has none of the team's threads: the library would wait for them forever."""
    global _is_forked_child
    _is_forked_child = True


os.register_at_fork(after_in_child=_note_fork)


@intrinsic
def run_on_team(typing_context: Any, kernel: Any, args: Any, n_parts: Any, n_threads: Any, team: Any) -> Any:
    """run_on_team(kernel, args, n_parts, n_threads, team): call `kernel(*args, part, n_parts)` for each part, and wait.

    All `n_threads` are called although at most `n_parts` of them get work: a team whose size changes is rebuilt. There
    are fewer parts if the library gives the caller fewer threads, as it does within a team's own thread. The kernel
    must not raise: no caller would receive the exception.
    """
    call = kernel.get_call_type(typing_context, (*args.types, types.intp, types.intp), {})

    def codegen(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        _, packed_args, n_parts, n_threads, packed_team = values
        compiled = kernel.dispatcher.overloads[call.args]
        context.active_code_library.add_linking_library(compiled.library)
        start, *counts = cgutils.unpack_tuple(builder, packed_team)
        slot = cgutils.alloca_once_value(builder, cgutils.pack_struct(builder, [packed_args, n_parts, *counts]))
        part = _make_part(context, builder.module, slot.type, compiled.fndesc, args.count)
        address, count = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [part.type, address, count, count])
        builder.call(
            builder.inttoptr(start, kind.as_pointer()),
            [part, builder.bitcast(slot, address), builder.trunc(n_threads, count), count(0)],
        )
        return context.get_dummy_value()

    return types.void(kernel, args, types.intp, types.intp, team), codegen


def _make_part(context: Any, module: Any, slot_type: Any, kernel: Any, n_args: int) -> Any:
    """Make `void part(void *slot)`, which runs a team thread's part of the kernel's work, if there is one."""
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer()])
    function = ir.Function(module, kind, f"part.{kernel.mangled_name}")
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block())
    held = builder.load(builder.bitcast(function.args[0], slot_type))
    packed_args, n_parts, *counts = (builder.extract_value(held, i) for i in range(4))
    ask = ir.FunctionType(ir.IntType(32), []).as_pointer()
    thread, size = (builder.zext(builder.call(builder.inttoptr(each, ask), []), n_parts.type) for each in counts)
    n_parts = builder.select(builder.icmp_signed("<", size, n_parts), size, n_parts)
    with builder.if_then(builder.icmp_signed("<", thread, n_parts)):
        args = [builder.extract_value(packed_args, i) for i in range(n_args)]
        callee = context.declare_function(module, kernel)
        context.call_conv.call_function(builder, callee, kernel.restype, kernel.argtypes, [*args, thread, n_parts])
    builder.ret_void()
    return function
