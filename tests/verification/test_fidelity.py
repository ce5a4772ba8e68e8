"""Fidelity with both models in memory: the values of transformers' own logits, one report for each arithmetic."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import int8convert
from int8convert.errors import CoverageError, SourceError
from int8convert.events import Event, MeasurementStarted, MeasurementStep
from int8convert.runtime.text.windows import TokenWindows, read_windows, read_windows_by
from int8convert.verification.fidelity.arithmetic import Arithmetic, ColumnCount, running
from int8convert.verification.fidelity.level import FidelityReport, measure_fidelity
from int8convert.verification.options import Execution
from tests.tools.outlier_models import convert, outlier_model, save
from tests.tools.tiny_models import build_model, edit_config

pytestmark = [
    pytest.mark.usefixtures("map_in_process"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def pair(tmp_path: Path, tokenizer: Any) -> tuple[Path, Path]:
    """A model with outlier features, in float16, and what quantize makes of it."""
    source = save(outlier_model(tokenizer), tmp_path / "source", tokenizer)
    return source, convert(source, tmp_path / "int8")


@pytest.fixture
def windows(text: Path, tokenizer: Any) -> TokenWindows:
    return read_windows(text, tokenizer, 4, 20)


@torch.no_grad()
def plain(source: Any, int8: Any, windows: TokenWindows) -> dict[str, Any]:
    """The same values by the plainest code there is."""
    p, q = (
        torch.cat([model(ids[None]).logits[:, :-1] for ids in windows.ids]).double().log_softmax(-1)
        for model in (source, int8)
    )
    came = windows.ids[:, 1:, None]
    p_nll, q_nll = -p.gather(2, came), -q.gather(2, came)
    kl = (p.exp() * (p - q)).sum(-1)
    return {
        "reference_perplexity": float(p_nll.mean().exp()),
        "perplexity": float(q_nll.mean().exp()),
        "delta_nll": float((q_nll - p_nll).mean()),
        "mean_kl": float(kl.mean()),
        "p99_kl": float(kl.flatten().quantile(0.99)),
        "same_top1": float((p.argmax(-1) == q.argmax(-1)).double().mean()),
        "delta_p": float((p_nll.neg().exp() - q_nll.neg().exp()).square().mean().sqrt()),
    }


def measured(report: FidelityReport, names: Any) -> dict[str, float]:
    return {name: getattr(report, name) for name in names}


def test_values_are_those_of_the_models_logits(pair: tuple[Path, Path], windows: TokenWindows) -> None:
    (report,) = measure_fidelity(*pair, windows)
    source = transformers.OPTForCausalLM.from_pretrained(pair[0], dtype=torch.float32)
    expected = plain(source, int8convert.load(pair[1]), windows)
    assert measured(report, expected) == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert (report.n_sequences, report.n_tokens) == (4, 4 * 19)
    assert (report.mode, report.threshold, report.streamed) == ("dynamic", 6.0, False)
    assert (report.dtype, report.reference_dtype) == ("float16", "float32")
    assert 1e-6 < report.mean_kl < 0.1
    assert report.convention == windows.convention


def test_errors_of_layers_are_those_of_the_hidden_states(pair: tuple[Path, Path], windows: TokenWindows) -> None:
    (report,) = measure_fidelity(*pair, windows)
    models = (transformers.OPTForCausalLM.from_pretrained(pair[0], dtype=torch.float32), int8convert.load(pair[1]))
    states = []
    for model in models:
        found: list[torch.Tensor] = []
        for layer in model.model.decoder.layers:
            layer.register_forward_hook(lambda _m, _i, output, found=found: found.append(output))
        with torch.no_grad():
            for ids in windows.ids:
                model(ids[None])
        states.append([torch.cat(found[i::2]).double() for i in range(2)])
    expected = [float((b - a).norm() / a.norm()) for a, b in zip(*states, strict=True)]
    assert [name for name, _ in report.layer_errors] == ["model.decoder.layers.0", "model.decoder.layers.1"]
    assert [error for _, error in report.layer_errors] == pytest.approx(expected, rel=1e-4)
    assert min(expected) > 0


def test_a_copy_of_the_reference_differs_by_the_arithmetic_alone(tmp_path: Path, tokenizer: Any, text: Path) -> None:
    """Weights that are multiples of their row's step lose nothing, so nothing but inputs and 16 bits is left."""
    model = outlier_model(tokenizer, {}, {})
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.dim() == 2 and "embed" not in name:
            parameter.data = (parameter / parameter.abs().amax(1, keepdim=True) * 127).round() / 1024
            parameter.data[:, 0] = 127 / 1024
    source = save(model, tmp_path / "source", tokenizer)
    out = convert(source, tmp_path / "int8")
    windows = read_windows(text, tokenizer, 4, 20)
    weights, full = measure_fidelity(source, out, windows, Execution(modes=("weight-only", "none")))
    assert 0 < weights.mean_kl < 1e-5
    assert full.mean_kl > 10 * weights.mean_kl


def test_each_mode_is_the_model_that_load_gives(pair: tuple[Path, Path], windows: TokenWindows) -> None:
    int8convert.store_outliers(*pair, {"model.decoder.layers.0.fc1": (7, 21, 50)}, {})
    reports = measure_fidelity(*pair, windows, Execution(modes=("none", "dynamic", "static", "static+guard")))
    source = transformers.OPTForCausalLM.from_pretrained(pair[0], dtype=torch.float32)
    assert [report.mode for report in reports] == ["none", "dynamic", "static", "static+guard"]
    for report in reports:
        expected = plain(source, int8convert.load(pair[1], outliers=report.mode), windows)
        assert measured(report, expected) == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert len({report.mean_kl for report in reports}) == 4
    (default,) = measure_fidelity(*pair, windows)
    assert (default.mode, default.mean_kl) == ("static+guard", reports[3].mean_kl)


def test_weight_only_is_the_model_with_the_weights_of_the_codes(pair: tuple[Path, Path], windows: TokenWindows) -> None:
    (report,) = measure_fidelity(*pair, windows, Execution(modes=("weight-only",)))
    source = transformers.OPTForCausalLM.from_pretrained(pair[0], dtype=torch.float32)
    rounded = transformers.OPTForCausalLM.from_pretrained(pair[0], dtype=torch.float16)
    for name, layer in int8convert.load(pair[1]).named_modules():
        if isinstance(layer, int8convert.Int8Linear):
            rounded.get_submodule(name).weight.data = (layer.weight * (layer.SCB / 127)[:, None]).half()
    expected = plain(source, rounded, windows)
    assert (report.threshold, report.outlier_share) == (None, 0)
    assert measured(report, expected) == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_thresholds_are_swept_where_a_mode_looks_for_outliers(pair: tuple[Path, Path], windows: TokenWindows) -> None:
    reports = measure_fidelity(*pair, windows, Execution(modes=("none", "dynamic"), thresholds=(0, 3, 6, math.inf)))
    assert [(r.mode, r.threshold) for r in reports] == [
        ("none", None),
        *(("dynamic", threshold) for threshold in (0, 3, 6, math.inf)),
    ]
    none, zero, three, six, infinite = reports
    assert none.mean_kl == zero.mean_kl == infinite.mean_kl
    assert six.mean_kl < zero.mean_kl / 2
    assert none.outlier_share == zero.outlier_share == infinite.outlier_share == 0
    assert 0 < six.outlier_share < three.outlier_share < 1
    expected = plain(
        transformers.OPTForCausalLM.from_pretrained(pair[0], dtype=torch.float32),
        int8convert.load(pair[1], threshold=3.0),
        windows,
    )
    assert measured(three, expected) == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_outlier_share_counts_the_columns_of_all_layers(pair: tuple[Path, Path], windows: TokenWindows) -> None:
    int8convert.store_outliers(*pair, {"model.decoder.layers.0.fc1": (7, 50)}, {})
    (static, guarded, dynamic) = measure_fidelity(
        *pair, windows, Execution(modes=("static", "static+guard", "dynamic"))
    )
    n_columns = 2 * (5 * 64 + 128)  # two layers: five projections of 64 inputs, one of 128
    assert static.outlier_share == pytest.approx(2 / n_columns)
    assert dynamic.outlier_share > 2 * (2 + 3 * 2) / n_columns  # q, k, v read both in each layer, too
    assert guarded.outlier_share == dynamic.outlier_share  # what is stored is not found once more


@pytest.mark.parametrize("mode", ["none", "weight-only"])
def test_layers_are_what_they_were_after_an_arithmetic_ran(pair: tuple[Path, Path], mode: str) -> None:
    model = int8convert.load(pair[1], threshold=5.0)
    layer = model.model.decoder.layers[0].fc1
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).half()
    x[:, 5] = 20
    before = layer(x)
    with running(model, Arithmetic(mode, 3.0), ColumnCount()):
        assert not torch.equal(layer(x), before)
    assert (layer.mode, layer.threshold, "forward" in vars(layer)) == ("dynamic", 5.0, False)
    assert torch.equal(layer(x), before)


def test_conventions_score_the_tokens_they_say(pair: tuple[Path, Path], text: Path, tokenizer: Any) -> None:
    ids = torch.tensor(tokenizer(text.read_text())["input_ids"])
    source = transformers.OPTForCausalLM.from_pretrained(pair[0], dtype=torch.float32)
    places = {
        "contiguous": [(20 * i, range(1, 20)) for i in range(3)],
        "strided": [(10 * i, range(10 if i else 1, 20)) for i in range(3)],
        "halves": [(20 * i, range(11, 20)) for i in range(3)],
    }
    for convention, scored in places.items():
        windows = read_windows_by(convention, text, tokenizer, 3, 20)
        (report,) = measure_fidelity(*pair, windows)
        nll = []
        for begin, targets in scored:
            window = ids[begin : begin + 20]
            with torch.no_grad():
                log_probs = source(window[None]).logits[0].double().log_softmax(-1)
            nll += [-float(log_probs[t - 1, window[t]]) for t in targets]
        assert report.n_tokens == windows.n_scored == len(nll)
        assert report.reference_perplexity == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5)
        assert report.convention.startswith(f"{convention}: 3 windows of 20 tokens")


def test_halves_put_the_tokenizers_own_token_first(text: Path, tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    ids = torch.tensor(tokenizer(text.read_text())["input_ids"])
    assert ids[0] == tokenizer.bos_token_id
    halves, contiguous = (read_windows_by(name, text, tokenizer, 3, 20).ids for name in ("halves", "contiguous"))
    assert torch.equal(contiguous, ids[:60].view(3, 20))
    assert torch.equal(halves[:, 1:], contiguous[:, 1:])
    assert halves[:, 0].tolist() == [tokenizer.bos_token_id] * 3


def test_peak_memory_is_said_before_anything_is_loaded(pair: tuple[Path, Path], windows: TokenWindows) -> None:
    events: list[Event] = []
    (report,) = measure_fidelity(*pair, windows, on_event=events.append)
    started, *steps = events
    assert isinstance(started, MeasurementStarted) and not started.streamed and started.n_steps == 4
    assert [replace(step, remaining_s=0.0) for step in steps if isinstance(step, MeasurementStep)] == [
        MeasurementStep("window", i + 1, 4, 0.0) for i in range(4)
    ]
    assert 0 < report.peak_memory_bytes <= started.peak_memory_bytes


def test_checkpoint_that_is_not_int8_is_refused(pair: tuple[Path, Path], windows: TokenWindows) -> None:
    with pytest.raises(SourceError, match=r"is no int8 checkpoint: its config.json has no quantization_config"):
        measure_fidelity(pair[0], pair[0], windows)


def test_checkpoint_without_an_int8_layer_is_refused(pair: tuple[Path, Path], windows: TokenWindows) -> None:
    block = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": ["model", "lm_head"]}
    edit_config(pair[0], quantization_config=block)
    with pytest.raises(CoverageError, match="OPTForCausalLM has no int8 layer"):
        measure_fidelity(pair[0], pair[0], windows)


def test_static_mode_without_stored_columns_is_refused(pair: tuple[Path, Path], windows: TokenWindows) -> None:
    with pytest.raises(SourceError, match="static outliers are asked for, and the checkpoint has no stored columns"):
        measure_fidelity(*pair, windows, Execution(modes=("dynamic", "static")))


def test_other_vocabulary_is_refused(
    pair: tuple[Path, Path], windows: TokenWindows, tmp_path: Path, tokenizer: Any
) -> None:
    model = build_model("opt")
    model.resize_token_embeddings(len(tokenizer) + 3, mean_resizing=False)
    model.save_pretrained(tmp_path / "other")
    n = len(tokenizer)
    with pytest.raises(SourceError, match=f"predicts one of {n:,} tokens, the reference one of {n + 3:,}"):
        measure_fidelity(tmp_path / "other", pair[1], windows)


def test_windows_longer_than_the_model_are_refused(pair: tuple[Path, Path], text: Path, tokenizer: Any) -> None:
    with pytest.raises(SourceError, match="the model takes 64 tokens, and the windows have 70"):
        measure_fidelity(*pair, read_windows(text, tokenizer, 2, 70))


def test_model_that_predicts_no_next_token_is_refused(tmp_path: Path, windows: TokenWindows) -> None:
    build_model("t5").save_pretrained(tmp_path / "source")
    out = convert(tmp_path / "source", tmp_path / "int8")
    with pytest.raises(SourceError, match="T5ForConditionalGeneration does not predict the next token"):
        measure_fidelity(tmp_path / "source", out, windows)


def test_reference_that_predicts_nan_is_refused(
    pair: tuple[Path, Path], windows: TokenWindows, tmp_path: Path, tokenizer: Any
) -> None:
    model = outlier_model(tokenizer)
    model.model.decoder.final_layer_norm.weight.data[3] = math.nan
    save(model, tmp_path / "broken", tokenizer)
    with pytest.raises(SourceError, match=r"broken' predicts NaN on this text"):
        measure_fidelity(tmp_path / "broken", pair[1], windows)


def test_unknown_mode_and_negative_threshold_are_wrong_usage(pair: tuple[Path, Path], windows: TokenWindows) -> None:
    with pytest.raises(ValueError, match="'int4' is none of static"):
        measure_fidelity(*pair, windows, Execution(modes=("int4",)))
    with pytest.raises(ValueError, match="threshold -1 is negative"):
        measure_fidelity(*pair, windows, Execution(thresholds=(-1,)))
