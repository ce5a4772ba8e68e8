"""Every undocumented name of transformers that we use still does what we use it for.

On the installed transformers; with `--slow` on the oldest that pyproject.toml allows as well, installed by pip into a
folder that comes before this environment's.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from int8convert import transformers_internals as internals
from int8convert.formats.layers import is_conv1d_layer

ROOT = Path(__file__).parents[2]
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}


def llama(**options: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **options))


def mixtral() -> Any:
    config = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=3)
    with torch.device("meta"):
        return transformers.MixtralForCausalLM(config)


@dataclass
class Loading:
    missing_keys: set[str]
    unexpected_keys: set[str] = field(default_factory=set)
    mismatched_keys: set[Any] = field(default_factory=set)
    conversion_errors: dict[str, str] = field(default_factory=dict)


def test_all_names_are_listed_and_all_that_are_listed_are_there() -> None:
    assert sorted(internals.__all__) == internals.__all__
    for name in internals.__all__:
        assert callable(getattr(internals, name)), name


def test_tied_parameters_name_the_one_whose_tensor_they_share() -> None:
    assert internals.tied_parameters(llama(tie_word_embeddings=True)) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert internals.tied_parameters(llama(tie_word_embeddings=False)) == {}


def test_model_is_built_with_tied_weights_apart() -> None:
    with torch.device("meta"), internals.no_tie_weights():
        apart = llama(tie_word_embeddings=True)
    assert apart.lm_head.weight is not apart.model.embed_tokens.weight
    together = llama(tie_word_embeddings=True)
    assert together.lm_head.weight is together.model.embed_tokens.weight


def test_modules_left_alone_by_default_are_the_head_and_what_is_tied_to_it() -> None:
    assert "lm_head" in internals.get_keys_to_not_convert(llama(tie_word_embeddings=False))
    assert {"lm_head", "model.embed_tokens"} <= {*internals.get_keys_to_not_convert(llama(tie_word_embeddings=True))}


def test_skip_list_is_read_as_names_tails_and_expressions() -> None:
    for name, skips, expected in (
        ("model.layers.1.mlp.up_proj", ["lm_head"], True),
        ("model.layers.1.mlp.up_proj", ["up_proj"], False),
        ("model.layers.1.mlp.up_proj", ["model.layers.1.mlp.up_proj"], False),
        ("model.layers.11.mlp.up_proj", ["model.layers.1.mlp.up_proj"], True),
        ("lm_head", ["lm_head"], False),
    ):
        assert internals.should_convert_module(name, skips) is expected, (name, skips)


def test_dtypes_of_a_plain_load_keep_some_modules_in_float32() -> None:
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=40)
    with torch.device("meta"):
        t5 = transformers.T5ForConditionalGeneration(config).to(torch.float16)
    dtype_of = internals.parameter_dtypes(t5, torch.float16)
    assert internals.kept_in_fp32(t5) == ["wo"]
    assert dtype_of("encoder.block.0.layer.1.DenseReluDense.wo.weight") is torch.float32
    assert dtype_of("encoder.block.0.layer.1.DenseReluDense.wi.weight") is torch.float16
    assert internals.kept_in_fp32(llama()) == []
    assert internals.parameter_dtypes(llama().bfloat16(), torch.bfloat16)("lm_head.weight") is torch.bfloat16


def test_keys_are_renamed_on_loading_and_back_on_saving() -> None:
    model = transformers.BertModel(transformers.BertConfig(**SIZES))
    mapping = internals.get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, internals.WeightRenaming)]
    parameters = model.state_dict()
    new, pattern = internals.rename_source_key(
        "bert.embeddings.LayerNorm.gamma", renamings, [], model.base_model_prefix, parameters
    )
    assert (new, pattern) == ("embeddings.LayerNorm.weight", None)
    renaming = internals.WeightRenaming("old_name", "new_name")
    assert internals.rename_source_key("a.old_name", [renaming], [], "", {})[0] == "a.new_name"
    assert renaming.was_used()
    assert internals.apply_renamings("a.new_name", [renaming.reverse_transform()]) == "a.old_name"


def test_experts_are_merged_by_conversions_of_known_operations() -> None:
    model = mixtral()
    mapping = internals.get_model_conversion_mapping(model)
    converters = [entry for entry in mapping if isinstance(entry, internals.WeightConverter)]
    by_target = {converter.target_patterns[0]: converter for converter in converters}
    gate_up = by_target[next(target for target in by_target if "gate_up_proj" in target)]
    kinds = [type(operation) for operation in gate_up.operations]
    assert kinds == [internals.MergeModulelist, internals.Concatenate] and len(gate_up.source_patterns) == 2
    first = f"model.layers.0.mlp.experts.0.{gate_up.source_patterns[0].rpartition('experts.*.')[2]}"
    key = first if "mlp" in gate_up.source_patterns[0] else first.replace(".mlp.", ".block_sparse_moe.")
    renamings = [entry for entry in mapping if isinstance(entry, internals.WeightRenaming)]
    found, pattern = internals.rename_source_key(key, renamings, converters, "model", model.state_dict())
    assert found == "model.layers.0.mlp.experts.gate_up_proj" and pattern in gate_up.source_patterns
    for operation in (internals.Interleave, internals.Transpose):
        assert issubclass(operation, internals.ConversionOps)
    assert issubclass(internals.SkipParameters, Exception)


def test_conversion_of_one_tensor_gives_the_parameter_and_its_value() -> None:
    transform = internals.WeightRenaming("a.weight", "b.weight")
    info = Loading({"b.weight"})
    transform.add_tensor("b.weight", "a.weight", "a.weight", torch.ones(2))
    model = llama()
    found = transform.convert("b.weight", model=model, config=model.config, hf_quantizer=None, loading_info=info)
    value = found["b.weight"]
    assert torch.equal(value[0] if isinstance(value, list) else value, torch.ones(2))


def test_tied_and_declared_keys_are_no_longer_missing_when_loading_ends() -> None:
    model = llama(tie_word_embeddings=True)
    needed = set(model.state_dict())
    info = Loading({"lm_head.weight", "model.norm.weight"})
    before = internals.finish_loading(model, info)
    assert "model.norm.weight" in before and info.missing_keys == {"model.norm.weight"}
    assert {"lm_head.weight", "model.norm.weight"} <= needed
    assert model.is_custom_code() is False and model.get_parameter_or_buffer("model.norm.weight") is not None


def test_keys_are_ordered_by_numbers() -> None:
    assert sorted(["l.10", "l.9", "a"], key=internals.dot_natural_key) == ["a", "l.9", "l.10"]


def test_some_tensors_of_a_model_are_loaded(tmp_path: Path) -> None:
    source = llama(tie_word_embeddings=False)
    source.save_pretrained(tmp_path)
    seen: list[tuple[str, ...]] = []

    def counting(load_all: Any) -> Any:
        def load(model: Any, state_dict: Any, files: Any, load_config: Any, *others: Any) -> Any:
            seen.append(tuple(type(each).__name__ for each in (state_dict, files)))
            found = load_all(model, state_dict, files, load_config, *others)
            with torch.no_grad():
                model.lm_head.weight.zero_()
            head = {"lm_head.weight": source.lm_head.weight.detach()}
            internals.convert_and_load_state_dict_in_model(model, head, load_config)
            assert load_config.weight_mapping is None or isinstance(load_config.weight_mapping, list)
            return found

        return load

    with internals.loading_weights_by(counting):
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert seen == [("NoneType", "list")]
    assert torch.equal(model.lm_head.weight, source.lm_head.weight)
    transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert len(seen) == 1  # undone


def test_bin_file_is_read(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(3)}, tmp_path / "pytorch_model.bin")
    assert torch.equal(internals.load_state_dict(str(tmp_path / "pytorch_model.bin"))["a"], torch.arange(3))


def test_loader_exchanges_modules_of_models_that_it_patches_and_of_no_others() -> None:
    assert internals.patched_modules(llama(), "bitsandbytes") == {}
    patched = {name: patch for name, patch in internals.MODULES_TO_PATCH_FOR_QUANTIZATION.items()}
    assert patched
    for name, patch in patched.items():
        module = type(name, (torch.nn.Module,), {})()
        expected = {"it": patch["module_name"].__name__} if "bitsandbytes" in patch["quantization_methods"] else {}
        holder = torch.nn.Module()
        holder.it = module
        assert internals.patched_modules(holder, "bitsandbytes") == expected


def test_model_is_marked_as_quantized() -> None:
    model = llama()
    assert not getattr(model.config, "_is_quantized", False)
    internals.mark_quantized(model)
    assert model.config._is_quantized and model.model.config._is_quantized


def test_marked_tensor_keeps_its_value_when_missing_ones_are_drawn() -> None:
    from transformers.initialization import ones_

    marked, other = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    internals.mark_loaded(marked)
    assert internals.is_marked_loaded(marked) and not internals.is_marked_loaded(other)
    for tensor in (marked, other):
        ones_(tensor)
    assert marked.tolist() == [0, 0] and other.tolist() == [1, 1]


def test_parameter_is_found_by_its_name() -> None:
    model = llama()
    module, leaf = internals.get_module_from_name(model, "model.layers.1.mlp.up_proj.weight")
    assert module is model.model.layers[1].mlp.up_proj and leaf == "weight"


def test_conv1d_holds_its_weight_as_in_times_out() -> None:
    conv1d = Conv1D(3, 5)
    assert conv1d.weight.shape == (5, 3) and is_conv1d_layer(conv1d) and not is_conv1d_layer(torch.nn.Linear(3, 5))


def test_callers_config_wins_over_that_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = internals.AutoHfQuantizer.merge_quantization_configs
    monkeypatch.setattr(internals.AutoHfQuantizer, "merge_quantization_configs", staticmethod(kept))

    class Ours:
        def for_checkpoint(self, block: Any) -> Any:
            return SimpleNamespace(block=block)

    internals.prefer_callers_config(Ours)
    merged = internals.AutoHfQuantizer.merge_quantization_configs({"a": 1}, Ours())
    assert merged.block == {"a": 1}
    theirs = transformers.BitsAndBytesConfig(load_in_8bit=True)
    assert internals.AutoHfQuantizer.merge_quantization_configs(theirs.to_dict(), None).load_in_8bit


def test_file_of_a_directory_is_found_and_a_missing_one_is_none(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    options = {"_raise_exceptions_for_missing_entries": False}
    assert internals.cached_file(str(tmp_path), "model.safetensors", **options) == str(tmp_path / "model.safetensors")
    assert internals.cached_file(str(tmp_path), "no_such_file", **options) is None


def test_class_in_the_checkpoints_code_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = tmp_path / "modules"
    modules.mkdir()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(str(modules))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "modeling_own.py").write_text("class Own:\n    value = 5\n")
    found = internals.get_class_from_dynamic_module("modeling_own.Own", str(tmp_path / "own"), local_files_only=True)
    assert found.value == 5


def test_nobody_is_asked_whether_code_may_run() -> None:
    from transformers import dynamic_module_utils

    before = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    with internals.not_waiting_for_consent():
        assert dynamic_module_utils.TIME_OUT_REMOTE_CODE == 0
    assert before == dynamic_module_utils.TIME_OUT_REMOTE_CODE > 0


@pytest.mark.slow
def test_oldest_supported_transformers_has_them_too(tmp_path: Path) -> None:
    found = re.search(r'"transformers>=([\d.]+)', (ROOT / "pyproject.toml").read_text())
    assert found is not None
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path)]
    if subprocess.run([*pip, f"transformers=={found[1]}.*"], check=False).returncode:
        pytest.skip("pip cannot install it here")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    version = "import transformers; print(transformers.__version__)"
    shown = subprocess.run(
        [sys.executable, "-c", version], env=environment, check=True, capture_output=True, text=True
    ).stdout
    assert shown.startswith(found[1])
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(tests, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
