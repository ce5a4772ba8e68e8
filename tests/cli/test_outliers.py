"""`int8convert outliers` and `quantize --columns` as their users meet them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import int8convert
from int8convert.checkpoint.names import OUTLIERS_FILE
from tests.cli.conftest import Run
from tests.tools.language_models import SENTENCES, build_tokenizer
from tests.tools.outlier_models import SCALED, SHIFTED, convert, gated_model, outlier_model, save
from tests.tools.tiny_models import file_bytes, read_tensors, save_checkpoint

pytestmark = [
    pytest.mark.usefixtures("map_in_process"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

WINDOWS = ("--sequences", "4", "--length", "40", "--device", "cpu")
COLUMNS = ("--columns", "calibrated")
FC1 = "model.decoder.layers.1.fc1"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "[b]text.txt"  # which is no markup
    path.write_text(" ".join(SENTENCES * 8), encoding="utf-8")
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tokenizer = build_tokenizer()
    return save(outlier_model(tokenizer), tmp_path / "source", tokenizer)


@pytest.fixture
def out(source: Path, tmp_path: Path) -> Path:
    return convert(source, tmp_path / "out")


def test_outliers_are_printed_on_stdout_and_what_could_be_stored_noted(run: Run, source: Path, text: Path) -> None:
    code, out, err = run("outliers", source, "--text", text, *WINDOWS)
    assert code == 0
    assert out.startswith(f"{source}: 12 inputs, 4 x 40 tokens of [b]text.txt, ")
    assert "Outlier features: |x| >= 6 in 25 % of 2 layers, at 6 % of the positions" in out
    rows = {line.split()[0]: line for line in out.splitlines() if line[:1].isdigit()}
    assert rows.keys() == {"7", "21", "50"}
    assert "negative" in rows["50"] and "100.0 %" in rows["7"] and "two-sided" in rows["21"]
    assert "fc2" in out and "Ablation" not in out
    started, *steps, last = err.splitlines()
    assert started.startswith("note: running layer by layer") and last.startswith("note: --write OUT would store")
    assert [step[:16] for step in steps] == ["measured: 1 of 2", "measured: 2 of 2"]


def test_quiet_prints_the_result_only(run: Run, source: Path, text: Path) -> None:
    code, out, err = run("outliers", source, "--text", text, *WINDOWS, "--quiet")
    assert (code, err) == (0, "") and "Outlier features" in out


def test_model_without_outlier_features_is_said_to_have_none(run: Run, tmp_path: Path, text: Path) -> None:
    tokenizer = build_tokenizer()
    plain = save(outlier_model(tokenizer, {}, {}), tmp_path / "plain", tokenizer)
    code, out, _ = run("outliers", plain, "--text", text, *WINDOWS, "--ablate")
    assert code == 0 and "no outlier features: no dimension reaches 6 in 25 % of the 2 layers" in out
    assert "Ablation" not in out


def test_ablation_is_a_table(run: Run, source: Path, text: Path) -> None:
    _, out, _ = run("outliers", source, "--text", text, *WINDOWS, "--ablate")
    lines = out.splitlines()
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("Ablation")) :]
    assert [line.split()[:2] for line in table[2:5]] == [["none", "0"], ["outliers", "3"], ["random", "3"]]


def test_json_is_one_object_and_nothing_else(run: Run, source: Path, text: Path) -> None:
    code, out, err = run("outliers", source, "--text", text, *WINDOWS, "--json")
    found = json.loads(out)
    assert (code, err, found["schema"], found["written"], found["figures"]) == (0, "", 1, None, [])
    assert [feature["column"] for feature in found["features"]] == [7, 21, 50]


@pytest.mark.parametrize("ran", ["source", "out"])
def test_written_columns_are_the_sources_and_load_uses_them(
    ran: str, run: Run, source: Path, out: Path, text: Path
) -> None:
    before = file_bytes(out)
    code, printed, err = run("outliers", {"source": source, "out": out}[ran], "--text", text, *WINDOWS, "--write", out)
    assert (
        code == 0
        and err.endswith("2 of 2 steps\n")
        and f"{out / OUTLIERS_FILE}: " in printed
        and "outlier columns of" in printed
    )
    assert {name: data for name, data in file_bytes(out).items() if name != OUTLIERS_FILE} == before
    layer = int8convert.load(out).get_submodule(FC1)
    columns = layer.outlier_columns.tolist()
    assert layer.mode == "static+guard" and {*SHIFTED, *SCALED} <= set(columns)
    assert torch.equal(layer.outlier_weight, read_tensors(source)[f"{FC1}.weight"][:, columns])


@pytest.mark.parametrize(("make", "factor"), [(outlier_model, 50), (gated_model, 1.8)])
def test_stored_columns_bring_the_model_nearer_to_its_source(
    make: Callable[[Any], Any], factor: float, run: Run, text: Path, tmp_path: Path
) -> None:
    tokenizer, ids = build_tokenizer(), torch.arange(3, 63)[None]
    source = save(make(tokenizer), tmp_path / "injected", tokenizer)
    out = convert(source, tmp_path / "injected-int8")
    model = make(tokenizer).half().float()

    def error() -> float:
        with torch.no_grad():
            expected = model(ids).logits.log_softmax(-1)
            found = int8convert.load(out, dtype=torch.float32)(ids).logits.log_softmax(-1)
        return float((expected.exp() * (expected - found)).sum(-1).mean())

    before = error()
    run("outliers", source, "--text", text, *WINDOWS, "--write", out)
    assert error() < before / factor


def test_how_the_columns_were_chosen_is_in_the_file(run: Run, source: Path, out: Path, text: Path) -> None:
    from int8convert.checkpoint.safetensors_file import read_safetensors_metadata

    run("outliers", source, "--text", text, *WINDOWS, "--threshold", "5", "--write", out)
    calibration = json.loads(read_safetensors_metadata(out / OUTLIERS_FILE)["calibration"])
    assert calibration["text"] == "[b]text.txt" and len(calibration["text_sha256"]) == 64
    assert (calibration["threshold"], calibration["n_sequences"], calibration["length"]) == (5.0, 4, 40)
    assert (calibration["min_share"], calibration["budget"]) == (0.06, 0.01)


def test_budget_buys_columns(run: Run, source: Path, out: Path, text: Path) -> None:
    written = []
    for budget in ("0", "5"):
        _, printed, _ = run("outliers", source, "--text", text, *WINDOWS, "--write", out, "--budget", budget, "--json")
        written.append(json.loads(printed)["written"])
    int8_bytes = 2 * (4 * 64 * 64 + 2 * 64 * 128)
    assert 0 < written[1]["n_bytes"] - written[0]["n_bytes"] < 0.05 * int8_bytes + 6000  # names and indices


def test_source_is_found_by_the_manifest_or_named(run: Run, source: Path, out: Path, text: Path) -> None:
    moved = source.rename(source.with_name("moved"))
    code, printed, err = run("outliers", out, "--text", text, *WINDOWS, "--write", out)
    assert (code, printed) == (1, "")
    assert f"its manifest names '{source}', which is not there" in err and "--source SRC" in err
    assert not (out / OUTLIERS_FILE).exists()
    code, _, _ = run("outliers", out, "--text", text, *WINDOWS, "--write", out, "--source", moved)
    assert code == 0 and (out / OUTLIERS_FILE).exists()


def test_export_names_an_int8_source_and_needs_the_one_in_16_bits(
    run: Run, source: Path, out: Path, text: Path, tmp_path: Path
) -> None:
    exported = tmp_path / "exported"
    int8convert.export(out, exported, format="compressed-tensors")
    code, _, err = run("outliers", exported, "--text", text, *WINDOWS, "--write", exported)
    assert code == 1 and f"its manifest names '{out}', which is int8 itself" in err and "--source SRC" in err
    code, _, _ = run("outliers", exported, "--text", text, *WINDOWS, "--write", exported, "--source", source)
    assert code == 0 and {*SHIFTED, *SCALED} <= set(
        int8convert.load(exported).get_submodule(FC1).outlier_columns.tolist()
    )


def test_wrong_source_is_an_error_and_leaves_nothing(
    run: Run, source: Path, out: Path, text: Path, tmp_path: Path
) -> None:
    other = save_checkpoint("llama", tmp_path / "other")
    before = file_bytes(out)
    code, printed, err = run("outliers", source, "--text", text, *WINDOWS, "--write", out, "--source", other)
    assert (code, printed) == (1, "") and "do not belong together" in err and file_bytes(out) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--threshold", "0"), "must be above 0"),
        (("--device", "tpu"), "--device"),
        (("--source", "x"), "--source needs --write OUT"),
        (("--lora", "x"), "--lora needs --write OUT"),
        (("--sequences", "0"), "--sequences"),
        (("--length", "1"), "--length"),
    ],
)
def test_wrong_usage_is_exit_code_2(
    arguments: tuple[str, ...], message: str, run: Run, source: Path, text: Path
) -> None:
    code, out, err = run("outliers", source, "--text", text, *arguments)
    assert (code, out) == (2, "") and message in err


def test_missing_text_is_two_lines(run: Run, source: Path, tmp_path: Path) -> None:
    code, out, err = run("outliers", source, "--text", tmp_path / "none.txt")
    first, second = err.splitlines()
    assert (code, out) == (1, "") and "cannot be read: No such file" in first and second.startswith("hint: ")


def test_missing_checkpoint_is_an_error_as_json_too(run: Run, tmp_path: Path, text: Path) -> None:
    code, out, _ = run("outliers", tmp_path / "nowhere", "--text", text, "--json")
    error = json.loads(out)["error"]
    assert (code, error["code"]) == (1, "source") and "not a checkpoint directory: nothing there" in error["message"]


def test_columns_are_written_into_int8_checkpoints_only(run: Run, source: Path, text: Path) -> None:
    before = file_bytes(source)
    code, _, err = run("outliers", source, "--text", text, "--write", source)
    assert code == 1 and f"'{source}' is no int8 checkpoint" in err and file_bytes(source) == before


def test_figures_without_matplotlib_are_refused_before_the_work(
    run: Run, text: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("int8convert.outliers.find.read_inputs", None)
    code, _, err = run("outliers", source, "--text", text, "--figures", tmp_path / "figures")
    assert code == 1 and "pip install 'int8convert[report]'" in err


def test_figures_are_drawn_where_they_are_asked_for(run: Run, text: Path, source: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "figures"
    _, out, _ = run("outliers", source, "--text", text, *WINDOWS, "--figures", folder, "--json")
    drawn = json.loads(out)["figures"]
    assert sorted(drawn) == sorted(str(path) for path in folder.iterdir()) and len(drawn) == 6


def test_quantize_calibrates_in_one_go(run: Run, source: Path, text: Path, tmp_path: Path) -> None:
    code, printed, _ = run("quantize", source, tmp_path / "new", "--columns", text, "--json")
    report = json.loads(printed)
    assert code == 0 and report["outliers"]["n_columns"] > 6
    assert {*SHIFTED, *SCALED} <= set(int8convert.load(tmp_path / "new").get_submodule(FC1).outlier_columns.tolist())
    code, printed, _ = run("quantize", source, tmp_path / "new", "--columns", text)
    assert code == 0 and "outlier columns of" in printed and "Weight error" in printed


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_calibration_of_the_source_stores_what_a_run_of_the_source_would(
    prefix: str, run: Run, source: Path, text: Path, tmp_path: Path
) -> None:
    """Names in the calibration are the model's, names in the checkpoint may lack a prefix."""
    tensors = read_tensors(source)
    save_file(
        {f"{prefix}{name.removeprefix('model.')}": tensor for name, tensor in tensors.items()},
        source / "model.safetensors",
        {"format": "pt"},
    )
    out, folder = tmp_path / "new", tmp_path / "cal"
    assert run("calibrate", source, "--text", text, *WINDOWS, "-o", folder)[0] == 0
    code, printed, _ = run("quantize", source, out, *COLUMNS, "--calibration", folder, "--json")
    expected = int8convert.find_outliers(source, int8convert.Text(text, n_sequences=4, length=40)).static_set
    assert code == 0 and json.loads(printed)["outliers"]["n_modules"] == len(expected) > 3
    stored = load_file(out / OUTLIERS_FILE)
    found = {
        f"model.{name.removeprefix('model.').removesuffix('.outlier_columns')}": tuple(columns.tolist())
        for name, columns in stored.items()
        if name.endswith(".outlier_columns")
    }
    assert found == expected
    for extra in (("--rotate",), ("--lora", tmp_path)):
        code, _, err = run("quantize", source, out, *COLUMNS, "--calibration", folder, *extra)
        assert code == 2 and f"--columns calibrated describes SRC without {extra[0]}" in err


def test_calibration_of_another_source_stops_the_conversion_before_it_begins(
    run: Run, source: Path, text: Path, tmp_path: Path
) -> None:
    assert run("calibrate", source, "--text", text, *WINDOWS, "-o", tmp_path / "cal")[0] == 0
    other = save_checkpoint("opt", tmp_path / "other")
    code, _, err = run("quantize", other, tmp_path / "new", *COLUMNS, "--calibration", tmp_path / "cal")
    assert code == 1 and "whose config is not that of" in err and not (tmp_path / "new").exists()


def test_calibration_that_fails_leaves_the_converted_checkpoint_and_says_so(
    run: Run, source: Path, text: Path, tmp_path: Path
) -> None:
    bare, new = save_checkpoint("opt", tmp_path / "bare"), tmp_path / "new"
    build_tokenizer().save_pretrained(bare)
    code, _, err = run("quantize", bare, new, "--columns", text)
    hint = err.splitlines()[-1]
    assert code == 1 and "the model knows only" in err
    assert f"'{new}' is complete but for stored columns" in hint and "nothing was written" not in hint
    int8convert.load(new)


def test_quantize_without_calibration_has_no_outliers(run: Run, source: Path, tmp_path: Path) -> None:
    _, printed, _ = run("quantize", source, tmp_path / "new", "--json")
    assert json.loads(printed)["outliers"] is None and not (tmp_path / "new" / OUTLIERS_FILE).exists()


def test_text_or_tokenizer_that_is_missing_stops_the_conversion_before_it_begins(
    run: Run, source: Path, text: Path, tmp_path: Path
) -> None:
    code, _, err = run("quantize", source, tmp_path / "new", "--columns", tmp_path / "none.txt")
    assert code == 1 and "none.txt" in err and not (tmp_path / "new").exists()
    bare = save_checkpoint("opt", tmp_path / "bare")
    code, _, err = run("quantize", bare, tmp_path / "new", "--columns", text)
    assert code == 1 and "has no tokenizer" in err and not (tmp_path / "new").exists()


def test_damage_is_printed_with_the_layers_to_keep(run: Run, source: Path, text: Path, tmp_path: Path) -> None:
    code, out, _ = run("outliers", source, "--text", text, *WINDOWS, "--damage", "--keep-budget", "30")
    assert code == 0 and "What rounding costs the predictions" in out
    _, _, kept = out.rpartition("convert with ")
    skips = kept.split()[1::2]
    assert skips and all(name.startswith("model.decoder.layers.") for name in skips)
    code, out, _ = run("outliers", source, "--text", text, *WINDOWS, "--damage", "--keep-budget", "30", "--json")
    found = json.loads(out)
    damage = {layer["module_name"]: layer for layer in found["damage"]}
    assert code == 0 and len(damage) == 12 and all(layer["weights"] > 0 for layer in damage.values())
    assert found["keep"] == skips
    best = max(damage.values(), key=lambda e: (e["weights"] + e["inputs_by_rule"]) / e["n_weights"])
    assert best["module_name"] in skips
    code, _, err = run("quantize", source, tmp_path / "kept", *(f"--skip={name}" for name in skips))
    assert code == 0, err


def test_keep_budget_alone_and_damage_of_int8_are_refused(run: Run, out: Path, text: Path) -> None:
    code, _, err = run("outliers", out, "--text", text, *WINDOWS, "--keep-budget", "3")
    assert code == 2 and "--keep-budget needs --damage" in err
    code, _, err = run("outliers", out, "--text", text, *WINDOWS, "--damage")
    assert code == 1 and "is int8" in err and "hint: give the source" in err
