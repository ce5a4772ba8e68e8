"""`quantize --quality best`: what it chooses, that the choice is better, and that a rerun finds its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import int8convert
from int8convert.cli.quality_options import naming_best
from int8convert.errors import SourceError
from int8convert.runtime.models import load_model, open_tokenizer
from int8convert.runtime.text.windows import read_windows
from int8convert.verification.exact.level import verify_exact
from tests.cli.conftest import Run
from tests.tools.language_models import SENTENCES, build_tokenizer
from tests.tools.outlier_models import outlier_model, save

pytestmark = [
    pytest.mark.usefixtures("rotation_in_process"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(SENTENCES * 200), encoding="utf-8")
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tokenizer = build_tokenizer()
    return save(outlier_model(tokenizer), tmp_path / "source", tokenizer)


def divergence(source: Path, out: Path, text: Path) -> float:
    """The mean KL divergence with one scale a token and no outlier columns, as servers compute."""
    with open_tokenizer(source, False) as tokenizer:
        ids = read_windows(text, tokenizer, 8, 32).ids
    with torch.no_grad():
        exact = load_model(source, "cpu")(ids).logits.log_softmax(-1)
        found = int8convert.load(out, outliers="none")(ids).logits.float().log_softmax(-1)
    return float((exact.exp() * (exact - found)).sum(-1).mean())


def test_best_is_nearer_and_a_rerun_finds_its_choice(run: Run, source: Path, text: Path, tmp_path: Path) -> None:
    plain, best = tmp_path / "plain", tmp_path / "best"
    assert run("quantize", source, plain, "--format", "compressed-tensors", "-q")[0] == 0
    command = (
        "quantize",
        source,
        best,
        "--format",
        "compressed-tensors",
        "--quality",
        "best",
        "--text",
        text,
        "--json",
    )
    code, out, err = run(*command)
    assert code == 0, err
    request: dict[str, Any] = json.loads((best / "int8convert" / "manifest.json").read_text())["conversion"]
    assert request["options"]["rotate"] is True
    assert request["options"]["round"] == "calibrated"
    assert request["options"]["keep_budget"] == 2.0
    assert divergence(source, best, text) < 0.5 * divergence(source, plain, text)
    assert verify_exact(best).is_passed
    (best / "config.json").unlink()
    before = (best / "model.safetensors").stat().st_mtime_ns
    code, again, err = run(*command)
    assert code == 0, err
    assert json.loads(again)["n_done_shards"] == json.loads(out)["n_shards"]
    assert (best / "model.safetensors").stat().st_mtime_ns == before


def test_other_conversions_in_the_output_decide_nothing(run: Run, source: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("quantize", source, out, "--format", "compressed-tensors", "-q")[0] == 0
    command = ("quantize", source, out, "--format", "compressed-tensors", "--quality", "best", "--text", text)
    code, _, err = run(*command, "--overwrite")
    assert code == 0, err
    assert "converts with --rotate" in " ".join(err.split())


def test_choice_is_said(run: Run, source: Path, text: Path, tmp_path: Path) -> None:
    code, _, err = run("quantize", source, tmp_path / "out", "--quality", "best", "--text", text, "--keep-budget", "1")
    assert code == 0, err
    said = " ".join(err.split())
    assert "--quality best converts with" in said and "expected KL divergence" in said
    assert f"the calibration is in '{tmp_path / 'out'}-calibration'" in said


def test_errors_of_the_parts_name_what_was_typed(
    run: Run, source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    best = ("quantize", source, out, "--quality", "best", "--text", text)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 1000})())
        code, _, err = run(*best)  # second moments
        assert code == 1 and "and the disk of" in err and "hint: leave out --quality best" in err
    with monkeypatch.context() as patch:
        patch.setattr("int8convert.outliers.keep.available_bytes", lambda device: 1000)
        code, _, err = run(*best)  # the damage of rounding
        assert code == 1 and "takes the source's model in memory" in err and "hint: leave out --quality best" in err
    (tmp_path / "short.txt").write_text("a few words")
    shutil.rmtree(f"{out}-calibration")
    code, _, err = run(*best[:-1], tmp_path / "short.txt")
    assert code == 1 and not {"--round", "--moments", "--keep-budget"} & set(err.split())
    assert run("quantize", source, out, "-q")[0] == 0
    code, _, err = run(*best)
    assert code == 1 and "no --quality best then, --quality best --keep-budget 2.0 now" in " ".join(err.split())


@pytest.mark.parametrize(
    ("message", "hint", "expected"),
    [
        ("6 tokens, --round calibrated needs 64", "run calibrate --moments", "6 tokens, --quality best needs 64"),
        ("--rotate-inputs", "convert without --rotate", "--rotate-inputs"),
        ("--keep-budget measures", "leave out --keep-budget", "--quality best measures"),
    ],
)
def test_options_that_best_stands_for_are_not_named(message: str, hint: str, expected: str) -> None:
    for quality, found in (("best", (expected, "leave out --quality best")), (None, (message, hint))):
        with pytest.raises(SourceError) as raised, naming_best(quality):
            raise SourceError(message, hint)
        assert (raised.value.message, raised.value.hint) == found


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--quality", "good"), "it is best, not 'good'"),
        (("--quality", "best", "--rotate"), "--quality best chooses by itself: leave out --rotate"),
        (("--quality", "best", "--lora", "a"), "leave out --lora"),
    ],
)
def test_wrong_usage(run: Run, tmp_path: Path, options: tuple[str, ...], expected: str) -> None:
    code, _, err = run("quantize", tmp_path, tmp_path / "out", *options)
    assert code == 2 and expected in " ".join(err.split())
