"""A calibration that ends early leaves no folder that looks complete, and says so."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from int8convert.calibration import moments
from int8convert.calibration.calibrate import calibrate
from int8convert.calibration.folder import is_calibration, read_calibration
from int8convert.errors import DiskFullError, OutputError
from int8convert.runtime.text.texts import Text
from tests.calibration.test_run import FAMILIES, save
from tests.cli.conftest import Run, run

__all__ = ["run"]

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def source(tmp_path: Path, tokenizer: Any) -> Path:
    return save(FAMILIES["llama"], tmp_path / "source", tokenizer)


@pytest.fixture
def cut(text: Path) -> Text:
    return Text(text, n_sequences=4, length=16)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), Killed()])
def test_run_that_ends_early_leaves_no_calibration(
    error: BaseException, source: Path, cut: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cal"
    calibrate(source, folder, cut, with_moments=True)  # an earlier one
    assert is_calibration(folder)
    write = moments.write_moments

    def failing(into: Path, number: int, found: Any) -> str:
        if number == 5:
            raise error
        return write(into, number, found)

    with monkeypatch.context() as patch, pytest.raises((DiskFullError, Killed)) as raised:
        patch.setattr(moments, "write_moments", failing)
        calibrate(source, folder, cut, with_moments=True)
    assert not is_calibration(folder)
    if isinstance(raised.value, DiskFullError):
        assert "no room left while writing to" in raised.value.message
        assert raised.value.state == f"'{folder}' holds no new calibration"
    calibrate(source, folder, cut, with_moments=True)  # the same again
    assert len(read_calibration(folder).inputs) == len(list((folder / "moments").iterdir())) == 12


def test_moments_that_do_not_fit_on_the_disk_are_refused_before_the_run(
    source: Path, cut: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Any] = []
    calibrate(source, tmp_path / "cal", cut)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 1000})())
    with pytest.raises(DiskFullError, match=r"second moments take up to 7\.29 MB, and the disk of .* has 1 kB left"):
        calibrate(source, tmp_path / "cal", cut, with_moments=True, on_event=events.append)
    assert events == [] and is_calibration(tmp_path / "cal")


def test_folder_of_something_else_is_left_alone(source: Path, cut: Text) -> None:
    before = sorted(source.iterdir())
    with pytest.raises(OutputError, match="holds other files"):
        calibrate(source, source, cut)
    assert sorted(source.iterdir()) == before


def test_command_writes_the_folder_and_says_what_is_in_it(run: Run, source: Path, text: Path, tmp_path: Path) -> None:
    arguments = ("calibrate", source, "--text", text, "--sequences", 4, "--length", 16)
    code, out, err = run(*arguments, "-o", tmp_path / "cal", "--moments")
    assert code == 0 and out.startswith(f"{tmp_path / 'cal'}: 21 layers with 12 inputs, 4 x 16 tokens of ")
    assert err.startswith("note: running layer by layer, at most ") and err.endswith("measured: 3 of 3 steps\n")
    code, out, err = run(*arguments, "-o", tmp_path / "cal", "--json")
    assert (code, err) == (0, "")
    printed = json.loads(out)
    assert printed.pop("elapsed_s") > 0 and printed.pop("folder") == str(tmp_path / "cal")
    assert printed == json.loads((tmp_path / "cal" / "calibration.json").read_text())
    assert all(entry["moments"] is None for entry in printed["inputs"])
    code, out, err = run("calibrate", source, "--text", text, "-o", source)
    assert code == 1 and "holds other files" in err and "name a new folder" in err
