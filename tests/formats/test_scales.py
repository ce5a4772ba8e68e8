"""absmax -> scale -> absmax, for every number a 16-bit source can have, and what float32 sources lose."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from int8convert.formats.scales import (
    absmax_to_scale,
    dequantize_by_absmax,
    dequantize_by_scale,
    scale_to_absmax,
)

ALL_16_BITS = np.arange(0x8000, dtype=np.uint32)  # without the sign


def finite(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return values[np.isfinite(values)]


ALL_MAGNITUDES = {
    "float16": finite(ALL_16_BITS.astype(np.uint16).view(np.float16).astype(np.float32)),
    "bfloat16": finite((ALL_16_BITS << 16).view(np.float32)),
}


@pytest.mark.parametrize("dtype", ALL_MAGNITUDES)
def test_every_16_bit_absmax_comes_back(dtype: str) -> None:
    absmax = ALL_MAGNITUDES[dtype]
    assert absmax.size > 31_000
    returned = scale_to_absmax(absmax_to_scale(absmax))
    assert np.array_equal(returned.view(np.uint32), absmax.view(np.uint32))


def test_every_float32_absmax_comes_back_within_one_unit_and_nearly_all_exactly() -> None:
    """A tenth of the mantissas of one binade; the others are the same but for the exponent."""
    bits = np.random.default_rng(0).integers(0x3F80_0000, 0x4000_0000, 800_000, np.uint32)
    absmax = bits.view(np.float32)
    scale = absmax_to_scale(absmax)
    returned = scale_to_absmax(scale)
    assert np.array_equal(absmax_to_scale(returned), scale)
    distance = np.abs(returned.view(np.int32).astype(np.int64) - bits)
    assert distance.max() == 1
    assert 0.005 < np.mean(distance == 1) < 0.01
    assert absmax[distance == 1].min() >= 127 / 64  # the mantissa begins with seven ones


def test_scale_of_another_tool_becomes_the_nearest_absmax() -> None:
    scale = np.arange(0x3F80_0000, 0x4000_0000, 997, np.uint32).view(np.float32)
    returned = absmax_to_scale(scale_to_absmax(scale))
    assert 0.985 < np.mean(returned == scale) < 0.995
    assert np.abs(returned.view(np.int32) - scale.view(np.int32)).max() == 1
    assert np.array_equal(scale_to_absmax(np.zeros(1, np.float32)), [0])


@settings(deadline=None)
@given(
    arrays(np.int8, (3, 5)),
    arrays(np.float32, 3, elements=st.floats(0, 65504, width=16)),
)
def test_dequantized_by_absmax_as_bitsandbytes_does(codes: Any, absmax: Any) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    expected = functional.int8_vectorwise_dequant(torch.tensor(codes), torch.tensor(absmax)).numpy()
    assert np.array_equal(dequantize_by_absmax(codes, absmax), expected)


def test_dequantized_by_scale_is_one_product() -> None:
    codes = np.array([[-128, -1, 0, 3, 127]], np.int8)
    scale = np.array([0.1], np.float32)
    expected = torch.tensor(codes).to(torch.float32) * torch.tensor(scale)[:, None]
    assert np.array_equal(dequantize_by_scale(codes, scale), expected.numpy())
