"""The parts of a kernel on the threads of a team; see `cpu.team`."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cuda_kernels.cpu.kernels.compiled import compiled


@compiled()
def part_of(n_rows, multiple, part, n_parts):  # type: ignore[no-untyped-def]
    """Return the range (begin, end) of one of `n_parts` equal parts; all but the last hold a multiple of `multiple`."""
    blocks = -(-n_rows // multiple)
    size = -(-blocks // n_parts) * multiple
    return min(part * size, n_rows), min((part + 1) * size, n_rows)


@intrinsic
def run_parts(typing_context: Any, kernel: Any, args: Any, n_parts: Any, team: Any) -> Any:
    """run_parts(kernel, args, n_parts, team): call `kernel(*args, part, n_parts)` for each part, and wait.

    All threads of the team are called although at most `n_parts` of them get work: a team whose size changes is
    rebuilt. There are fewer parts if the library gives the caller fewer threads, as it does within a team's own thread:
    `part` and its `n_parts` are then smaller than what memory was sized for.
    A team without functions is the calling thread. The kernel must not raise: no caller would receive the exception.

    Args:
        team: `cpu.team.Team`.
    """
    call = kernel.get_call_type(typing_context, (*args.types, types.intp, types.intp), {})

    def codegen(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        _, packed_args, n_parts, packed_team = values
        compiled = kernel.dispatcher.overloads[call.args]
        context.active_code_library.add_linking_library(compiled.library)
        start, *counts, n_threads = cgutils.unpack_tuple(builder, packed_team)
        one = n_parts.type(1)
        is_alone = builder.or_(builder.icmp_signed("<=", n_parts, one), builder.icmp_signed("==", start, start.type(0)))
        with builder.if_else(is_alone) as (alone, together):
            with alone:
                unpacked = [builder.extract_value(packed_args, i) for i in range(args.count)]
                _call(context, builder, compiled.fndesc, [*unpacked, n_parts.type(0), one])
            with together:
                slot = cgutils.alloca_once_value(builder, cgutils.pack_struct(builder, [packed_args, n_parts, *counts]))
                part = _make_part(context, builder.module, slot.type, compiled.fndesc, args.count)
                address, count = ir.IntType(8).as_pointer(), ir.IntType(32)
                kind = ir.FunctionType(ir.VoidType(), [part.type, address, count, count])
                builder.call(
                    builder.inttoptr(start, kind.as_pointer()),
                    [part, builder.bitcast(slot, address), builder.trunc(n_threads, count), count(0)],
                )
        return context.get_dummy_value()

    return types.void(kernel, args, types.intp, team), codegen


def _call(context: Any, builder: Any, kernel: Any, values: Any) -> None:
    callee = context.declare_function(builder.module, kernel)
    context.call_conv.call_function(builder, callee, kernel.restype, kernel.argtypes, values)


def _make_part(context: Any, module: Any, slot_type: Any, kernel: Any, n_args: int) -> Any:
    """Make `void part(void *slot)`, which runs a team thread's part of the kernel's work, if there is one."""
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer()])
    function = ir.Function(module, kind, module.get_unique_name(f"part.{kernel.mangled_name}"))
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block())
    held = builder.load(builder.bitcast(function.args[0], slot_type))
    packed_args, n_parts, *counts = (builder.extract_value(held, i) for i in range(4))
    ask = ir.FunctionType(ir.IntType(32), []).as_pointer()
    thread, size = (builder.zext(builder.call(builder.inttoptr(each, ask), []), n_parts.type) for each in counts)
    n_parts = builder.select(builder.icmp_signed("<", size, n_parts), size, n_parts)
    with builder.if_then(builder.icmp_signed("<", thread, n_parts)):
        _call(
            context, builder, kernel, [*(builder.extract_value(packed_args, i) for i in range(n_args)), thread, n_parts]
        )
    builder.ret_void()
    return function
