"""The pictures show the numbers: read back from what is drawn, not from how it looks."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch

from int8convert.errors import OutputError, SourceError
from int8convert.outliers.features import LayerInput, OutlierFeature
from int8convert.outliers.figures import draw_figures, outlier_figures, prepare_folder
from int8convert.outliers.find import OutlierReport

pytest.importorskip("matplotlib")

N_LAYERS = 5


def report(width: int = 32, features: tuple[int, ...] = (4, 20)) -> OutlierReport:
    """Dimension j of layer i reaches (i + 1) * 10 if it is a feature, else 1; fc2 reads something wider."""
    inputs, largest = [], {}
    for i in range(N_LAYERS):
        for kind, n in (("q_proj", width), ("k_proj", width), ("fc2", 2 * width)):
            name = f"layers.{i}.{kind}"
            values = torch.ones(n)
            if kind != "fc2":
                values[list(features)] = 10.0 * (i + 1)
            largest[name] = values
            inputs.append(LayerInput(name, f"layers.{i}", kind, n, 100, float(values.max()), kind != "fc2", ()))
    found = tuple(OutlierFeature(k, 1.0, 1.0, 50.0, "positive", (9.0, 20.0, 40.0)) for k in features)
    return OutlierReport(
        *(
            "model",
            "text.txt",
            "0" * 64,
            1,
            100,
            6.0,
            N_LAYERS,
            tuple(inputs),
            found,
            (),
            (),
            0.06,
            0.01,
            {},
            0,
            1,
            "cpu",
            1.0,
        ),
        largest=largest,
    )


def test_each_picture_is_written_as_png_and_svg(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "figures"
    prepare_folder(folder)
    paths = draw_figures(report(), folder)
    names = ("outlier-map", "magnitude-by-layer", "growth-with-depth")
    assert [path.name for path in paths] == [f"{name}.{suffix}" for name in names for suffix in ("png", "svg")]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in paths if path.suffix == ".png")
    assert all(b"<svg" in path.read_bytes() for path in paths if path.suffix == ".svg")


def test_map_holds_the_largest_magnitude_of_every_layer_and_dimension() -> None:
    figure = dict(outlier_figures(report()))["outlier-map"]
    axes = figure.axes[0]
    values = torch.as_tensor(axes.images[0].get_array())
    expected = torch.ones(N_LAYERS, 32)
    expected[:, [4, 20]] = 10.0 * torch.arange(1, N_LAYERS + 1)[:, None]
    assert torch.equal(values, expected)
    assert [label.get_text() for label in axes.child_axes[0].get_xticklabels()] == ["4", "20"]


def test_wide_map_shows_the_largest_of_neighbouring_dimensions() -> None:
    figure = dict(outlier_figures(report(width=5000, features=(4321,))))["outlier-map"]
    axes = figure.axes[0]
    values = torch.as_tensor(axes.images[0].get_array())
    assert values.shape == (N_LAYERS, 1000) and values[4, 4321 // 5] == 50 and int((values > 1).sum()) == N_LAYERS
    assert axes.images[0].get_extent()[:2] == [-0.5, 4999.5] and "largest of each 5" in axes.get_xlabel()


def test_neighbouring_features_do_not_write_over_each_other() -> None:
    figure = dict(outlier_figures(report(width=512, features=(100, 102, 300))))["outlier-map"]
    labels = [label.get_text() for label in figure.axes[0].child_axes[0].get_xticklabels()]
    assert len(labels) == 3 and sum(map(bool, labels)) == 2 and labels[2] == "300"


def test_magnitudes_are_lines_and_inputs_that_are_the_same_one_line() -> None:
    figure = dict(outlier_figures(report()))["magnitude-by-layer"]
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    assert list(lines) == ["q_proj, k_proj", "fc2", "threshold 6"]
    assert list(lines["q_proj, k_proj"]) == [10, 20, 30, 40, 50] and set(lines["fc2"]) == {1.0}


def test_growth_has_a_line_for_each_feature_over_what_others_reach() -> None:
    figure = dict(outlier_figures(report()))["growth-with-depth"]
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert lines["dimension 4"] == lines["dimension 20"] == [10, 20, 30, 40, 50]
    (band,) = figure.axes[0].collections
    assert {y for _, y in band.get_paths()[0].vertices} == {1.0}


def test_lines_differ_by_marker_as_well_as_by_colour() -> None:
    figure = dict(outlier_figures(report(features=tuple(range(0, 32, 4)))))["growth-with-depth"]
    lines = [line for line in figure.axes[0].lines if line.get_label().startswith("dimension")]
    assert len({line.get_marker() for line in lines}) == len({line.get_color() for line in lines}) == len(lines) == 7


def test_infinite_magnitudes_and_models_without_features_are_drawn(tmp_path: Path) -> None:
    quiet = report(features=())
    quiet.largest["layers.2.q_proj"][3] = math.inf
    assert len(draw_figures(quiet, tmp_path)) == 6


def test_nothing_is_drawn_of_a_model_without_hidden_states(tmp_path: Path) -> None:
    flat = dataclasses.replace(report(), inputs=())
    assert draw_figures(flat, tmp_path) == []


def test_folder_that_is_a_file_or_gone_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="figures cannot be written to"):
        prepare_folder(tmp_path / "file")
    with pytest.raises(OutputError, match="figures cannot be written to"):
        draw_figures(report(), tmp_path / "gone")


def test_magnitudes_are_labelled_by_plain_numbers() -> None:
    for name, figure in outlier_figures(report()):
        figure.draw_without_rendering()
        axis = figure.axes[-1].yaxis if name == "outlier-map" else figure.axes[0].yaxis
        labels = {label.get_text() for label in axis.get_majorticklabels()}
        assert {"5", "10", "20"} <= labels and not any(label.get_text() for label in axis.get_minorticklabels())


def test_missing_matplotlib_is_an_error_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SourceError, match="need matplotlib") as error:
        prepare_folder(tmp_path / "figures")
    assert "int8convert[report]" in error.value.hint and not (tmp_path / "figures").exists()
