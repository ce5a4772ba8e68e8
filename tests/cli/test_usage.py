"""Wrong usage: exit code 2, what is wrong in words that name it, and with --json one object."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGINT, SIGTERM

import pytest

from int8convert import text
from int8convert.cli.console import TerminatedError
from tests.cli.conftest import Run
from tests.tools.tiny_models import save_checkpoint


def said(err: str) -> str:
    """The last line, which comes behind typer's usage."""
    return err.splitlines()[-1].removeprefix("Error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "X"], "OUT is missing: name the directory to write, or pass --dry-run, or --upload REPO"),
        (["quantize", "X", ""], "OUT is empty"),
        (["quantize", "", "out"], "SRC is empty"),
        (["export", "", "new"], "OUT is empty"),
        (["export", "out", ""], "NEW is empty"),
        (["generate", ""], "OUT is empty"),
        (["inspect", ""], "PATH is empty"),
        (["verify", ""], "OUT is empty"),
        (["upload", "", "me/x"], "OUT is empty"),
        (["upload", "out", ""], "REPO is empty"),
        (["outliers", "", "--text", "text.txt"], "CHECKPOINT is empty"),
        (
            ["export", "out", "new", "--format", "gguf"],
            "Invalid value for --format: it is bitsandbytes, compressed-tensors or torchao, not 'gguf'",
        ),
        (["quantize", "X", "Y", "--keep"], "--keep needs --upload REPO"),
        (["quantize", "X", "Y", "--max-disk", "3GB"], "--max-disk needs --upload REPO"),
        (["quantize", "X", "Y", "--private"], "--private needs --upload REPO"),
        (["quantize", "X", "Y", "--public"], "--public needs --upload REPO"),
        (["quantize", "X", "Y", "--bandwidth", "50MB"], "--bandwidth needs --dry-run"),
        (
            ["quantize", "X", "--upload", "a/b", "--keep", "--max-disk", "3GB"],
            "--max-disk limits the local disk; --keep keeps all of the output: give one of them",
        ),
        (
            ["quantize", "X", "--upload", "a/b", "--columns", "text.txt"],
            "--columns stores columns after the last shard: convert with it, then int8convert upload",
        ),
        (["quantize", ".", "Y", "--revision", "main"], "--revision applies to Hub sources only; '.' is a local path"),
        (["quantize", ".", "Y", "--reader", "stream"], "--reader applies to Hub sources only; '.' is a local path"),
        (["quantize", ".", "Y", "--cache-dir", "c"], "--cache-dir applies to Hub sources only; '.' is a local path"),
        (
            ["quantize", ".", "--dry-run", "--bandwidth", "5MB"],
            "--bandwidth applies to Hub sources only; '.' is a local path",
        ),
        (["quantize", "a/b", "--xyz"], "No such option: --xyz"),
        (["inspect"], "Missing argument 'PATH'."),
        (["verify", "X", "--level", "foo"], "Invalid value for --level: it is exact, fidelity or tasks, not 'foo'"),
        (
            ["quantize", "X", "Y", "--on-nonfinite", "no"],
            "Invalid value for '--on-nonfinite': it is error or keep, not 'no'",
        ),
    ],
)
def test_wrong_usage_is_named_in_text_and_in_json(arguments: list[str], message: str, run: Run) -> None:
    code, out, err = run(*arguments)
    assert (code, out, said(err)) == (2, "", message)

    code, out, err = run(*arguments, "--json")
    found = json.loads(out)
    assert (code, said(err)) == (2, message)
    assert found.keys() == {"schema", "error"} and found["schema"] == 1
    assert (found["error"]["code"], found["error"]["message"]) == ("usage", message)
    assert f"int8convert {arguments[0]} --help" in found["error"]["hint"]


@pytest.mark.parametrize("rate", ["50", "fast", "100Mbit", "100 Mbps", "5M", "0MB"])
def test_bandwidth_without_bytes_as_its_unit_is_refused(rate: str, run: Run) -> None:
    code, _, err = run("quantize", "a/b", "--dry-run", "--bandwidth", rate)
    assert code == 2
    assert said(err) == f"--bandwidth must be bytes a second, such as 50MB, not {rate!r}; 100 Mbit/s are 12.5MB"


def test_reader_of_the_environment_does_not_concern_a_local_source(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INT8CONVERT_READER", "stream")
    source = save_checkpoint("opt", tmp_path / "source")
    assert run("quantize", source, tmp_path / "out", "--quiet")[0] == 0


@pytest.mark.parametrize(
    ("signal_number", "code", "word"), [(SIGINT, 130, "interrupted"), (SIGTERM, 143, "terminated")]
)
def test_interrupted_command_prints_its_object(signal_number: int, code: int, word: str, tmp_path: Path) -> None:
    source = save_checkpoint("opt", tmp_path / "source")
    command = [sys.executable, "-m", "int8convert", "quantize", str(source), str(tmp_path / "out"), "--json"]
    command += ["--skip", "fc2"]  # no seed knows what is skipped, so transformers maps the model, for seconds
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lock = tmp_path / "out" / "int8convert" / "lock"
    while not lock.exists() or not lock.read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    time.sleep(0.4)  # between the lock and the promise to remove it lie a few instructions
    process.send_signal(signal_number)
    stdout, stderr = process.communicate()
    assert process.returncode == code and stderr.startswith(f"error: {word}\nhint: ")
    hint = "finished shards are kept, the one in work was removed; the same command resumes"
    assert json.loads(stdout) == {"schema": 1, "error": {"code": word, "message": word, "hint": hint}}


@pytest.mark.parametrize(
    ("stop", "code", "word"), [(KeyboardInterrupt, 130, "interrupted"), (TerminatedError, 143, "terminated")]
)
def test_signal_while_arguments_are_read_is_told_like_a_later_one(
    stop: type[KeyboardInterrupt], code: int, word: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(size: str | None) -> None:
        raise stop

    monkeypatch.setattr(text, "parse_size", stopped)
    found, out, err = run("quantize", "a/b", "out", "--json")
    assert (found, err) == (code, f"error: {word}\nhint: nothing was started\n")
    assert json.loads(out)["error"]["code"] == word


def test_inspect_does_not_say_that_it_wrote_nothing(run: Run, tmp_path: Path) -> None:
    code, out, err = run("inspect", tmp_path / "nowhere", "--json")
    assert code == 1 and "nothing was written" not in err + out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "t.txt"], "--text has no effect at --level exact, which runs no model"),
        (["--max-kl", "1"], "--max-kl has no effect at --level exact, which runs no model"),
        (["--length", "32"], "--length has no effect at --level exact, which runs no model"),
        (["--tasks", "piqa"], "--tasks has no effect at --level exact: it needs --level tasks"),
    ],
)
def test_options_of_the_higher_levels_are_refused_at_the_exact_one(options: list[str], message: str, run: Run) -> None:
    code, out, err = run("verify", "X", "--level", "exact", *options)
    assert (code, out, said(err)) == (2, "", message)


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_revision_of_a_directory_is_refused(command: str, run: Run, tmp_path: Path) -> None:
    code, _, err = run(command, tmp_path, "--revision", "main")
    assert code == 2 and said(err).startswith("--revision applies to Hub checkpoints only; ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --format, --dequantize or --max-shard-size"),
        (["--format", "torchao", "--dequantize", "float16"], "give --format or --dequantize, not both"),
    ],
)
def test_export_names_its_options_as_the_command_line_has_them(options: list[str], message: str, run: Run) -> None:
    code, _, err = run("export", "X", "Y", *options)
    assert (code, said(err)) == (2, message)


def test_allowed_weights_that_are_not_missing_are_an_error(run: Run, tmp_path: Path) -> None:
    source = save_checkpoint("opt", tmp_path / "source")
    code, _, err = run("quantize", source, tmp_path / "out", "--allow-missing", "scroe")
    assert code == 1 and "--allow-missing 'scroe' matches no tensor that the source lacks" in err
    assert "hint: leave --allow-missing out: the source lacks no tensor" in err


def test_quiet_keeps_the_notes(run: Run, tmp_path: Path) -> None:
    source = save_checkpoint("opt", tmp_path / "source")
    (source / "adapter_config.json").write_text("{}")
    code, _, err = run("quantize", source, tmp_path / "out", "-q")
    assert code == 0 and "note: the adapter beside the weights is left out" in err
    assert "shard 1 of" not in err


@pytest.mark.parametrize("name", ["device", "figures"])
def test_option_of_the_models_is_refused_at_the_exact_level(name: str, run: Run) -> None:
    code, _, err = run("verify", "X", "--level", "exact", f"--{name}", "cpu")
    assert (code, said(err)) == (2, f"--{name} has no effect at --level exact, which runs no model")


def test_device_of_the_environment_does_not_concern_the_exact_level(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INT8CONVERT_DEVICE", "cpu")
    assert run("verify", "X", "--level", "exact")[0] == 1


def test_options_that_a_dry_run_does_not_use_are_named(run: Run, tmp_path: Path) -> None:
    source = save_checkpoint("opt", tmp_path / "source")
    code, _, err = run("quantize", source, "--dry-run", "--overwrite", "--check")
    assert code == 0 and "note: no effect in a dry run: --overwrite, --check" in err


def test_threshold_that_the_format_does_not_hold_is_named(run: Run, tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "source")
    code, _, err = run("quantize", source, tmp_path / "out", "--format", "compressed-tensors", "--threshold", "5")
    assert code == 0 and "note: --threshold has no effect: a checkpoint in compressed-tensors holds none" in err


def test_client_options_of_a_local_conversion_are_refused(run: Run, tmp_path: Path) -> None:
    code, _, err = run("quantize", tmp_path, tmp_path / "out", "--no-xet")
    assert (code, said(err)) == (2, f"--no-xet applies to Hub sources only; {str(tmp_path)!r} is a local path")
