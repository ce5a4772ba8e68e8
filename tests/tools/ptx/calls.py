"""Calls of device functions, replaced by the functions' bodies before anything is decoded.

Numba inlines its own; what is left are the slow paths of float64 functions. A callee's names get a suffix for each
call, its parameters and results are those of the caller, which live in local memory, and `ret` goes to its body's end.
"""

from __future__ import annotations

from tests.tools.ptx.parser import Function, Instruction, Variable, renamed


def inlined(function: Function, functions: dict[str, Function], callers: tuple[str, ...] = ()) -> Function:
    """The function with every call in it replaced. Refuses recursion, and functions without a body."""
    flat = Function(function.name, function.is_entry, function.parameters, function.results, function.max_threads)
    flat.registers = dict(function.registers)
    flat.variables = [_as_local(each) for each in function.variables]
    starts = []
    for instruction in function.body:
        starts.append(len(flat.body))
        if instruction.opcode.split(".")[0] == "call":
            _splice(flat, instruction, functions, (*callers, function.name), f"$call{len(starts)}")
        else:
            flat.body.append(instruction)
    starts.append(len(flat.body))
    flat.labels |= {name: starts[index] for name, index in function.labels.items()}
    return flat


def _splice(
    flat: Function, call: Instruction, functions: dict[str, Function], callers: tuple[str, ...], suffix: str
) -> None:
    name = next(each for each in call.operands if not each.startswith("("))
    place = call.operands.index(name)
    results, arguments = ("".join(part).strip("()") for part in (call.operands[:place], call.operands[place + 1 :]))
    if name not in functions or name in callers or call.guard or len(call.operands) > place + 2:
        raise NotImplementedError(f"line {call.line}: {call.text}")
    callee = inlined(functions[name], functions, callers)
    formal = [*callee.results, *callee.parameters]
    given = [each.strip() for each in (*results.split(","), *arguments.split(",")) if each.strip()]
    if len(formal) != len(given) or any(each.space != "param" for each in formal):
        raise NotImplementedError(f"line {call.line}: {call.text}")
    own = [*callee.registers, *callee.labels, *(each.name for each in callee.variables)]
    new_names = {each: each + suffix for each in own}
    new_names |= {each.name: target for each, target in zip(formal, given, strict=True)}
    start, end = len(flat.body), f"$end{suffix}"
    for instruction in callee.body:
        if instruction.opcode.split(".")[0] == "ret":
            instruction = instruction._replace(opcode="bra", operands=(end,))
        flat.body.append(renamed(instruction, new_names))
    flat.registers |= {new_names[each]: kind for each, kind in callee.registers.items()}
    flat.variables += [each._replace(name=new_names[each.name]) for each in callee.variables]
    flat.labels |= {new_names[each]: start + index for each, index in callee.labels.items()}
    flat.labels[end] = len(flat.body)


def _as_local(variable: Variable) -> Variable:
    return variable._replace(space="local") if variable.space == "param" else variable
