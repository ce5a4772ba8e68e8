"""A calibration comes back from its folder as it was; a folder that is not whole, or not ours, is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from int8convert.calibration.folder import (
    CalibratedInput,
    Calibration,
    Moments,
    begin_folder,
    is_calibration,
    read_calibration,
    read_moments,
    write_calibration,
    write_moments,
)
from int8convert.calibration.statistics import watching
from int8convert.calibration.weight_squares import weight_squares
from int8convert.checkpoint.hashing import json_sha256
from int8convert.errors import CorruptFileError, OutputError, SourceError
from int8convert.sources import open_source
from tests.tools.tiny_models import edit_config, save_checkpoint

N_IN = 140
MOMENTS = Moments(torch.arange(N_IN * N_IN).float().view(N_IN, N_IN), torch.ones(3, N_IN))


def calibration(config: dict[str, Any]) -> Calibration:
    """The calibration of two layers that read the same tensor."""
    torch.manual_seed(0)
    layers = {"a": nn.Linear(N_IN, 8), "b": nn.Linear(N_IN, 5)}
    with torch.no_grad(), watching(layers, 6.0) as statistics:
        x = torch.randn(30, N_IN) * 4
        for layer in layers.values():
            layer(x)
    weights = {name: weight_squares(layer) for name, layer in layers.items()}
    inputs = (CalibratedInput(("a", "b"), N_IN, 24, "0000.safetensors"),)
    described = ("opt", json_sha256(config), "text.txt", "0" * 64, 5, 6, 1, 6.0)
    return Calibration(*described, inputs, statistics, weights)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "cal"
    begin_folder(folder)
    assert write_moments(folder, 0, MOMENTS) == "0000.safetensors"
    write_calibration(folder, calibration({"model_type": "opt"}))
    return folder


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "calibration.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_read_is_what_was_written(folder: Path) -> None:
    written, found = calibration({"model_type": "opt"}), read_calibration(folder)
    assert replace(found, statistics={}, weights={}) == replace(written, statistics={}, weights={})
    for name, seen in written.statistics.items():
        again = found.statistics[name]
        assert again.n_tokens == seen.n_tokens == 30 and again.output_variance == seen.output_variance
        assert again.sums.keys() == seen.sums.keys()
        assert all(torch.equal(again.sums[key], value) for key, value in seen.sums.items())
        assert torch.equal(found.weights[name].columns, written.weights[name].columns)
        assert (found.weights[name].n_rows, found.weights[name].steps) == (
            written.weights[name].n_rows,
            written.weights[name].steps,
        )
    moments = read_moments(folder, found.inputs[0])
    assert moments is not None and torch.equal(moments.second_moment, MOMENTS.second_moment)
    assert torch.equal(moments.held_out, MOMENTS.held_out)
    assert read_moments(folder, replace(found.inputs[0], moments=None)) is None


def test_folder_without_its_record_is_no_calibration(folder: Path) -> None:
    (folder / "calibration.json").unlink()
    assert not is_calibration(folder)
    with pytest.raises(SourceError, match="holds no complete calibration"):
        read_calibration(folder)


def test_calibration_of_another_source_is_refused(folder: Path, tmp_path: Path) -> None:
    source = save_checkpoint("opt", tmp_path / "source")
    write_calibration(folder, calibration(open_source(source).config))
    assert read_calibration(folder, open_source(source)).source == "opt"
    edit_config(source, novel=1)
    with pytest.raises(SourceError, match="calibration of 'opt', whose config is not that of"):
        read_calibration(folder, open_source(source))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "has schema '2', expected 1"),
        ({"threshold": "6"}, "lacks a field"),
        ({"length": None}, "lacks a field"),
        ({"inputs": {}}, "lacks a field"),
        ({"inputs": [{"modules": ["a"]}]}, "lacks a field"),
        ({"inputs": []}, "which no input of its record has"),
    ],
)
def test_record_of_another_kind_is_refused(changes: dict[str, Any], message: str, folder: Path) -> None:
    edit(folder, **changes)
    with pytest.raises(CorruptFileError, match=message):
        read_calibration(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"modules": []},
        {"modules": ["a", "a"]},
        {"modules": ["a", 1]},
        {"in_features": 0},
        {"in_features": "140"},
        {"n_tokens": -1},
        {"moments": "../../secret.safetensors"},
        {"moments": "a.safetensors"},
    ],
)
def test_input_that_is_none_is_refused(change: dict[str, Any], folder: Path) -> None:
    entry = {"modules": ["a", "b"], "in_features": N_IN, "n_tokens": 24, "moments": None} | change
    edit(folder, inputs=[entry])
    with pytest.raises(CorruptFileError, match=r"lacks a field|expected"):
        read_calibration(folder)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.maximum": torch.zeros(N_IN + 1)}, r"holds \[141\] of torch.float32 for 'a.maximum', expected \[140\]"),
        ({"a.n_above": torch.zeros(N_IN)}, r"of torch.float32 for 'a.n_above', expected \[140\] of torch.int64"),
        ({"a.output_sum": torch.zeros(8)}, "of torch.float32 for 'a.output_sum'"),
        ({"b.n_tokens": torch.zeros(2, dtype=torch.int64)}, "for 'b.n_tokens'"),
        ({"c.maximum": torch.zeros(N_IN)}, "holds 'c.maximum', which no input"),
    ],
)
def test_statistics_of_another_shape_are_refused(tensors: dict[str, torch.Tensor], message: str, folder: Path) -> None:
    path = folder / "statistics.safetensors"
    save_file(load_file(path) | tensors, path)
    with pytest.raises(CorruptFileError, match=message):
        read_calibration(folder)


def test_damaged_files_are_refused(folder: Path) -> None:
    entry = read_calibration(folder).inputs[0]
    path = folder / "moments" / "0000.safetensors"
    for tensors in (
        {"second_moment": torch.zeros(N_IN, N_IN)},
        {"second_moment": torch.zeros(N_IN, 3), "held_out": torch.zeros(1, N_IN)},
        {"second_moment": torch.zeros(N_IN, N_IN), "held_out": torch.zeros(1, N_IN, dtype=torch.float64)},
    ):
        save_file(tensors, path)
        with pytest.raises(CorruptFileError, match="does not hold the moments of an input with 140 features"):
            read_moments(folder, entry)
    path.unlink()
    with pytest.raises(CorruptFileError, match="cannot be read: No such file"):
        read_moments(folder, entry)
    (folder / "statistics.safetensors").write_bytes(b"no")
    with pytest.raises(CorruptFileError, match="is no safetensors file"):
        read_calibration(folder)


def test_new_run_ends_the_earlier_calibration_and_spares_strangers_files(folder: Path, tmp_path: Path) -> None:
    begin_folder(folder)
    assert not is_calibration(folder) and list((folder / "moments").iterdir()) == []
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    with pytest.raises(OutputError, match=r"holds other files, such as 'thesis\.tex'"):
        begin_folder(other)
    assert (other / "thesis.tex").read_text() == "precious"
