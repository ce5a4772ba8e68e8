"""What ptxas makes of the kernels that the default plans choose: resources, and the instructions they are about."""

from __future__ import annotations

import pytest

from cuda_kernels.cuda import activation_quantize, dequantize_epilogue, int8_blocks, int8_gemv, int8_skinny
from cuda_kernels.cuda.int8_operands import Operands
from cuda_kernels.cuda.launch import Kernel
from cuda_kernels.reference import QuantizedActivations, QuantizedWeight
from tests.tools.ptx.contraction import contractions
from tests.tools.ptx.toolchain import Cubin, assemble

ADDRESS = 1 << 20
CAPABILITIES = [(7, 5), (8, 0), (9, 0), (10, 0)]
IN_CI = [(7, 5), (9, 0)]
"""The oldest, and the one that the interpreter runs."""


def product(engine: str, n_tokens: int, dtype: str = "F16", n_features: int = 9216, n_columns: int = 9216) -> Kernel:
    x, weight = QuantizedActivations(*[ADDRESS] * 6), QuantizedWeight(*[ADDRESS] * 4)
    placed = Operands(dtype, x, weight, ADDRESS, n_tokens, n_features, n_columns, 6, 0)
    if engine == "epilogue":
        return dequantize_epilogue.launches(placed, ADDRESS)[0].kernel
    return (int8_gemv if engine == "gemv" else int8_skinny).launches(placed)[0].kernel


def quantizer(n_tokens: int, capacity: int, dtype: str = "F16", n_columns: int = 9216) -> Kernel:
    written, sizes = QuantizedActivations(*[ADDRESS] * 6), (n_tokens, n_columns, n_columns, 6, capacity)
    placed = activation_quantize.Operands(dtype, *[ADDRESS] * 3, written, 6.0, *sizes)
    return activation_quantize.launches(placed, activation_quantize.plan(n_tokens, n_columns))[-1].kernel


def blocks(n_tokens: int, capability: tuple[int, int] = (9, 0)) -> Kernel:
    x, weight = QuantizedActivations(*[ADDRESS] * 6, 128), QuantizedWeight(*[ADDRESS] * 4)
    placed = Operands("BF16", x, weight, ADDRESS, n_tokens, 9216, 9216, 6, 0)
    return int8_blocks.launches(placed, capability)[0].kernel


# Kernels that other tests run, so they are compiled anyway, for one of the capabilities.
KERNELS = {
    "gemv, 1 token": (lambda: product("gemv", 1), "IDP.4A"),
    "gemv, 4 tokens": (lambda: product("gemv", 4, n_features=2304), "IDP.4A"),
    "gemv, 8 tokens": (lambda: product("gemv", 8), "IDP.4A"),
    "skinny, 16 tokens": (lambda: product("skinny", 16, n_features=2304), "IMMA.16832.S8.S8"),
    "skinny, 64 tokens": (lambda: product("skinny", 64), "IMMA.16832.S8.S8"),
    "blocks, 1 token": (lambda: blocks(1), "IMMA.16832.S8.S8"),
    "blocks, 64 tokens": (lambda: blocks(64), "IMMA.16832.S8.S8"),
    "epilogue": (lambda: product("epilogue", 512), "FFMA"),
    "quantizer, 1 token": (lambda: quantizer(1, 0, n_columns=512), "FMUL"),
    "quantizer, 512 tokens, finding": (lambda: quantizer(512, 16, n_columns=2048), "FMUL"),
}
"""name -> the kernel, and an instruction its time goes into."""


def check(cubin: Cubin, instruction: str) -> None:
    opcodes = cubin.opcodes()
    assert cubin.spill_bytes == 0 and cubin.stack_bytes == 0
    assert not any(opcode.startswith(("LDL", "STL")) for opcode in opcodes)
    assert any(opcode.startswith("LDG.E") and ".128" in opcode for opcode in opcodes)
    assert any(opcode.startswith(instruction) for opcode in opcodes)
    assert not cubin.warnings


@pytest.mark.parametrize(
    ("name", "cc"),
    [
        pytest.param(name, cc, marks=[pytest.mark.slow] * (cc not in IN_CI))
        for name in KERNELS
        for cc in CAPABILITIES
        if not name.startswith(("skinny", "blocks")) or cc >= int8_skinny.LEAST_CAPABILITY
    ],
)
def test_kernel_has_its_instructions_and_no_spills(name: str, cc: tuple[int, int]) -> None:
    make, instruction = KERNELS[name]
    check(assemble(make().ptx(cc), cc), instruction)


def test_blocks_take_the_smaller_products_of_turing() -> None:
    check(assemble(blocks(1, (7, 5)).ptx((7, 5)), (7, 5)), "IMMA.8816.S8.S8")


@pytest.mark.slow
@pytest.mark.parametrize("cc", CAPABILITIES)
def test_every_plan_on_every_architecture(cc: tuple[int, int]) -> None:
    for dtype in ("F16", "BF16", "F32"):
        for n_tokens in (1, 2, 4, 8):
            check(assemble(product("gemv", n_tokens, dtype).ptx(cc), cc), "IDP.4A")
        for n_tokens in (8, 16, 32, 64) if cc >= int8_skinny.LEAST_CAPABILITY else ():
            check(assemble(product("skinny", n_tokens, dtype).ptx(cc), cc), "IMMA.16832.S8.S8")
        check(assemble(product("epilogue", 512, dtype).ptx(cc), cc), "FFMA")
        for n_tokens, capacity in ((1, 0), (1, 16), (512, 0), (512, 16)):
            check(assemble(quantizer(n_tokens, capacity, dtype).ptx(cc), cc), "FMUL")


@pytest.mark.slow
@pytest.mark.parametrize("cc", CAPABILITIES)
def test_slow_paths_do_not_spill_either(cc: tuple[int, int]) -> None:
    kernels = [product("gemv", n_tokens, n_columns=1025) for n_tokens in (1, 8)]
    kernels += [quantizer(n_tokens, capacity, n_columns=1025) for n_tokens, capacity in ((1, 0), (512, 16))]
    if cc >= int8_skinny.LEAST_CAPABILITY:
        kernels.append(product("skinny", 64, n_columns=1025))
    for kernel in kernels:
        assert assemble(kernel.ptx(cc), cc).spill_bytes == 0


@pytest.mark.parametrize("name", KERNELS)
def test_nothing_is_left_for_ptxas_to_fuse(name: str) -> None:
    """Roundings are spelled out, so that every kernel and every architecture gives the same bits."""
    assert not contractions(KERNELS[name][0]().ptx((9, 0)))
