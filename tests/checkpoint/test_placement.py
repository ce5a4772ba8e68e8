"""How many GPUs hold a checkpoint: layers whole, in order, a reserve on each."""

from __future__ import annotations

from int8convert.checkpoint.placement import RESERVED_BYTES, place

GB = 1_000_000_000


def layers(n: int, n_bytes: int) -> list[tuple[str, int]]:
    return [(f"model.layers.{i}.{part}.weight", n_bytes // 2) for i in range(n) for part in ("attn", "mlp")]


def test_layers_are_not_cut() -> None:
    by_size = {p.gpu_gb: p for p in place(layers(6, 12 * GB))}
    assert {gb: p.n_gpus for gb, p in by_size.items()} == {24: 6, 40: 2, 80: 1}
    assert by_size[40].n_free_bytes == 2 * (40 * GB - RESERVED_BYTES) - 72 * GB


def test_reserve_is_left_free() -> None:
    assert [p.n_gpus for p in place([("a.weight", 23 * GB)])] == [1, 1, 1]
    assert [p.n_gpus for p in place([("a.weight", 23 * GB + 1)])] == [None, 1, 1]


def test_more_than_eight_is_too_many() -> None:
    assert [p.n_gpus for p in place(layers(8, 20 * GB))] == [8, 8, 3]
    assert [p.n_gpus for p in place(layers(9, 20 * GB))] == [None, None, 3]
