"""Factors that are folded into weights: proved on small models, chosen by held-out inputs, tested on conversions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from cuda_kernels import reference
from int8convert import quantize
from int8convert.calibration.calibrate import calibrate
from int8convert.checkpoint import rows
from int8convert.checkpoint.names import SMOOTHING_FILE
from int8convert.conversion import smoothing_search
from int8convert.conversion.smoothing_search import Choice, ReadTensor, round_inputs, round_weights, search_factors
from int8convert.errors import FormatError, Int8ConvertError
from int8convert.events import GroupsSmoothed, ignore
from int8convert.formats.int8_checkpoint import SourceReaders
from int8convert.outliers.keep import keep_budget
from int8convert.planning.calibrated_rounding import CALIBRATED
from int8convert.planning.fold import Factors, Fold
from int8convert.planning.folding import groups
from int8convert.planning.folding.parameter_folds import ParameterFold
from int8convert.planning.folding.proof import fold_into
from int8convert.planning.folding.worker import find_smoothing
from int8convert.planning.plan_checkpoint import PlanOptions, plan
from int8convert.planning.smoothing import SmoothingFactors, read_factors, spread
from int8convert.publish.finished import read_finished
from int8convert.runtime.text.texts import Text
from int8convert.verification.exact.level import verify_exact
from tests.cli.conftest import Run, run
from tests.planning.folding.test_rotation import LARGER, read_tensors
from tests.tools.family_models import families
from tests.tools.language_models import build_tokenizer, language_model
from tests.tools.rotation_check import check_smoothing, randomized
from tests.tools.tiny_models import MODELS, build_model, save_checkpoint

__all__ = ["run"]

SMOOTH = ("--smooth", "calibrated")

PREFIX = "model.decoder.layers.1."

GROUPS = {
    "opt": 3 * 4,  # both norms, v -> o, fc1 -> fc2
    "llama": 3 * 4,
    "qwen3 with a tied head": 3 * 4,
    "gemma": 3 * 4,
    "gpt2": 3 * 2,  # the norms alone: GELU keeps no proportion, and q, k and v are one layer
    "gpt_neox": 3 * 2,
}
"""Model of `LARGER` -> number of its groups."""


def smoothing_of(model: Any) -> dict[str, Any]:
    with torch.device("meta"):
        real = type(model)(model.config)
    return find_smoothing(real, ())


def random_factors(groups: list[dict[str, Any]]) -> SmoothingFactors:
    generator = np.random.default_rng(1)
    return SmoothingFactors(
        {group["name"]: np.exp(generator.normal(0, 1, group["size"])).astype(np.float32) for group in groups}
    )


def check_same(model: Any, found: dict[str, Any]) -> None:
    """Check that a model with random factors folded in computes the same."""
    weights = {key: value.detach().clone() for key, value in model.named_parameters(remove_duplicate=False)}
    folds = {fields["parameter"]: ParameterFold(**fields) for fields in found["folds"]}
    ids = torch.arange(3, 40)[None]
    expected = groups.run(model, ids)
    fold_into(model, folds, weights, random_factors(found["groups"]))
    torch.testing.assert_close(groups.run(model, ids), expected, rtol=0, atol=3e-5 * float(expected.abs().max()))
    for name in folds:
        assert not torch.allclose(model.get_parameter(name), weights[name], rtol=0.1), name


@pytest.mark.parametrize("name", LARGER)
def test_smoothed_model_computes_the_same(name: str) -> None:
    """A model of other sizes than the one on which the groups were proved."""
    model = randomized(LARGER[name]())
    found = smoothing_of(model)
    assert (len(found["groups"]), found["refusals"]) == (GROUPS[name], [])
    check_same(model, found)


def test_smoothed_gemma3_computes_the_same() -> None:
    """Its norms hold 1 less than they multiply by; those after attention and MLP feed no Linear layer."""
    config = transformers.Gemma3TextConfig(
        vocab_size=160,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    model = randomized(transformers.Gemma3ForCausalLM(config))
    found = smoothing_of(model)
    names = {group["name"].rpartition("layers.0.")[2] for group in found["groups"]}
    assert {"input_layernorm", "pre_feedforward_layernorm", "mlp.up_proj", "self_attn.v_proj"} <= names
    assert not any("post" in name for name in names)
    check_same(model, found)


def test_heads_that_share_values_share_factors() -> None:
    factors = np.array([1, 2, 3, 4], np.float32)
    np.testing.assert_array_equal(spread(factors, 8, 2), [1, 2, 1, 2, 3, 4, 3, 4])
    np.testing.assert_array_equal(spread(factors, 4, 0), factors)


def test_what_other_modules_read_is_refused_with_the_reason() -> None:
    mixture = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=160,
            num_hidden_layers=3,
            num_attention_heads=2,
            hidden_size=64,
            intermediate_size=64,
            num_key_value_heads=1,
        )
    )
    found = smoothing_of(mixture)
    kinds = {group["name"].rpartition(".")[2] for group in found["groups"]}
    assert kinds == {"input_layernorm", "v_proj"}
    assert "model.layers.*.mlp.gate reads is not smoothed, because it is a MixtralTopKRouter" in found["refusals"][0]
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=160, hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=96
        )
    )
    found = smoothing_of(bert)  # its norms feed the residual stream, too
    assert {group["name"].rpartition(".")[2] for group in found["groups"]} == {"value"}
    assert any("output.LayerNorm is not smoothed: a smoothed small model" in reason for reason in found["refusals"])
    t5 = smoothing_of(MODELS["t5"]())
    assert t5["groups"] == [] and "has an encoder and a decoder" in t5["refusals"][0]


def test_inputs_are_rounded_as_loaders_round_them() -> None:
    x = np.random.default_rng(2).normal(0, 1, (5, 64)).astype(np.float32)
    x[2, 7] = 30
    for threshold in (0.0, 6.0):
        codes = reference.activation_quantize(x, np.empty(0, np.int32), threshold, 8 if threshold else 0)
        expected = codes.codes * (codes.absmax / np.float32(127))
        if threshold:
            assert codes.found_columns[0] == 7
            expected[:, 7] = x[:, 7]
        np.testing.assert_allclose(round_inputs(x, threshold), expected, rtol=1e-6)
    quantized = reference.row_quantize(x)
    np.testing.assert_allclose(round_weights(x), quantized.codes * (quantized.absmax / 127)[:, None], rtol=1e-6)


def save(model: Any, directory: Path) -> Path:
    model.save_pretrained(directory, max_shard_size="60KB")
    build_tokenizer().save_pretrained(directory)
    return directory


def write_calibration(source: Path, folder: Path) -> Path:
    text = folder.with_suffix(".txt")
    text.write_text(" ".join(f"{i * i} and {chr(97 + i % 26)} {i % 7}" for i in range(400)))
    options = Text(text, n_sequences=8, length=32)
    calibrate(source, folder, options, with_moments=True, device="cpu", on_event=ignore)
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """An OPT whose second layer has outliers in the gain of its second norm, in several shards."""
    model = randomized(language_model("opt", build_tokenizer()))
    model.get_parameter(f"{PREFIX}final_layer_norm.weight").data[[3, 17]] *= 60
    return save(model, tmp_path / "source")


@pytest.fixture
def calibration(checkpoint: Path, tmp_path: Path) -> Path:
    return write_calibration(checkpoint, tmp_path / "cal")


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> dict[str, Choice]:
    """Group -> what was chosen for it."""
    found: dict[str, Choice] = {}
    choose = smoothing_search.choose

    def recording(tensor: ReadTensor, readers: SourceReaders) -> Choice:
        found[tensor.group.name] = choose(tensor, readers)
        return found[tensor.group.name]

    monkeypatch.setattr(smoothing_search, "choose", recording)
    return found


@pytest.mark.usefixtures("rotation_in_process")
@pytest.mark.parametrize("format", ["bitsandbytes", "compressed-tensors"])
def test_factors_are_chosen_where_a_gain_has_outliers(
    checkpoint: Path, calibration: Path, format: str, choices: dict[str, Choice]
) -> None:
    planned = plan(checkpoint, PlanOptions(calibration=calibration, smooth=CALIBRATED, format=format))
    assert not any(tensor.fold for tensor in planned.tensors)  # the factors are not chosen yet
    factors, event = search_factors(planned, calibration, 6.0, ignore)
    norm = factors.by_group[f"{PREFIX}final_layer_norm"]
    assert set(np.argsort(norm)[-2:]) == {3, 17} and norm[3] > 3 * np.median(norm)
    np.testing.assert_allclose(np.log(norm).mean(), 0, atol=1e-5)
    assert event.n_groups == 2 * 4 and event.n_smoothed == len(factors.by_group) < 8
    assert event.error_after is not None and event.error_before is not None
    assert event.error_after < event.error_before
    choice = choices[f"{PREFIX}final_layer_norm"]
    assert choice.strength is not None and choice.strength > 0
    assert choice.error_after < choice.error_before / (20 if format == "compressed-tensors" else 5)


@pytest.mark.usefixtures("rotation_in_process")
def test_without_outliers_hardly_anything_changes(tmp_path: Path, choices: dict[str, Choice]) -> None:
    model = randomized(language_model("opt", build_tokenizer()))
    for name, parameter in model.named_parameters():
        if "layer_norm" in name:
            parameter.data.fill_(float(name.endswith("weight")))
    source = save(model, tmp_path / "source")
    folder = write_calibration(source, tmp_path / "cal")
    search_factors(plan(source, PlanOptions(calibration=folder, smooth=CALIBRATED)), folder, 6.0, ignore)
    norms = [choice for name, choice in choices.items() if name.endswith("layer_norm")]
    assert len(norms) == 4
    assert all(choice.error_after > 0.8 * choice.error_before for choice in norms)


@pytest.mark.usefixtures("rotation_in_process")
def test_conversion_quantizes_the_smoothed_weights(checkpoint: Path, calibration: Path, tmp_path: Path) -> None:
    report = quantize(checkpoint, tmp_path / "out", PlanOptions(calibration=calibration, smooth=CALIBRATED))
    assert report.smoothed is not None and report.smoothed.n_groups == 8
    source, out = read_tensors(checkpoint), read_tensors(tmp_path / "out")
    factors = read_factors(tmp_path / "out" / SMOOTHING_FILE).by_group[f"{PREFIX}final_layer_norm"]
    for leaf in ("weight", "bias"):
        norm = source[f"{PREFIX}final_layer_norm.{leaf}"].numpy()
        np.testing.assert_allclose(out[f"{PREFIX}final_layer_norm.{leaf}"].numpy(), norm / factors, rtol=1e-6)
    smoothed = read_factors(tmp_path / "out" / SMOOTHING_FILE).by_group
    expected = source[f"{PREFIX}fc1.weight"].numpy() * factors
    if f"{PREFIX}fc1" in smoothed:
        expected *= (np.float32(1) / smoothed[f"{PREFIX}fc1"])[:, None]
    np.testing.assert_array_equal(out[f"{PREFIX}fc1.weight"].numpy(), reference.row_quantize(expected).codes)


@pytest.mark.usefixtures("rotation_in_process")
def test_bytes_do_not_depend_on_threads_and_blocks(
    checkpoint: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(checkpoint, tmp_path / "one", PlanOptions(calibration=calibration, smooth=CALIBRATED), workers=1)
    monkeypatch.setattr(rows, "BLOCK_BYTES", 3000)
    options = PlanOptions(smooth=tmp_path / "one" / SMOOTHING_FILE)
    quantize(checkpoint, tmp_path / "other", options, workers=3)
    one, other = read_tensors(tmp_path / "one"), read_tensors(tmp_path / "other")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
    assert (tmp_path / "one" / SMOOTHING_FILE).read_bytes() == (tmp_path / "other" / SMOOTHING_FILE).read_bytes()


@pytest.mark.usefixtures("rotation_in_process")
def test_verify_recomputes_and_finds_a_changed_factor(checkpoint: Path, calibration: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(checkpoint, out, PlanOptions(calibration=calibration, smooth=CALIBRATED))
    assert verify_exact(out).is_passed
    path = out / SMOOTHING_FILE
    content = bytearray(path.read_bytes())
    content[-2] ^= 0x40
    path.write_bytes(content)
    failed = {check.name for check in verify_exact(out).checks if not check.is_passed}
    assert "files" in failed and failed & {"codes", "scales", "kept"}
    path.unlink()
    with pytest.raises(Int8ConvertError, match=r"smoothing.safetensors' is missing"):
        verify_exact(out)


@pytest.mark.usefixtures("rotation_in_process")
def test_resumed_conversion_uses_the_same_factors(
    checkpoint: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def stop(event: Any) -> None:
        if type(event).__name__ == "ShardFinished":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(checkpoint, out, PlanOptions(calibration=calibration, smooth=CALIBRATED), on_event=stop)
    factors = (out / SMOOTHING_FILE).read_bytes()
    with pytest.raises(Int8ConvertError, match=r"--smooth .* then, no --smooth now"):
        quantize(checkpoint, out)
    with monkeypatch.context() as patch:
        patch.setattr("int8convert.conversion.smoothing_search.search_factors", None)
        report = quantize(checkpoint, out, PlanOptions(calibration=calibration, smooth=CALIBRATED))
    assert report.n_done_shards >= 1 and (out / SMOOTHING_FILE).read_bytes() == factors
    assert report.smoothed == GroupsSmoothed(len(read_factors(out / SMOOTHING_FILE).by_group))
    assert verify_exact(out).is_passed
    quantize(checkpoint, out, PlanOptions(), overwrite=True)
    assert not (out / SMOOTHING_FILE).exists()


@pytest.mark.usefixtures("rotation_in_process")
def test_folded_models_are_smoothed_where_nothing_is_rotated(tmp_path: Path) -> None:
    """In a gated MLP: from the layer that multiplies to the one that reads the product."""
    model = randomized(build_model("llama", torch.float32))
    model.save_pretrained(tmp_path / "source")
    planned = plan(tmp_path / "source", PlanOptions(rotate=True))
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    size = planned.model_map.tensors and model.config.intermediate_size
    factors = {name: np.linspace(0.5, 2, size, dtype=np.float32) for name in names}
    (tmp_path / "factors.safetensors").write_bytes(SmoothingFactors(factors).content())
    options = PlanOptions(rotate=True, smooth=tmp_path / "factors.safetensors")
    both = plan(tmp_path / "source", options)
    assert both.folding is not None and [group.name for group in both.folding.smooth_groups] == names
    quantize(tmp_path / "source", tmp_path / "out", options)
    source, out = read_tensors(tmp_path / "source"), read_tensors(tmp_path / "out")
    down = source["model.layers.0.mlp.down_proj.weight"].numpy() * factors[names[0]]
    down = reference.rotate(np.ascontiguousarray(down.T), 64).T
    np.testing.assert_array_equal(
        out["model.layers.0.mlp.down_proj.weight"].numpy(), reference.row_quantize(down).codes
    )
    assert verify_exact(tmp_path / "out").is_passed


@pytest.mark.usefixtures("rotation_in_process")
def test_factors_of_another_model_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "factors.safetensors"
    path.write_bytes(SmoothingFactors({"no.such.norm": np.ones(8, np.float32)}).content())
    with pytest.raises(Int8ConvertError, match=r"holds 8 factors for 'no.such.norm', the model has 0"):
        plan(checkpoint, PlanOptions(smooth=path))
    path.write_bytes(SmoothingFactors({f"{PREFIX}fc1": np.zeros(8, np.float32)}).content())
    with pytest.raises(Int8ConvertError, match=r"holds no positive float32 factors"):
        plan(checkpoint, PlanOptions(smooth=path))


def test_inputs_are_divided_by_what_multiplies_the_columns() -> None:
    """By which calibrated rounding gets the inputs of a smoothed weight."""
    generator = np.random.default_rng(3)
    x, weight = (generator.normal(0, 1, (n, 64)).astype(np.float32) for n in (5, 16))
    columns, row_factors = (np.exp(generator.normal(0, 1, n)).astype(np.float32) for n in (64, 16))
    fold = Fold(row_factors=Factors.of(row_factors), column_factors=Factors.of(columns), row_block=16)
    product = fold.of_inputs().load().apply(x, 0) @ fold.load().apply(weight, 0).T
    expected = reference.rotate(x @ weight.T * row_factors, 16)
    np.testing.assert_allclose(product, expected, rtol=1e-4, atol=1e-4)
    assert fold.identity() != Fold(row_factors=Factors.of(columns), row_block=16).identity()


@pytest.mark.usefixtures("rotation_in_process")
def test_smoothed_weights_can_be_rounded_by_the_calibration(
    checkpoint: Path, calibration: Path, tmp_path: Path
) -> None:
    options = PlanOptions(calibration=calibration, smooth=CALIBRATED, round=CALIBRATED)
    report = quantize(checkpoint, tmp_path / "out", options)
    assert report.rounding is not None and report.rounding.error < report.rounding.nearest_error
    assert verify_exact(tmp_path / "out").is_passed


@pytest.mark.usefixtures("rotation_in_process")
@pytest.mark.filterwarnings("ignore")
def test_modules_are_kept_by_what_the_smoothed_model_loses(checkpoint: Path, calibration: Path, tmp_path: Path) -> None:
    text = Text(calibration.with_suffix(".txt"), n_sequences=2, length=32)
    options = PlanOptions(calibration=calibration, smooth=CALIBRATED, keep=keep_budget(20, text, device="cpu"))
    first = quantize(checkpoint, tmp_path / "out", options, on_event=ignore)
    assert first.kept_by_budget is not None and first.kept_by_budget.names
    again = quantize(checkpoint, tmp_path / "out", options, on_event=ignore)
    assert again.n_done_shards == again.n_shards and again.kept_by_budget is not None
    assert again.kept_by_budget.names == first.kept_by_budget.names
    assert verify_exact(tmp_path / "out").is_passed


@pytest.mark.usefixtures("rotation_in_process")
@pytest.mark.filterwarnings("ignore")
def test_command_line_reports_and_refuses(run: Run, checkpoint: Path, calibration: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, notes = run("quantize", checkpoint, out, *SMOOTH, "--calibration", calibration)
    assert code == 0 and "smoothing: 7 of 8 groups of layers; their outputs' squared error" in printed, notes
    assert SMOOTHING_FILE in read_finished(out).files()  # an upload sends it
    assert run("verify", out, "--level", "exact")[0] == 0
    assert SMOOTHING_FILE in read_finished(out).files()
    code, _, error = run(
        "quantize", checkpoint, tmp_path / "new", *SMOOTH, "--calibration", calibration, "--lora", checkpoint
    )
    assert code == 2 and "--smooth measures SRC without the adapter" in error
    for given, message in (
        ((*SMOOTH, "--calibration", tmp_path / "nowhere"), "holds no complete calibration"),
        (("--smooth", tmp_path / "nowhere"), "is no file of factors"),
        (("--smooth", checkpoint / "config.json"), ""),
    ):
        code, _, error = run("quantize", checkpoint, tmp_path / "new", *given)
        assert code == 1 and message in error and not (tmp_path / "new").exists()


@pytest.mark.usefixtures("rotation_in_process")
def test_calibration_without_held_out_inputs_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a few words and more of them " * 40)
    calibrate(checkpoint, tmp_path / "cal", Text(text, n_sequences=2, length=32), device="cpu", on_event=ignore)
    with pytest.raises(Int8ConvertError, match=r"holds no held-out inputs of layers that can be smoothed") as refused:
        quantize(checkpoint, tmp_path / "out", PlanOptions(calibration=tmp_path / "cal", smooth=CALIBRATED))
    assert refused.value.hint == "calibrate again with int8convert calibrate --moments"
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("rotation_in_process", "map_in_process")
def test_format_that_makes_no_smoothed_layer_int8_is_named(tmp_path: Path) -> None:
    source, text = save_checkpoint("gpt2", tmp_path / "gpt2"), tmp_path / "text.txt"
    text.write_text("%$#!&" * 60)  # no word of the tokenizer: the model knows 128 tokens
    build_tokenizer().save_pretrained(source)
    options = {"with_moments": True, "device": "cpu", "on_event": ignore}
    calibrate(source, tmp_path / "cal", Text(text, n_sequences=2, length=32), **options)
    with pytest.raises(FormatError, match=r"none of its layers becomes int8 in compressed-tensors") as refused:
        quantize(
            source,
            tmp_path / "out",
            PlanOptions(calibration=tmp_path / "cal", smooth=CALIBRATED, format="compressed-tensors"),
        )
    assert refused.value.hint == "leave out --smooth, or choose another --format"


@pytest.mark.parametrize(
    ("name", "n_groups", "refuses"),
    [
        ("causal/bloom", 4, False),
        ("causal/bert", 2, True),
        ("causal/aria_text", 6, True),
        ("causal/axk1", 4, True),
        ("causal/deepseek_v2", 4, True),
        ("causal/ctrl", 4, True),
        ("causal/deepseek_v4", 2, True),
    ],
)
def test_family_computes_the_same_or_is_refused(name: str, n_groups: int, refuses: bool) -> None:
    """Post-norms, routers, experts that are shared, latent attention, layers without names, and clamps."""
    result = check_smoothing(next(family for family in families() if family.name == name))
    assert result.is_right and result.n_groups == n_groups, result
    assert bool(result.refusals) == refuses, result
