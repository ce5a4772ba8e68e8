"""The main job as a function: what it writes, what it reports, and that planned equals written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import int8convert
from cuda_kernels import reference
from int8convert.checkpoint.floats import convert_floats
from int8convert.checkpoint.rows import BLOCK_BYTES
from int8convert.events import Event, PlanMade, ShardFinished, ShardStarted, TensorKept, TensorQuantized
from int8convert.planning.plan_checkpoint import PlanOptions
from int8convert.text import parse_size
from tests.tools.options import quantize
from tests.tools.tiny_models import file_bytes, read_tensors, save_as_pickles, save_checkpoint

pytestmark = pytest.mark.usefixtures("map_in_process")


def convert(source: Path, out: Path, **options: Any) -> int8convert.ConversionReport:
    return quantize(source, out, **options)


def large_row_checkpoint(directory: Path, n_columns: int = 3 * BLOCK_BYTES // 8) -> Path:
    """An OPT whose fc2 rows are several blocks' worth of rows, and an uneven number of them."""
    import transformers

    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = transformers.OPTConfig(vocab_size=32, ffn_dim=n_columns, max_position_embeddings=16, **sizes)
    torch.manual_seed(1)
    transformers.OPTForCausalLM(config).half().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_blocks_and_threads_leave_no_trace(workers: int, tmp_path: Path) -> None:
    source = large_row_checkpoint(tmp_path / "source")
    convert(source, tmp_path / "out", workers=workers)
    weights, written = read_tensors(source), read_tensors(tmp_path / "out")
    assert weights["model.decoder.layers.0.fc1.weight"].numel() * 2 > 8 * BLOCK_BYTES
    for name in ("fc1", "fc2", "self_attn.q_proj"):
        prefix = f"model.decoder.layers.0.{name}"
        expected = reference.row_quantize(weights[f"{prefix}.weight"].float().numpy())
        np.testing.assert_array_equal(written[f"{prefix}.weight"].numpy(), expected.codes)
        np.testing.assert_array_equal(written[f"{prefix}.SCB"].numpy(), expected.absmax)


def test_output_is_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "source", max_shard_size="60KB")
    convert(source, tmp_path / "1", workers=1)
    convert(source, tmp_path / "7", workers=7)
    assert file_bytes(tmp_path / "1") == file_bytes(tmp_path / "7")


@pytest.mark.parametrize("name", ["opt", "gpt2", "t5"])
@pytest.mark.parametrize("max_shard_size", [None, "30kB"])
def test_planned_sizes_equal_written_sizes(name: str, max_shard_size: str | None, tmp_path: Path) -> None:
    source = save_checkpoint(name, tmp_path / "source", max_shard_size="70KB")
    plan = int8convert.plan(source, PlanOptions(max_shard_size=max_shard_size))
    report = convert(source, tmp_path / "out", max_shard_size=max_shard_size)
    written = {p.name: p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")}
    assert written == {shard.file_name: shard.n_bytes for shard in plan.shards}
    assert report.n_written_bytes == sum(written.values())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = read_tensors(tmp_path / "out")
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())


def test_one_output_shard_for_each_input_shard(tmp_path: Path) -> None:
    source = save_checkpoint("opt", tmp_path / "source", max_shard_size="60KB")
    convert(source, tmp_path / "out")
    names = sorted(path.name for path in source.glob("*.safetensors"))
    assert len(names) > 2
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == names


def test_max_shard_size_bounds_every_shard_of_more_than_one_tensor(tmp_path: Path) -> None:
    source = save_checkpoint("opt", tmp_path / "source")
    plan = int8convert.plan(source, PlanOptions(max_shard_size="20kB"))
    assert len(plan.shards) > 4
    for shard in plan.shards:
        assert sum(tensor.output_bytes for tensor in shard.tensors) <= 20_000 or len(shard.tensors) == 1
    convert(source, tmp_path / "many", max_shard_size="20kB")
    convert(source, tmp_path / "one")
    many, one = read_tensors(tmp_path / "many"), read_tensors(tmp_path / "one")
    assert set(many) == set(one) and all(torch.equal(many[name], one[name]) for name in one)


def test_small_files_are_carried_over_and_foreign_weights_are_not(tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "source")
    carried = {
        "tokenizer.json": "{}",
        "chat_template.jinja": "{{ x }}",
        "LICENSE": "text",
        "additional_chat_templates/tools.jinja": "{{ y }}",
        "modules.json": '[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]',
        "1_Pooling/config.json": "{}",
        "2_Dense/model.safetensors": "small",
    }
    for folder in ("additional_chat_templates", "1_Pooling", "2_Dense"):
        (source / folder).mkdir()
    (source / "original").mkdir()
    left = {"flax_model.msgpack": "w", "README.md": "card", "original/params.json": "{}", "pytorch_model.bin": "w"}
    for name, text in {**carried, **left}.items():
        (source / name).write_text(text)
    convert(source, tmp_path / "out")
    written = file_bytes(tmp_path / "out")
    own = {"generation_config.json", "config.json", "model.safetensors", "int8convert/manifest.json"}
    assert set(written) == {*carried, *own}
    assert all(written[name] == text.encode() for name, text in carried.items())


def test_large_file_of_no_known_kind_is_left_behind_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("int8convert.checkpoint.directory.MAX_AUXILIARY_BYTES", 1000)
    source = save_checkpoint("llama", tmp_path / "source")
    (source / "video").write_bytes(b"x" * 1001)
    (source / "tokenizer.json").write_bytes(b"x" * 1000)
    events: list[Event] = []
    convert(source, tmp_path / "out", on_event=events.append)
    made = [event for event in events if isinstance(event, PlanMade)]
    assert not (tmp_path / "out" / "video").exists() and (tmp_path / "out" / "tokenizer.json").exists()
    assert made[0].notes == ("'video' is not copied: it is too large to belong to a checkpoint",)


def test_config_tells_the_loader_everything(tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "source")
    convert(source, tmp_path / "out", threshold=5, skip=["o_proj"], min_coverage=0)
    before, after = (json.loads((d / "config.json").read_text()) for d in (source, tmp_path / "out"))
    block = after.pop("quantization_config")
    assert after == before
    assert block == {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "llm_int8_threshold": 5.0,
        "llm_int8_skip_modules": ["lm_head", *(f"model.layers.{i}.self_attn.o_proj" for i in range(2))],
    }
    assert isinstance(block["llm_int8_threshold"], float)


def test_report_states_coverage_and_weight_error(tmp_path: Path) -> None:
    source = save_checkpoint("opt", tmp_path / "source")
    report = convert(source, tmp_path / "out")
    weights, written = read_tensors(source), read_tensors(tmp_path / "out")
    int8 = {name: t for name, t in written.items() if t.dtype == torch.int8}
    assert report.n_int8_parameters == sum(t.numel() for t in int8.values())
    assert report.n_parameters == sum(t.numel() for t in weights.values())
    assert report.coverage == report.n_int8_parameters / report.n_parameters
    assert sum(kept.n_parameters for kept in report.kept) == report.n_parameters - report.n_int8_parameters
    for error in report.errors:
        sqnr = {}
        for name in int8:
            if name.endswith(f".{error.layer_kind}.weight"):
                weight = weights[name].double()
                scale = written[name.replace(".weight", ".SCB")].double()[:, None] / 127
                noise = (weight - int8[name] * scale).square().sum()
                sqnr[name] = float(10 * torch.log10(weight.square().sum() / noise))
        assert error.n_tensors == len(sqnr) == 2
        assert error.worst_sqnr_db == pytest.approx(min(sqnr.values()), abs=1e-3)
        assert error.worst_tensor == min(sqnr, key=lambda name: sqnr[name])
        assert error.mean_sqnr_db == pytest.approx(sum(sqnr.values()) / len(sqnr), abs=1e-3)
    json.dumps(report.to_json(), allow_nan=False)


def test_events_tell_the_whole_story_in_order(tmp_path: Path) -> None:
    source = save_checkpoint("opt", tmp_path / "source", max_shard_size="60KB")
    events: list[Event] = []
    convert(source, tmp_path / "out", on_event=events.append)
    assert isinstance(events[0], PlanMade) and isinstance(events[-1], ShardFinished)
    plan = int8convert.plan(source)
    made = events[0]
    assert (made.source, made.n_shards, made.coverage) == (str(source), len(plan.shards), plan.coverage)
    assert (made.n_read_bytes, made.n_written_bytes) == (plan.n_read_bytes, plan.n_written_bytes)
    done = [event for event in events if isinstance(event, TensorQuantized | TensorKept)]
    assert sorted(event.name for event in done) == sorted(tensor.output_name for tensor in plan.tensors)
    assert sum(event.n_read_bytes for event in done) == plan.n_read_bytes
    for kind in (ShardStarted, ShardFinished):
        assert [event.i for event in events if isinstance(event, kind)] == list(range(len(plan.shards)))


def test_plan_writes_nothing(tmp_path: Path) -> None:
    source = save_checkpoint("opt", tmp_path / "source")
    before = file_bytes(tmp_path)
    int8convert.plan(source)
    assert file_bytes(tmp_path) == before


def test_source_is_not_touched(tmp_path: Path) -> None:
    source = save_checkpoint("opt", tmp_path / "source")
    before = file_bytes(source)
    convert(source, tmp_path / "out")
    assert file_bytes(source) == before


def test_overwrite_replaces_the_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    many = save_checkpoint("opt", tmp_path / "many", max_shard_size="40KB")
    one = save_checkpoint("llama", tmp_path / "one")
    convert(many, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    convert(one, tmp_path / "out", overwrite=True)
    convert(one, tmp_path / "fresh")
    assert file_bytes(tmp_path / "out") == {**file_bytes(tmp_path / "fresh"), "notes.txt": b"mine"}


def test_pickles_with_views_and_transposes_convert_like_plain_ones(tmp_path: Path) -> None:
    plain = save_checkpoint("opt", tmp_path / "plain")
    source = save_as_pickles(plain, tmp_path / "source", 1)
    state_dict = torch.load(source / "pytorch_model.bin", weights_only=True)
    odd = {}
    for name, tensor in state_dict.items():
        if name.endswith("fc1.weight"):
            tensor = tensor.t().contiguous().t()
        elif name.endswith("fc2.weight"):
            tensor = torch.stack([tensor, tensor], -1)[..., 0]
        elif name.endswith("norm.bias"):
            tensor = torch.stack([tensor, tensor], -1)[..., 1]
        odd[name] = tensor
    odd["lm_head.weight"] = odd["model.decoder.embed_tokens.weight"]
    torch.save(odd, source / "pytorch_model.bin")
    convert(plain, tmp_path / "expected")
    convert(source, tmp_path / "out")
    expected, found = read_tensors(tmp_path / "expected"), read_tensors(tmp_path / "out")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_legacy_pickle_converts_too(tmp_path: Path) -> None:
    plain = save_checkpoint("opt", tmp_path / "plain")
    source = save_as_pickles(plain, tmp_path / "source", 1)
    state_dict = torch.load(source / "pytorch_model.bin", weights_only=True)
    torch.save(state_dict, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert(plain, tmp_path / "expected")
    convert(source, tmp_path / "out")
    expected, found = read_tensors(tmp_path / "expected"), read_tensors(tmp_path / "out")
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


def test_float64_source_is_rounded_to_float32_as_torch_does(tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "source", torch.float32)
    weights = {name: t.double() * 1.0000001 for name, t in read_tensors(source).items()}
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    convert(source, tmp_path / "out")
    written = read_tensors(tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    expected = reference.row_quantize(weights[name].float().numpy())
    np.testing.assert_array_equal(written[name].numpy(), expected.codes)
    assert torch.equal(written["model.norm.weight"], weights["model.norm.weight"].float())


@pytest.mark.parametrize("source", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("target", ["F64", "F32", "F16", "BF16"])
def test_float_conversion_equals_torch(source: str, target: str) -> None:
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4096, generator=generator, dtype=torch.float64) * 2.0 ** torch.arange(-40, 24).repeat(64)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 65519.0, 65520.0, 3.4e38, 1e-45])
    values = torch.cat([values, special.double()]).to(dtypes[source])
    converted = convert_floats(values.view(torch.uint8).numpy(), source, target)
    # By way of float32 where the source is wider: two roundings, as documented.
    expected = (values.float() if source == "F64" and target == "BF16" else values).to(dtypes[target])
    assert converted.tobytes() == expected.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5GB", 5 * 10**9),
        ("500MiB", 500 * 2**20),
        ("1.5kB", 1500),
        (7, 7),
        ("12", 12),
        ("2T", 2 * 10**12),
        (None, None),
    ],
)
def test_sizes_are_read_as_people_write_them(text: int | str | None, expected: int | None) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5 apples", "0", "1e9", "5GBB"])
def test_nonsense_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="5GB"):
        parse_size(text)


@pytest.mark.parametrize(
    "options", [{"workers": 0}, {"threshold": -1.0}, {"threshold": float("nan")}, {"min_coverage": 2}]
)
def test_arguments_out_of_range_are_refused_before_anything_happens(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least"):
        convert(tmp_path / "missing", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
