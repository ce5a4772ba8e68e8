"""Weights that are zeros in whole rows, as a file that was half written has them: converted, and said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import int8convert
from int8convert.conversion.report import ConversionReport
from tests.cli.conftest import Run
from tests.scenarios.strangers.makers import convert

pytestmark = pytest.mark.usefixtures("map_in_process")

UP, DOWN, HEAD = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight", "lm_head.weight"


def zero(source: Path, name: str, begin: int, end: int) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors[name][begin:end] = 0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})


def report_of(source: Path, out: Path) -> ConversionReport:
    return int8convert.quantize(source, out, on_event=lambda event: None)


@pytest.mark.parametrize(
    ("name", "begin", "end", "expected"),
    [
        (UP, 0, 128, {UP: 128}),
        (UP, 112, 128, {UP: 16}),
        (UP, 113, 128, {}),  # under an eighth
        (HEAD, 0, 128, {HEAD: 128}),
    ],
)
def test_rows_of_zeros_are_counted(
    name: str, begin: int, end: int, expected: dict[str, int], source: Path, tmp_path: Path
) -> None:
    zero(source, name, begin, end)
    assert report_of(source, tmp_path / "out").zero_rows == expected


def test_half_of_a_large_kept_matrix(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By blocks: rows of a kept tensor are not looked at one by one."""
    monkeypatch.setattr("int8convert.checkpoint.rows.BLOCK_BYTES", 1 << 10)
    zero(source, HEAD, 64, 128)
    assert report_of(source, tmp_path / "out").zero_rows == {HEAD: 64}


def test_vectors_of_zeros_are_none_of_it(source: Path, tmp_path: Path) -> None:
    """Norms that store their difference to one begin as zeros."""
    zero(source, "model.norm.weight", 0, 64)
    assert report_of(source, tmp_path / "out").zero_rows == {}


def test_it_is_said_and_a_resumed_conversion_says_it_again(source: Path, tmp_path: Path, run: Run) -> None:
    zero(source, UP, 0, 64)
    zero(source, DOWN, 0, 64)
    code, _, err = run("quantize", source, tmp_path / "out")
    assert code == 0
    assert f"64 rows of '{DOWN}' hold nothing but zeros, and many in 1 other tensor:" in " ".join(err.split())
    again = json.loads(run("quantize", source, tmp_path / "out", "--json")[1])
    assert (again["n_done_shards"], again["zero_rows"]) == (1, {DOWN: 64, UP: 64})


def test_whole_checkpoints_have_none(source: Path, tmp_path: Path) -> None:
    assert report_of(source, convert(source, tmp_path / "out")).zero_rows == {}
