"""Little that becomes int8: a note where that is the model's nature, an error where it makes the output pointless."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import int8convert
from int8convert.errors import CoverageError
from int8convert.planning.coverage import check_coverage
from int8convert.planning.plan_checkpoint import PlanOptions
from tests.cli.conftest import Run
from tests.scenarios.strangers.makers import convert

pytestmark = pytest.mark.usefixtures("map_in_process")

SIZES: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 64}


@pytest.fixture
def small_model(tmp_path: Path) -> Path:
    """A tied embedding of 65,536 values beside Linear weights of 49,152: 43 %, about what Gemma 3 270M has."""
    config = transformers.LlamaConfig(
        **{**SIZES, "num_hidden_layers": 1}, vocab_size=1024, intermediate_size=170, tie_word_embeddings=True
    )
    transformers.LlamaForCausalLM(config).half().save_pretrained(tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture
def experts_model(tmp_path: Path) -> Path:
    """Experts hold 94 % of the Linear weights, as they do in Mixtral, and bitsandbytes holds none."""
    config = transformers.MixtralConfig(**SIZES, vocab_size=64, intermediate_size=256, num_local_experts=8)
    transformers.MixtralForCausalLM(config).half().save_pretrained(tmp_path / "experts")
    return tmp_path / "experts"


def test_small_model_converts_and_says_what_stays(small_model: Path, tmp_path: Path) -> None:
    report = int8convert.quantize(small_model, tmp_path / "out", on_event=lambda event: None)
    assert report.notes == ("42.7 % of the parameters become int8; what stays 16-bit: embedding, tied 57 %",)


def test_only_a_bar_that_was_set_is_held_against_it(small_model: Path, tmp_path: Path) -> None:
    with pytest.raises(CoverageError, match=r"only 42\.7 % of the parameters .* --min-coverage asks for 50 %"):
        convert(small_model, tmp_path / "out", min_coverage=0.5)
    assert not (tmp_path / "out").exists()
    convert(small_model, tmp_path / "out", min_coverage=0.42)


def test_what_the_user_skips_is_the_users_choice(small_model: Path, tmp_path: Path) -> None:
    (note,) = int8convert.plan(small_model, PlanOptions(only=["q_proj"])).model_map.notes
    assert note.startswith("3.6 % of the parameters become int8; what stays 16-bit: embedding, tied 57 %, user skip")
    convert(small_model, tmp_path / "out", only=["q_proj"])


def test_plan_that_leaves_nearly_every_linear_16_bit_is_refused(experts_model: Path, tmp_path: Path) -> None:
    with pytest.raises(CoverageError) as caught:
        convert(experts_model, tmp_path / "out")
    assert caught.value.message.startswith(
        "only 4.0 % of the Linear weights would become int8, expected at least 20 % (16-bit: "
    )
    assert "experts: not replaced by the bitsandbytes loader 95 %" in caught.value.message
    assert caught.value.hint.startswith("pass --format compressed-tensors, which holds such modules as int8, or pass ")
    assert not (tmp_path / "out").exists()
    convert(experts_model, tmp_path / "out", min_coverage=0)


def test_guess_by_names_with_low_coverage_is_refused(small_model: Path) -> None:
    planned = int8convert.plan(small_model)
    check_coverage(planned, None)
    guessed = replace(planned, model_map=replace(planned.model_map, model_class=None))
    with pytest.raises(CoverageError, match="the model's class is unknown, and by their names only 4"):
        check_coverage(guessed, None)


def test_dry_run_prints_what_stays_even_if_the_run_would_be_refused(run: Run, experts_model: Path) -> None:
    code, printed, err = run("quantize", experts_model, "--dry-run")
    assert code == 1
    assert "experts: not replaced by the bitsandbytes loader" in printed and "int8: 4.0 % of " in printed
    assert err.splitlines()[-2:][0].startswith("error: only 4.0 % of the Linear weights would become int8")
    code, printed, _ = run("quantize", experts_model, "--dry-run", "--json")
    plan = json.loads(printed)
    assert (code, plan["error"]["code"]) == (1, "coverage")
    reasons = [tensor["reason"] for tensor in plan["tensors"].values()]
    assert reasons.count("experts: not replaced by the bitsandbytes loader") == 2 * 8 * 3


def test_dry_run_prints_the_plan_of_a_source_that_lacks_weights(run: Run, small_model: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors: dict[str, torch.Tensor] = load_file(small_model / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, small_model / "model.safetensors", {"format": "pt"})
    code, printed, err = run("quantize", small_model, "--dry-run")
    assert code == 1 and "embedding, tied" in printed and "model.layers.0.mlp.up_proj.weight" in err
