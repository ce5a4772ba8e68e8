"""What export writes: the same codes in every format, scales that come back, weights bitsandbytes would dequantize."""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

import int8convert
from int8convert.events import Event, ShardFinished
from int8convert.formats.layers import CONV1D_NAMES, is_conv1d
from tests.tools.options import quantize
from tests.tools.tiny_models import build_model, edit_config, file_bytes, read_tensors, save_checkpoint

pytestmark = [
    pytest.mark.usefixtures("map_in_process"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def make_int8(directory: Path, name: str = "opt", dtype: torch.dtype = torch.float16, **options: Any) -> Path:
    """An int8 checkpoint in several shards; its source beside it."""
    source = save_checkpoint(name, directory / "source", dtype, max_shard_size="60KB")
    quantize(source, directory / "int8", **options)
    return directory / "int8"


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Same names, dtypes, shapes and bytes."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def read_config(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("opt", torch.float16), ("llama", torch.bfloat16), ("t5", torch.float16), ("gpt_neox", torch.float16)],
)
def test_round_trip_through_all_formats_ends_with_the_first_bytes(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    before = make_int8(tmp_path, name, dtype)
    for step in ("compressed-tensors", "torchao", "bitsandbytes"):
        report = int8convert.export(before, tmp_path / step, format=step)
        assert report.n_changed_scales == 0 and (report.source_format, report.format) != (step, None)
        before = tmp_path / step
    assert_same(read_tensors(tmp_path / "bitsandbytes"), read_tensors(tmp_path / "int8"))
    block, first = (read_config(tmp_path / d)["quantization_config"] for d in ("bitsandbytes", "int8"))
    # For all that headers tell, a matrix that is kept may be a Linear. GPT-NeoX's output head has another name in the
    # files than in the model.
    more = {"t5": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias", "gpt_neox": "embed_out"}.get(name)
    assert set(first["llm_int8_skip_modules"]) <= set(block["llm_int8_skip_modules"])
    assert {**block, "llm_int8_skip_modules": 0} == {**first, "llm_int8_skip_modules": 0}
    assert more in block["llm_int8_skip_modules"] if more else block == first


@pytest.mark.parametrize(("name", "dtype"), [("opt", torch.float16), ("qwen3", torch.bfloat16)])
def test_export_writes_what_quantize_would(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    made = {}
    for format in ("bitsandbytes", "compressed-tensors"):
        (tmp_path / format).mkdir()
        made[format] = make_int8(tmp_path / format, name, dtype, format=format)
    for format, other in zip(made, reversed(made), strict=True):
        new = tmp_path / f"from {other}"
        int8convert.export(made[other], new, format=format)
        assert_same(read_tensors(new), read_tensors(made[format]))
        assert read_config(new) == read_config(made[format])


def test_compressed_tensors_bytes(tmp_path: Path) -> None:
    out = make_int8(tmp_path)
    int8convert.export(out, tmp_path / "new", format="compressed-tensors")
    before, after = read_tensors(out), read_tensors(tmp_path / "new")
    name = "model.decoder.layers.1.fc1"
    assert torch.equal(after[f"{name}.weight"], before[f"{name}.weight"])
    assert torch.equal(after[f"{name}.weight_scale"], (before[f"{name}.SCB"] / 127)[:, None])
    assert after[f"{name}.weight_scale"].dtype == torch.float32
    assert torch.equal(after[f"{name}.bias"], before[f"{name}.bias"])
    assert not any("SCB" in key or "format" in key for key in after)
    assert read_config(tmp_path / "new")["quantization_config"]["ignore"] == ["lm_head"]


def test_torchao_bytes_and_header(tmp_path: Path) -> None:
    out = make_int8(tmp_path)
    int8convert.export(out, tmp_path / "new", format="torchao")
    before, after = read_tensors(out), read_tensors(tmp_path / "new")
    name = "model.decoder.layers.1.fc1"
    assert torch.equal(after[f"{name}._weight_qdata"], before[f"{name}.weight"])
    assert torch.equal(after[f"{name}._weight_scale"], (before[f"{name}.SCB"] / 127)[:, None])
    assert torch.equal(after[f"{name}._weight_zero_point"], torch.zeros(128, 1, dtype=torch.int8))
    shards = sorted((tmp_path / "new").glob("*.safetensors"))
    assert len(shards) == 3
    for shard in shards:
        with safe_open(shard, "pt") as file:
            metadata = file.metadata()
        assert metadata["format"] == "pt"
        names = json.loads(metadata["tensor_names"])
        assert set(names) == {n for n in before if not n.endswith(("SCB", "weight_format"))}
        assert json.loads(metadata[f"{name}.weight"])["_data"]["block_size"] == [1, 64]
        assert json.loads(metadata[f"{name}.bias"]) == {"_type": "Tensor"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["opt", "llama", "gpt2"])
def test_dequantized_as_bitsandbytes_does(name: str, dtype: str, tmp_path: Path) -> None:
    """GPT-2's Conv1D weights turn back into [in, out]; bitsandbytes makes Linear layers of them, [out, in]."""
    pytest.importorskip("bitsandbytes")
    source_dtype = torch.bfloat16 if name == "llama" else torch.float16
    out = make_int8(tmp_path, name, source_dtype)
    report = int8convert.export(out, tmp_path / "new", dequantize=dtype)
    model_class = type(build_model(name))
    theirs = model_class.from_pretrained(out, device_map="cpu").dequantize(DTYPES[dtype])
    ours, before = read_tensors(tmp_path / "new"), read_tensors(out)
    assert (report.format, report.dtype) == (None, dtype)
    n_compared = 0
    for key, expected in theirs.state_dict().items():
        if before.get(key) is not None and before[key].dtype == torch.int8:
            expected = expected.T if name == "gpt2" else expected
            assert ours[key].dtype == DTYPES[dtype]
            assert torch.equal(ours[key], expected), key
            n_compared += 1
        elif key in before:
            assert ours[key].dtype == before[key].dtype and torch.equal(ours[key], before[key])
    assert n_compared == report.n_int8_weights >= 8
    config = read_config(tmp_path / "new")
    assert config["dtype"] == dtype and "quantization_config" not in config
    model, info = model_class.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(info.values()), info
    original = read_tensors(tmp_path / "source")
    for key, weight in model.state_dict().items():
        if key in original:
            error = (weight.float() - original[key].float()).abs().max()
            assert error <= original[key].abs().max() / 127


@pytest.mark.parametrize("step", ["compressed-tensors", "torchao"])
def test_dequantized_from_a_scale_is_code_times_scale(step: str, tmp_path: Path) -> None:
    out = make_int8(tmp_path)
    int8convert.export(out, tmp_path / "between", format=step)
    int8convert.export(tmp_path / "between", tmp_path / "new", dequantize="float32")
    before, after = read_tensors(out), read_tensors(tmp_path / "new")
    name = "model.decoder.layers.0.fc2"
    expected = before[f"{name}.weight"].float() * (before[f"{name}.SCB"] / 127)[:, None]
    assert torch.equal(after[f"{name}.weight"], expected)


@pytest.mark.parametrize("format", ["bitsandbytes", "compressed-tensors", "torchao"])
def test_reshard_keeps_tensors_and_config(format: str, tmp_path: Path) -> None:
    out = make_int8(tmp_path)
    if format != "bitsandbytes":
        int8convert.export(out, tmp_path / "start", format=format)
        out = tmp_path / "start"
    int8convert.export(out, tmp_path / "one", max_shard_size="1GB")
    int8convert.export(tmp_path / "one", tmp_path / "many", max_shard_size="20KB")
    for new, n_shards in (("one", 1), ("many", 6)):
        assert_same(read_tensors(tmp_path / new), read_tensors(out))
        assert read_config(tmp_path / new) == read_config(out)
        shards = sorted((tmp_path / new).glob("*.safetensors"))
        assert len(shards) >= n_shards if new == "many" else len(shards) == 1
        for shard in shards:
            assert shard.stat().st_size < 40_000 or new == "one"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    tensors = read_tensors(out)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for name, file_name in index["weight_map"].items():
        if name.endswith((".SCB", "_scale")):  # a weight's parts stay together
            others = [n for n in index["weight_map"] if n.startswith(name.rpartition(".")[0] + ".") and "weight" in n]
            assert {index["weight_map"][n] for n in others} == {file_name}


def test_checkpoint_of_bitsandbytes_itself(tmp_path: Path) -> None:
    """Its config has no list of modules to skip, and its files lie in another order."""
    pytest.importorskip("bitsandbytes")
    source = save_checkpoint("llama", tmp_path / "source")
    config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=5.0)
    model_class = transformers.LlamaForCausalLM
    model = model_class.from_pretrained(source, quantization_config=config, device_map="cpu")
    model.save_pretrained(tmp_path / "theirs")
    int8convert.export(tmp_path / "theirs", tmp_path / "between", format="compressed-tensors")
    assert read_config(tmp_path / "between")["quantization_config"]["ignore"] == ["lm_head"]
    int8convert.export(tmp_path / "between", tmp_path / "new", format="bitsandbytes")
    assert_same(read_tensors(tmp_path / "new"), read_tensors(tmp_path / "theirs"))
    int8convert.export(tmp_path / "theirs", tmp_path / "copy", format="bitsandbytes")
    assert_same(read_tensors(tmp_path / "copy"), read_tensors(tmp_path / "theirs"))
    assert read_config(tmp_path / "copy")["quantization_config"]["llm_int8_threshold"] == 5.0


def test_torchao_headers_that_name_their_own_tensors_only_are_put_together(tmp_path: Path) -> None:
    out = make_int8(tmp_path)
    int8convert.export(out, tmp_path / "all", format="torchao")
    names, partial = [], []
    for path in sorted((tmp_path / "all").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
            metadata = file.metadata()
        own = [
            n
            for n in json.loads(metadata["tensor_names"])
            if n in tensors or n.removesuffix(".weight") + "._weight_qdata" in tensors
        ]
        save_file(tensors, path, {**{n: metadata[n] for n in own}, "tensor_names": json.dumps(own)})
        names += own
        partial.append(metadata)
    int8convert.export(tmp_path / "all", tmp_path / "one", max_shard_size="1GB")
    with safe_open(tmp_path / "one" / "model.safetensors", "pt") as file:
        found = file.metadata()
    assert sorted(json.loads(found["tensor_names"])) == sorted(names)
    assert all(found[name] == partial[0][name] for name in names)


def write_checkpoint(directory: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    """One file of bitsandbytes' format."""
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    block = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (directory / "config.json").write_text(json.dumps({"quantization_config": block, **config}))
    return directory


@pytest.mark.parametrize("options", [{"format": "torchao"}, {"dequantize": "bfloat16"}, {"max_shard_size": "50KB"}])
def test_number_of_threads_changes_no_byte(options: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("int8convert.checkpoint.rows.BLOCK_BYTES", 1024)
    int8 = make_int8(tmp_path)
    for workers in (1, 2, 5):
        int8convert.export(int8, tmp_path / f"{workers}", workers=workers, **options)
    expected = file_bytes(tmp_path / "1")
    assert file_bytes(tmp_path / "2") == file_bytes(tmp_path / "5") == expected


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_tensors_of_many_blocks(model_type: str, tmp_path: Path) -> None:
    """Some megabytes each, of an odd number of columns; with Conv1D read by rows and written by columns."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (2900, 1111), dtype=torch.int8, generator=generator)
    absmax = torch.rand(2900, generator=generator).half().float()
    kept = torch.rand(1500, 1111, generator=generator)
    tensors = {"h.0.c_fc.weight": codes, "h.0.c_fc.SCB": absmax, "wte.weight": kept}
    out = write_checkpoint(tmp_path / "int8", tensors, {"model_type": model_type})
    int8convert.export(out, tmp_path / "plain", dequantize="float32")
    plain = read_tensors(tmp_path / "plain")
    weight = codes * absmax[:, None] * (torch.ones(()) / 127)
    assert torch.equal(plain["h.0.c_fc.weight"], weight.T if model_type == "gpt2" else weight)
    assert torch.equal(plain["wte.weight"], kept)
    if model_type == "llama":
        int8convert.export(out, tmp_path / "new", format="compressed-tensors")
        assert torch.equal(read_tensors(tmp_path / "new")["h.0.c_fc.weight"], codes)


def test_what_older_tools_wrote_otherwise(tmp_path: Path) -> None:
    """No weight_format, an absmax of fp16: read for what they mean, and written as they should be."""
    scb = torch.rand(8).half()
    tensors = {"a.weight": torch.ones(8, 4, dtype=torch.int8), "a.SCB": scb, "norm.weight": torch.ones(4).bfloat16()}
    out = write_checkpoint(tmp_path / "int8", tensors, {})
    int8convert.export(out, tmp_path / "between", format="torchao")
    int8convert.export(tmp_path / "between", tmp_path / "new", format="bitsandbytes")
    expected = {**tensors, "a.SCB": scb.float(), "a.weight_format": torch.tensor(0, dtype=torch.uint8)}
    assert_same(read_tensors(tmp_path / "new"), expected)
    assert read_config(tmp_path / "between")["torch_dtype"] == "bfloat16"


def test_pickled_checkpoint_with_a_transposed_tensor(tmp_path: Path) -> None:
    out = make_int8(tmp_path, "llama", torch.bfloat16)
    tensors = read_tensors(out)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((out / "config.json").read_bytes())
    head = tensors["lm_head.weight"].T.contiguous().T
    assert not head.is_contiguous()
    torch.save({**tensors, "lm_head.weight": head}, pickled / "pytorch_model.bin")
    int8convert.export(pickled, tmp_path / "new", format="bitsandbytes")
    assert_same(read_tensors(tmp_path / "new"), tensors)


def test_fused_experts_that_stayed_16_bit_are_ignored(tmp_path: Path) -> None:
    """vLLM looks for the layer that holds them, which has no tensor `.weight` of its own."""
    tensors = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.ones(2, 8, 4),
        "model.layers.0.mlp.experts.1.down_proj.weight": torch.ones(8, 4),
        "model.layers.0.o_proj.weight": torch.ones(8, 4, dtype=torch.int8),
        "model.layers.0.o_proj.SCB": torch.ones(8),
        "model.layers.0.conv.weight": torch.ones(8, 1, 4),
    }
    out = write_checkpoint(tmp_path / "int8", tensors, {})
    int8convert.export(out, tmp_path / "new", format="compressed-tensors")
    experts = "model.layers.0.mlp.experts"
    ignored = read_config(tmp_path / "new")["quantization_config"]["ignore"]
    assert ignored == ["lm_head", experts, f"{experts}.1.down_proj"]


def test_scale_in_another_shard_than_its_codes(tmp_path: Path) -> None:
    out = make_int8(tmp_path)
    tensors = read_tensors(out)
    split = tmp_path / "split"
    split.mkdir()
    (split / "config.json").write_bytes((out / "config.json").read_bytes())
    parts = {f"model-0000{i}-of-00002.safetensors": {} for i in (1, 2)}
    first, second = parts
    for name, tensor in tensors.items():
        parts[second if name.endswith("SCB") else first][name] = tensor
    for file_name, part in parts.items():
        save_file(part, split / file_name)
    weight_map = {name: file_name for file_name, part in parts.items() for name in part}
    (split / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    int8convert.export(split, tmp_path / "new", format="torchao")
    assert (tmp_path / "new" / "model.safetensors").is_file()
    int8convert.export(out, tmp_path / "expected", format="torchao", max_shard_size="1GB")
    assert_same(read_tensors(tmp_path / "new"), read_tensors(tmp_path / "expected"))


def test_modules_that_stayed_16_bit_are_ignored_by_name(tmp_path: Path) -> None:
    """In compressed-tensors' list a name means itself only, in the others also what ends with it."""
    out = make_int8(tmp_path, skip=["layers.0.*"], min_coverage=0.1)
    edit_config(out, quantization_config={**read_config(out)["quantization_config"], "llm_int8_skip_modules": ["fc2"]})
    int8convert.export(out, tmp_path / "new", format="compressed-tensors")
    ignored = read_config(tmp_path / "new")["quantization_config"]["ignore"]
    linear = ["fc1", "fc2", *(f"self_attn.{name}_proj" for name in ("k", "out", "q", "v"))]
    assert ignored == [f"model.decoder.layers.0.{name}" for name in linear]


def test_experts_go_to_compressed_tensors_and_to_16_bits(tmp_path: Path) -> None:
    out = make_experts(tmp_path)
    int8convert.export(out, tmp_path / "new", max_shard_size="1GB")
    assert_same(read_tensors(tmp_path / "new"), read_tensors(out))
    int8convert.export(out, tmp_path / "plain", dequantize="bfloat16")
    plain = read_tensors(tmp_path / "plain")
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    assert torch.equal(plain[name], (read_tensors(out)[name].float() * 0.5).bfloat16())
    assert not any(key.endswith("scale") for key in plain)


def test_experts_and_conv1d_stay_where_they_have_a_form(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.0.up_proj"
    tensors = {f"{name}.weight": torch.ones(8, 4, dtype=torch.int8), f"{name}.SCB": torch.ones(8)}
    int8convert.export(
        write_checkpoint(tmp_path / "experts", tensors, {}), tmp_path / "new", format="compressed-tensors"
    )
    assert read_tensors(tmp_path / "new").keys() == {f"{name}.weight", f"{name}.weight_scale"}
    gpt2 = make_int8(tmp_path, "gpt2")
    int8convert.export(gpt2, tmp_path / "cut", max_shard_size="30KB")
    assert_same(read_tensors(tmp_path / "cut"), read_tensors(gpt2))


def make_experts(directory: Path) -> Path:
    """Two experts in int8 as compressed-tensors has them, beside a router that is kept."""
    out = directory / "experts"
    out.mkdir()
    tensors: dict[str, torch.Tensor] = {"model.layers.0.mlp.gate.weight": torch.ones(2, 64, dtype=torch.bfloat16)}
    for i in range(2):
        name = f"model.layers.0.mlp.experts.{i}.up_proj"
        tensors[f"{name}.weight"] = torch.arange(-64, 64, dtype=torch.int8)[:, None].repeat(1, 64)
        tensors[f"{name}.weight_scale"] = torch.full((128, 1), 0.5)
    save_file(tensors, out / "model.safetensors")
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    groups = {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**int8, "strategy": "channel", "dynamic": False},
            "input_activations": {**int8, "strategy": "token", "dynamic": True},
        }
    }
    block = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["model.layers.0.mlp.gate"],
        "config_groups": groups,
    }
    config = {"model_type": "qwen3_moe", "dtype": "bfloat16", "quantization_config": block}
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_other_files_go_along_and_the_manifest_holds_hashes(tmp_path: Path) -> None:
    out = make_int8(tmp_path)
    (out / "tokenizer.json").write_text("{}")
    (out / "README.md").write_text("about the other format")
    told: list[Event] = []
    report = int8convert.export(out, tmp_path / "new", format="compressed-tensors", on_event=told.append)
    events = [event for event in told if isinstance(event, ShardFinished)]
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert "tokenizer.json" in names and "README.md" not in names
    assert [(e.i, e.n) for e in events] == [(0, 3), (1, 3), (2, 3)]
    files = {e.file_name: (tmp_path / "new" / e.file_name).stat().st_size for e in events}
    assert {e.file_name: e.n_bytes for e in events} == files
    assert report.n_written_bytes == sum(files.values())
    own = sorted(p.name for p in (tmp_path / "new" / "int8convert").iterdir())
    assert own == ["local.json", "manifest.json"]
    manifest = json.loads((tmp_path / "new" / "int8convert" / "manifest.json").read_text())
    assert manifest["conversion"]["format"] == "compressed-tensors"
    for record in manifest["shards"]:
        data = (tmp_path / "new" / record["file_name"]).read_bytes()
        assert record["sha256"] == hashlib.sha256(data).hexdigest()


def test_overwrite_replaces_what_is_there(tmp_path: Path) -> None:
    out = make_int8(tmp_path)
    new = tmp_path / "new"
    int8convert.export(out, new, format="torchao")
    (new / "notes.txt").write_text("mine")
    int8convert.export(out, new, dequantize="float16", max_shard_size="1GB", overwrite=True)
    assert (new / "notes.txt").read_text() == "mine"
    assert [path.name for path in sorted(new.glob("model*"))] == ["model.safetensors"]
    before = file_bytes(new)
    int8convert.export(out, new, dequantize="float16", max_shard_size="1GB", overwrite=True)
    assert file_bytes(new) == before


def test_every_conv1d_of_transformers_is_known_and_no_linear_taken_for_one() -> None:
    """By transformers' own classes: those whose source makes a Conv1D, built small on the meta device."""
    folder = Path(transformers.__file__).parent / "models"
    found = {path.parent.name for path in folder.glob("*/modeling_*.py") if "= Conv1D(" in path.read_text()}
    assert found == {"clvp", "decision_transformer", "gpt2", "imagegpt", "openai"}
    small = {"n_embd": 32, "n_head": 2, "n_layer": 1, "n_inner": 64, "hidden_size": 32}
    classes = [
        ("gpt2", "GPT2Config", "GPT2LMHeadModel", {**small, "add_cross_attention": True}),
        ("openai", "OpenAIGPTConfig", "OpenAIGPTLMHeadModel", small),
        ("imagegpt", "ImageGPTConfig", "ImageGPTForCausalImageModeling", small),
        ("decision_transformer", "DecisionTransformerConfig", "DecisionTransformerModel", small),
        ("clvp", "ClvpDecoderConfig", "ClvpForCausalLM", {"num_hidden_layers": 1}),
    ]
    seen = set()
    for folder_name, config_name, class_name, sizes in classes:
        module = importlib.import_module(f"transformers.models.{folder_name}")
        config = getattr(module, config_name)(**{k: v for k, v in sizes.items()})
        with torch.device("meta"):
            model = getattr(module, class_name)(config)
        for name, layer in model.named_modules():
            expected = type(layer) is transformers.pytorch_utils.Conv1D
            if expected or type(layer) is torch.nn.Linear:
                assert is_conv1d(name, config.to_dict()) == expected, f"{class_name}: {name}"
                seen |= {name.rpartition(".")[2]} if expected else set()
        assert is_conv1d("transformer.h.0.attn.c_proj", {"model_type": "pair", "decoder": config.to_dict()})
    assert seen == CONV1D_NAMES
    assert not is_conv1d("transformer.h.0.attn.c_attn", {"model_type": "gpt_bigcode"})


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """In a process of its own: 134 MB of codes become 268 MB of bf16."""
    out = tmp_path / "big"
    out.mkdir()
    tensors = {
        "model.layers.0.fc1.weight": torch.ones(16384, 8192, dtype=torch.int8),
        "model.layers.0.fc1.SCB": torch.full((16384,), 3.0),
    }
    save_file(tensors, out / "model.safetensors")
    block = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (out / "config.json").write_text(json.dumps({"quantization_config": block}))
    code = (
        "import resource, sys; from int8convert.conversion.export import export\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); export(sys.argv[1], sys.argv[2], dequantize='bfloat16'); print(peak() - before)"
    )
    command = [sys.executable, "-c", code, str(out), str(tmp_path / "new")]
    grown_kb = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown_kb < 40_000
    assert (tmp_path / "new" / "model.safetensors").stat().st_size > 268_000_000
