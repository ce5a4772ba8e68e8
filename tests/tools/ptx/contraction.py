"""Products that ptxas may fuse into a sum, so that the hardware rounds once where the interpreter rounds twice.

PTX ISA, `mul`: without a rounding modifier, mul and add "may be optimized to use fused-multiply-add instructions on the
target device". `mul.rn` and `add.rn` never are.
"""

from __future__ import annotations

from tests.tools.ptx.floats import FLOAT_TYPES, ROUNDINGS
from tests.tools.ptx.parser import Instruction, parse


def contractions(ptx_text: str) -> list[str]:
    """Every add or sub that may be fused with a mul whose result it reads, as text; empty is what one hopes for.

    Registers are taken to be written once, as compilers do; a register written again makes this list longer, not
    shorter.
    """
    found = []
    for function in parse(ptx_text).functions.values():
        products = {each.operands[0]: each for each in function.body if _is_open(each, ("mul",))}
        for each in function.body:
            if _is_open(each, ("add", "sub")):
                found += [
                    f"line {products[name].line}: {products[name].text}; line {each.line}: {each.text}"
                    for name in each.operands[1:]
                    if name in products
                ]
    return found


def _is_open(instruction: Instruction, names: tuple[str, ...]) -> bool:
    """Whether it is one of these operations on floats, without a rounding modifier."""
    base, *modifiers = instruction.opcode.split(".")
    kind = modifiers[-1].removesuffix("x2") if modifiers else ""
    return base in names and kind in FLOAT_TYPES and not set(modifiers) & set(ROUNDINGS)
