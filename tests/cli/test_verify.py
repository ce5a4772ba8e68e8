"""`int8convert verify` as its users meet it: verdict, exit codes, streams, JSON."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from int8convert.checkpoint.directory import read_shard
from int8convert.checkpoint.names import VERIFY_FILE
from tests.cli.conftest import Run
from tests.tools.language_models import SENTENCES, build_tokenizer
from tests.tools.outlier_models import convert, outlier_model, save
from tests.tools.tiny_models import file_bytes

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

EXACT = ("--level", "exact")
LOOSE = ("--device", "cpu", "--max-dnll", "9", "--max-kl", "9")
FC1 = "model.decoder.layers.1.fc1"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tokenizer = build_tokenizer()
    return save(outlier_model(tokenizer), tmp_path / "source", tokenizer)


@pytest.fixture
def out(source: Path, tmp_path: Path, map_in_process: None) -> Path:
    return convert(source, tmp_path / "out")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(SENTENCES * 8), encoding="utf-8")
    return path


def break_code(out: Path) -> None:
    """Change one byte of the file, in its place."""
    path = out / "model.safetensors"
    (stored,) = (tensor for tensor in read_shard(path).tensors if tensor.name == f"{FC1}.weight")
    data = bytearray(path.read_bytes())
    data[stored.offset + 3 * stored.shape[1] + 5] ^= 64
    path.write_bytes(data)


def test_exact_level_passes_and_writes_what_it_found(run: Run, out: Path) -> None:
    before = file_bytes(out)
    code, printed, err = run("verify", out, *EXACT)
    assert code == 0
    lines = printed.splitlines()
    assert lines[0] == f"{out}: passed" and lines[1].startswith("Exact: 12 int8 weights, ")
    rows = {line.split("  ")[0].strip(): line.split() for line in lines if line.endswith(("ok", "FAILED"))}
    assert len(rows) == 13 and rows["codes"][1:] == ["65,536", "0", "ok"] and rows["files"][1] == "1"
    assert err == f"note: written: {out / VERIFY_FILE}\n"
    after = file_bytes(out)
    assert {name: data for name, data in after.items() if name != VERIFY_FILE} == before
    report = json.loads(after[VERIFY_FILE])
    assert (report["schema"], report["is_passed"], report["failures"], report["level"]) == (1, True, [], "exact")


def test_failure_is_exit_code_3_and_comes_first(run: Run, out: Path) -> None:
    break_code(out)
    code, printed, err = run("verify", out)
    assert code == 3
    lines = printed.splitlines()
    assert lines[0] == f"{out}: failed"
    assert lines[1].startswith("  files: model.safetensors: expected sha256 ")
    assert lines[2].startswith(f"  weights: {FC1}.weight row 3 column 5: expected ")
    assert lines[3].startswith(f"  codes: {FC1}.weight row 3 column 5: expected code ")
    assert sum(line.endswith("FAILED") for line in lines) == 3
    assert "Fidelity" not in printed and "note: the models were not run: the exact level failed" in err


def test_both_levels_are_printed_with_what_was_run_and_on_what(run: Run, out: Path) -> None:
    code, printed, err = run("verify", out, *LOOSE, "--sequences", "2", "--thresholds", "inf,3")
    assert code == 0
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    (said,) = (line for line in lines if line.startswith("Fidelity: "))
    assert re.search(r"a blunt default \([\d,]+ tokens\), 2 windows of 64, spread; 126 tokens scored$", said)
    for text in ("dynamic", "outlier threshold 6", "streamed no"):
        assert text in lines
    assert sum(line.startswith(("KL, mean 0.", "perplexity, source ", "delta-NLL ")) for line in lines) == 3
    at = lines.index("Outlier thresholds")
    assert [line.split()[:2] for line in lines[at + 2 : at + 5]] == [[t, "dynamic"] for t in ("3", "6", "inf")]
    notes = err.splitlines()
    assert notes[0].startswith("note: running in memory, at most ")
    assert "measured: 2 of 2 steps" in notes and notes[-1] == f"note: written: {out / VERIFY_FILE}"


def test_page_and_pictures_are_written_where_they_are_asked_for(run: Run, out: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page, figures = tmp_path / "new" / "report.html", tmp_path / "figures"
    code, _, err = run("verify", out, *LOOSE, "--sequences", "2", "--report", page, "--figures", figures)
    assert code == 0 and err.splitlines()[-2:] == [f"note: written: {page}", f"note: written: {figures}"]
    text = page.read_text()
    assert "Passed. " in text and text.count("<img ") == 4 and str(out) in text
    names = ("coverage", "fidelity", "layer-errors", "outlier-map")
    assert sorted(p.name for p in figures.iterdir()) == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]


def test_page_of_a_broken_checkpoint_says_what_is_broken(run: Run, out: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    break_code(out)
    code, _, _ = run("verify", out, "--report", tmp_path / "report.html", "--quiet")
    text = (tmp_path / "report.html").read_text()
    assert code == 3 and "Failed. files: " in text and f"{FC1}.weight row 3 column 5" in text


def test_what_is_kept_of_an_earlier_run_is_said(run: Run, out: Path, text: Path) -> None:
    run("verify", out, *LOOSE, "--text", text, "--length", "32", "--quiet")
    code, _, err = run("verify", out, *EXACT)
    assert code == 0
    assert (
        err.splitlines()[0] == "note: kept in verify.json of an earlier run on the same files: causes, fidelity, text"
    )


def test_streamed_measurement_says_so_and_finds_the_same(run: Run, out: Path, text: Path) -> None:
    found = []
    for options in ((), ("--stream",)):
        code, printed, err = run("verify", out, *LOOSE, "--text", text, "--length", "32", "--json", *options)
        assert (code, err) == (0, "")
        found += json.loads(printed)["fidelity"]
    assert [report["streamed"] for report in found] == [False, True]
    assert found[0]["mean_kl"] == pytest.approx(found[1]["mean_kl"], rel=1e-3)


def test_gate_that_fails_is_exit_code_3(run: Run, out: Path, text: Path) -> None:
    code, printed, _ = run("verify", out, "--text", text, "--length", "32", "--max-kl", "0", "--max-dnll", "9")
    assert code == 3
    assert printed.splitlines()[1].startswith("  fidelity (dynamic): mean KL is ")


def test_truncated_shard_is_a_failure_and_no_error(run: Run, out: Path) -> None:
    path = out / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    code, printed, err = run("verify", out)
    assert code == 3 and "the models were not run" in err
    assert printed.splitlines()[1].startswith("  files: ") and "model.safetensors" in printed.splitlines()[1]


def test_json_is_one_object_and_what_was_written(run: Run, out: Path) -> None:
    break_code(out)
    code, printed, err = run("verify", out, *EXACT, "--json")
    found = json.loads(printed)
    assert (code, err, found["is_passed"]) == (3, "", False)
    assert found.pop("written") == str(out / VERIFY_FILE)
    written = json.loads((out / VERIFY_FILE).read_text())
    assert (written["out"], written["reference"], written["exact"]["reference"]) == (out.name, "source", "source")
    same = ("is_passed", "failures", "files", "gates", "level")
    assert {key: written[key] for key in same} == {key: found[key] for key in same}
    assert written["exact"]["checks"] == found["exact"]["checks"]
    checks = {check["name"]: check for check in found["exact"]["checks"]}
    assert [name for name, check in checks.items() if not check["is_passed"]] == ["files", "weights", "codes"]
    finding = checks["codes"]["findings"][0]
    assert (finding["tensor"], finding["row"], finding["column"], finding["n_places"]) == (f"{FC1}.weight", 3, 5, 1)


def test_what_cannot_be_measured_is_exit_code_1_and_writes_nothing(run: Run, out: Path, source: Path) -> None:
    source.rename(source.with_name("moved"))
    code, printed, err = run("verify", out, *EXACT)
    assert (code, printed) == (1, "") and err.startswith("error: the source of ") and "--reference SRC" in err
    assert not (out / VERIFY_FILE).exists()
    code, _, _ = run("verify", out, *EXACT, "--reference", source.with_name("moved"))
    assert code == 0
    code, printed, _ = run("verify", out, *EXACT, "--json")
    assert code == 1 and json.loads(printed)["error"]["code"] == "source"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--level", "exactly"),
        ("--dataset", "imagenet"),
        ("--text", "a.txt", "--dataset", "c4"),
        ("--thresholds", "0,x"),
        ("--thresholds", "-1"),
        ("--convention", "mine"),
        ("--max-kl", "-1"),
        ("--device", "gpu"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...], run: Run, out: Path) -> None:
    code, printed, err = run("verify", out, *arguments)
    assert (code, printed) == (2, "") and arguments[-2] in err


def test_quiet_prints_the_result_only(run: Run, out: Path) -> None:
    code, printed, err = run("verify", out, *EXACT, "--quiet")
    assert (code, err) == (0, "") and "passed" in printed


def test_report_that_cannot_be_written_is_said_and_changes_no_verdict(run: Run, out: Path) -> None:
    (out / VERIFY_FILE).mkdir()
    code, printed, err = run("verify", out, *EXACT)
    assert code == 0 and "passed" in printed and "the report could not be written into" in err


def test_converting_anew_removes_what_was_said_of_the_old(run: Run, out: Path, source: Path) -> None:
    run("verify", out, *EXACT)
    assert (out / VERIFY_FILE).exists()
    code, _, _ = run("quantize", source, out, "--overwrite", "--skip", "fc1", "--min-coverage", "10")
    assert code == 0 and not (out / VERIFY_FILE).exists()


def test_a_bar_is_shown_where_somebody_watches(run: Run, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code, printed, err = run("verify", out, *EXACT)
    assert code == 0 and "passed" in printed and "written" in err


def test_exact_level_loads_no_torch(out: Path) -> None:
    """Memory stays flat, and the command is quick; the model map is made in a child of its own, or known."""
    import subprocess

    code = (
        "import sys; from int8convert.verification.verify import verify\n"
        f"report = verify({str(out)!r}, level='exact')\n"
        "print(report.is_passed, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["True", "False"]
