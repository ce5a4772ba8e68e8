"""The command line as its users meet it: what goes to which stream, exit codes, help."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGINT, SIGTERM

import pytest

from int8convert.cli.app import main
from tests.cli.conftest import Run
from tests.tools.tiny_models import edit_config, file_bytes, save_checkpoint

COMMANDS = ("quantize", "calibrate", "inspect", "export", "verify", "outliers", "upload", "generate")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_checkpoint("opt", tmp_path / "source", max_shard_size="60KB")


def test_quantize_prints_the_result_on_stdout_and_progress_on_stderr(run: Run, source: Path, tmp_path: Path) -> None:
    code, out, err = run("quantize", source, tmp_path / "out")
    assert code == 0
    assert "82.4 % of the parameters" in out and "fc2" in out and "embedding, tied" in out
    assert re.findall(r"shard (\d) of (\d)", err) == [(str(i + 1), "3") for i in range(3)]
    assert "shard 1" not in out


def test_quiet_prints_the_result_only(run: Run, source: Path, tmp_path: Path) -> None:
    code, out, err = run("quantize", source, tmp_path / "out", "--quiet")
    assert (code, err) == (0, "") and "82.4 %" in out


def test_json_is_one_object_and_nothing_else(run: Run, source: Path, tmp_path: Path) -> None:
    code, out, err = run("quantize", source, tmp_path / "out", "--json")
    report = json.loads(out)
    assert (code, err, report["schema"]) == (0, "", 1)
    assert report["n_shards"] == 3 and 0.8 < report["coverage"] < 0.83
    assert report["kept"][0].keys() == {"reason", "n_tensors", "n_parameters"}


def test_error_is_two_lines_on_stderr(run: Run, source: Path, tmp_path: Path) -> None:
    code, out, err = run("quantize", source, source)
    assert (code, out) == (1, "")
    first, second = err.splitlines()
    assert first.startswith("error: OUT '") and second.startswith("hint: ")


def test_error_as_json(run: Run, tmp_path: Path) -> None:
    code, out, err = run("quantize", tmp_path / "[bold]nowhere", tmp_path / "out", "--json")
    error = json.loads(out)["error"]
    assert code == 1 and len(err.splitlines()) == 2
    assert error.keys() == {"code", "message", "hint"} and error["code"] == "source"
    assert "[bold]nowhere" in error["message"] and "[bold]nowhere" in err


def test_debug_adds_the_traceback(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from int8convert.errors import SourceError

    monkeypatch.setenv("INT8CONVERT_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["int8convert", "inspect", str(tmp_path / "nowhere")])
    with pytest.raises((SystemExit, SourceError)):
        main()


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize"],
        ["quantize", "src"],
        ["quantize", "src", "out", "--threshold", "six"],
        ["quantize", "src", "out", "--threshold", "-1"],
        ["quantize", "src", "out", "--workers", "0"],
        ["quantize", "src", "out", "--min-coverage", "101"],
        ["quantize", "src", "out", "--max-shard-size", "5 apples"],
        ["quantize", "src", "out", "--device", "tpu"],
        ["quantize", "src", "out", "--no-such-option"],
        ["inspect"],
        ["export", "out"],
        ["export", "out", "new"],
        ["export", "out", "new", "--format", "gguf"],
        ["export", "out", "new", "--dequantize", "int8"],
        ["export", "out", "new", "--format", "torchao", "--dequantize", "float16"],
        ["export", "out", "new", "--max-shard-size", "5 apples"],
        ["no-such-command"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], run: Run) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and "Error" in err


def test_dry_run_writes_nothing_and_needs_no_out(run: Run, source: Path, tmp_path: Path) -> None:
    before = file_bytes(tmp_path)
    code, out, _ = run("quantize", source, "--dry-run")
    assert code == 0 and "nothing was written" in out and "memory: at most about" in out
    assert file_bytes(tmp_path) == before


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_refused_dry_run_says_that_nothing_was_written(options: tuple[str, ...], run: Run, tmp_path: Path) -> None:
    code, _, err = run("quantize", tmp_path / "nowhere", "--dry-run", *options)
    assert code == 1 and err.endswith("; nothing was written\n")


def test_dry_run_as_json_equals_the_run(run: Run, source: Path, tmp_path: Path) -> None:
    _, out, _ = run("quantize", source, "--dry-run", "--json")
    plan = json.loads(out)
    _, out, _ = run("quantize", source, tmp_path / "out", "--json")
    report = json.loads(out)
    for key in ("n_parameters", "n_int8_parameters", "coverage", "byte_coverage", "n_read_bytes", "n_written_bytes"):
        assert plan[key] == report[key]
    fc1 = plan["tensors"]["model.decoder.layers.0.fc1.weight"]
    assert fc1 == {"source": "model.decoder.layers.0.fc1.weight", "dtype": "I8", "reason": None}


def test_inspect_shows_source_and_output(run: Run, source: Path, tmp_path: Path) -> None:
    run("quantize", source, tmp_path / "out")
    _, before, _ = run("inspect", source)
    code, after, err = run("inspect", tmp_path / "out")
    assert (code, err) == (0, "")
    assert "int8: 0.0 %" in before and "quant_method: none" in before
    assert "int8: 82.4 %" in after and "quant_method: bitsandbytes, threshold 6.0, left 16-bit: lm_head" in after
    assert re.search(r"model\.decoder\.layers\.\*\.fc1\.weight +I8 +128x64 +2", after)
    assert re.search(r"embed_tokens\.weight .* embedding, tied\n", after) and "why not int8" not in before


def test_inspect_json(run: Run, source: Path) -> None:
    _, out, _ = run("inspect", source, "--json")
    found = json.loads(out)
    assert found["schema"] == 1 and found["n_shards"] == 3 and found["quant_method"] is None
    assert sum(group["n_tensors"] for group in found["groups"]) == found["n_tensors"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_and_exit_codes(command: str, run: Run) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert out.count(f"int8convert {command} ") >= 3 and "Exit codes:" in out


def test_every_command_is_listed_here_and_in_the_readme(run: Run) -> None:
    _, out, _ = run("--help")
    assert tuple(re.findall(r"^  (\w+)  ", out.split("Commands:")[1], re.MULTILINE)) == COMMANDS
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for command in COMMANDS:
        assert f"int8convert {command} " in readme


def test_console_script_on_a_terminal_shows_a_live_bar(source: Path, tmp_path: Path) -> None:
    """The real command, the real child process, a real terminal on stderr."""
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "int8convert", "quantize", str(source), str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=child, env={**os.environ, "TERM": "xterm"})
    os.close(child)
    shown = b""
    while True:
        try:
            shown += os.read(parent, 65536)
        except OSError:  # a closed pseudo-terminal ends with EIO, not with an empty read
            break
    out, _ = process.communicate()
    os.close(parent)
    assert process.returncode == 0
    assert b"\x1b[" in shown and b"shard" in shown and b"82.4 %" in shown
    assert b"\x1b[" not in out and b"82.4 %" in out


@pytest.mark.parametrize(
    ("signal_number", "code", "word"), [(SIGINT, 130, "interrupted"), (SIGTERM, 143, "terminated")]
)
def test_signal_while_transformers_starts_leaves_nothing(
    signal_number: int, code: int, word: str, source: Path, tmp_path: Path, no_maps: None
) -> None:
    """The real command; the child that maps the model takes seconds, in which the signal falls."""
    edit_config(source, of_another_version=1)  # so that no map ships with the package
    out = tmp_path / "new" / "out"
    command = [sys.executable, "-m", "int8convert", "quantize", str(source), str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lock = out / "int8convert" / "lock"
    while not lock.exists() or not lock.read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    time.sleep(0.4)  # between the lock and the promise to remove it lie a few instructions
    process.send_signal(signal_number)
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (code, "")
    assert stderr.splitlines() == [
        f"error: {word}",
        "hint: finished shards are kept, the one in work was removed; the same command resumes",
    ]
    assert not (tmp_path / "new").exists()


def test_rerun_says_what_it_skips(run: Run, source: Path, tmp_path: Path) -> None:
    run("quantize", source, tmp_path / "out")
    code, out, err = run("quantize", source, tmp_path / "out")
    assert code == 0 and "82.4 %" in out
    assert re.findall(r"shard (\d) of 3: \S+ is done from an earlier run", err) == ["1", "2", "3"]
