"""Converting with an adapter equals converting the model that PEFT merged it into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from int8convert.errors import AdapterError, OutputError
from int8convert.planning.model_map.process import ModelMapProcess
from tests.conftest import MAP_PROCESS, InProcessWorker
from tests.planning.test_lora import save_adapter
from tests.tools.options import quantize
from tests.tools.tiny_models import build_model, edit_config, file_bytes, read_tensors, save_checkpoint

pytestmark = [pytest.mark.usefixtures("map_in_process"), pytest.mark.filterwarnings("ignore")]


def convert(source: Path, out: Path, **options: Any) -> dict[str, torch.Tensor]:
    quantize(source, out, **options)
    return read_tensors(out)


def check_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """The same up to the last bits of B @ A, which move a code by one where it is near a tie."""
    assert ours.keys() == theirs.keys()
    n_codes = n_moved = 0
    for name, expected in theirs.items():
        if expected.dtype == torch.int8:
            difference = (ours[name].int() - expected.int()).abs()
            assert difference.max() <= 1, name
            n_codes += difference.numel()
            n_moved += int((difference > 0).sum())
        else:
            torch.testing.assert_close(ours[name].float(), expected.float(), rtol=2e-6, atol=2e-6, msg=name)
    assert n_moved <= n_codes / 1000


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4}),
        ("llama", {"target_modules": "all-linear", "use_dora": True}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "use_rslora": True}),
        ("llama", {"target_modules": ["embed_tokens", "o_proj"]}),
        ("opt", {"target_modules": ["fc1", "k_proj"], "bias": "lora_only"}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("t5", {"target_modules": ["q", "wo"]}),
    ],
)
def test_result_is_that_of_the_merged_model(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    source = save_checkpoint(name, tmp_path / "source", torch.float32)
    adapter = save_adapter(name, tmp_path / "adapter", LoraConfig(**options))
    merged = PeftModel.from_pretrained(build_model(name, torch.float32), adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    ours = convert(source, tmp_path / "out", lora=adapter, min_coverage=0)
    check_equal(ours, convert(tmp_path / "merged", tmp_path / "expected", min_coverage=0))
    plain = convert(source, tmp_path / "plain", min_coverage=0)
    assert any(not torch.equal(ours[key], plain[key]) for key in plain)


def test_skipped_conv1d_is_merged_as_it_is_stored(tmp_path: Path) -> None:
    source = save_checkpoint("gpt2", tmp_path / "source", torch.float32)
    adapter = save_adapter("gpt2", tmp_path / "adapter", LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    merged = PeftModel.from_pretrained(build_model("gpt2", torch.float32), adapter).merge_and_unload()
    ours = convert(source, tmp_path / "out", lora=adapter, skip=["c_attn"], min_coverage=0)
    name = "transformer.h.0.attn.c_attn.weight"
    torch.testing.assert_close(ours[name], dict(merged.named_parameters())[name].detach(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("output_format", ["bitsandbytes", "compressed-tensors"])
def test_half_precision_base_is_merged_in_float32(output_format: str, tmp_path: Path) -> None:
    """PEFT rounds the merged weight to the base's dtype first; here it is quantized unrounded."""
    source = save_checkpoint("llama", tmp_path / "source", torch.bfloat16)
    adapter = save_adapter("llama", tmp_path / "adapter", LoraConfig(target_modules=["q_proj"], r=4, lora_alpha=8))
    written = convert(source, tmp_path / "out", lora=adapter, format=output_format)
    matrices = load_file(adapter / "adapter_model.safetensors")
    base = read_tensors(source)
    for i in range(2):
        key = f"model.layers.{i}.self_attn.q_proj.weight"
        prefix = f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_"
        exact = base[key].double() + 2 * matrices[prefix + "B.weight"].double() @ matrices[prefix + "A.weight"].double()
        step = exact.abs().amax(1, keepdim=True) / 127
        assert ((written[key].double() * step - exact).abs() <= 0.501 * step).all()


def test_workers_leave_no_trace_and_a_changed_adapter_is_not_mixed_in(tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "source", max_shard_size="60KB")
    adapter = save_adapter("llama", tmp_path / "adapter", LoraConfig(target_modules=["q_proj"]))
    for workers in (1, 3):
        convert(source, tmp_path / f"{workers}", lora=adapter, workers=workers)
    assert file_bytes(tmp_path / "1") == file_bytes(tmp_path / "3")
    with pytest.raises(OutputError, match=r"--lora of another one then, no --lora now"):
        convert(source, tmp_path / "1")
    edit_config_of_adapter = adapter / "adapter_config.json"
    edit_config_of_adapter.write_text(edit_config_of_adapter.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    with pytest.raises(OutputError, match=r"--lora was another: its 'adapter_config.json' differs"):
        convert(source, tmp_path / "1", lora=adapter)


def test_adapter_for_another_model_leaves_nothing(tmp_path: Path) -> None:
    source = save_checkpoint("opt", tmp_path / "source")
    adapter = save_adapter("llama", tmp_path / "adapter", LoraConfig(target_modules=["down_proj"]))
    with pytest.raises(AdapterError, match="not in the checkpoint"):
        convert(source, tmp_path / "out", lora=adapter)
    assert not (tmp_path / "out").exists()


def test_adapter_of_an_unknown_class_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_checkpoint("llama", tmp_path / "source")
    adapter = save_adapter("llama", tmp_path / "adapter", LoraConfig(target_modules=["q_proj"]))
    edit_config(source, architectures=["NovelForCausalLM"], model_type="novel")
    monkeypatch.setattr(MAP_PROCESS, ModelMapProcess)
    monkeypatch.setattr("int8convert.planning.model_map.process.Worker", InProcessWorker)
    with pytest.raises(AdapterError, match="class is unknown"):
        convert(source, tmp_path / "out", lora=adapter)
    assert not (tmp_path / "out").exists()
