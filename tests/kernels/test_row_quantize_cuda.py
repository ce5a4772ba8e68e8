"""What is CUDA's own in row quantization: which kernel takes which rows, alignment, determinism, machine code."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from cuda_kernels import reference
from cuda_kernels.cuda import row_quantize
from cuda_kernels.cuda.launch import Kernel
from tests.kernels.backends import DTYPES, narrow, widen
from tests.kernels.cuda_backends import Interpreted, interpret
from tests.kernels.outputs import Bits
from tests.tools.ptx import Memory
from tests.tools.ptx.toolchain import assemble

CAPABILITIES = [(7, 5), (8, 0), (9, 0), (10, 0)]


def normal(rows: int, columns: int, dtype: str) -> Bits:
    return narrow(np.random.default_rng(columns).standard_normal((rows, columns)) * 0.05, dtype)


def kernel_of(weight: int, dtype: str, columns: int, row_stride: int, codes: int = 0) -> str:
    (launch,) = row_quantize.launches(weight, dtype, (5, columns), row_stride, codes, 0, 0, 0, 1 << 16)
    return launch.kernel.name


def test_whole_aligned_vectors_take_the_fast_kernels() -> None:
    assert kernel_of(0, "F16", 1024, 1024) == "_row_of_a_warp"
    assert kernel_of(0, "BF16", 1032, 1040) == "_row_of_a_block"
    assert kernel_of(0, "F32", 512, 512) == "_row_of_a_warp"
    assert kernel_of(0, "F32", 516, 516) == "_row_of_a_block"
    assert kernel_of(0, "F16", 1 << 18, 1 << 18) == "_row_of_a_block"


def test_anything_else_goes_value_by_value() -> None:
    assert kernel_of(2, "F16", 1024, 1024) == "_row_by_values"
    assert kernel_of(0, "F16", 1023, 1024) == "_row_by_values"
    assert kernel_of(0, "F16", 1024, 1028) == "_row_by_values"
    assert kernel_of(0, "F16", 1024, 1024, codes=4) == "_row_by_values"
    assert kernel_of(0, "F32", 510, 512) == "_row_by_values"


def test_matrix_without_rows_launches_nothing() -> None:
    assert row_quantize.launches(0, "F16", (0, 64), 64, 0, 0, 0, 0, 1 << 16) == []


def test_a_block_asks_for_the_shared_memory_of_what_it_keeps() -> None:
    for columns, expected in ((4096, 8192), (32768, 65536), (32776, 65536)):
        (launch,) = row_quantize.launches(0, "F16", (5, columns), columns, 0, 0, 0, 0, 1 << 16)
        assert launch.shared_bytes == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [1, 3])
def test_rows_at_any_address_equal_the_reference(dtype: str, shift: int) -> None:
    """Weights a value or three past a multiple of 16 bytes, codes as many bytes past one of 8."""
    rows, columns = 3, 264
    weight = normal(rows, columns, dtype)
    store, memory = np.append(np.zeros(shift, weight.dtype), weight), Memory()
    codes, sums = np.full(shift + weight.size, -128, np.int8), np.full((3, rows), np.nan, np.float32)
    at_weight, at_codes = memory.place(store) + shift * weight.itemsize, memory.place(codes) + shift
    at_sums = memory.place(sums)
    at = (at_codes, *(at_sums + 4 * rows * k for k in range(3)))
    interpret(row_quantize.launches(at_weight, dtype, (rows, columns), columns, *at, 0), memory)
    expected = reference.row_quantize(widen(weight, dtype))
    np.testing.assert_array_equal(codes[shift:], expected.codes.reshape(-1))
    np.testing.assert_array_equal(sums[0], expected.absmax)


@pytest.mark.parametrize("columns", [8200, 9216])
@pytest.mark.parametrize("kept_bytes", [0, 16, 16000, 65536])
def test_what_is_kept_does_not_show_in_the_result(columns: int, kept_bytes: int) -> None:
    weight = normal(3, columns, "F16")
    few, all_kept = Interpreted(kept_bytes=kept_bytes), Interpreted(kept_bytes=1 << 17)
    for a, b in zip(few.row_quantize(weight, "F16"), all_kept.row_quantize(weight, "F16"), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_longest_row_equals_the_reference(dtype: str) -> None:
    weight = normal(1, 1 << 18, dtype)
    found = Interpreted(kept_bytes=row_quantize.MOST_KEPT_BYTES).row_quantize(weight, dtype)
    expected = reference.row_quantize(widen(weight, dtype))
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.absmax, expected.absmax)
    # 256 threads add 1,024 values each, then as a tree: under 1,024 + 8 + 8 roundings of terms that are all positive.
    np.testing.assert_allclose(found.signal, expected.signal, rtol=1040 * 2.0**-24)
    np.testing.assert_allclose(found.noise, expected.noise, rtol=1040 * 2.0**-24 + 2.0**-22)


@pytest.mark.parametrize("cc", CAPABILITIES, ids=str)
def test_every_architecture_gives_the_same_bits(cc: tuple[int, int]) -> None:
    for columns in (33, 264, 1032):
        weight = normal(9, columns, "F16")
        found, expected = (Interpreted(each).row_quantize(weight, "F16") for each in (cc, (9, 0)))
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)


MOST_REGISTERS = 48
"""For five blocks of 256 threads on a multiprocessor, which then have 80 KiB of loads under way."""


def assert_machine_code(kernel: Kernel, cc: tuple[int, int], dtype: str) -> None:
    cubin = assemble(kernel.ptx(cc), cc)
    opcodes = cubin.opcodes()
    assert cubin.spill_bytes == cubin.stack_bytes == 0 and not cubin.warnings
    assert not any(re.match("LDL|STL", opcode) for opcode in opcodes)
    assert cubin.registers <= MOST_REGISTERS
    assert cubin.shared_bytes < row_quantize.STATIC_SHARED_BYTES or kernel.name == "_row_of_a_warp"
    if kernel.name != "_row_by_values":
        loads = [i for i, opcode in enumerate(opcodes) if re.match(r"LDG\.E\S*\.128", opcode)]
        first_use = next(i for i, opcode in enumerate(opcodes) if opcode.startswith("STS"))
        assert sum(load < first_use for load in loads) >= 4  # all under way before the first is waited for
        assert any(re.match(r"STG\.E\S*" + ("" if dtype == "F32" else r"\.64"), opcode) for opcode in opcodes)
        assert not any(re.match(r"F2I|I2F", opcode) for opcode in opcodes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_machine_code_for_hopper(dtype: str) -> None:
    for kernels in (row_quantize.BY_VALUES, row_quantize.OF_A_WARP, row_quantize.OF_A_BLOCK):
        assert_machine_code(kernels[dtype], (9, 0), dtype)


@pytest.mark.parametrize("cc", CAPABILITIES, ids=str)
def test_machine_code_for_every_architecture(cc: tuple[int, int]) -> None:
    for kernels in (row_quantize.BY_VALUES, row_quantize.OF_A_WARP, row_quantize.OF_A_BLOCK):
        assert_machine_code(kernels["F16"], cc, "F16")


def test_wrapper_refuses_what_it_cannot_read() -> None:
    for weight in (torch.zeros(4, 8), torch.zeros(4, 8, dtype=torch.float64), torch.zeros(4)):
        with pytest.raises(ValueError, match="on a CUDA device"):
            row_quantize.row_quantize(weight)


@pytest.mark.gpu
def test_two_launches_give_the_same_bits() -> None:
    for columns in (33, 512, 4096, 1 << 17):
        weight = torch.randn(333, columns, device="cuda").half()
        for a, b in zip(row_quantize.row_quantize(weight), row_quantize.row_quantize(weight), strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [4096, 9216, 36864, 57344, 1 << 18])
def test_real_sizes_equal_the_reference_on_the_gpu(columns: int) -> None:
    weight = torch.randn(300, columns, device="cuda").half()
    found, expected = row_quantize.row_quantize(weight), reference.row_quantize(weight.float().cpu().numpy())
    np.testing.assert_array_equal(found.codes.cpu().numpy(), expected.codes)
    np.testing.assert_array_equal(found.absmax.cpu().numpy(), expected.absmax)
    np.testing.assert_allclose(found.signal.cpu().numpy(), expected.signal, rtol=1e-4)
    np.testing.assert_allclose(found.noise.cpu().numpy(), expected.noise, rtol=1e-4)
