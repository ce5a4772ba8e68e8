"""`quantize --round calibrated` on the command line: what it says of the plan, the rows and the published card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from int8convert.inspection import inspect
from int8convert.publish.card import make_card
from int8convert.publish.finished import read_finished
from tests.cli.conftest import Run
from tests.tools.calibrations import letters, save_source


def test_calibrate_plan_convert_and_publish(run: Run, tmp_path: Path) -> None:
    source, text = save_source("llama", tmp_path / "source"), tmp_path / "text.txt"
    text.write_text(letters(4000, seed=0))
    moments = ("--moments", "--sequences", "24", "--length", "32")
    assert run("calibrate", source, "--text", text, "-o", tmp_path / "cal", *moments)[0] == 0
    calibrated = ("--round", "calibrated", "--calibration", tmp_path / "cal")
    code, printed, notes = run("quantize", source, *calibrated, "--dry-run", "--json")
    rounded = {name for name, tensor in json.loads(printed)["tensors"].items() if tensor.get("round") == "calibrated"}
    assert code == 0 and len(rounded) == 14 and not notes
    code, _, notes = run("quantize", source, *calibrated, "--dry-run")
    assert code == 0 and "the codes of 14 of 14 int8 weights are chosen by the calibration" in notes
    code, printed, _ = run("quantize", source, tmp_path / "out", *calibrated)
    assert code == 0 and "of 1,024 rows accepted; squared error of the outputs on held-out inputs: 0." in printed
    assert run("verify", tmp_path / "out", "--level", "exact")[0] == 0
    card = make_card(read_finished(tmp_path / "out"), "me/model", inspect(tmp_path / "out"))
    assert "int8convert quantize SOURCE OUT --calibration CAL --round calibrated" in card
    assert "from the weights alone" not in card and "codes chosen by the outputs of layers on a text" in card


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("--round", "calibrated"), "--round calibrated needs --calibration CAL"),
        (("--smooth", "calibrated"), "--smooth calibrated needs --calibration CAL"),
        (("--columns", "calibrated"), "--columns calibrated needs --calibration CAL"),
        (("--calibration", "c"), "--calibration needs --smooth calibrated, --round calibrated or --columns calibrated"),
        (("--smooth", "."), "it is calibrated or a file, and '.' is a folder, as --calibration takes"),
        (("--columns", "."), "it is calibrated or a file, and '.' is a folder, as --calibration takes"),
    ],
)
def test_half_of_the_two_options_is_refused(given: tuple[str, str], expected: str, run: Run, tmp_path: Path) -> None:
    code, _, notes = run("quantize", tmp_path, tmp_path / "out", *given)
    assert code == 2 and expected in " ".join(notes.split())


def test_other_rounding_is_refused(run: Run, tmp_path: Path) -> None:
    code, _, notes = run("quantize", tmp_path, tmp_path / "out", "--round", "up")
    assert code == 2 and "it is nearest or calibrated, not 'up'" in notes


def test_calibration_that_is_none_is_refused_in_two_lines(run: Run, tmp_path: Path) -> None:
    source = save_source("llama", tmp_path / "source")
    code, _, notes = run("quantize", source, tmp_path / "out", "--round", "calibrated", "--calibration", tmp_path)
    assert code == 1 and "holds no complete calibration" in notes and not (tmp_path / "out").exists()
