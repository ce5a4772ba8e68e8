"""A few tokens through a checkpoint's model without its weights: the verdict is that of the loader with them."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import int8convert
from int8convert.planning.model_map import int8_choice
from int8convert.sources import open_source
from int8convert.verification.exact.level import verify_exact
from int8convert.verification.exact.trial_run import TrialRun
from int8convert.verification.exact.trial_run_worker import answer
from tests.conftest import InProcessMap, InProcessWorker
from tests.scenarios.strangers.makers import change
from tests.tools.family_check import check_close, flattened_inputs, run_model, with_finite_weights
from tests.tools.family_models import build_family, families

pytestmark = [pytest.mark.usefixtures("map_in_process"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def without_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversions that do not look at what the model's code reads, as those of other tools."""
    monkeypatch.setattr(int8_choice, "modules_with_read_weights", lambda model: {})
    monkeypatch.setattr(InProcessMap, "answers", {})


def save_family(name: str, directory: Path) -> Path:
    model = build_family(next(family for family in families() if family.name == name))
    with_finite_weights(model)
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


def convert(name: str, folder: Path, output_format: str = "bitsandbytes") -> Path:
    source, out = save_family(name, folder / "source"), folder / "out"
    int8convert.quantize(
        source, out, int8convert.PlanOptions(format=output_format, min_coverage=0), on_event=lambda event: None
    )
    return out


def try_out(out: Path, output_format: str = "bitsandbytes") -> dict[str, Any]:
    before = torch.get_default_dtype()
    try:
        return answer({"directory": str(out), "format": output_format, "trusts_code": False})
    finally:
        torch.set_default_dtype(before)


RUN = [
    "causal/llama",
    "causal/gpt2",
    "causal/rwkv",
    "causal/jamba",
    "causal/cpmant",
    "seq2seq/switch_transformers",
    "seq2seq/t5",
    "masked/bert",
]
BREAK = {
    "causal/hy_v4": ("indexer.weights_proj", "an input of torch.int8"),
    "causal/dots3_note_text": ("indexer.weights_proj", "an input of torch.int8"),
    "causal/mamba": ("mixer.dt_proj", "its codes are read by matmul in backbone.layers.0.mixer"),
    "masked/mobilebert": ("cls.predictions.dense", "its codes are read by cat in cls.predictions"),
}


def runs_in_bitsandbytes(out: Path, source: Path) -> bool:
    """Whether transformers + bitsandbytes run an output as its source runs, with no integer as input of a layer."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model_class = getattr(transformers, json.loads((out / "config.json").read_text())["architectures"][0])
    model = model_class.from_pretrained(out, device_map="cpu")
    integers = []
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: None if inputs[0].is_floating_point() else integers.append(name)
            )
    try:
        with flattened_inputs():  # bitsandbytes' operation on CPUs takes no inputs of four dimensions
            check_close(run_model(model), run_model(model_class.from_pretrained(source)))
    except Exception:
        return False
    return not integers  # bitsandbytes casts them to fp16 and goes on


@pytest.mark.parametrize("name", [*RUN, *BREAK])
def test_verdict_is_that_of_bitsandbytes_with_the_weights(name: str, tmp_path: Path, without_rule: None) -> None:
    out = convert(name, tmp_path)
    found = try_out(out)
    assert found["not_run"] is None
    assert runs_in_bitsandbytes(out, tmp_path / "source") == (found["found"] == []) == (name in RUN)
    if name in RUN:
        assert 0 < found["n_called"] <= found["n_replaced"]  # a few tokens do not reach every expert
    else:
        module, what = BREAK[name]
        first, its = found["found"][0]
        assert first.endswith(module) and its == what


@pytest.mark.parametrize("output_format", ["bitsandbytes", "compressed-tensors"])
def test_verify_fails_what_was_converted_without_the_rule(
    output_format: str, tmp_path: Path, without_rule: None
) -> None:
    report = verify_exact(convert("causal/hy_v4", tmp_path, output_format))
    failed = [check for check in report.checks if not check.is_passed]
    assert [check.name for check in failed] == ["runs"]
    assert str(failed[0].findings[0]) == (
        "model.layers.0.self_attn.indexer.weights_proj: expected a module that runs as int8, "
        "found an input of torch.int8"
    )


def test_verify_passes_what_was_converted_with_it(tmp_path: Path) -> None:
    report = verify_exact(convert("causal/hy_v4", tmp_path))
    assert report.is_passed
    assert report.checks[-1].name == "runs" and report.checks[-1].n_checked > 10


def test_child_answers_as_this_process_does(tmp_path: Path, without_rule: None) -> None:
    out = convert("causal/dots3_note_text", tmp_path)
    with TrialRun(open_source(out), trusts_code=False) as trial:
        check, notes = trial.result()
    assert [[finding.tensor, finding.found] for finding in check.findings] == [list(f) for f in try_out(out)["found"]]
    assert not check.is_passed and notes == []


def test_model_that_takes_no_text_is_not_tried_and_says_so(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.Siglip2VisionConfig(**sizes, num_patches=16, patch_size=4)
    transformers.Siglip2VisionModel(config).bfloat16().save_pretrained(tmp_path / "source")
    int8convert.quantize(tmp_path / "source", tmp_path / "out", on_event=lambda event: None)
    report = verify_exact(tmp_path / "out")
    assert report.is_passed
    (note,) = report.notes
    assert note.startswith("whether its model runs was not tested: without weights, ")


def test_what_the_model_does_with_floats_too_is_no_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("int8convert.verification.exact.trial_run.Worker", InProcessWorker)
    out = convert("causal/llama", tmp_path)
    change(out / "config.json", hidden_act="no such function")  # fails with any weights
    with TrialRun(open_source(out), trusts_code=False) as trial:
        check, (note,) = trial.result()
    assert check.is_passed and "no such function" in note


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    block = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": ["lm_head"]}
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 4}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", **sizes}
    change(tmp_path / "config.json", **config, vocab_size=128_256, quantization_config=block)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = try_out(tmp_path)
    grown_bytes = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert (found["n_called"], found["found"], found["not_run"]) == (28, [], None)
    assert grown_bytes < 200e6  # its weights are 6 GB
