"""Three verdicts: what passes, what fails, and what too few tokens were measured for."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from int8convert.checkpoint.names import VERIFY_FILE
from int8convert.errors import UnverifiedError
from int8convert.publish.finished import check_verified, read_finished
from int8convert.publish.verify_command import Gates, Undecided, deciding_run
from int8convert.publish.verify_json import Verdict
from int8convert.runtime.text.texts import Text
from int8convert.verification.fidelity.level import FidelityReport
from int8convert.verification.fidelity.paired_statistics import interval
from int8convert.verification.options import Execution
from int8convert.verification.page import render, say_verdict
from int8convert.verification.verdict import fidelity_failures, fidelity_verdict, undecided_measurements
from int8convert.verification.verify import verify
from int8convert.verification.verify_report import VerifyReport
from tests.cli.conftest import Run, run
from tests.tools.language_models import SENTENCES
from tests.tools.tiny_models import edit_config
from tests.verification.conftest import text
from tests.verification.test_verify import made, own_out

__all__ = ["made", "own_out", "run", "text"]

pytestmark = [
    pytest.mark.usefixtures("map_in_process"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

RUN = FidelityReport(
    n_sequences=16,
    n_tokens=16 * 255,
    reference_perplexity=9.0,
    perplexity=9.1,
    delta_nll=0.0,
    delta_nll_interval=(-0.001, 0.001),
    mean_kl=0.001,
    mean_kl_interval=(0.0005, 0.0015),
    median_kl=0.001,
    p99_kl=0.01,
    p999_kl=0.02,
    same_top1=0.99,
    delta_p=0.01,
    mode="dynamic",
    threshold=6.0,
    layer_errors=(),
    outlier_share=0.01,
    dtype="float16",
    reference_dtype="float32",
    device="cpu",
    streamed=False,
    peak_memory_bytes=1,
    seconds=1.0,
    convention="spread",
)
"""A run that passes the default gates of 0.01."""


def kl(low: float, high: float) -> FidelityReport:
    mean = 0.005 if low == -math.inf else (low + high) / 2
    return replace(RUN, mean_kl=mean, mean_kl_interval=(low, high))


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.002, 0.00999, Verdict.PASSED),
        (0.002, 0.01, Verdict.PASSED),
        (0.002, 0.0101, Verdict.UNDECIDED),
        (0.0099, 0.3, Verdict.UNDECIDED),
        (0.01, 0.3, Verdict.UNDECIDED),
        (0.0101, 0.3, Verdict.FAILED),
        (-math.inf, math.inf, Verdict.UNDECIDED),
        (math.nan, math.nan, Verdict.FAILED),
    ],
)
def test_verdict_is_that_of_the_whole_interval(low: float, high: float, verdict: Verdict) -> None:
    assert fidelity_verdict(Gates(), kl(low, high)) is verdict
    dnll = replace(RUN, delta_nll=kl(low, high).mean_kl, delta_nll_interval=(low, high))
    assert fidelity_verdict(Gates(), dnll) is verdict
    assert fidelity_verdict(Gates(), replace(dnll, mean_kl=0.3, mean_kl_interval=(0.2, 0.4))) is Verdict.FAILED
    assert fidelity_verdict(Gates(max_dnll=math.inf, max_kl=math.inf), RUN) is Verdict.PASSED


@pytest.mark.parametrize(
    ("low", "high", "n_sequences"),
    [
        (4, 10, 288),  # the gate of 8 is one from the mean, a third of the half width: 2 * 16 * 9
        (6, 12, 288),
        (2, 10, 128),  # half of the half width: 2 * 16 * 4
        (0, 16, None),  # at the gate
        (0, 16.0625, None),  # less than a hundredth of the half width beside it
        (0, 16.5, 34848),  # 33 times nearer than the half width: 2 * 16 * 33 * 33
        (0, 8.5, 42),  # 2 * 16 * (4.25 / 3.75) ** 2 = 41.1
        (-math.inf, math.inf, 16),
    ],
)
def test_number_that_would_do_is_that_of_the_half_width(low: float, high: float, n_sequences: int | None) -> None:
    report = kl(low, high) if high < math.inf else replace(kl(low, high), n_sequences=1, n_tokens=255)
    (found,) = undecided_measurements(Gates(max_kl=8.0), report)
    n_tokens = None if n_sequences is None else n_sequences * 255
    assert (found.gate, found.n_sequences, found.n_tokens) == ("max_kl", n_sequences, n_tokens)
    if n_sequences is None:
        assert found.line.endswith("; no number of tokens would do, because the mean is at the gate")
    else:
        assert f"; about {n_tokens:,} tokens in {n_sequences:,} windows would do" in found.line


def test_number_that_would_do_decides_most_runs_of_windows_like_those_that_were_measured() -> None:
    """Of runs that are undecided, one with as many windows as it says is decided by 7 of 10, and on the right side."""
    random = np.random.default_rng(0)

    def measured(mean: float, n: int) -> FidelityReport:
        sums, tokens = random.normal(mean, 0.004, n), np.ones(n)
        return replace(RUN, n_sequences=n, n_tokens=n, mean_kl=sums.mean(), mean_kl_interval=interval(sums, tokens))

    verdicts = []
    for mean in random.uniform(0.008, 0.012, 600):
        for found in undecided_measurements(Gates(), measured(mean, 16)):
            if found.n_sequences is not None and found.n_sequences < 20_000:
                right = Verdict.PASSED if mean < 0.01 else Verdict.FAILED
                verdict = fidelity_verdict(Gates(), measured(mean, found.n_sequences))
                verdicts.append("undecided" if verdict is Verdict.UNDECIDED else verdict is right)
    assert len(verdicts) > 300
    assert 0.6 < verdicts.count(True) / len(verdicts) < 0.85
    assert verdicts.count(False) / len(verdicts) < 0.03


def test_lines_say_mean_interval_gate_and_what_is_assumed() -> None:
    (found,) = undecided_measurements(Gates(), kl(0.004, 0.012))
    assert found.line == (
        "fidelity (dynamic): mean KL is 0.008, at 95 % confidence between 0.004 and 0.012, expected at most 0.01; "
        "about 32,640 tokens in 128 windows would do if mean and spread stay as they are"
    )
    (line,) = fidelity_failures(Gates(), kl(0.02, 0.04))
    assert line == "fidelity (dynamic): mean KL is 0.03, at 95 % confidence at least 0.02, expected at most 0.01"


TEXT = {"name": "my text.txt", "n_text_tokens": 4500, "length": 256, "n_sequences": 16, "convention": "spread: 16"}


@pytest.mark.parametrize(
    ("needed", "text", "options", "all_options"),
    [
        ([("max_kl", 17)], TEXT, "--sequences 17", "--text 'my text.txt' --sequences 17 --length 256"),
        ([("max_kl", 18)], TEXT, "--text FILE --sequences 18 --length 256", "--text FILE --sequences 18 --length 256"),
        (
            [("max_dnll", 12), ("max_kl", 9)],
            {**TEXT, "convention": "strided: 9", "n_text_tokens": 11 * 128 + 256},
            "--sequences 12",
            "--text 'my text.txt' --sequences 12 --length 256 --convention strided",
        ),
        (
            [("max_kl", 18)],
            {**TEXT, "dataset": "c4", "convention": "contiguous: 16"},
            "--text FILE --sequences 18 --length 256",
            "--text FILE --sequences 18 --length 256 --convention contiguous",
        ),
        (
            [("max_kl", 18)],
            {**TEXT, "is_default": True},
            "--text FILE --sequences 18 --length 256",
            "--text FILE --sequences 18 --length 256",
        ),
        (
            [("max_kl", None)],
            TEXT,
            "--max-kl X",
            "--text 'my text.txt' --sequences 16 --length 256 --max-dnll 0.5 --max-kl X",
        ),
    ],
)
def test_run_that_would_decide(
    needed: list[tuple[str, int | None]], text: dict[str, object], options: str, all_options: str
) -> None:
    found = deciding_run([Undecided("", gate, n, n) for gate, n in needed], text)
    assert shlex.join(found.options()) == options
    gates = {"max_dnll": 0.5, "max_kl": 0.02} if needed[0][1] is None else {"max_kl": 0.01}
    assert shlex.join(found.all_options(text, gates)) == all_options


@pytest.fixture
def blunt(own_out: Path) -> Path:
    """One whose outlier columns are not found: its KL divergence varies much from window to window."""
    block = json.loads((own_out / "config.json").read_text())["quantization_config"]
    edit_config(own_out, quantization_config={**block, "llm_int8_threshold": 1000.0})
    manifest = own_out / "int8convert" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["conversion"]["options"]["threshold"] = 1000.0
    manifest.write_text(json.dumps(content))
    return own_out


WINDOWS = ("--length", "32", "--device", "cpu", "--max-dnll", "0.5", "--max-kl", "0.001")


def test_too_few_windows_say_so_and_the_number_that_they_name_decides(run: Run, blunt: Path, tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text(" ".join(SENTENCES * 24), encoding="utf-8")

    code, printed, err = run("verify", blunt, "--text", text, "--sequences", "4", *WINDOWS)

    assert code == 4
    lines = printed.splitlines()
    assert lines[0] == f"{blunt}: too few tokens to say"
    assert (
        lines[1].startswith("  fidelity (dynamic): mean KL is 0.00") and " expected at most 0.001; about " in lines[1]
    )
    report = json.loads((blunt / VERIFY_FILE).read_text())
    assert (report["verdict"], report["is_passed"], report["failures"]) == ("undecided", False, [])
    (undecided,) = report["undecided"]
    assert (undecided["line"], undecided["gate"]) == (lines[1].strip(), "max_kl")
    n = undecided["n_sequences"]
    assert 8 < n < 33 and undecided["n_tokens"] == n * 31
    assert f"note: to decide, run the same command with --sequences {n}\n" in err

    output = read_finished(blunt)
    assert output.unverified == f"too few tokens were measured to say whether it passes: {undecided['line']}"
    with pytest.raises(UnverifiedError) as caught:
        check_verified(output)
    command = f"int8convert verify {blunt} --text long.txt --sequences {n} --length 32 --max-dnll 0.5 --max-kl 0.001"
    assert f"run `{command}`, or pass --allow-unverified" in caught.value.hint

    code, printed, _ = run("verify", blunt, "--text", text, "--sequences", str(n), *WINDOWS, "--json")
    assert code == 3 and json.loads(printed)["verdict"] == "failed"


def test_text_that_is_too_short_is_said_to_be(run: Run, blunt: Path, text: Path) -> None:
    code, _, err = run("verify", blunt, "--text", text, "--sequences", "4", *WINDOWS)
    assert code == 4
    assert "note: to decide, run the same command with --text FILE --sequences 22 --length 32\n" in err
    assert "note: this text has 375 tokens, too few for these windows\n" in err


def test_one_window_decides_nothing(own_out: Path, text: Path) -> None:
    report = verify(own_out, text=Text(text, n_sequences=1, length=32), execution=Execution("cpu"))
    assert report.verdict is Verdict.UNDECIDED and [each.n_sequences for each in report.undecided] == [16, 16]


def test_page_says_that_too_few_tokens_were_measured(blunt: Path, text: Path) -> None:
    report = verify(
        blunt, text=Text(text, n_sequences=4, length=32), execution=Execution("cpu"), gates=Gates(0.01, 0.001)
    )
    assert len(report.undecided) == 2
    assert say_verdict(report).startswith("Too few tokens to say. fidelity (dynamic): delta-NLL is ")
    pytest.importorskip("jinja2")
    page = render(report, [])
    assert '<body class="undecided">' in page and f"<title>{blunt}: undecided</title>" in page
    assert page.count("would do if mean and spread stay as they are") == 3


def test_exact_level_has_two_verdicts(own_out: Path) -> None:
    report = verify(own_out, level="exact")
    assert report.verdict is Verdict.PASSED and report.undecided == ()
    edit_config(own_out, activation_function="gelu")
    failed: VerifyReport = verify(own_out, level="exact")
    assert failed.verdict is Verdict.FAILED


@pytest.mark.parametrize(
    "changes",
    [
        {"undecided": 5},
        {"undecided": [1, {}, {"line": "x", "gate": ["max_kl"], "n_sequences": 5, "n_tokens": 5}]},
        {"undecided": [{"line": "x", "gate": "max_kl", "n_sequences": 10**400, "n_tokens": 5}]},
        {"undecided": [{"line": "x", "gate": "rm -rf", "n_sequences": None, "n_tokens": None}]},
        {"verdict": ["undecided"]},
    ],
)
def test_nonsense_that_is_undecided_is_not_verified_and_no_error(changes: dict[str, object], own_out: Path) -> None:
    report = verify(own_out, level="exact").to_published_json()
    written = {**report, "is_passed": False, "verdict": "undecided", "text": [], "gates": {"max_kl": []}, **changes}
    (own_out / VERIFY_FILE).write_text(json.dumps(written))
    output = read_finished(own_out)
    assert output.unverified == "it did not pass when it was verified"
    with pytest.raises(UnverifiedError) as caught:
        check_verified(output)
    assert f"run `int8convert verify {own_out}`, or pass" in caught.value.hint


def test_undecided_lines_of_a_stranger_are_escaped(own_out: Path) -> None:
    report = verify(own_out, level="exact").to_published_json()
    entry = {"line": "x\x1b[2J", "gate": "max_kl", "n_sequences": 5, "n_tokens": 5}
    written = {**report, "is_passed": False, "verdict": "undecided", "text": 1, "gates": 1, "undecided": [entry]}
    (own_out / VERIFY_FILE).write_text(json.dumps(written))
    output = read_finished(own_out)
    assert output.unverified == "too few tokens were measured to say whether it passes: x\\x1b[2J"
