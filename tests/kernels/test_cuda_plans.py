"""What the planning of the CUDA operations promises, for every size; nothing is compiled here."""

from __future__ import annotations

import itertools
import math

import pytest

from cuda_kernels.cuda import activation_quantize, dequantize_epilogue, int8_blocks, int8_gemv, int8_skinny
from cuda_kernels.cuda.int8_matmul import Engine, choose
from cuda_kernels.cuda.int8_operands import Operands
from cuda_kernels.reference import QuantizedActivations, QuantizedWeight

TOKENS = [1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 512, 8192]
WIDTHS = [1, 33, 768, 1024, 2048, 5120, 9216, 12288, 36864]
ADDRESS = 1 << 20


def operands(n_tokens: int, n_features: int, n_columns: int, codes: int = ADDRESS, block_size: int = 0) -> Operands:
    x, weight = QuantizedActivations(codes, *[ADDRESS] * 5, block_size), QuantizedWeight(*[ADDRESS] * 4)
    return Operands("F16", x, weight, ADDRESS, n_tokens, n_features, n_columns, 6, 0)


@pytest.mark.parametrize("n_tokens", TOKENS)
def test_gemv_grid_covers_each_output_once(n_tokens: int) -> None:
    for n_features, n_columns in itertools.product(WIDTHS, WIDTHS):
        cut = int8_gemv.plan(n_tokens, n_features, n_columns)
        (launch,) = int8_gemv.launches(operands(n_tokens, n_features, n_columns))
        features = int8_gemv.WARPS // cut.split * cut.rows
        assert features % 4 == 0 and cut.tokens * cut.rows <= 32
        assert launch.grid == (math.ceil(n_features / features), math.ceil(n_tokens / cut.tokens), 1)


@pytest.mark.parametrize("n_tokens", TOKENS)
def test_skinny_grid_covers_each_output_once(n_tokens: int) -> None:
    for n_features, n_columns in itertools.product(WIDTHS, WIDTHS):
        cut = int8_skinny.plan(n_tokens, n_features, n_columns)
        (launch,) = int8_skinny.launches(operands(n_tokens, n_features, n_columns))
        features, tokens = int8_skinny.WARPS // cut.split * 16 * cut.row_tiles, 8 * cut.token_tiles
        assert features * tokens <= 16 * int8_skinny.THREADS
        assert launch.grid == (math.ceil(n_features / features), math.ceil(n_tokens / tokens), 1)


@pytest.mark.parametrize("block_size", [64, 128, 256])
def test_blocks_grid_covers_each_output_once_and_parts_do_not_depend_on_tokens(block_size: int) -> None:
    for n_features, n_columns in itertools.product(WIDTHS, WIDTHS):
        cuts = {t: int8_blocks.plan(t, n_features, n_columns, block_size) for t in TOKENS}
        assert len({cut.split for cut in cuts.values()}) == 1
        for n_tokens, cut in cuts.items():
            placed = operands(n_tokens, n_features, n_columns, block_size=block_size)
            (launch,) = int8_blocks.launches(placed, (9, 0))
            features, tokens = int8_skinny.WARPS // cut.split * 16 * cut.row_tiles, 8 * cut.token_tiles
            assert features * tokens <= 16 * int8_skinny.THREADS
            assert launch.grid == (math.ceil(n_features / features), math.ceil(n_tokens / tokens), 1)


def test_blocks_have_an_engine_of_their_own() -> None:
    for n_tokens, capability in itertools.product((1, 64, 512), ((7, 5), (9, 0))):
        assert choose(operands(n_tokens, 1024, 1024, block_size=128), capability) is Engine.BLOCKS


def test_large_weights_fill_an_h200() -> None:
    """132 multiprocessors; a matrix of 85 MB and up."""
    for n_tokens, n_features in itertools.product((1, 2, 4, 8), (9216, 36864)):
        (launch,) = int8_gemv.launches(operands(n_tokens, n_features, 9216))
        assert launch.grid[0] >= 4 * 132
    for n_tokens, n_features in itertools.product((16, 32, 64), (9216, 36864)):
        (launch,) = int8_skinny.launches(operands(n_tokens, n_features, 9216))
        assert launch.grid[0] >= 132


@pytest.mark.parametrize(("n_columns", "codes"), [(1025, ADDRESS), (1032, ADDRESS), (1024, ADDRESS + 8)])
def test_rows_of_no_whole_vectors_take_the_slow_path(n_columns: int, codes: int) -> None:
    fast = int8_gemv.launches(operands(1, 64, 1024))[0].kernel
    assert int8_gemv.launches(operands(1, 64, n_columns, codes))[0].kernel is not fast


@pytest.mark.parametrize(
    ("n_tokens", "n_features", "n_columns", "capability", "engine"),
    [
        (1, 9216, 9216, (9, 0), Engine.GEMV),
        (8, 9216, 9216, (9, 0), Engine.GEMV),
        (9, 9216, 9216, (9, 0), Engine.SKINNY),
        (64, 9216, 9216, (8, 0), Engine.SKINNY),
        (64, 9216, 9216, (7, 5), Engine.GEMV),
        (65, 9216, 9216, (9, 0), Engine.LIBRARY),
        (65, 9216, 9216, (7, 5), Engine.LIBRARY),
        # cuBLASLt wants multiples of 8.
        (512, 9217, 9216, (9, 0), Engine.SKINNY),
        (512, 9216, 9220, (9, 0), Engine.SKINNY),
        (512, 9216, 9220, (7, 5), Engine.GEMV),
    ],
)
def test_engine_of_a_size(
    n_tokens: int, n_features: int, n_columns: int, capability: tuple[int, int], engine: Engine
) -> None:
    assert choose(operands(n_tokens, n_features, n_columns), capability) is engine


def test_library_gets_no_misaligned_codes() -> None:
    assert choose(operands(512, 1024, 1024, ADDRESS + 8), (9, 0)) is Engine.SKINNY


def test_epilogue_grid_covers_each_output_once() -> None:
    for n_tokens, n_features in itertools.product(TOKENS, WIDTHS):
        (launch,) = dequantize_epilogue.launches(operands(n_tokens, n_features, 64), ADDRESS)
        tile = (dequantize_epilogue.TILE_FEATURES, dequantize_epilogue.TILE_TOKENS)
        assert launch.grid == (math.ceil(n_features / tile[0]), math.ceil(n_tokens / tile[1]), 1)


def quantize_launches(n_tokens: int, n_columns: int, capacity: int) -> list[activation_quantize.Launch]:
    written = QuantizedActivations(*[ADDRESS] * 6)
    operands = activation_quantize.Operands(
        "F16", *[ADDRESS] * 3, written, 6.0, n_tokens, n_columns, n_columns, 6, capacity
    )
    return activation_quantize.launches(operands, activation_quantize.plan(n_tokens, n_columns))


@pytest.mark.parametrize("n_tokens", TOKENS)
def test_every_token_is_some_block_s(n_tokens: int) -> None:
    for n_columns in [*WIDTHS, 262_144]:
        cut = activation_quantize.plan(n_tokens, n_columns)
        *marking, launch = quantize_launches(n_tokens, n_columns, 16)
        assert (launch.grid[0] - 1) * cut.tokens < n_tokens <= launch.grid[0] * cut.tokens
        assert n_columns <= 8 * launch.shared_bytes < n_columns + 32, "a bit for each column, in words"
        assert bool(marking) == (n_tokens > cut.own_tokens)
        for mark in marking:
            assert (mark.grid[1] - 1) * cut.mark_tokens < n_tokens <= mark.grid[1] * cut.mark_tokens
            n_marks = mark.grid[1] * math.ceil(n_columns / 8)
            assert activation_quantize.mark_bytes(n_tokens, n_columns, 16, cut) == n_marks


@pytest.mark.parametrize(("n_tokens", "capacity", "count"), [(1, 0, 1), (8192, 0, 1), (8, 16, 1), (9, 16, 2)])
def test_launches_are_as_few_as_can_be(n_tokens: int, capacity: int, count: int) -> None:
    assert len(quantize_launches(n_tokens, 9216, capacity)) == count
