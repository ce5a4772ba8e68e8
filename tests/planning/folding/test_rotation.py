"""Rotations that are folded into weights: proved on small models, tested on larger ones and on whole conversions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from compressed_tensors.transform import TransformConfig, TransformFactory
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from cuda_kernels import reference
from int8convert import export, load, quantize, verify
from int8convert.checkpoint import rows
from int8convert.errors import Int8ConvertError
from int8convert.formats import compressed_tensors
from int8convert.formats.transforms import with_transforms
from int8convert.outliers.folded_model import fold_model
from int8convert.planning.folding.groups import run
from int8convert.planning.folding.parameter_folds import ParameterFold, rotation_block
from int8convert.planning.folding.proof import is_proved, small_model
from int8convert.planning.folding.worker import find_rotation
from int8convert.planning.plan_checkpoint import PlanOptions, plan
from tests.tools.family_models import families
from tests.tools.rotation_check import check_rotation, randomized, rotated
from tests.tools.tiny_models import MODELS, build_model

_SIZES = {"vocab_size": 160, "num_hidden_layers": 3, "num_attention_heads": 2}

LARGER: dict[str, Any] = {
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**_SIZES, hidden_size=128, ffn_dim=192, word_embed_proj_dim=128, pad_token_id=0)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**_SIZES, hidden_size=192, intermediate_size=320, num_key_value_heads=1)
    ),
    "qwen3 with a tied head": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            **_SIZES,
            hidden_size=256,
            head_dim=32,
            num_key_value_heads=1,
            intermediate_size=96,
            tie_word_embeddings=True,
        )
    ),
    "gemma": lambda: transformers.GemmaForCausalLM(
        transformers.GemmaConfig(**_SIZES, hidden_size=64, head_dim=64, num_key_value_heads=1, intermediate_size=96)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=160, n_embd=128, n_layer=3, n_head=2, bos_token_id=1, eos_token_id=2)
    ),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**_SIZES, hidden_size=128, intermediate_size=192)
    ),
}


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def folds_of(model: Any) -> tuple[dict[str, ParameterFold], dict[str, Any]]:
    with torch.device("meta"):
        real = type(model)(model.config)
    found = find_rotation(real)
    return {fields["parameter"]: ParameterFold(**fields) for fields in found["folds"]}, found


@pytest.mark.parametrize("name", LARGER)
def test_folded_model_computes_the_same(name: str) -> None:
    """A model of other sizes than the one on which the rotation was proved."""
    model = randomized(LARGER[name]())
    folds, found = folds_of(model)
    copy = rotated(model, folds, found["untied"] is not None)
    ids = torch.arange(3, 40)[None]
    expected = run(model, ids)
    torch.testing.assert_close(run(copy, ids), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    embedding = next(key for key in folds if key.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight")))
    assert not torch.allclose(copy.get_parameter(embedding), model.get_parameter(embedding), atol=0.1)
    for module in copy.modules():
        weight = getattr(module, "weight", None)
        if "Norm" in type(module).__name__ and weight is not None and weight.shape == (model.config.hidden_size,):
            assert weight.unique().numel() == 1  # its gain is in the weights


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "rotates_stream"),
    [
        *((f"causal/{name}", True) for name in ("cohere", "falcon", "gptj", "phi", "stablelm", "starcoder2")),
        *((f"causal/{name}", False) for name in ("deepseek_v3", "gemma2", "olmo", "olmo2", "qwen3_moe")),
        *(("masked/modernbert", False), ("masked/bert", False), ("seq2seq/t5", False)),
    ],
)
def test_family_computes_the_same_or_is_refused(name: str, rotates_stream: bool) -> None:
    """Some families of those that `scripts/check_rotations.py` tries all of."""
    result = check_rotation(next(family for family in families() if family.name == name))
    assert result.is_right, result
    assert result.rotates_stream == rotates_stream, result


def test_both_rotations_are_found() -> None:
    folds, found = folds_of(LARGER["llama"]())
    assert found["refusals"] == []
    prefix = "model.layers.2.self_attn."
    assert folds[f"{prefix}v_proj.weight"] == ParameterFold(
        f"{prefix}v_proj.weight", "model.layers.2.input_layernorm", row_block=16, column_block=64
    )
    assert folds[f"{prefix}o_proj.weight"] == ParameterFold(f"{prefix}o_proj.weight", row_block=64, column_block=16)
    assert folds[f"{prefix}q_proj.weight"].row_block == 1


@pytest.mark.parametrize(("size", "block"), [(896, 64), (4096, 256), (768, 256), (96, 16), (30, 1), (128, 64)])
def test_block_is_the_largest_power_of_four(size: int, block: int) -> None:
    assert rotation_block(size) == block


def refusals(model: Any) -> str:
    _, found = folds_of(model)
    assert not any(fields["gain"] for fields in found["folds"])
    return "; ".join(found["refusals"])


def test_what_cannot_be_folded_is_refused_with_the_reason() -> None:
    assert "post_attention_layernorm has a gain, and feeds no Linear" in refusals(MODELS["gemma3"]())
    assert "word_embeddings_layernorm has a gain, and feeds no Linear" in refusals(MODELS["bloom"]())
    assert "has an encoder and a decoder" in refusals(MODELS["t5"]())
    mixture = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**_SIZES, hidden_size=64, intermediate_size=64, num_key_value_heads=1)
    )
    assert "is no Linear layer" in refusals(mixture)
    latent = transformers.DeepseekV2ForCausalLM(
        transformers.DeepseekV2Config(
            **_SIZES, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_experts_per_tok=2
        )
    )
    assert "is no Linear layer" in refusals(latent)


def test_a_forgotten_weight_is_no_rotation() -> None:
    """The proof compares outputs, so it fails for every fold that is left out."""
    model = MODELS["llama"]()
    found = find_rotation(model)
    small = {
        fields["parameter"]: ParameterFold(**fields)
        for fields in found["folds"]
        if fields["parameter"] in dict(small_model(model).named_parameters())
    }
    ids = torch.arange(3, 15)[None]
    assert is_proved(model, small, ids, unties=False)
    for leaf in ("embed_tokens", "input_layernorm", "k_proj", "v_proj", "o_proj", "down_proj", "norm", "lm_head"):
        name = next(key for key in small if key.endswith(f"{leaf}.weight"))
        without = {key: fold for key, fold in small.items() if key != name}
        assert not is_proved(model, without, ids, unties=False), name


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = randomized(build_model("opt", torch.float32))
    model.save_pretrained(tmp_path / "source", max_shard_size="60KB")
    return tmp_path / "source"


@pytest.mark.usefixtures("rotation_in_process")
def test_conversion_quantizes_the_rotated_weights(checkpoint: Path, tmp_path: Path) -> None:
    quantize(checkpoint, tmp_path / "out", PlanOptions(rotate=True))
    source, out = read_tensors(checkpoint), read_tensors(tmp_path / "out")
    prefix = "model.decoder.layers.1."
    gain = source[f"{prefix}self_attn_layer_norm.weight"].numpy()
    expected = reference.rotate(source[f"{prefix}self_attn.q_proj.weight"].numpy() * gain, 64)
    np.testing.assert_array_equal(
        out[f"{prefix}self_attn.q_proj.weight"].numpy(), reference.row_quantize(expected).codes
    )
    written = reference.rotate(np.ascontiguousarray(source[f"{prefix}fc2.weight"].numpy().T), 64).T
    np.testing.assert_array_equal(out[f"{prefix}fc2.weight"].numpy(), reference.row_quantize(written).codes)
    assert (out[f"{prefix}self_attn_layer_norm.weight"] == 1).all()
    final = source["model.decoder.final_layer_norm.weight"].numpy()
    embedding = source["model.decoder.embed_tokens.weight"].numpy()
    np.testing.assert_array_equal(out["model.decoder.embed_tokens.weight"].numpy(), reference.rotate(embedding, 64))
    np.testing.assert_array_equal(out["lm_head.weight"].numpy(), reference.rotate(embedding * final, 64))


@pytest.mark.usefixtures("rotation_in_process")
def test_bytes_do_not_depend_on_threads_and_blocks(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(checkpoint, tmp_path / "one", PlanOptions(rotate=True), workers=1)
    monkeypatch.setattr(rows, "BLOCK_BYTES", 3000)
    quantize(checkpoint, tmp_path / "other", PlanOptions(rotate=True), workers=3)
    one, other = read_tensors(tmp_path / "one"), read_tensors(tmp_path / "other")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.usefixtures("rotation_in_process")
def test_inputs_are_rotated_while_the_model_runs(tmp_path: Path) -> None:
    """compressed-tensors' own transform gives the same inputs, and unrotates the same weights."""
    model = randomized(build_model("llama", torch.float32))
    model.save_pretrained(tmp_path / "source")
    prefix = "model.layers.1.mlp.down_proj"
    weight = load_file(tmp_path / "source" / "model.safetensors")[f"{prefix}.weight"].numpy()
    rotated = torch.from_numpy(reference.rotate(np.ascontiguousarray(weight.T), 64).T.copy())  # its outputs are
    x = torch.randn(50, 128, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 30  # an outlier in the product of the MLP
    errors = {}
    for name, options in {
        "folded": PlanOptions(format="compressed-tensors", rotate=True),
        "all": PlanOptions(format="compressed-tensors", rotate_inputs=True),
    }.items():
        quantize(tmp_path / "source", tmp_path / name, options)
        loaded = load(tmp_path / name, outliers="none")
        layer = loaded.get_submodule(prefix)
        errors[name] = float((layer(x) - x @ rotated.T).norm())
    assert errors["all"] < 0.4 * errors["folded"]

    assert layer.input_block == 128
    assert {name for name, module in loaded.named_modules() if getattr(module, "input_block", 1) > 1} == {
        f"model.layers.{i}.mlp.down_proj" for i in range(2)
    }
    block = json.loads((tmp_path / "all" / "config.json").read_text())["quantization_config"]
    scheme = TransformConfig.model_validate(block["transform_config"]).config_groups["inputs"]
    linear = torch.nn.Linear(128, 64, bias=False)
    transform = TransformFactory.from_scheme(scheme, name="inputs").create_transform(linear, scheme.apply[0])
    torch.testing.assert_close(layer.rotate_input(x), transform(x))
    tensors = read_tensors(tmp_path / "all")
    torch.testing.assert_close(tensors[f"{prefix}.inputs_input.weight"].float(), transform.weight.float())
    assert float((layer.dequantize() - rotated).abs().max()) < 0.02


@pytest.mark.usefixtures("rotation_in_process")
@pytest.mark.parametrize(("name", "options"), [("opt", {"rotate": True}), ("llama", {"rotate_inputs": True})])
def test_source_is_rotated_in_memory_to_be_measured(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = randomized(build_model(name, torch.float32))
    model.save_pretrained(tmp_path / "source")
    planned = plan(tmp_path / "source", PlanOptions(format="compressed-tensors", **options))
    ids = torch.arange(3, 40)[None]
    expected, before = run(model, ids), [p.detach().clone() for p in model.parameters()]
    fold_model(model, planned)
    torch.testing.assert_close(run(model, ids), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert sum(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=False)) > 10


@pytest.mark.usefixtures("rotation_in_process")
def test_verify_compares_rotated_inputs(tmp_path: Path) -> None:
    randomized(build_model("llama", torch.float32)).save_pretrained(tmp_path / "source")
    out = tmp_path / "out"
    quantize(tmp_path / "source", out, PlanOptions(format="compressed-tensors", rotate_inputs=True))
    assert verify(out, level="exact").failures == ()
    name = "model.layers.0.mlp.down_proj.inputs_input.weight"
    tensors = load_file(out / "model.safetensors")
    tensors[name][3, 4] *= -1
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    report = verify(out, level="exact")
    finding = next(check for check in report.exact.checks if check.name == "weights").findings[0]
    assert (finding.tensor, finding.row, finding.column) == (name, 3, 4)


def test_rotated_inputs_need_a_loader_that_rotates_them(tmp_path: Path) -> None:
    build_model("llama").save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="rotate_inputs needs the format compressed-tensors"):
        quantize(tmp_path / "source", tmp_path / "out", PlanOptions(rotate_inputs=True))
    block = with_transforms(compressed_tensors.block((), 6.0), ["a"])
    assert compressed_tensors.block_problem(block) == ""
    block["transform_config"]["config_groups"]["inputs"]["head_dim"] = 64
    assert "rotates inputs or weights in another way" in compressed_tensors.block_problem(block)


def test_model_without_rotation_is_refused(tmp_path: Path) -> None:
    build_model("bloom").save_pretrained(tmp_path / "source")
    with pytest.raises(Int8ConvertError, match=r"cannot be rotated.*word_embeddings_layernorm") as refused:
        quantize(tmp_path / "source", tmp_path / "out", PlanOptions(rotate=True))
    assert refused.value.hint == "convert without --rotate"
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("rotation_in_process")
def test_fold_that_fits_no_fp16_is_refused(tmp_path: Path) -> None:
    model = randomized(build_model("llama", torch.float32))
    model.get_parameter("model.norm.weight").data.fill_(60000)
    model.get_parameter("lm_head.weight").data *= 30
    model.half().save_pretrained(tmp_path / "source")
    with pytest.raises(Int8ConvertError, match=r"'lm_head.weight' does not fit F16 after the fold"):
        quantize(tmp_path / "source", tmp_path / "out", PlanOptions(rotate=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("rotation_in_process")
def test_gain_of_zero_is_refused(tmp_path: Path) -> None:
    model = randomized(build_model("llama", torch.float32))
    model.get_parameter("model.layers.0.input_layernorm.weight").data[3] = 0
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(Int8ConvertError, match=r"input_layernorm.weight' holds zero"):
        quantize(tmp_path / "source", tmp_path / "out", PlanOptions(rotate=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("rotation_in_process")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", ["post_attention_layernorm", "lm_head", "embed_tokens"])
def test_what_an_adapter_replaces_is_rotated(module: str, tmp_path: Path) -> None:
    """A norm of the adapter gives its own gain to the layers that read it."""
    source, adapter, out = tmp_path / "source", tmp_path / "adapter", tmp_path / "out"
    randomized(build_model("llama", torch.float32)).save_pretrained(source)
    base = transformers.AutoModelForCausalLM.from_pretrained(source)
    tuned = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[module]))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in tuned.named_parameters():
        if "modules_to_save" in name:
            parameter.data *= torch.empty_like(parameter).uniform_(0.3, 3, generator=generator)
    tuned.save_pretrained(adapter)
    quantize(source, out, PlanOptions(rotate=True, lora=adapter))
    export(out, tmp_path / "plain", dequantize="float32")
    ids = torch.arange(3, 40)[None]
    expected = run(tuned.merge_and_unload(), ids)
    found = run(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), ids)
    assert (found - expected).abs().max() < 0.3 * expected.std()  # 0.15 measured; 4.6 with what the source holds
