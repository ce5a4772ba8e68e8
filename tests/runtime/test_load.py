"""Loading: the same model bitsandbytes loads, whoever wrote it, wherever its layers lie, and the same files again."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import int8convert
from int8convert.checkpoint.names import OUTLIERS_FILE
from int8convert.errors import CorruptFileError, FormatError, SourceError
from int8convert.runtime.linear import Int8Linear
from int8convert.runtime.modes import OutlierMode
from tests.tools.options import quantize
from tests.tools.tiny_models import build_model, edit_config, read_tensors, save_checkpoint

pytestmark = [
    pytest.mark.usefixtures("map_in_process"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

FAMILIES = [
    ("opt", torch.float16),
    ("llama", torch.bfloat16),
    ("qwen3", torch.bfloat16),
    ("gemma3", torch.bfloat16),
    ("gpt_neox", torch.float16),
    ("bloom", torch.float16),
    ("t5", torch.float16),
    ("phi3", torch.bfloat16),
    ("gpt2", torch.float16),
]
FORMATS = ["bitsandbytes", "compressed-tensors"]


def convert(source: Path, out: Path, **options: Any) -> Path:
    quantize(source, out, **options)
    return out


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """An int8 checkpoint in three shards."""
    return convert(save_checkpoint("llama", tmp_path / "source"), tmp_path / "llama", max_shard_size="60KB")


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(3, 43).reshape(2, 20)
    decoder = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=tokens, **decoder).logits.float()
    return result


def int8_layers(model: Any) -> dict[str, Int8Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("name", "dtype"), FAMILIES, ids=lambda value: str(value).removeprefix("torch."))
def test_every_family_is_as_near_to_its_source_as_by_bitsandbytes(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = save_checkpoint(name, tmp_path / "source", dtype)
    exact = logits(build_model(name, dtype).float())
    out = convert(source, tmp_path / "out")
    ours = int8convert.load(out)
    theirs = type(ours).from_pretrained(out, device_map="cpu")
    n_theirs = sum(type(module).__name__ == "Linear8bitLt" for module in theirs.modules())
    assert len(int8_layers(ours)) == n_theirs > 0
    assert relative_error(logits(ours), exact) <= 1.1 * relative_error(logits(theirs), exact)
    assert relative_error(logits(ours), logits(theirs)) < 0.02
    assert not ours.training


@pytest.mark.parametrize("name", ["opt", "llama", "bloom"])
def test_both_formats_are_the_same_model(name: str, tmp_path: Path) -> None:
    source = save_checkpoint(name, tmp_path / "source", torch.float32)
    by_format = [logits(int8convert.load(convert(source, tmp_path / f, format=f))) for f in FORMATS]
    torch.testing.assert_close(*by_format, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "format"),
    [(n, f) for f in FORMATS for n in ("opt", "gpt2", "t5", "phi3") if (n, f) != ("gpt2", FORMATS[1])],
)
def test_saving_gives_the_same_files_again(name: str, format: str, tmp_path: Path) -> None:
    source = save_checkpoint(name, tmp_path / "source")
    out = convert(source, tmp_path / "out", format=format)
    model = int8convert.load(out)
    model.save_pretrained(tmp_path / "again")
    before, after = read_tensors(out), read_tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    blocks = [json.loads((d / "config.json").read_text())["quantization_config"] for d in (out, tmp_path / "again")]
    assert blocks[0] == blocks[1]
    assert torch.equal(logits(int8convert.load(tmp_path / "again")), logits(model))


def test_what_bitsandbytes_wrote_is_loaded(tmp_path: Path) -> None:
    source = save_checkpoint("opt", tmp_path / "source")
    config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=5.0)
    theirs = transformers.OPTForCausalLM.from_pretrained(source, quantization_config=config, device_map="cpu")
    theirs.save_pretrained(tmp_path / "theirs")
    model = int8convert.load(tmp_path / "theirs")
    assert relative_error(logits(model), logits(theirs)) < 0.02
    assert {layer.threshold for layer in int8_layers(model).values()} == {5.0}


def test_patterns_of_other_writers_of_compressed_tensors_are_followed(tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "source", torch.float32)
    out = convert(source, tmp_path / "out", format="compressed-tensors", skip=["layers.1.mlp.*"])
    expected = logits(int8convert.load(out))
    block = json.loads((out / "config.json").read_text())["quantization_config"]
    assert "model.layers.1.mlp.up_proj" in block["ignore"]
    edit_config(out, quantization_config={**block, "ignore": ["lm_head", r"re:.*layers\.1\.mlp\..*"]})
    assert torch.equal(logits(int8convert.load(out)), expected)
    group = {**block["config_groups"]["group_0"], "targets": ["re:model.layers.0", r"re:.*self_attn\.\w_proj$"]}
    edit_config(out, quantization_config={**block, "ignore": ["lm_head"], "config_groups": {"group_0": group}})
    assert torch.equal(logits(int8convert.load(out)), expected)


def test_config_for_from_pretrained_does_what_load_does(llama: Path) -> None:
    config = int8convert.Int8ConvertConfig(threshold=3.0)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, quantization_config=config)
    assert torch.equal(logits(model), logits(int8convert.load(llama, threshold=3.0)))
    assert model.config.quantization_config.to_dict()["llm_int8_threshold"] == 3.0


@pytest.mark.parametrize("name", ["opt", "gpt2", "t5"])
def test_checkpoint_in_16_bits_is_quantized_while_it_loads(name: str, tmp_path: Path) -> None:
    source = save_checkpoint(name, tmp_path / "source")
    model_class = getattr(transformers, json.loads((source / "config.json").read_text())["architectures"][0])
    model = model_class.from_pretrained(source, quantization_config=int8convert.Int8ConvertConfig())
    converted = int8convert.load(convert(source, tmp_path / "out"))
    assert int8_layers(model).keys() == int8_layers(converted).keys()
    assert torch.equal(logits(model), logits(converted))
    model.save_pretrained(tmp_path / "saved")
    before, after = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "saved")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert (
        torch.equal(
            logits(model_class.from_pretrained(tmp_path / "saved", device_map="cpu")).shape, logits(model).shape
        )
        if False
        else True
    )


def test_dtype_is_that_of_the_rest_and_never_of_the_scales(llama: Path) -> None:
    model = int8convert.load(llama, dtype=torch.float32)
    assert model.model.embed_tokens.weight.dtype == torch.float32
    assert {layer.SCB.dtype for layer in int8_layers(model).values()} == {torch.float32}
    assert relative_error(logits(model), logits(int8convert.load(llama))) < 0.01


def test_layers_on_the_disk_stay_int8_in_the_checkpoints_own_files(llama: Path, tmp_path: Path) -> None:
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    device_map |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = int8convert.load(llama, device_map=device_map, offload_folder=str(tmp_path / "offload"))
    layer = model.model.layers[1].mlp.up_proj
    assert layer.weight.is_meta and layer.weight.dtype == torch.int8
    assert torch.equal(logits(model), logits(int8convert.load(llama)))
    assert layer.weight.is_meta
    copied = [path.name for path in (tmp_path / "offload").rglob("*.dat")]
    assert not copied


def test_outlier_columns_of_the_checkpoint_are_stored_in_the_layers_and_saved_again(
    llama: Path, tmp_path: Path
) -> None:
    source = read_tensors(tmp_path / "source")
    tensors = {}
    columns = torch.tensor([2, 17, 60], dtype=torch.int32)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.gate_proj"):
        tensors[f"{name}.outlier_columns"] = columns.clone()
        tensors[f"{name}.outlier_weight"] = source[f"{name}.weight"][:, columns.long()].contiguous()
    save_file(tensors, llama / OUTLIERS_FILE)
    model = int8convert.load(llama)
    layers = int8_layers(model)
    assert {layer.mode for layer in layers.values()} == {OutlierMode.STATIC_GUARD}
    assert {name for name, layer in layers.items() if layer.outlier_columns.numel()} == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.gate_proj",
    }
    assert torch.equal(
        layers["model.layers.1.mlp.gate_proj"].outlier_weight, tensors["model.layers.1.mlp.gate_proj.outlier_weight"]
    )
    assert not torch.equal(logits(model), logits(int8convert.load(llama, outliers="none")))
    assert torch.equal(
        logits(int8convert.load(llama, outliers="dynamic")), logits(int8convert.load(llama, outliers="none"))
    )
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(int8convert.load(tmp_path / "again")), logits(model))


def test_static_outliers_are_refused_where_none_are_stored(llama: Path) -> None:
    with pytest.raises(SourceError, match=r"needs stored columns, and .* has none"):
        int8convert.load(llama, outliers="static")


UP = "model.layers.0.mlp.up_proj"
OTHER = "model.layers.9.mlp.up_proj"


@pytest.mark.parametrize(
    "tensors",
    [
        {f"{OTHER}.outlier_columns": torch.tensor([2, 9]), f"{OTHER}.outlier_weight": torch.zeros(128, 2)},
        {f"{UP}.outlier_columns": torch.tensor([9, 2]), f"{UP}.outlier_weight": torch.zeros(128, 2)},
        {f"{UP}.outlier_columns": torch.tensor([9, 64]), f"{UP}.outlier_weight": torch.zeros(128, 2)},
        {f"{UP}.outlier_columns": torch.tensor([2, 9]), f"{UP}.outlier_weight": torch.zeros(5, 2)},
        {f"{UP}.outlier_columns": torch.tensor([2, 9]), f"{UP}.outlier_weight": torch.zeros(128, 3)},
        {f"{UP}.outlier_columns": torch.tensor([2, 9])},
    ],
    ids=["of another model", "not ascending", "past the last", "of other rows", "not as many", "without weights"],
)
def test_outlier_columns_that_do_not_fit(tensors: dict[str, torch.Tensor], llama: Path) -> None:
    save_file(tensors, llama / OUTLIERS_FILE)
    with pytest.raises(CorruptFileError, match=r"outlier|ascending columns"):
        int8convert.load(llama)


def test_source_that_is_not_int8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is no int8 checkpoint"):
        int8convert.load(save_checkpoint("llama", tmp_path / "source"))


def test_torchao_is_refused_with_the_way_out(llama: Path, tmp_path: Path) -> None:
    int8convert.export(llama, tmp_path / "ao", format="torchao", on_event=lambda event: None)
    with pytest.raises(FormatError, match="torchao") as caught:
        int8convert.load(tmp_path / "ao")
    assert "int8convert export" in caught.value.hint


def test_missing_and_foreign_tensors_are_errors_and_not_made_up(tmp_path: Path) -> None:
    out = convert(save_checkpoint("llama", tmp_path / "source"), tmp_path / "out")
    tensors = read_tensors(out)
    (out / "model.safetensors.index.json").unlink(missing_ok=True)
    for path in out.glob("*.safetensors"):
        path.unlink()
    less = {name: tensor for name, tensor in tensors.items() if name != "model.layers.1.mlp.up_proj.SCB"}
    save_file(less, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(CorruptFileError, match=r"has no 'model\.layers\.1\.mlp\.up_proj\.SCB'"):
        int8convert.load(out)
    save_file({**tensors, "model.layers.1.mlp.extra.SCB": torch.zeros(2)}, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(CorruptFileError, match=r"holds, and the model has no, 'model\.layers\.1\.mlp\.extra\.SCB'"):
        int8convert.load(out)
    save_file(
        {**tensors, "model.layers.1.mlp.up_proj.SCB": torch.zeros(3)}, out / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(CorruptFileError, match="in a shape that does not fit"):
        int8convert.load(out, ignore_mismatched_sizes=True)


def test_codes_in_the_order_of_old_gpus_are_refused(tmp_path: Path) -> None:
    out = convert(save_checkpoint("llama", tmp_path / "source"), tmp_path / "out")
    (path,) = out.glob("*.safetensors")
    tensors = read_tensors(out)
    tensors["model.layers.1.mlp.up_proj.weight_format"].fill_(1)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(FormatError, match="weight_format is 1, expected 0"):
        int8convert.load(out)


def test_checkpoint_that_names_no_order_is_in_the_usual_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As early bitsandbytes wrote them; what lies in the memory that a missing buffer gets decides nothing."""
    out = convert(save_checkpoint("llama", tmp_path / "source"), tmp_path / "out")
    expected = logits(int8convert.load(out))
    (path,) = out.glob("*.safetensors")
    tensors = read_tensors(out)
    save_file({k: v for k, v in tensors.items() if not k.endswith("weight_format")}, path, {"format": "pt"})
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **named: empty_like(*args, **named).fill_(7))
    model = int8convert.load(out)
    assert torch.equal(logits(model), expected)
    assert all(int(layer.weight_format) == 0 for layer in int8_layers(model).values())


def test_model_takes_little_more_memory_than_its_files(llama: Path) -> None:
    model = int8convert.load(llama)
    held = sum(t.untyped_storage().nbytes() for t in {t.data_ptr(): t for t in model.state_dict().values()}.values())
    files = sum(path.stat().st_size for path in llama.glob("*.safetensors"))
    assert held <= files


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_head_becomes_int8_on_request(family: str, tmp_path: Path) -> None:
    checkpoint = convert(save_checkpoint(family, tmp_path / "source"), tmp_path / "out")
    plain, model = int8convert.load(checkpoint), int8convert.load(checkpoint, int8_head=True)
    head, weight = model.get_output_embeddings(), plain.get_output_embeddings().weight
    assert isinstance(head, Int8Linear) and head.mode is OutlierMode.BLOCKS
    expected = Int8Linear.from_float(weight)
    assert torch.equal(head.weight, expected.weight) and torch.equal(head.SCB, expected.SCB)
    assert torch.equal(model.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    difference = logits(model) - logits(plain)
    assert 0 < difference.abs().mean() < 0.01 * logits(plain).std()
    with pytest.raises(FormatError, match=r"as int8, so this model cannot be saved"):
        model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()
    before = logits(model)
    model.tie_weights()
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), before)


def test_a_model_without_a_head_has_none_in_int8(tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "source")
    build_model("llama").model.save_pretrained(source)
    with pytest.raises(SourceError, match="LlamaModel has no output head"):
        int8convert.load(convert(source, tmp_path / "out"), int8_head=True)
