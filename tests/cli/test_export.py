"""`int8convert export` as its users meet it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGINT, SIGTERM

import pytest
import torch
from safetensors.torch import save_file

from int8convert.cli.console import RESUMABLE
from tests.cli.conftest import Run
from tests.tools.tiny_models import file_bytes, read_tensors, save_checkpoint

PARTS = ("weight", "SCB")


@pytest.fixture
def int8(run: Run, tmp_path: Path) -> Path:
    source = save_checkpoint("opt", tmp_path / "source", max_shard_size="60KB")
    run("quantize", source, tmp_path / "int8", "--quiet")
    return tmp_path / "int8"


def test_result_on_stdout_and_progress_on_stderr(run: Run, int8: Path, tmp_path: Path) -> None:
    code, out, err = run("export", int8, tmp_path / "new", "--format", "compressed-tensors")
    assert code == 0 and "12 int8 weights of bitsandbytes as compressed-tensors" in out
    plan, *lines = err.splitlines()
    assert " in 3 shards -> " in plan and plan.endswith(" in 3")
    assert len(lines) == 3 and lines[0].startswith("shard 1 of 3: model-00001-of-00003.safetensors ")
    assert "shard 1" not in out


def test_quiet_prints_the_result_only(run: Run, int8: Path, tmp_path: Path) -> None:
    code, out, err = run("export", int8, tmp_path / "new", "--dequantize", "float16", "--quiet")
    assert (code, err) == (0, "") and "as float16" in out


def test_json_is_one_object_and_nothing_else(run: Run, int8: Path, tmp_path: Path) -> None:
    code, out, err = run("export", int8, tmp_path / "new", "--max-shard-size", "1GB", "--json")
    report = json.loads(out)
    assert (code, err, report["schema"]) == (0, "", 1)
    assert (report["source_format"], report["format"], report["dtype"]) == ("bitsandbytes", "bitsandbytes", None)
    assert (report["n_shards"], report["n_int8_weights"], report["n_changed_scales"]) == (1, 12, 0)


def test_error_is_two_lines_and_json(run: Run, int8: Path) -> None:
    code, out, err = run("export", int8, int8, "--format", "torchao", "--json")
    error = json.loads(out)["error"]
    assert code == 1 and error["code"] == "output" and "is the source itself" in error["message"]
    assert [line.split(":")[0] for line in err.splitlines()] == ["error", "hint"]


def test_format_that_cannot_hold_the_model(run: Run, tmp_path: Path) -> None:
    run("quantize", save_checkpoint("gpt2", tmp_path / "gpt2"), tmp_path / "int8", "--quiet")
    code, out, err = run("export", tmp_path / "int8", tmp_path / "new", "--format", "compressed-tensors")
    assert (code, out) == (1, "") and "no form for Conv1D" in err and not (tmp_path / "new").exists()


def test_overwrite(run: Run, int8: Path, tmp_path: Path) -> None:
    run("export", int8, tmp_path / "new", "--format", "torchao")
    code, _, err = run("export", int8, tmp_path / "new", "--format", "compressed-tensors")
    assert code == 1 and "--overwrite" in err
    code, _, _ = run("export", int8, tmp_path / "new", "--format", "compressed-tensors", "--overwrite")
    assert code == 0 and b"compressed-tensors" in file_bytes(tmp_path / "new")["config.json"]


def test_inspect_counts_parameters_alike_in_every_format(run: Run, int8: Path, tmp_path: Path) -> None:
    _, out, _ = run("inspect", int8, "--json")
    expected = json.loads(out)
    for format in ("compressed-tensors", "torchao"):
        run("export", int8, tmp_path / format, "--format", format)
        _, out, _ = run("inspect", tmp_path / format, "--json")
        found = json.loads(out)
        assert found["quant_method"] == format
        for key in ("n_parameters", "n_int8_parameters", "coverage"):
            assert found[key] == expected[key]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int8 checkpoint of 128 MB of codes in four shards, which take long enough for a signal to fall in between."""
    int8 = tmp_path_factory.mktemp("large")
    for i in range(4):
        codes = {f"layers.{i}.fc1.weight": torch.full((4096, 8192), i, dtype=torch.int8)}
        save_file(codes | {f"layers.{i}.fc1.SCB": torch.ones(4096)}, int8 / f"model-0000{i + 1}-of-00004.safetensors")
    weight_map = {f"layers.{i}.fc1.{n}": f"model-0000{i + 1}-of-00004.safetensors" for i in range(4) for n in PARTS}
    (int8 / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    block = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (int8 / "config.json").write_text(json.dumps({"quantization_config": block}))
    return int8


@pytest.mark.parametrize(
    ("signal_number", "code", "word"), [(SIGINT, 130, "interrupted"), (SIGTERM, 143, "terminated")]
)
def test_signal_in_the_middle_and_the_same_command_resumes(
    signal_number: int, code: int, word: str, large: Path, tmp_path: Path
) -> None:
    """The real command."""
    int8, new = large, tmp_path / "parent" / "new"
    command = [sys.executable, "-m", "int8convert", "export", str(int8), str(new), "--dequantize", "bfloat16"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (new / "model-00001-of-00004.safetensors").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal_number)
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (code, "")
    assert stderr.splitlines()[-2:] == [f"error: {word}", f"hint: {RESUMABLE}"]
    n_finished = len(list(new.glob("*.safetensors")))
    assert 1 <= n_finished < 4 and not (new / "config.json").exists() and not list(new.glob("*.incomplete"))
    report = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, text=True, check=True)
    assert json.loads(report.stdout)["n_done_shards"] == n_finished
    found = read_tensors(new)
    for i in range(4):
        weight = found[f"layers.{i}.fc1.weight"]
        assert weight.dtype == torch.bfloat16 and (weight == torch.tensor(i / 127).bfloat16()).all()
