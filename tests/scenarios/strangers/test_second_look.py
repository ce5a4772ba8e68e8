"""Faults that a second tester found: adapters in OUT, names that are not UTF-8, a lost directory, trials that died."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from int8convert.errors import ModelMapError, SourceError
from int8convert.publish.finished import read_finished
from int8convert.publish.verify_json import read_verify_json
from int8convert.runtime.generate import generate
from int8convert.runtime.load import load
from int8convert.sources import open_source
from int8convert.verification.exact.trial_run import TrialRun
from tests.cli.conftest import Run
from tests.scenarios.strangers.makers import change, convert, passes_exact, write

pytestmark = pytest.mark.usefixtures("map_in_process")


def test_adapter_in_out_is_not_added_without_a_word(out: Path) -> None:
    entries = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    write(out / "adapter_config.json", entries)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    factors = {f"{name}A.weight": torch.ones(2, 64), f"{name}B.weight": torch.ones(64, 2)}
    save_file(factors, out / "adapter_model.safetensors", {"format": "pt"})
    for run in (lambda: generate(out, ["w5"], max_new_tokens=1), lambda: load(out)):
        with pytest.raises(SourceError, match="transformers would add that adapter"):
            run()


@pytest.mark.parametrize("odd", ["source", "out"])
def test_output_of_a_name_that_is_not_utf8_is_verified_and_published(odd: str, source: Path, tmp_path: Path) -> None:
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/s\xff"))
    src = Path(shutil.copytree(source, place)) if odd == "source" else source
    out = convert(src, place if odd == "out" else tmp_path / "converted")
    assert passes_exact(out)
    assert read_verify_json(out)["is_passed"] is True
    assert read_finished(out).unverified == ""


def test_deleted_current_directory_ends_in_two_lines(out: Path, tmp_path: Path, run: Run) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    before = os.getcwd()
    os.chdir(gone)
    try:
        gone.rmdir()
        code, _, stderr = run("generate", out, "w5")
    finally:
        os.chdir(before)
    assert code == 1
    assert stderr.splitlines() == [
        "error: the current directory was deleted",
        "hint: change to another directory and rerun the same command",
    ]


def test_trial_run_that_died_does_not_pass(out: Path) -> None:
    with TrialRun(open_source(out), False) as trial:
        assert trial._worker is not None
        trial._worker.stop()
        with pytest.raises(SourceError, match=r"could not be tested: the process ended with status -9"):
            trial.result()


@pytest.mark.parametrize("entries", [{"rms_norm_eps": 4}, {"max_position_embeddings": [1]}, {"dtype": "int8"}])
def test_config_that_no_loader_takes_is_refused(entries: dict[str, object], source: Path, tmp_path: Path) -> None:
    change(source / "config.json", **entries)
    with pytest.raises(ModelMapError, match=r"'config.json'.*(expected|type)") as refused:
        convert(source, tmp_path / "converted")
    assert "fetch config.json again" in refused.value.hint
    assert not (tmp_path / "converted").exists()
