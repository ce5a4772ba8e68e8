"""What a run layer by layer gathers is what hooks on a whole model of transformers see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from int8convert.calibration import run
from int8convert.calibration.calibrate import calibrate
from int8convert.calibration.folder import Calibration, read_calibration, read_moments
from int8convert.calibration.weight_squares import weight_squares
from int8convert.errors import LayerwiseError, SourceError
from int8convert.events import Event, MeasurementStarted, MeasurementStep
from int8convert.runtime.layered import memory as layered_memory
from int8convert.runtime.text.texts import Text
from int8convert.runtime.text.windows import TokenWindows, read_windows
from tests.tools.family_models import build_family, families
from tests.tools.outlier_models import convert
from tests.tools.tiny_models import MODELS

pytestmark = [
    pytest.mark.usefixtures("map_in_process"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

N_WINDOWS, LENGTH = 5, 24
SIZES = {"vocab_size": 384, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED = {**SIZES, "intermediate_size": 160, "num_key_value_heads": 2}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)),
    "opt with layers before and after the decoder layers": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**SIZES, ffn_dim=160, word_embed_proj_dim=32, max_position_embeddings=64)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=384, n_embd=64, n_layer=3, n_head=4)
    ),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES, intermediate_size=160)),
    "falcon, whose layers have a forward of their own": lambda: transformers.FalconForCausalLM(
        transformers.FalconConfig(**SIZES)
    ),
    "qwen2_moe with a shared expert": lambda: transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            **GROUPED,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=48,
            num_experts=4,
            num_experts_per_tok=2,
        )
    ),
}


def save(build: Callable[[], Any], directory: Path, tokenizer: Any) -> Path:
    """A checkpoint in float32 whose weights are large enough for outliers."""
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "embed" not in name and "wte" not in name:
                parameter.mul_(6)
            if "norm" in name or "ln_" in name:
                parameter += torch.randn(parameter.shape).exp()
    model.save_pretrained(directory, max_shard_size="200KB")
    tokenizer.save_pretrained(directory)
    return directory


def read_by_hooks(model: Any, ids: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Layer -> all it read, and all it wrote, [tokens, features], window after window."""
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | transformers.pytorch_utils.Conv1D):
            module.register_forward_hook(
                lambda m, i, y, name=name: found.setdefault(name, []).append(
                    (i[0].flatten(0, -2).clone(), y.flatten(0, -2).clone())  # Falcon adds to them in place
                )
            )
    with torch.no_grad():
        for window in ids:
            model(window[None])
    return {name: (torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])) for name, pairs in found.items()}


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-4, atol=1e-4)


def check(name: str, calibration: Calibration, x: torch.Tensor, y: torch.Tensor, module: nn.Module) -> None:
    """Compare the sums of a layer with those of all it read and wrote, by their definitions."""
    seen, weight = calibration.statistics[name], calibration.weights[name]
    assert seen.n_tokens == len(x)
    assert_close(seen.maximum, x.amax(0))
    assert_close(seen.minimum, x.amin(0))
    assert torch.equal(seen.n_above, (x >= 6).sum(0)) and torch.equal(seen.n_below, (x <= -6).sum(0))
    assert_close(seen.sum_squares, x.double().square().sum(0))
    together = x.split((N_WINDOWS - 1) * LENGTH)  # held-out windows run by themselves, and have outliers of their own
    ordinary = torch.cat([part.where(part.abs().amax(0) < 6, 0.0) for part in together])
    assert_close(seen.step_squares, (ordinary.abs().amax(1).double() / 127).square().sum())
    blocks = [block.abs().amax(1).double() for block in x.split(128, dim=1)]
    assert_close(seen.block_step_squares, torch.stack([(block / 127).square().sum() for block in blocks]))
    assert_close(seen.output_sum, y.double().sum(0))
    assert_close(seen.output_squares, y.double().square().sum())
    expected = weight_squares(module)
    assert_close(weight.columns, expected.columns)
    assert weight.steps == pytest.approx(expected.steps) and weight.n_rows == expected.n_rows == y.shape[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_statistics_and_moments_are_those_of_a_whole_model(
    name: str, tmp_path: Path, text: Path, tokenizer: Any
) -> None:
    source = save(FAMILIES[name], tmp_path / "source", tokenizer)
    events: list[Event] = []
    made = calibrate(
        source,
        tmp_path / "cal",
        Text(text, n_sequences=N_WINDOWS, length=LENGTH),
        with_moments=True,
        device="cpu",
        on_event=events.append,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    read = read_by_hooks(model, read_windows(text, tokenizer, N_WINDOWS, LENGTH).ids)
    calibration = read_calibration(tmp_path / "cal")
    assert replace(calibration, statistics={}, weights={}) == replace(made, statistics={}, weights={})
    assert (calibration.n_sequences, calibration.length, calibration.n_held_out) == (N_WINDOWS, LENGTH, 1)
    assert calibration.statistics.keys() == {key for key in read if key not in ("lm_head", "embed_out")}
    for key in calibration.statistics:
        check(key, calibration, *read[key], model.get_submodule(key))
    n_used = (N_WINDOWS - 1) * LENGTH
    for entry in calibration.inputs:
        moments = read_moments(tmp_path / "cal", entry)
        assert moments is not None
        for key in entry.modules:
            x = read[key][0].double()
            assert entry.n_tokens == n_used and entry.in_features == x.shape[1]
            expected = (x[:n_used].t() @ x[:n_used]).float()
            torch.testing.assert_close(moments.second_moment, expected, rtol=1e-4, atol=1e-6 * float(expected.max()))
            assert_close(moments.held_out, x[n_used:])
    started, *steps = events
    assert isinstance(started, MeasurementStarted) and started.streamed and started.n_steps == len(steps) == 3
    assert all(isinstance(step, MeasurementStep) for step in steps)


def test_layers_that_read_the_same_tensor_share_its_moments(tmp_path: Path, text: Path, tokenizer: Any) -> None:
    source = save(FAMILIES["llama"], tmp_path / "source", tokenizer)
    made = calibrate(source, tmp_path / "cal", Text(text, length=LENGTH), with_moments=True)
    groups = [tuple(name.rpartition(".")[2] for name in entry.modules) for entry in made.inputs]
    assert groups == 3 * [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    assert [entry.moments for entry in made.inputs] == [f"{i:04}.safetensors" for i in range(12)]


def test_moments_of_wide_inputs_are_left_out(
    tmp_path: Path, text: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("int8convert.calibration.moments.MAX_WIDTH", 100)
    source = save(FAMILIES["llama"], tmp_path / "source", tokenizer)
    made = calibrate(source, tmp_path / "cal", Text(text, length=LENGTH), with_moments=True)
    assert {entry.in_features for entry in made.inputs if entry.moments is None} == {160}
    assert len(list((tmp_path / "cal" / "moments").iterdir())) == 9


def test_windows_run_together_as_they_run_alone(
    tmp_path: Path, text: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(FAMILIES["llama"], tmp_path / "source", tokenizer)
    cut = Text(text, n_sequences=N_WINDOWS, length=LENGTH)
    together = calibrate(source, tmp_path / "a", cut)
    monkeypatch.setattr(run, "_TOKENS_AT_A_TIME", 1)
    monkeypatch.setattr(layered_memory, "available_bytes", lambda device: 10_000)  # hidden states in files
    alone = calibrate(source, tmp_path / "b", cut)
    for name, seen in together.statistics.items():
        for leaf, value in seen.sums.items():
            if leaf != "step_squares":  # outlier columns are those of windows that run together
                assert_close(alone.statistics[name].sums[leaf], value)


def test_int8_checkpoint_shows_what_it_reads_itself(tmp_path: Path, text: Path, tokenizer: Any) -> None:
    source = save(FAMILIES["llama"], tmp_path / "source", tokenizer)
    out = convert(source, tmp_path / "out")
    cut = Text(text, n_sequences=N_WINDOWS, length=LENGTH)
    made, of_source = calibrate(out, tmp_path / "a", cut), calibrate(source, tmp_path / "b", cut)
    assert made.statistics.keys() == of_source.statistics.keys()
    for name, seen in made.statistics.items():
        assert float(seen.sum_squares.sum()) == pytest.approx(
            float(of_source.statistics[name].sum_squares.sum()), rel=0.1
        )
        torch.testing.assert_close(made.weights[name].columns, of_source.weights[name].columns, rtol=0.05, atol=0.01)


def test_model_that_has_no_decoder_layers_runs_in_memory(tmp_path: Path, text: Path, tokenizer: Any) -> None:
    source = save(MODELS["t5"], tmp_path / "source", tokenizer)
    model = transformers.T5ForConditionalGeneration.from_pretrained(source)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(source)
    events: list[Event] = []
    cut = Text(text, n_sequences=N_WINDOWS, length=LENGTH)
    made = calibrate(source, tmp_path / "cal", cut, on_event=events.append)
    assert isinstance(events[0], MeasurementStarted) and not events[0].streamed
    assert {"encoder.block.0", "decoder.block.1"} <= {".".join(name.split(".")[:3]) for name in made.statistics}
    with pytest.raises(
        SourceError, match="second moments need a run layer by layer: T5ForConditionalGeneration does not predict"
    ):
        calibrate(source, tmp_path / "cal", cut, with_moments=True)


def test_layers_that_hand_on_more_than_a_hidden_state_run_in_memory(
    tmp_path: Path, text: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that was begun layer by layer leaves nothing in the sums."""
    source = save(FAMILIES["llama"], tmp_path / "source", tokenizer)
    cut = Text(text, n_sequences=N_WINDOWS, length=LENGTH)
    expected = calibrate(source, tmp_path / "a", cut)
    runner = run.LayerRunner

    class Refusing(runner):  # type: ignore[misc, valid-type]
        def run(self, layer: int, *inputs: Any) -> torch.Tensor:
            return super().run(layer, *inputs) if layer == 0 else self._refuse("hands on more")

    monkeypatch.setattr(run, "LayerRunner", Refusing)
    found = calibrate(source, tmp_path / "b", cut)
    assert found.statistics.keys() == expected.statistics.keys()
    for name, seen in expected.statistics.items():
        assert found.statistics[name].n_tokens == seen.n_tokens
        assert_close(found.statistics[name].sum_squares, seen.sum_squares)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("xlm", "changes the hidden state before its layer 1"),
        ("hrm_text", "does not run each of its layers once, one after the other"),
        ("zaya", "hands on more than a hidden state to its layer 1"),
        ("gemma4_text", "hands on more than a hidden state from its layer 0 to others"),
        ("openai-gpt", "has no hidden state after its layer 0"),
        ("cpmant", "cannot be run: RuntimeError: Tensor on device cpu is not on the expected device meta"),
    ],
)
def test_model_whose_layers_are_no_chain_runs_in_memory(model_type: str, reason: str, tmp_path: Path) -> None:
    family = next(f for f in families() if (f.task, f.model_type) == ("causal", model_type))
    build_family(family).save_pretrained(tmp_path)
    ids = torch.randint(3, 100, (3, 12), generator=torch.Generator().manual_seed(1))
    windows = TokenWindows(ids, "random", "", 36)

    def prepare(model: Any) -> run.Task:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        return run.Task(layers, windows)

    options = run.RunOptions(6.0, "cpu")
    with pytest.raises(LayerwiseError) as error:
        run._read_by_layers(tmp_path, prepare, options)
    assert reason in error.value.message
    readings = run.read_inputs(tmp_path, prepare, options)
    assert not readings.streamed and any(seen.n_tokens >= 36 for seen in readings.statistics.values())
