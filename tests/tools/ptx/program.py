"""A kernel ready to run: decoded, its variables laid out, its arguments packed."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tests.tools.ptx.calls import inlined
from tests.tools.ptx.instructions import Operation, decode
from tests.tools.ptx.memory import GAP_BYTES, VARIABLES_START
from tests.tools.ptx.operands import Place, Scope
from tests.tools.ptx.parser import Function, Module, Variable, parse

Array = npt.NDArray[Any]


class Program(NamedTuple):
    """A decoded kernel. Extents are (offset, n_bytes) of the variables in shared and local memory."""

    kernel: Function
    operations: list[Operation]
    register_bytes: list[int]
    parameter_offsets: list[int]
    shared_extents: list[tuple[int, int]]
    local_extents: list[tuple[int, int]]
    dynamic_offset: int
    variables: list[tuple[int, Variable]]


@lru_cache(maxsize=64)
def load(ptx_text: str, kernel: str | None = None) -> Program:
    """Parse and decode a kernel."""
    module = parse(ptx_text)
    kernels = [each for each in module.functions.values() if each.is_entry and kernel in (None, each.name)]
    if len(kernels) != 1:
        raise ValueError(f"{len(kernels)} kernels where one is asked for: {[each.name for each in kernels]}")
    function = inlined(kernels[0], module.functions)
    places: dict[str, Place] = {}
    shared, dynamic = _lay_out("shared", module, function, places)
    local, _ = _lay_out("local", module, function, places)
    variables, address = [], VARIABLES_START
    for variable in module.variables:
        if variable.space in ("global", "const"):
            variables.append((address, variable))
            places[variable.name] = Place(variable.space, address)
            address = (address + variable.n_bytes + 2 * GAP_BYTES - 1) // GAP_BYTES * GAP_BYTES
    offsets, end = [], 0
    for parameter in function.parameters:
        offsets.append(-(-end // parameter.align) * parameter.align)
        end = offsets[-1] + parameter.n_bytes
    parameters = {each.name: offset for each, offset in zip(function.parameters, offsets, strict=True)}
    scope = Scope(function.registers, places, parameters)
    operations = [decode(each, scope, function.labels) for each in function.body]
    return Program(function, operations, scope.register_bytes, offsets, shared, local, dynamic, variables)


def _lay_out(
    space: str, module: Module, function: Function, places: dict[str, Place]
) -> tuple[list[tuple[int, int]], int]:
    """Give the variables of a space their offsets, with gaps; also returns where dynamic shared memory starts.

    Offsets are odd multiples of the declared alignment: a kernel that relies on a larger one is caught.
    """
    extents, end = [], 0
    variables = [each for each in (*module.variables, *function.variables) if each.space == space]
    fixed, dynamic = [each for each in variables if each.n_bytes], [each for each in variables if not each.n_bytes]
    for variable in fixed:
        offset = _odd_multiple(end + GAP_BYTES, variable.align)
        places[variable.name] = Place(space, offset)
        extents.append((offset, variable.n_bytes))
        end = offset + variable.n_bytes
    start = _odd_multiple(end + GAP_BYTES, max((each.align for each in dynamic), default=16))
    places |= {each.name: Place(space, start) for each in dynamic}
    return extents, start


def _odd_multiple(at_least: int, align: int) -> int:
    return (-(-at_least // align) | 1) * align


def pack_arguments(program: Program, args: Sequence[int | float | bytes | np.generic]) -> bytes:
    """Arguments in the kernel's parameter space."""
    parameters = program.kernel.parameters
    if len(args) != len(parameters):
        raise ValueError(f"{len(args)} arguments for {len(parameters)} parameters")
    packed = bytearray()
    for parameter, offset, value in zip(parameters, program.parameter_offsets, args, strict=True):
        packed += bytes(offset - len(packed)) + _packed(parameter, value)
    return bytes(packed)


def _packed(parameter: Variable, value: int | float | bytes | np.generic) -> bytes:
    raw: bytes
    if isinstance(value, bytes | np.generic):
        raw = value if isinstance(value, bytes) else value.tobytes()
    elif isinstance(value, float):
        if parameter.element[0] in "us" or parameter.n_bytes not in (4, 8):
            raise TypeError(f"{value} for a parameter of type {parameter.element}")
        raw = struct.pack({4: "<f", 8: "<d"}[parameter.n_bytes], value)
    else:
        if parameter.element.startswith(("f", "bf")):
            raise TypeError(f"the integer {value} for a parameter of type {parameter.element}")
        bits = 8 * parameter.n_bytes
        if not -(1 << (bits - 1)) <= value < 1 << bits:
            raise ValueError(f"{value} for a parameter of {bits} bits")
        raw = (value % (1 << bits)).to_bytes(parameter.n_bytes, "little")
    if len(raw) != parameter.n_bytes:
        raise ValueError(f"{len(raw)} bytes for a parameter of {parameter.n_bytes}")
    return raw


def initial_content(variable: Variable) -> Array:
    """A module variable's content before the launch."""
    content = np.zeros(variable.n_bytes, np.uint8)
    content[: len(variable.initial)] = variable.initial
    content.flags.writeable = variable.space != "const"
    return content
