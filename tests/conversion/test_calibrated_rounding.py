"""`--round calibrated`: other codes in the same format, where held-out inputs accept them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import int8convert
from cuda_kernels.reference import rotate, row_quantize
from int8convert.checkpoint.manifest import CalibratedRows
from int8convert.conversion.calibrated_rows import CalibrationInputs, PreparedInput, RowRounding, prepare
from int8convert.errors import AdapterError, Int8ConvertError, OutputError, SourceError
from int8convert.events import Event, ShardFinished, TensorQuantized
from int8convert.outliers.store import store_outliers
from int8convert.planning.fold import Fold
from int8convert.planning.plan_checkpoint import PlanOptions, plan
from int8convert.verification.exact.level import ExactReport, verify_exact
from tests.kernels.test_feedback_round import gptq_errors, inputs
from tests.planning.test_lora import save_adapter
from tests.tools.calibrations import LENGTH, letters, save_calibration, save_source
from tests.tools.language_models import build_tokenizer, language_model
from tests.tools.options import quantize
from tests.tools.tiny_models import file_bytes, read_tensors

pytestmark = [
    pytest.mark.usefixtures("map_in_process"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

Calibrated = tuple[Path, Path]


class Given(CalibrationInputs):
    """An input that is prepared already."""

    def __init__(self, prepared: PreparedInput) -> None:
        self._found = prepared

    def get(self, moments: object) -> PreparedInput:
        return self._found


def round_rows(weight: Any, x: Any, held_out: Any) -> tuple[Any, CalibratedRows, Any, Any]:
    """Round a weight; its codes, the outcome, and what `row_quantize` gives."""
    nearest = row_quantize(weight)
    codes, noise = nearest.codes.copy(), nearest.noise.copy()
    prepared = prepare((x.T @ x).astype(np.float32), held_out.astype(np.float32))
    rounding = RowRounding(None, len(weight), Given(prepared))  # type: ignore[arg-type]
    rounding.round(weight, 0, codes, nearest.absmax, noise)
    return codes, rounding.outcome(), nearest, noise


def output_errors(weight: Any, codes: Any, absmax: Any, x: Any) -> Any:
    """Return the squared error of each row's outputs."""
    return np.square(x @ (weight - codes * (absmax.astype(float) / 127)[:, None]).T).sum(axis=0)


def test_codes_are_those_of_gptq_within_a_step_of_the_weights() -> None:
    n = 24
    x, weight = inputs(n, 2000), np.random.default_rng(2).standard_normal((64, n)).astype(np.float32)
    codes, outcome, nearest, noise = round_rows(weight, x, inputs(n, 500, seed=1))
    order = np.argsort(-np.square(x).sum(axis=0), kind="stable")
    h = (x.T @ x)[np.ix_(order, order)]
    h += 0.01 * np.diag(h).mean() * np.eye(n)
    in_steps = (weight / nearest.absmax[:, None].astype(float) * 127)[:, order]
    errors = gptq_errors(in_steps, h, 0.99)
    is_changed = (codes != nearest.codes).any(axis=1)
    assert is_changed.sum() == outcome.n_accepted > 50
    np.testing.assert_array_equal(codes[:, order][is_changed], np.rint(in_steps - errors)[is_changed])
    np.testing.assert_allclose(noise[is_changed], np.square(errors[is_changed]).sum(axis=1), rtol=1e-3)


def test_no_row_is_worse_on_held_out_inputs_than_rounded_to_nearest() -> None:
    """Held-out inputs that only resemble the calibration's refuse some rows; each row keeps the better codes."""
    n = 48
    weight = np.random.default_rng(2).standard_normal((100, n)).astype(np.float32)
    held_out = inputs(n, 200, seed=1)
    held_out += 0.3 * held_out.std() * np.random.default_rng(3).standard_normal(held_out.shape)
    codes, outcome, nearest, _ = round_rows(weight, inputs(n, 60), held_out)
    before = output_errors(weight, nearest.codes, nearest.absmax, held_out)
    after = output_errors(weight, codes, nearest.absmax, held_out)
    is_changed = (codes != nearest.codes).any(axis=1)
    assert 0 < outcome.n_accepted < 100
    assert (after[is_changed] < before[is_changed]).all()
    np.testing.assert_allclose([outcome.nearest_error, outcome.error], [before.sum(), after.sum()], rtol=1e-4)


@pytest.mark.parametrize("n_tokens", [0, 1, 10])
def test_second_moment_of_few_tokens_falls_back_row_by_row(n_tokens: int) -> None:
    weight = np.random.default_rng(2).standard_normal((30, 64)).astype(np.float32)
    held_out = inputs(64, 300, seed=1)
    codes, outcome, nearest, noise = round_rows(weight, inputs(64, 10)[:n_tokens], held_out)
    assert outcome.error <= outcome.nearest_error
    if not n_tokens:
        assert outcome.n_accepted == 0
        np.testing.assert_array_equal(codes, nearest.codes)
        np.testing.assert_array_equal(noise, nearest.noise)


def test_zero_rows_and_largest_weights_keep_their_codes() -> None:
    weight = np.random.default_rng(2).standard_normal((40, 64)).astype(np.float32)
    weight[3] = 0
    codes, _, nearest, _ = round_rows(weight, inputs(64, 500), inputs(64, 300, seed=1))
    assert not codes[3].any()
    at = np.abs(weight).argmax(axis=1)[:, None]
    np.testing.assert_array_equal(np.take_along_axis(codes, at, 1), np.take_along_axis(nearest.codes, at, 1))
    assert np.abs(codes.astype(int)).max() == 127


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    """A checkpoint of several shards and its calibration; read only."""
    folder = tmp_path_factory.mktemp("calibrated")
    source = save_source("llama", folder / "source", max_shard_size="100KB")
    return source, save_calibration(source, folder / "cal")


def convert(calibrated: Calibrated, out: Path, **options: Any) -> int8convert.ConversionReport:
    source, folder = calibrated
    return quantize(source, out, round="calibrated", calibration=folder, **options)


def failures(report: ExactReport) -> dict[str, list[str]]:
    return {check.name: [str(finding) for finding in check.findings] for check in report.checks if not check.is_passed}


@pytest.mark.parametrize("output_format", ["bitsandbytes", "compressed-tensors"])
def test_codes_differ_scales_do_not_and_verify_passes(
    output_format: str, calibrated: Calibrated, tmp_path: Path
) -> None:
    report = convert(calibrated, tmp_path / "out", format=output_format)
    quantize(calibrated[0], tmp_path / "nearest", format=output_format)
    found, nearest = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "nearest")
    assert found.keys() == nearest.keys()
    int8 = {name for name, tensor in found.items() if tensor.dtype == torch.int8}
    assert all(torch.equal(found[name], nearest[name]) for name in found.keys() - int8)
    n_different = sum(int((found[name] != nearest[name]).sum()) for name in int8)
    assert n_different > 1000
    assert report.rounding is not None
    assert (report.rounding.n_tensors, report.rounding.n_nearest) == (len(int8), 0)
    assert report.rounding.n_rows == sum(found[name].shape[0] for name in int8)
    assert report.rounding.error < 0.9 * report.rounding.nearest_error
    checked = verify_exact(tmp_path / "out")
    assert failures(checked) == {} and checked.n_different_codes == n_different and checked.n_different_scales == 0
    (note,) = checked.notes
    assert note.startswith(f"the codes of {len(int8)} weights were chosen by a calibration")


@pytest.mark.usefixtures("rotation_in_process")
@pytest.mark.parametrize("rotates", [False, True])
def test_predictions_are_nearer_on_tokens_that_the_calibration_never_saw(
    rotates: bool, calibrated: Calibrated, tmp_path: Path
) -> None:
    convert(calibrated, tmp_path / "calibrated", rotate=rotates)
    quantize(calibrated[0], tmp_path / "nearest", rotate=rotates)
    assert failures(verify_exact(tmp_path / "calibrated")) == {}
    tokenizer = build_tokenizer()
    ids = tokenizer(letters(2000, seed=5), return_tensors="pt").input_ids[:, : 16 * LENGTH].view(16, LENGTH)
    with torch.no_grad():
        expected = language_model("llama", tokenizer, torch.bfloat16).float()(ids).logits
        errors = [
            float((dequantized(tmp_path / name)(ids).logits - expected).square().sum())
            for name in ("calibrated", "nearest")
        ]
    assert errors[0] < 0.9 * errors[1]


def dequantized(out: Path) -> Any:
    """Return the model in float32, so that only the weights are rounded."""
    int8convert.export(out, out.with_name(f"{out.name}-float"), dequantize="float32")
    return transformers.LlamaForCausalLM.from_pretrained(out.with_name(f"{out.name}-float"), dtype=torch.float32)


def test_inputs_are_folded_as_the_weights_are() -> None:
    generator = np.random.default_rng(0)
    weight, x = (generator.standard_normal((32, 64)).astype(np.float32) for _ in range(2))
    fold = Fold(row_block=16, column_block=4, input_block=8)
    outputs = fold.of_inputs().load().apply(x, 0) @ fold.load().apply(weight, 0).T
    np.testing.assert_allclose(outputs, rotate(x @ weight.T, 16), atol=1e-4)


def stop_after(n_shards: int) -> Callable[[Event], None]:
    def on_event(event: Event) -> None:
        if isinstance(event, ShardFinished) and event.i == n_shards - 1:
            raise KeyboardInterrupt

    return on_event


def test_bytes_do_not_depend_on_workers_or_interruptions(calibrated: Calibrated, tmp_path: Path) -> None:
    one = convert(calibrated, tmp_path / "one", workers=1)
    convert(calibrated, tmp_path / "three", workers=3)
    with pytest.raises(KeyboardInterrupt):
        convert(calibrated, tmp_path / "resumed", on_event=stop_after(2))
    resumed = convert(calibrated, tmp_path / "resumed")
    assert resumed.n_done_shards >= 2 and resumed.rounding == one.rounding
    expected = file_bytes(tmp_path / "one")
    assert file_bytes(tmp_path / "three") == expected and file_bytes(tmp_path / "resumed") == expected
    manifest = json.loads((tmp_path / "one" / "int8convert" / "manifest.json").read_text())
    assert manifest["conversion"]["options"]["round"] == "calibrated"
    tensors = {name: t for shard in manifest["shards"] for name, t in shard["tensors"].items()}
    assert {t["dtype"] == "I8" for t in tensors.values() if "rounding" in t} == {True}


def test_other_calibration_does_not_continue_a_conversion(calibrated: Calibrated, tmp_path: Path) -> None:
    source, _ = calibrated
    with pytest.raises(KeyboardInterrupt):
        convert(calibrated, tmp_path / "out", on_event=stop_after(1))
    other = save_calibration(source, tmp_path / "other", n_windows=12)
    with pytest.raises(OutputError, match=r"--calibration was another: its 'calibration\.json' differs"):
        convert((source, other), tmp_path / "out")
    with pytest.raises(OutputError, match="--round calibrated then, no --round now"):
        quantize(source, tmp_path / "out")


def test_layers_without_moments_are_rounded_to_nearest_and_judged_so(tmp_path: Path) -> None:
    source = save_source("opt", tmp_path / "source")
    folder = save_calibration(source, tmp_path / "cal", unmeasured="fc2")
    events: list[Event] = []
    report = convert((source, folder), tmp_path / "out", on_event=events.append)
    assert report.rounding is not None and (report.rounding.n_tensors, report.rounding.n_nearest) == (10, 2)
    note = "the codes of 10 of 12 int8 weights are chosen by the calibration, the others are rounded to nearest"
    assert any(found.startswith(note) for found in report.notes)
    nearest = {e.name for e in events if isinstance(e, TensorQuantized) and e.n_accepted_rows is None}
    assert nearest == {f"model.decoder.layers.{i}.fc2.weight" for i in (0, 1)}
    assert failures(verify_exact(tmp_path / "out")) == {}
    change_codes(tmp_path / "out", min(nearest), 1)
    assert set(failures(verify_exact(tmp_path / "out"))) == {"files", "weights", "codes"}


def change_codes(out: Path, name: str, n_steps: int) -> None:
    """Move the first code of a weight, not the largest of its row, towards zero and past it."""
    (path,) = out.glob("*.safetensors")
    tensors = load_file(path)
    column = int(tensors[name][0].abs().argmin())
    tensors[name][0, column] += n_steps
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(("n_steps", "found"), [(2, {"files", "weights"}), (-60, {"files", "weights"})])
def test_code_further_than_a_step_from_its_weight_is_found(n_steps: int, found: set[str], tmp_path: Path) -> None:
    source = save_source("llama", tmp_path / "source")
    folder = save_calibration(source, tmp_path / "cal")
    convert((source, folder), tmp_path / "out")
    name = "model.layers.1.mlp.down_proj.weight"
    change_codes(tmp_path / "out", name, n_steps)
    report = verify_exact(tmp_path / "out")
    assert set(failures(report)) == found
    (finding,) = next(check for check in report.checks if check.name == "weights").findings
    assert finding.tensor == name and "within 0.99 steps" in str(finding)


def test_wrong_scale_and_lost_peak_are_found(tmp_path: Path) -> None:
    source = save_source("llama", tmp_path / "source")
    folder = save_calibration(source, tmp_path / "cal")
    convert((source, folder), tmp_path / "out")
    (path,) = (tmp_path / "out").glob("*.safetensors")
    tensors = load_file(path)
    name = "model.layers.0.self_attn.o_proj"
    tensors[f"{name}.SCB"][2] *= 1.0001
    peak = int(tensors[f"{name}.weight"][5].abs().argmax())
    tensors[f"{name}.weight"][5, peak] -= tensors[f"{name}.weight"][5, peak].sign()
    save_file(tensors, path, {"format": "pt"})
    assert set(failures(verify_exact(tmp_path / "out"))) == {"files", "scales", "weights", "rows"}


def test_export_of_a_calibrated_checkpoint_passes(calibrated: Calibrated, tmp_path: Path) -> None:
    convert(calibrated, tmp_path / "out")
    int8convert.export(tmp_path / "out", tmp_path / "exported", format="compressed-tensors")
    report = verify_exact(tmp_path / "exported")
    assert failures(report) == {} and report.n_different_codes > 1000


def test_outlier_columns_of_a_calibrated_checkpoint_are_stored_and_judged(
    calibrated: Calibrated, tmp_path: Path
) -> None:
    convert(calibrated, tmp_path / "out")
    name = "model.layers.0.mlp.down_proj"
    store_outliers(calibrated[0], tmp_path / "out", {name: list(range(0, 128, 2))})
    report = verify_exact(tmp_path / "out")
    assert failures(report) == {}
    assert {check.name: check.n_checked for check in report.checks}["outlier columns"] == 64
    int8convert.load(tmp_path / "out")


def test_conv1d_is_rounded_by_its_input(tmp_path: Path) -> None:
    source = save_source("gpt2", tmp_path / "source")
    folder = save_calibration(source, tmp_path / "cal")
    report = convert((source, folder), tmp_path / "out")
    assert report.rounding is not None and report.rounding.n_tensors == 8
    assert report.rounding.error < 0.95 * report.rounding.nearest_error
    assert failures(verify_exact(tmp_path / "out")) == {}


def refusal(source: Path, folder: Path, **options: Any) -> Int8ConvertError:
    with pytest.raises(Int8ConvertError) as raised:
        plan(source, PlanOptions(round="calibrated", calibration=folder, **options))
    return raised.value


def test_unusable_calibrations_are_refused_before_anything_is_written(calibrated: Calibrated, tmp_path: Path) -> None:
    source, folder = calibrated
    other = save_source("opt", tmp_path / "opt")
    assert "is the calibration of" in refusal(other, folder).message
    none = save_calibration(source, tmp_path / "none", unmeasured="")
    assert "holds no second moments" in refusal(source, none).message
    few = save_calibration(source, tmp_path / "few", n_windows=4)
    assert "holds 32 held-out tokens, --round calibrated needs at least 64" in refusal(source, few).message
    assert "no complete calibration" in refusal(source, tmp_path).message
    adapter = save_adapter("llama", tmp_path / "adapter", LoraConfig(r=2, target_modules=["q_proj"]))
    assert isinstance(refusal(source, folder, lora=adapter), AdapterError)


def test_calibration_of_other_widths_is_refused(calibrated: Calibrated, tmp_path: Path) -> None:
    source, folder = calibrated
    shutil.copytree(folder, tmp_path / "cal")
    record = json.loads((tmp_path / "cal" / "calibration.json").read_text())
    modules = {name: entry for entry in record["inputs"] for name in entry["modules"]}
    down, up = modules["model.layers.0.mlp.down_proj"], modules["model.layers.0.mlp.up_proj"]
    down["modules"], up["modules"] = up["modules"], down["modules"]
    (tmp_path / "cal" / "calibration.json").write_text(json.dumps(record))
    error = refusal(source, tmp_path / "cal")
    assert isinstance(error, SourceError)


@pytest.mark.parametrize("options", [{"round": "calibrated"}, {"smooth": "calibrated"}, {"round": "other"}])
def test_options_that_do_not_fit_together_are_refused(options: dict[str, Any], calibrated: Calibrated) -> None:
    with pytest.raises(ValueError, match=r"round must be nearest or calibrated|round calibrated need a calibration"):
        plan(calibrated[0], PlanOptions(**options))


def test_plan_names_the_rounding_and_reads_no_moments(calibrated: Calibrated) -> None:
    source, folder = calibrated
    planned = plan(source, PlanOptions(round="calibrated", calibration=folder))
    rounded = {name for name, tensor in planned.to_json()["tensors"].items() if tensor.get("round") == "calibrated"}
    assert rounded == {tensor.output_name for tensor in planned.tensors if tensor.is_quantized}
    assert all("round" not in tensor for tensor in plan(source).to_json()["tensors"].values())
    digests = [[shard.digest() for shard in each.shards] for each in (planned, plan(source))]
    assert sum(a != b for a, b in zip(*digests, strict=True)) > 1
