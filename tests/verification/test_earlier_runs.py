"""A failed measurement stays on record until the same is measured again and passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from int8convert.checkpoint.names import OUTLIERS_FILE, VERIFY_FILE
from int8convert.errors import UnverifiedError
from int8convert.inspection import inspect
from int8convert.publish.card import make_card
from int8convert.publish.finished import check_verified, read_finished
from int8convert.publish.verify_command import Gates
from int8convert.publish.verify_json import Status, Verdict
from int8convert.runtime.text.texts import Text
from int8convert.verification.checks import Check, Finding
from int8convert.verification.earlier_runs import with_earlier_failures, write_report
from int8convert.verification.options import Execution
from int8convert.verification.tasks import TaskReport
from int8convert.verification.verify import verify
from int8convert.verification.verify_report import VerifyReport
from tests.cli.conftest import Run, run
from tests.conftest import in_this_process
from tests.tools.language_models import SENTENCES
from tests.verification.conftest import text
from tests.verification.test_verify import made, own_out

__all__ = ["made", "own_out", "run", "text"]

pytestmark = [
    pytest.mark.usefixtures("map_in_process"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

STRICT, LOOSE = Gates(0.5, 1e-9), Gates(0.5, 1e-3)
"""What the model fails, and what it passes."""


@pytest.fixture(scope="module")
def measured_once(made: Path, tmp_path_factory: pytest.TempPathFactory) -> VerifyReport:
    """Both levels, on 4 windows of 32 tokens, passed."""
    text = tmp_path_factory.mktemp("measured") / "text.txt"
    text.write_text(" ".join(SENTENCES * 8), encoding="utf-8")
    with in_this_process():
        report = verify(
            made / "out", text=Text(text, n_sequences=4, length=32), execution=Execution("cpu"), gates=LOOSE
        )
    assert report.is_passed and report.fidelity[0].n_tokens == 124
    return report


@pytest.fixture
def measured(measured_once: VerifyReport, own_out: Path) -> VerifyReport:
    """The same of an output that a test may change."""
    return replace(measured_once, out=str(own_out))


def record(report: VerifyReport) -> VerifyReport:
    """What a run that found this writes and returns."""
    judged = with_earlier_failures(replace(report, earlier_failures=()))
    write_report(judged)
    return judged


def exact_only(report: VerifyReport) -> VerifyReport:
    return replace(report, level="exact", gates=Gates(), text=None, fidelity=(), tasks=())


def exact_failed(report: VerifyReport) -> VerifyReport:
    finding = Finding("config.json", "one", "another")
    broken = replace(report.exact, checks=(Check("config", False, 1, (finding,), 1),))
    return replace(exact_only(report), exact=broken)


def not_opened(report: VerifyReport) -> VerifyReport:
    return replace(exact_failed(report), files={})


def fewer_tokens(report: VerifyReport) -> VerifyReport:
    return replace(report, fidelity=tuple(replace(run, n_tokens=run.n_tokens - 1) for run in report.fidelity))


def other_text(report: VerifyReport) -> VerifyReport:
    assert report.text is not None
    return replace(report, text=replace(report.text, sha256="0" * 64))


def shorter_windows(report: VerifyReport) -> VerifyReport:
    """More tokens in all, and each with less before it."""
    assert report.text is not None
    return replace(more_tokens(report), text=replace(report.text, n_sequences=333, length=4))


def other_windows(report: VerifyReport) -> VerifyReport:
    assert report.text is not None
    return replace(more_tokens(report), text=replace(report.text, convention="another"))


def other_mode(report: VerifyReport) -> VerifyReport:
    return replace(report, fidelity=tuple(replace(run, mode="weight-only") for run in report.fidelity))


def better(report: VerifyReport) -> VerifyReport:
    """As if the model had been nearer to its source than the strict gates ask."""
    runs = tuple(replace(run, mean_kl=0.0, mean_kl_interval=(0.0, 0.0)) for run in report.fidelity)
    return replace(report, gates=STRICT, fidelity=runs)


def undecided(report: VerifyReport) -> VerifyReport:
    """As if the strict gate had been inside the interval."""
    runs = tuple(replace(run, mean_kl=2e-9, mean_kl_interval=(0.0, 4e-9)) for run in report.fidelity)
    return replace(report, gates=STRICT, fidelity=runs)


def more_tokens(report: VerifyReport) -> VerifyReport:
    return replace(better(report), fidelity=tuple(replace(r, n_tokens=999) for r in better(report).fidelity))


def more_windows(report: VerifyReport) -> VerifyReport:
    """Cut in the same way, which the report says in other words."""
    assert report.text is not None
    convention = report.text.convention.replace("4 windows", "9 windows")
    assert convention != report.text.convention
    return replace(more_tokens(report), text=replace(report.text, n_sequences=9, convention=convention))


def unchanged(report: VerifyReport) -> VerifyReport:
    return report


Run_ = Callable[[VerifyReport], VerifyReport]


def looser_and_undecided(report: VerifyReport) -> VerifyReport:
    """With looser gates, too, inside the interval."""
    runs = tuple(replace(run, mean_kl=5e-4, mean_kl_interval=(1e-4, 2e-3)) for run in report.fidelity)
    return replace(report, gates=LOOSE, fidelity=runs)


LATER: dict[str, tuple[list[Run_], bool, list[Status]]] = {
    "a lower level": ([exact_only], False, [Status.STANDS]),
    "a lower level, twice": ([exact_only, exact_only], False, [Status.STANDS]),
    "a lower level that failed first": ([exact_failed, exact_only], False, [Status.STANDS]),
    "a checkpoint that did not open first": ([not_opened, exact_only], False, [Status.STANDS]),
    "fewer tokens": ([fewer_tokens], False, [Status.STANDS]),
    "another text": ([other_text], False, [Status.STANDS]),
    "shorter windows": ([shorter_windows], False, [Status.STANDS]),
    "windows that are cut in another way": ([other_windows], False, [Status.STANDS]),
    "another arithmetic": ([other_mode], False, [Status.STANDS]),
    "looser gates": ([unchanged], True, [Status.OVERRULED]),
    "looser gates, then a lower level": ([unchanged, exact_only, exact_only], True, [Status.OVERRULED]),
    "looser gates, then fewer tokens": ([unchanged, fewer_tokens], False, [Status.STANDS]),
    "looser gates, then another text": ([unchanged, other_text, exact_only], False, [Status.STANDS]),
    "too few tokens to say": ([undecided], False, [Status.STANDS]),
    "too few tokens to say, then a lower level": ([undecided, exact_only], False, [Status.STANDS]),
    "too few tokens to say with looser gates": ([looser_and_undecided], False, [Status.STANDS]),
    "too few tokens to say, then the same gates": ([undecided, better], True, []),
    "the same gates": ([better], True, []),
    "the same gates, then too few tokens to say and a lower level": ([better, undecided, exact_only], True, []),
    "the same gates on more windows": ([more_windows, exact_only], True, []),
    "the same gates on more tokens": ([more_tokens, exact_only], True, []),
}


@pytest.mark.parametrize("how", LATER)
def test_failure_stands_until_the_same_is_measured_again(how: str, measured: VerifyReport) -> None:
    runs, is_passed, statuses = LATER[how]
    failed = record(replace(measured, gates=STRICT))
    assert not failed.is_passed and failed.earlier_failures == ()
    for run_ in runs:
        report = record(run_(measured))
    assert report.is_passed is is_passed
    assert [failure.status for failure in report.earlier_failures] == statuses
    written = json.loads((Path(report.out) / VERIFY_FILE).read_text())
    assert written["is_passed"] is is_passed and written["failures"] == list(report.failures)
    assert [failure["status"] for failure in written["earlier_failures"]] == statuses
    output = read_finished(report.out)
    assert bool(output.unverified) is not is_passed
    card = make_card(output, "me/x", inspect(report.out))
    assert ("mean KL is" in card) is bool(statuses), "the card tells what is still on record"
    if not is_passed:
        (line,) = (line for line in report.failures if line.startswith("an earlier run"))
        assert line.startswith("an earlier run, on 124 tokens of text.txt: fidelity (dynamic): mean KL is ")
        with pytest.raises(UnverifiedError, match="did not pass when it was verified"):
            check_verified(output)


def test_undecided_run_alone_is_no_failure_and_no_pass(measured: VerifyReport) -> None:
    for report in (record(undecided(measured)), record(undecided(measured))):
        assert (report.verdict, report.is_passed) == (Verdict.UNDECIDED, False)
        assert report.failures == () and report.earlier_failures == ()
    written = json.loads((Path(measured.out) / VERIFY_FILE).read_text())
    assert (written["is_passed"], written["verdict"], written["failures"]) == (False, "undecided", [])
    assert record(exact_only(measured)).is_passed, "an undecided run leaves nothing on record"


def test_arithmetic_that_is_undecided_keeps_its_failure_beside_one_that_fails_again(measured: VerifyReport) -> None:
    """Else the failure of the first arithmetic would go unseen with a failure of the second one alone."""
    one, other = measured.fidelity[0], replace(measured.fidelity[0], mode="weight-only")
    record(replace(measured, gates=STRICT, fidelity=(one, other)))
    (undecided_one,) = undecided(measured).fidelity
    report = record(replace(measured, gates=STRICT, fidelity=(undecided_one, other)))
    assert [failure.measured for failure in report.standing] == [{"dynamic": 124, "weight-only": 124}]
    (better_one,) = better(measured).fidelity
    report = record(replace(measured, gates=STRICT, fidelity=(better_one, other)))
    assert report.standing == () and [line[:23] for line in report.failures] == ["fidelity (weight-only):"]


def test_failures_on_two_texts_are_cleared_one_by_one(measured: VerifyReport) -> None:
    for report in (measured, other_text(measured)):
        record(replace(report, gates=STRICT))
    assert len(record(exact_only(measured)).standing) == 2
    assert len(record(better(measured)).standing) == 1
    assert record(better(other_text(measured))).is_passed


def test_failure_that_was_measured_again_is_not_told_twice(measured: VerifyReport) -> None:
    for _ in range(3):
        record(replace(measured, gates=STRICT))
    assert len(record(exact_only(measured)).standing) == 1
    record(replace(fewer_tokens(measured), gates=STRICT))
    assert [f.measured for f in record(exact_only(measured)).standing] == [{"dynamic": 124}, {"dynamic": 123}]


def test_no_number_of_later_failures_drops_one_that_stands(measured: VerifyReport) -> None:
    record(replace(measured, gates=STRICT))
    for n in range(25):
        assert measured.text is not None
        record(replace(measured, gates=STRICT, text=replace(measured.text, sha256=f"{n:064}")))
    assert len(record(exact_only(measured)).standing) == 26


def test_of_many_failures_on_one_text_those_stay_that_clear_the_others(measured: VerifyReport) -> None:
    for n in [*range(50, 75), *range(30, 50)]:
        runs = tuple(replace(run, n_tokens=n) for run in measured.fidelity)
        record(replace(measured, gates=STRICT, fidelity=runs))
    assert {"dynamic": 74} in [failure.measured for failure in record(exact_only(measured)).standing]
    assert len(record(exact_only(measured)).standing) <= 20


def test_failures_of_other_files_are_bounded(measured: VerifyReport) -> None:
    for n in range(25):
        record(replace(measured, gates=STRICT, files={**measured.files, "config.json": f"{n:064}"}))
    report = record(exact_only(measured))
    assert report.is_passed and len(report.earlier_failures) == 20


def test_failure_of_stricter_gates_outlives_a_failure_of_looser_ones(measured: VerifyReport) -> None:
    """Else two runs that fail would be cleared by one that passes the looser of their gates."""
    middle = Gates(0.5, 1e-7)
    record(replace(measured, gates=STRICT))
    assert not record(replace(measured, gates=middle)).is_passed
    runs = tuple(replace(run, mean_kl=1e-8, mean_kl_interval=(5e-9, 2e-8)) for run in measured.fidelity)
    nearer = replace(measured, gates=middle, fidelity=runs)
    report = record(nearer)
    assert report.is_passed
    assert [(f.gates, f.status) for f in report.earlier_failures] == [(STRICT, Status.OVERRULED)]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", OUTLIERS_FILE])
def test_failure_is_of_the_files_that_were_measured(name: str, measured: VerifyReport) -> None:
    record(replace(measured, gates=STRICT))
    changed = replace(exact_only(measured), files={**measured.files, name: "0" * 64})
    assert record(changed).is_passed
    assert not record(exact_only(measured)).is_passed, "the files are back, and so is the failure"


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "int8convert/manifest.json"])
def test_files_that_decide_nothing_change_nothing(name: str, measured: VerifyReport) -> None:
    record(replace(measured, gates=STRICT))
    assert not record(replace(exact_only(measured), files={**measured.files, name: "0" * 64})).is_passed


def edit_verify(out: str, change: Callable[[dict[str, Any]], object]) -> None:
    path = Path(out) / VERIFY_FILE
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def as_before(content: dict[str, Any]) -> None:
    """As the version before this wrote it: three files, no failures of others."""
    names = ("config.json", "int8convert/manifest.json")
    content.update(files={name: content["files"][name] for name in names}, tool="int8convert 0.0.1")
    content.pop("earlier_failures")


def test_failure_that_an_older_version_wrote_stands_too(measured: VerifyReport) -> None:
    record(replace(measured, gates=STRICT))
    edit_verify(measured.out, as_before)
    assert not record(exact_only(measured)).is_passed
    assert not record(exact_only(measured)).is_passed
    assert record(better(measured)).is_passed


NONSENSE: dict[str, Callable[[dict[str, Any]], object]] = {
    "no list": lambda content: content.update(earlier_failures="x"),
    "numbers": lambda content: content.update(earlier_failures=[1, None, {}]),
    "tokens of 400 digits": lambda content: content["fidelity"][0].update(n_tokens=10**400),
    "gates of 400 digits": lambda content: content["gates"].update(max_kl=10**400),
    "gates that are none": lambda content: content.update(gates=[]),
    "files that are none": lambda content: content.update(files=5),
    "failures that are none": lambda content: content.update(failures={"fidelity": 1}),
}


@pytest.mark.parametrize("how", NONSENSE)
def test_nonsense_in_a_report_is_no_failure_and_no_error(how: str, measured: VerifyReport) -> None:
    record(replace(measured, gates=STRICT))
    edit_verify(measured.out, NONSENSE[how])
    assert all(failure.level == "fidelity" for failure in record(exact_only(measured)).earlier_failures)


def test_report_that_cannot_be_read_is_said_to_be_lost(measured: VerifyReport) -> None:
    (Path(measured.out) / VERIFY_FILE).write_text("{")
    report = record(exact_only(measured))
    assert report.is_passed and "what earlier runs found is not known: 'verify.json'" in report.exact.notes[-1]


def test_command_cuts_the_text_as_it_was_measured(measured: VerifyReport) -> None:
    assert measured.text is not None
    halves = replace(measured.text, convention="halves: 4 windows")
    record(replace(measured, gates=STRICT, text=halves))
    (failure,) = record(exact_only(measured)).standing
    command = "int8convert verify OUT --text text.txt --sequences 4 --length 32 --convention halves"
    assert failure.command("OUT") == f"{command} --max-dnll 0.5 --max-kl 1e-09"
    with pytest.raises(UnverifiedError) as caught:
        check_verified(read_finished(measured.out))
    assert failure.command(measured.out) in caught.value.hint


def answered(n_samples: int, p_value: float) -> TaskReport:
    counts = {"n_samples": n_samples, "n_only_reference": 30, "n_only_int8": 2}
    return TaskReport("piqa", "acc", reference=0.7, int8=0.6, p_value=p_value, **counts)


def test_tasks_are_cleared_by_as_many_questions(measured: VerifyReport) -> None:
    tasks = replace(measured, level="tasks", tasks=(answered(100, 1e-9),))
    assert not record(tasks).is_passed
    assert not record(measured).is_passed, "a run of the models alone"
    assert not record(replace(tasks, tasks=(answered(99, 0.5),))).is_passed
    report = record(exact_only(measured))
    command = "int8convert verify OUT --level tasks --tasks piqa --max-dnll 0.5 --max-kl 0.001"
    assert report.standing[0].command("OUT") == command
    assert record(replace(tasks, tasks=(answered(100, 0.5),))).is_passed


def test_command_says_that_an_earlier_failure_stands_and_what_clears_it(run: Run, own_out: Path, text: Path) -> None:
    window = ("--text", text, "--sequences", "2", "--length", "32", "--device", "cpu", "--max-dnll", "9")
    assert run("verify", own_out, *window, "--max-kl", "1e-9")[0] == 3

    code, printed, err = run("verify", own_out, "--level", "exact")

    assert code == 3
    lines = printed.splitlines()
    assert lines[0] == f"{own_out}: failed"
    assert lines[1].startswith("  an earlier run, on 62 tokens of text.txt: fidelity (dynamic): mean KL is ")
    command = f"int8convert verify {own_out} --text text.txt --sequences 2 --length 32 --max-dnll 9 --max-kl 1e-09"
    assert f"note: this run does not clear that failure; passing this command does: {command}" in err
    code, printed, _ = run("verify", own_out, *window, "--max-kl", "9", "--json")
    assert code == 0 and json.loads(printed)["earlier_failures"][0]["status"] == "overruled"
    assert run("verify", own_out, "--level", "exact", "--json")[0] == 0
