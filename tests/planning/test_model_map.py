"""What becomes int8, what does not and why, and what the user's patterns do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from int8convert.errors import AlreadyQuantizedError, ModelMapError, PatternError
from int8convert.patterns import matches
from int8convert.planning.model_map.model_map import Action, ModelMap, ModuleFilter, check_config
from int8convert.planning.model_map.process import ModelMapProcess
from int8convert.sources import open_source
from tests.conftest import InProcessMap, InProcessWorker
from tests.tools.tiny_models import edit_config, save_as_pickles, save_checkpoint


def model_map(directory: Path, **patterns: tuple[str, ...]) -> ModelMap:
    return InProcessMap(open_source(directory), ModuleFilter(**patterns)).result()


def quantized(found: ModelMap) -> set[str]:
    return {name.removesuffix(".weight") for name, tensor in found.tensors.items() if tensor.output_dtype == "I8"}


def test_child_process_and_in_process_maps_agree(tmp_path: Path) -> None:
    source = open_source(save_checkpoint("opt", tmp_path / "opt"))
    modules = ModuleFilter(skip=("fc2",))
    process = ModelMapProcess(source, modules)
    assert process.result() == InProcessMap(source, modules).result()


def test_child_process_runs_no_module_from_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Converting from inside a checkpoint that brings a torch.py of its own."""
    directory = save_checkpoint("llama", tmp_path / "llama")
    for name in ("torch", "transformers", "json"):
        (directory / f"{name}.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')")
    monkeypatch.chdir(directory)
    assert ModelMapProcess(open_source("."), ModuleFilter()).result().model_class == "LlamaForCausalLM"
    assert not (tmp_path / "trace").exists()


def test_reasons_are_given_for_all_that_stays(tmp_path: Path) -> None:
    found = model_map(save_checkpoint("t5", tmp_path / "t5"))
    reasons = {name: tensor.reason for name, tensor in found.tensors.items() if tensor.output_dtype != "I8"}
    assert reasons["shared.weight"] == "embedding, tied"
    assert reasons["encoder.block.0.layer.1.DenseReluDense.wo.weight"] == "keep in fp32"
    assert reasons["encoder.final_layer_norm.weight"] == "not a matrix product"
    assert reasons["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] == "embedding"
    assert all(reasons.values())


def test_output_head_stays_and_is_in_the_skip_list(tmp_path: Path) -> None:
    found = model_map(save_checkpoint("llama", tmp_path / "llama"))
    assert found.tensors["lm_head.weight"].reason == "output head"
    assert found.skip_modules == ("lm_head",)


def test_skip_list_covers_all_kept_linears_and_nothing_else(tmp_path: Path) -> None:
    found = model_map(save_checkpoint("llama", tmp_path / "llama"), skip=("layers.0.*", "down_proj"))
    expected = {f"model.layers.1.self_attn.{p}_proj" for p in "qkvo"} | {
        f"model.layers.1.mlp.{p}_proj" for p in ("gate", "up")
    }
    assert quantized(found) == expected
    assert "model.layers.1.mlp.down_proj" in found.skip_modules
    assert not expected & set(found.skip_modules)
    assert found.tensors["model.layers.0.self_attn.q_proj.weight"].reason == "user skip"


def test_only_leaves_everything_else_alone(tmp_path: Path) -> None:
    found = model_map(save_checkpoint("opt", tmp_path / "opt"), only=("fc1",), skip=("layers.1.*",))
    assert quantized(found) == {"model.decoder.layers.0.fc1"}


@pytest.mark.parametrize("option", ["skip", "only"])
def test_pattern_that_matches_nothing_is_an_error(option: str, tmp_path: Path) -> None:
    with pytest.raises(PatternError, match=rf"--{option} 'q_porj' matches no module"):
        model_map(save_checkpoint("opt", tmp_path / "opt"), **{option: ("q_porj",)})


def test_patterns_match_full_names_and_dotted_tails() -> None:
    assert matches("model.layers.0.fc1", "fc1")
    assert matches("model.layers.0.fc1", "layers.*.fc1")
    assert matches("model.layers.0.fc1", "model.layers.0.fc1")
    assert not matches("model.layers.0.fc1", "c1")
    assert not matches("model.layers.0.fc1", "model.layers.0")


def test_conv1d_is_transposed(tmp_path: Path) -> None:
    found = model_map(save_checkpoint("gpt2", tmp_path / "gpt2"))
    assert found.tensors["transformer.h.0.attn.c_attn.weight"].action is Action.QUANTIZE_TRANSPOSED


def test_class_unknown_to_transformers_falls_back_to_its_model_type(tmp_path: Path) -> None:
    directory = save_checkpoint("t5", tmp_path / "t5")
    edit_config(directory, architectures=["T5WithLMHeadModel"])
    found = model_map(directory)
    assert found.model_class == "T5ForConditionalGeneration"
    assert "T5WithLMHeadModel" in found.notes[0]


def test_model_type_unknown_to_transformers_is_mapped_by_name_and_said_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("int8convert.planning.model_map.process.Worker", InProcessWorker)
    directory = save_checkpoint("llama", tmp_path / "llama")
    expected = quantized(model_map(directory))
    edit_config(directory, architectures=["NovelForCausalLM"], model_type="novel")
    process = ModelMapProcess(open_source(directory), ModuleFilter())
    found = process.result()
    assert found.model_class is None
    assert "'novel'" in found.notes[0] and "name and shape" in found.notes[0]
    assert quantized(found) == expected
    assert set(found.skip_modules) == {"lm_head", "model.embed_tokens"}


def test_child_that_cannot_import_transformers_is_an_error_not_a_guess(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(save_checkpoint("llama", tmp_path / "llama"))
    (tmp_path / "broken" / "transformers").mkdir(parents=True)
    (tmp_path / "broken" / "transformers" / "__init__.py").write_text("import no_such_module")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    with pytest.raises(ModelMapError, match="ModuleNotFoundError: No module named 'no_such_module'"):
        ModelMapProcess(source, ModuleFilter(skip=("q_proj",))).result()


def test_child_that_is_killed_is_an_error_not_a_guess(tmp_path: Path) -> None:
    source = open_source(save_checkpoint("llama", tmp_path / "llama"))
    process = ModelMapProcess(source, ModuleFilter(skip=("q_proj",)))
    assert process._worker is not None
    process._worker.stop()
    with pytest.raises(ModelMapError, match="status -9"):
        process.result()


def test_already_quantized_source_is_refused_by_method() -> None:
    config = {"architectures": ["X"], "quantization_config": {"quant_method": "gptq"}}
    with pytest.raises(AlreadyQuantizedError, match="gptq"):
        check_config(config)


@pytest.mark.parametrize("config", [{}, {"model_type": "opt"}, {"architectures": []}, {"architectures": "OPT"}])
def test_config_without_architecture_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(ModelMapError, match=r"config\.json"):
        check_config(config)


def test_tied_head_of_a_pickle_is_dropped_but_an_untied_one_is_not(tmp_path: Path) -> None:
    plain = save_checkpoint("opt", tmp_path / "plain")
    tied = save_as_pickles(plain, tmp_path / "tied", 1)
    assert model_map(tied).tensors["lm_head.weight"].action is Action.DROP
    state_dict = torch.load(tied / "pytorch_model.bin", weights_only=True)
    state_dict["lm_head.weight"] = state_dict["lm_head.weight"].clone()
    torch.save(state_dict, tied / "pytorch_model.bin")
    assert model_map(tied).tensors["lm_head.weight"].action is Action.KEEP
