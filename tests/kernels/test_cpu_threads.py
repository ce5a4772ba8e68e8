"""The CPU kernels on several threads: the same bits as on one, from any thread, and in a forked child."""

from __future__ import annotations

import os
import threading
from dataclasses import replace

import numpy as np
import pytest

from cuda_kernels.cpu import operations, tensors
from cuda_kernels.cpu.kernels.compiled import compiled
from cuda_kernels.cpu.kernels.team import part_of, run_parts
from cuda_kernels.cpu.team import ALONE, team
from cuda_kernels.cpu.threads import run_split
from cuda_kernels.reference import N_STEPS
from tests.kernels.backends import DTYPES, Cpu, narrow, widen
from tests.kernels.layers import make_product, make_tokens, without_bias

COLUMNS = np.array([3, 700], np.int32)


@pytest.mark.parametrize("n_rows", [0, 1, 31, 32, 33, 95, 96, 97, 1000])
@pytest.mark.parametrize("n_threads", [1, 2, 3, 64])
@pytest.mark.parametrize("multiple", [1, 32])
def test_parts_make_up_the_rows(n_rows: int, n_threads: int, multiple: int) -> None:
    parts: list[tuple[int, int]] = []
    run_split(lambda begin, end: parts.append((begin, end)), n_rows, n_threads, multiple)
    parts.sort()
    assert [row for begin, end in parts for row in range(begin, end)] == list(range(n_rows))
    assert len(parts) <= n_threads
    assert all(begin % multiple == 0 and begin < max(end, 1) for begin, end in parts)


def test_parts_run_at_the_same_time() -> None:
    meeting = threading.Barrier(2, timeout=30)
    run_split(lambda begin, end: [meeting.wait()], 2, 2)


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_in_any_part_reaches_the_caller(failing: int) -> None:
    meeting = threading.Barrier(2, timeout=30)

    def fail(begin: int, end: int) -> None:
        meeting.wait()  # so that the caller cannot take over a part nobody has begun
        if begin == failing:
            raise ValueError("part")

    with pytest.raises(ValueError, match="part"):
        run_split(fail, 2, 2)


@compiled()
def count_part(seen, part, n_parts):  # type: ignore[no-untyped-def]
    seen[part, n_parts] += 1


@compiled()
def count_parts(seen, n_parts, team):  # type: ignore[no-untyped-def]
    run_parts(count_part, (seen,), n_parts, team)


@pytest.fixture(params=["torch's threads", "the caller alone"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "the caller alone":
        monkeypatch.setattr(operations, "team", lambda n_threads: ALONE)
        monkeypatch.setattr(tensors, "team", lambda n_threads: ALONE)
    elif team(2) == ALONE:
        pytest.skip("torch's threads are not GNU OpenMP's here")


@pytest.mark.parametrize(("n_parts", "n_threads"), [(1, 4), (2, 4), (4, 4), (3, 64)])
def test_every_part_runs_once(n_parts: int, n_threads: int) -> None:
    for threads, n_run in ((team(n_threads), n_parts), (ALONE, 1)):
        seen = np.zeros((70, 70), np.int64)
        for _ in range(50):
            count_parts(seen, n_parts, threads)
        expected = np.zeros_like(seen)
        expected[:n_run, n_run] = 50
        np.testing.assert_array_equal(seen, expected)


@pytest.mark.parametrize("n_rows", [0, 1, 31, 32, 33, 97, 1000])
@pytest.mark.parametrize("n_parts", [1, 2, 3, 64])
@pytest.mark.parametrize("multiple", [1, 32])
def test_parts_of_a_kernel_make_up_its_rows(n_rows: int, n_parts: int, multiple: int) -> None:
    parts = [part_of(n_rows, multiple, part, n_parts) for part in range(n_parts)]
    assert [row for begin, end in parts for row in range(begin, end)] == list(range(n_rows))
    assert all(begin % multiple == 0 for begin, end in parts if begin < end)


@pytest.mark.parametrize("dtype", DTYPES)
def test_number_of_threads_changes_no_bit(dtype: str, engine: None) -> None:
    """Sizes at which the kernels do take more than one thread; columns to find in tokens of every part."""
    x = make_tokens(301, 1024, dtype, [3, 700])
    for t in (0, 150, 300):
        x[t, t + 1] = narrow(-9, dtype)
    product = make_product(301, 1500, 1024, dtype, n_outliers=3, n_found=1, capacity=2)
    alone, others = Cpu(n_threads=1), [Cpu(n_threads=2), Cpu(n_threads=3)]
    for other in others:
        for a, b in zip(*(c.activation_quantize(x, dtype, COLUMNS, 6.0, 4) for c in (alone, other)), strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(product.multiply(alone), product.multiply(other))
        np.testing.assert_array_equal(product.finish(alone), product.finish(other))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_depend_on_its_batch(dtype: str) -> None:
    """One token takes another kernel than many; with a stored set no other token has a say."""
    product = make_product(6, 67, 200, dtype, n_outliers=3)
    batch = product.multiply(Cpu(n_threads=1))
    for t in range(6):
        one = product.x._replace(
            codes=product.x.codes[t : t + 1],
            absmax=product.x.absmax[t : t + 1],
            outlier_x=product.x.outlier_x[t : t + 1],
        )
        np.testing.assert_array_equal(replace(product, x=one).multiply(Cpu(n_threads=1)), batch[t : t + 1])


@pytest.mark.parametrize("n_tokens", [1, 2, 5, 13, 131])
@pytest.mark.parametrize("block_size", [64, 128, 256])
@pytest.mark.parametrize("n_columns", [300, 512])
def test_blocks_are_added_up_in_float32_in_ascending_order(n_tokens: int, block_size: int, n_columns: int) -> None:
    """By rows, by tiles, and by both in rounds of 128 tokens, with columns that fill no vector and with none."""
    product = without_bias(make_product(n_tokens, 67, n_columns, "F32", block_size=block_size))
    sums = np.zeros((n_tokens, 67), np.float32)
    for b, products in enumerate(product.products):
        sums += products.astype(np.float32) * (product.x.absmax[:, b : b + 1] / np.float32(N_STEPS))
    expected = sums * (product.weight.absmax / np.float32(N_STEPS))
    np.testing.assert_array_equal(widen(product.multiply(Cpu(n_threads=1)), "F32"), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_epilogue_alone_gives_the_same_bits(dtype: str) -> None:
    product = make_product(6, 67, 200, dtype, n_outliers=3, n_found=2, capacity=2)
    np.testing.assert_array_equal(product.multiply(Cpu(n_threads=1)), product.finish(Cpu(n_threads=1)))


def test_several_threads_may_call_at_once(engine: None) -> None:
    product = make_product(5, 2100, 1024, "F16", n_outliers=3)
    expected, found = product.multiply(Cpu(n_threads=1)), []
    callers = [threading.Thread(target=lambda: found.append(product.multiply(Cpu(n_threads=2)))) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 8
    for y in found:
        np.testing.assert_array_equal(y, expected)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own() -> None:
    run_split(lambda begin, end: None, 2, 2)
    child = os.fork()
    if child == 0:
        parts: list[int] = []
        meeting = threading.Barrier(2, timeout=20)
        try:
            run_split(lambda begin, end: parts.append(begin + 0 * meeting.wait()), 2, 2)
        finally:
            os._exit(0 if sorted(parts) == [0, 1] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_multiplies_after_its_parent_did() -> None:
    """The library that has torch's threads waits forever for those a child has not."""
    product = make_product(5, 2100, 1024, "F16", n_outliers=3)
    expected = product.multiply(Cpu(n_threads=2))
    child = os.fork()
    if child == 0:
        is_equal = False
        try:
            is_equal = bool((product.multiply(Cpu(n_threads=2)) == expected).all())
        finally:
            os._exit(0 if is_equal else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
