"""Whatever int8convert writes passes the exact level, however it came about; and so does what bitsandbytes writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import int8convert
from int8convert.errors import AdapterError, SourceError
from int8convert.events import Event, TensorsCompared
from int8convert.verification.exact.level import ExactReport, verify_exact
from tests.conversion.test_experts import build
from tests.planning.test_lora import save_adapter
from tests.tools.fp8_checkpoints import save_fp8
from tests.tools.outlier_models import convert
from tests.tools.tiny_models import MODELS, build_model, read_tensors, save_as_pickles, save_checkpoint

pytestmark = [
    pytest.mark.usefixtures("map_in_process"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

COUNTED = ("rows", "weights", "codes", "scales")


def failures(report: ExactReport) -> dict[str, list[str]]:
    return {check.name: [str(finding) for finding in check.findings] for check in report.checks if not check.is_passed}


def assert_passes(report: ExactReport, *checked: str) -> None:
    """Nothing found, and the checks named were about something."""
    assert failures(report) == {}
    n_checked = {check.name: check.n_checked for check in report.checks}
    assert all(n_checked[name] > 0 for name in ("tensors", "kept", *COUNTED, *checked)), n_checked


@pytest.mark.parametrize("output_format", ["bitsandbytes", "compressed-tensors"])
@pytest.mark.parametrize("name", MODELS)
def test_every_family_passes_in_both_formats(name: str, output_format: str, tmp_path: Path) -> None:
    if name == "gpt2" and output_format == "compressed-tensors":
        pytest.skip("no such form")
    source = save_checkpoint(name, tmp_path / "source", torch.bfloat16, max_shard_size="100KB")
    out = convert(source, tmp_path / "out", format=output_format, min_coverage=0)
    report = verify_exact(out)
    assert_passes(report, "files", "config", "carried")
    assert (report.n_different_codes, report.n_different_scales, report.notes) == (0, 0, ())
    assert report.reference == str(source) and report.format == output_format
    int8 = [tensor for tensor in read_tensors(out).values() if tensor.dtype == torch.int8]
    assert report.n_int8_weights == len(int8)
    assert {c.name: c.n_checked for c in report.checks}["codes"] == sum(tensor.numel() for tensor in int8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_every_dtype_passes(dtype: torch.dtype, tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "source", dtype)
    assert_passes(verify_exact(convert(source, tmp_path / "out")))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "dbrx", "deepseek_v3"])
@pytest.mark.parametrize("output_format", ["bitsandbytes", "compressed-tensors"])
def test_experts_pass(family: str, output_format: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path / "source")
    report = verify_exact(convert(tmp_path / "source", tmp_path / "out", format=output_format, min_coverage=0))
    assert_passes(report)
    assert (report.n_int8_weights > 24) is (output_format == "compressed-tensors")


@pytest.mark.parametrize("kind", ["block", "row", "tensor"])
def test_fp8_sources_pass(kind: str, tmp_path: Path) -> None:
    plain = save_checkpoint("llama", tmp_path / "plain", torch.bfloat16)
    save_fp8(plain, tmp_path / "fp8", kind)
    out = convert(tmp_path / "fp8", tmp_path / "out", skip=["layers.0.*"], min_coverage=0)
    assert_passes(verify_exact(out), "config")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"target_modules": "all-linear", "use_dora": True}),
        ("llama", {"target_modules": ["embed_tokens", "o_proj"]}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("opt", {"target_modules": ["fc1", "k_proj"], "bias": "lora_only"}),
    ],
)
def test_merged_adapter_passes_if_it_is_named_and_not_otherwise(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    source = save_checkpoint(name, tmp_path / "source", torch.float16)
    adapter = save_adapter(name, tmp_path / "adapter", LoraConfig(**options))
    out = convert(source, tmp_path / "out", lora=adapter, min_coverage=0)
    report = verify_exact(out, lora=adapter)
    assert_passes(report)
    assert "an adapter was merged" in report.notes[0]
    with pytest.raises(AdapterError, match="the manifest has only its hash"):
        verify_exact(out)
    other = save_adapter(name, tmp_path / "other", LoraConfig(**{**options, "lora_alpha": 99}))
    with pytest.raises(AdapterError, match="another one was merged"):
        verify_exact(out, lora=other)
    with pytest.raises(AdapterError, match="none was merged"):
        verify_exact(convert(source, tmp_path / "plain", min_coverage=0), lora=adapter)


def test_skipped_and_chosen_modules_are_those_of_the_manifest(tmp_path: Path) -> None:
    source = save_checkpoint("opt", tmp_path / "source")
    report = verify_exact(convert(source, tmp_path / "out", skip=["fc2", "layers.0.*"], only=["fc*"], min_coverage=0))
    assert_passes(report)
    assert report.n_int8_weights == 1


def test_modules_kept_for_their_values_must_hold_such_values(tmp_path: Path) -> None:
    source = save_checkpoint("opt", tmp_path / "source", torch.float32)
    tensors = load_file(source / "model.safetensors")
    tensors["model.decoder.layers.0.fc1.weight"][3, 4] = 1e6
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    out = convert(source, tmp_path / "out", on_nonfinite="keep")
    assert_passes(verify_exact(out))
    # The same manifest over a source that has an int8 form.
    tensors["model.decoder.layers.0.fc1.weight"][3, 4] = 0.01
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    found = failures(verify_exact(out))
    assert "int8: all its weights have an int8 form" in found["tensors"][0]


def test_pickles_and_resharded_outputs_pass(tmp_path: Path) -> None:
    source = save_checkpoint("opt", tmp_path / "source")
    pickles = save_as_pickles(source, tmp_path / "pickles", 3)
    assert_passes(verify_exact(convert(pickles, tmp_path / "out", max_shard_size="60KB")), "files")


def test_resumed_conversion_passes(tmp_path: Path) -> None:
    source = save_checkpoint("opt", tmp_path / "source", max_shard_size="30KB")

    def stop(event: object) -> None:
        if type(event).__name__ == "ShardFinished":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        int8convert.quantize(source, tmp_path / "out", on_event=stop)
    with pytest.raises(SourceError, match="is an unfinished conversion") as raised:
        verify_exact(_with_weights(tmp_path / "out"))
    assert "the quantize command that began it finishes it" in raised.value.hint
    assert_passes(verify_exact(convert(source, tmp_path / "out")), "files")


def _with_weights(out: Path) -> Path:
    """A finished shard under the name of a whole checkpoint's."""
    shutil.copytree(out, out.with_name("partial"))
    shard = next(out.with_name("partial").glob("*.safetensors"))
    shard.rename(shard.with_name("model.safetensors"))
    return out.with_name("partial")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_exports_pass_through_all_formats_and_their_manifests(dtype: torch.dtype, tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "source", dtype)
    at = convert(source, tmp_path / "int8", skip=["layers.0.mlp.*"])
    for i, output_format in enumerate(["compressed-tensors", "torchao", "bitsandbytes"]):
        at = Path(int8convert.export(at, tmp_path / f"{i}", format=output_format, max_shard_size="100KB").out)
        report = verify_exact(at)
        assert_passes(report, "files", "config", "carried")
        assert (report.format, report.reference, report.n_different_codes) == (output_format, str(source), 0)


def test_export_whose_origin_is_gone_is_judged_by_its_distance_alone(tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "source")
    int8 = convert(source, tmp_path / "int8", skip=["layers.0.mlp.*"])
    int8convert.export(int8, tmp_path / "out", format="compressed-tensors")
    shutil.rmtree(int8)
    with pytest.raises(SourceError, match="no manifest names it"):
        verify_exact(tmp_path / "out")
    report = verify_exact(tmp_path / "out", reference=source)
    assert_passes(report, "files")
    assert "no manifest tells" in report.notes[0]


def test_stored_outlier_columns_pass(tmp_path: Path) -> None:
    for i, (dtype, options) in enumerate([(torch.bfloat16, {}), (torch.float64, {"format": "compressed-tensors"})]):
        source = save_checkpoint("llama", tmp_path / f"source{i}", dtype)
        out = convert(source, tmp_path / f"out{i}", **options)
        columns = {"model.layers.0.mlp.down_proj": [1, 7, 127], "model.layers.1.self_attn.q_proj": [0]}
        int8convert.store_outliers(source, out, columns)
        report = verify_exact(out)
        assert_passes(report, "outlier columns")
        assert {c.name: c.n_checked for c in report.checks}["outlier columns"] == 4


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16 if name == "llama" else torch.float16) for name in MODELS],
)
def test_what_transformers_and_bitsandbytes_write_passes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    source = save_checkpoint(name, tmp_path / "source", dtype)
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = type(build_model(name)).from_pretrained(source, quantization_config=config, device_map="cpu")
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(SourceError, match="no manifest names it"):
        verify_exact(tmp_path / "out")
    report = verify_exact(tmp_path / "out", reference=source)
    assert_passes(report)
    assert (report.n_different_codes, report.n_different_scales) == (0, 0)
    assert "no manifest tells" in report.notes[0]


def test_fp32_source_that_bitsandbytes_rounded_to_fp16_first_passes_and_says_how_much_differs(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    source = save_checkpoint("opt", tmp_path / "source", torch.float32)
    config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["fc2", "lm_head"])
    model = transformers.OPTForCausalLM.from_pretrained(source, quantization_config=config, device_map="cpu")
    model.save_pretrained(tmp_path / "out")
    report = verify_exact(tmp_path / "out", reference=source)
    assert_passes(report)
    assert report.n_int8_weights == 10 and report.n_different_codes > 0 and report.n_different_scales > 0


def test_compressed_tensors_of_unknown_origin_pass_with_scales_of_their_own(tmp_path: Path) -> None:
    """Half a step of whatever scale is stored: absmax / 127.5, as some tools have it, in bf16, with codes to match."""
    source = save_checkpoint("llama", tmp_path / "source", torch.bfloat16)
    out = convert(source, tmp_path / "out", format="compressed-tensors", skip=["layers.1.mlp.*"], min_coverage=0)
    shutil.rmtree(out / "int8convert")
    path = out / "model.safetensors"
    tensors = load_file(path)
    weights = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    scale = (weights[name].float().abs().amax(1, keepdim=True) / 127.5).bfloat16()
    tensors[f"{name}_scale"] = scale
    tensors[name] = (weights[name].float() / scale.float()).round().clamp(-128, 127).to(torch.int8)
    save_file(tensors, path, {"format": "pt"})
    report = verify_exact(out, reference=source)
    assert_passes(report)
    assert report.n_int8_weights == 11 and report.n_different_scales == 128
    tensors[name][4, 5] += 2 if tensors[name][4, 5] < 100 else -2
    save_file(tensors, path, {"format": "pt"})
    found = failures(verify_exact(out, reference=source))
    assert found.keys() == {"weights"} and f"{name} row 4 column 5: " in found["weights"][0]


@pytest.mark.parametrize(
    "shards",
    [
        5,
        [7, {"tensors": 3}],
        [{"file_name": 1, "n_bytes": 1, "sha256": "", "plan_sha256": "", "sources": {}, "tensors": {}}],
        [{"file_name": "a", "n_bytes": "1", "sha256": "", "plan_sha256": "", "sources": {}, "tensors": {}}],
        [{"file_name": "\x1b[2J", "n_bytes": 1, "sha256": "", "plan_sha256": "", "sources": {}, "tensors": {}}],
    ],
)
def test_nonsense_in_a_manifest_names_no_file(shards: Any, tmp_path: Path) -> None:
    out = convert(save_checkpoint("opt", tmp_path / "source"), tmp_path / "out")
    path = out / "int8convert" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "shards": shards}))
    found = failures(verify_exact(out))
    assert found.keys() == {"files"} and "model.safetensors: expected no such file: the manifest" in found["files"][0]


def test_model_quantized_in_memory_and_saved_passes(tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "source", torch.float32)
    int8convert.quantize_(build_model("llama", torch.float32)).save_pretrained(tmp_path / "out")
    report = verify_exact(tmp_path / "out", reference=source)
    assert_passes(report)
    assert report.n_different_codes == 0


def test_source_that_moved_is_to_be_named(tmp_path: Path) -> None:
    source = save_checkpoint("opt", tmp_path / "source")
    out = convert(source, tmp_path / "out")
    moved = source.rename(tmp_path / "moved")
    with pytest.raises(SourceError, match=r"its manifest names '.*source', which is not there") as raised:
        verify_exact(out)
    assert "--reference SRC" in raised.value.hint
    assert_passes(verify_exact(out, reference=moved), "files", "config")


def test_other_source_of_the_same_shape_fails_and_is_said_to_be_another(tmp_path: Path) -> None:
    out = convert(save_checkpoint("opt", tmp_path / "source"), tmp_path / "out")
    build_model("opt", seed=1).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text(
        json.dumps({**json.loads((tmp_path / "other" / "config.json").read_text()), "dropout": 0.5})
    )
    report = verify_exact(out, reference=tmp_path / "other")
    assert set(failures(report)) == {"weights", "codes", "scales", "kept", "config"}
    assert "the source is not the one of the conversion" in report.notes[0]


def test_something_else_than_an_int8_checkpoint_is_an_error(tmp_path: Path) -> None:
    source = save_checkpoint("opt", tmp_path / "source")
    with pytest.raises(SourceError, match=r"source' is no int8 checkpoint: its config.json has no quantization_config"):
        verify_exact(source, reference=source)
    with pytest.raises(SourceError, match="nothing there"):
        verify_exact(tmp_path / "nowhere")


def test_findings_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    out = convert(save_checkpoint("opt", tmp_path / "source", max_shard_size="30KB"), tmp_path / "out")
    build_model("opt", seed=1).save_pretrained(tmp_path / "other", max_shard_size="30KB")
    one, many = (verify_exact(out, reference=tmp_path / "other", workers=n) for n in (1, 7))
    assert one.checks == many.checks and not one.is_passed


def test_progress_ends_with_all_bytes(tmp_path: Path) -> None:
    out = convert(save_checkpoint("opt", tmp_path / "source", max_shard_size="30KB"), tmp_path / "out")
    events: list[Event] = []
    report = verify_exact(out, on_event=events.append)
    seen = [event.n_done_bytes for event in events if isinstance(event, TensorsCompared)]
    assert seen == sorted(seen) and events[-1] == TensorsCompared(report.n_read_bytes, report.n_read_bytes)
