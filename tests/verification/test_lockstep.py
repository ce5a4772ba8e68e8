"""Layer by layer: what comes out is what comes out in memory, for every family, and each layer is read once."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import int8convert
from int8convert.errors import CorruptFileError, DiskFullError, SourceError
from int8convert.events import Event, MeasurementStarted, MeasurementStep
from int8convert.runtime.layered import hidden_states, layer_runner
from int8convert.runtime.layered import memory as layered_memory
from int8convert.runtime.layered.layered_model import LayeredModel
from int8convert.runtime.text.windows import Convention, TokenWindows
from int8convert.verification.fidelity import lockstep
from int8convert.verification.fidelity.level import FidelityReport, measure_fidelity
from int8convert.verification.options import Execution
from tests.tools.fp8_checkpoints import save_fp8
from tests.tools.outlier_models import convert
from tests.tools.tiny_models import MODELS, read_tensors, save_as_pickles

pytestmark = [
    pytest.mark.usefixtures("map_in_process"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

SIZES = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED = {**SIZES, "intermediate_size": 128, "num_key_value_heads": 2}

FAMILIES: dict[str, Callable[[], Any]] = {
    **{name: MODELS[name] for name in ("opt", "llama", "qwen3", "gpt_neox", "bloom", "phi3", "gpt2")},
    "gemma3 with both kinds of attention": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **GROUPED,
            head_dim=16,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
    "falcon": lambda: transformers.FalconForCausalLM(transformers.FalconConfig(**SIZES)),
    "falcon with alibi": lambda: transformers.FalconForCausalLM(
        transformers.FalconConfig(**SIZES, alibi=True, new_decoder_architecture=True, num_kv_heads=2)
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**GROUPED, num_local_experts=4)),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **GROUPED, head_dim=16, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2
        )
    ),
    "gptj": lambda: transformers.GPTJForCausalLM(
        transformers.GPTJConfig(vocab_size=128, n_embd=64, n_layer=3, n_head=4, rotary_dim=8)
    ),
    "cohere with scaled logits": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**GROUPED)),
}


def save_source(build: Callable[[], Any], directory: Path, dtype: torch.dtype = torch.float16) -> Path:
    """A checkpoint whose layers do something: their weights are larger than a fresh model's."""
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "embed" not in name and "wte" not in name:
                parameter.mul_(6)
    model.to(dtype).save_pretrained(directory, max_shard_size="200KB")
    return directory


@pytest.fixture
def windows() -> TokenWindows:
    ids = torch.randint(3, 128, (3, 24), generator=torch.Generator().manual_seed(1))
    return TokenWindows(ids, "random", "", 72)


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, Path]:
    source = save_source(FAMILIES["llama"], tmp_path / "source")
    return source, convert(source, tmp_path / "int8")


def values(report: FidelityReport) -> dict[str, Any]:
    """Everything that does not depend on how it was measured."""
    return asdict(replace(report, streamed=False, peak_memory_bytes=0, seconds=0.0))


def assert_same(streamed: FidelityReport, in_memory: FidelityReport) -> None:
    assert (streamed.streamed, in_memory.streamed) == (True, False)
    found, expected = values(streamed), values(in_memory)
    assert [name for name, _ in found["layer_errors"]] == [name for name, _ in expected["layer_errors"]]
    for report in (found, expected):
        report["layer_errors"] = [error for _, error in report["layer_errors"]]
    for name, value in expected.items():
        is_number = not isinstance(value, str | bool | None)
        assert found[name] == (pytest.approx(value, rel=1e-5, abs=1e-9) if is_number else value), name


@pytest.mark.parametrize("name", FAMILIES)
def test_streamed_is_in_memory_and_that_is_transformers_own(name: str, tmp_path: Path, windows: TokenWindows) -> None:
    source = save_source(FAMILIES[name], tmp_path / "source")
    # The loader of the other layout replaces neither experts nor Falcon's own kind of Linear.
    layout = "compressed-tensors" if name.startswith(("falcon", "mixtral", "qwen3_moe")) else "bitsandbytes"
    out = convert(source, tmp_path / "int8", format=layout)
    (in_memory,) = measure_fidelity(source, out, windows, Execution(stream=False))
    (streamed,) = measure_fidelity(source, out, windows, Execution(stream=True))
    assert_same(streamed, in_memory)
    assert len(streamed.layer_errors) in (2, 3)
    assert all(error > 0 for _, error in streamed.layer_errors)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    int8 = int8convert.load(out)
    with torch.no_grad():
        p, q = (
            torch.cat([m(ids[None]).logits[:, :-1] for ids in windows.ids]).double().log_softmax(-1)
            for m in (model, int8)
        )
    came = windows.ids[:, 1:, None]
    assert streamed.reference_perplexity == pytest.approx(float((-p.gather(2, came)).mean().exp()), rel=1e-5)
    assert streamed.perplexity == pytest.approx(float((-q.gather(2, came)).mean().exp()), rel=1e-5)
    assert streamed.mean_kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4, abs=1e-9)
    assert streamed.mean_kl > 1e-8


def test_all_arithmetics_go_through_each_layer_together(
    llama: tuple[Path, Path], windows: TokenWindows, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [f"model.layers.{i}.{name}" for i in range(2) for name in ("mlp.down_proj", "self_attn.q_proj")]
    int8convert.store_outliers(*llama, dict.fromkeys(layers, (3, 5, 9)), {})
    execution = Execution("cpu", True, ("none", "dynamic", "static+guard", "weight-only"), (0.5, 2))
    seen = watch(monkeypatch)
    streamed = measure_fidelity(*llama, windows, execution)
    assert [model.n_loads for model in seen.models] == [3, 3]  # two layers and the head, of each model
    assert [runner.n_forwards for runner in seen.runners] == [
        2 * 3 + 1,
        2 * 3 * 6 + 6,
    ]  # and a warm-up of each arithmetic
    for found, expected in zip(
        streamed, measure_fidelity(*llama, windows, replace(execution, stream=False)), strict=True
    ):
        assert_same(found, expected)
    assert len({report.mean_kl for report in streamed}) == 6


class Seen:
    """What was made while a measurement ran."""

    def __init__(self) -> None:
        self.models: list[LayeredModel] = []
        self.runners: list[layer_runner.LayerRunner] = []


def watch(monkeypatch: pytest.MonkeyPatch) -> Seen:
    seen = Seen()

    class WatchedModel(LayeredModel):
        def __init__(self, *inputs: Any) -> None:
            super().__init__(*inputs)
            seen.models.append(self)

    class WatchedRunner(layer_runner.LayerRunner):
        def __init__(self, *inputs: Any) -> None:
            super().__init__(*inputs)
            seen.runners.append(self)

    monkeypatch.setattr(lockstep, "LayeredModel", WatchedModel)
    monkeypatch.setattr(lockstep, "LayerRunner", WatchedRunner)
    return seen


@pytest.mark.parametrize(("n_layers", "n_windows"), [(2, 2), (2, 6), (6, 2), (6, 6)])
def test_work_grows_with_windows_times_layers_and_reading_with_layers(
    n_layers: int, n_windows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformers.LlamaConfig(**{**GROUPED, "num_hidden_layers": n_layers})
    source = save_source(lambda: transformers.LlamaForCausalLM(config), tmp_path / "source")
    out = convert(source, tmp_path / "int8")
    ids = torch.randint(3, 128, (n_windows, 10), generator=torch.Generator().manual_seed(1))
    seen = watch(monkeypatch)
    events: list[Event] = []
    measure_fidelity(source, out, TokenWindows(ids, "random", "", 100), Execution(stream=True), on_event=events.append)
    assert [runner.n_forwards for runner in seen.runners] == [n_layers * n_windows + 1] * 2  # and a warm-up
    assert [model.n_loads for model in seen.models] == [n_layers + 1] * 2
    started, *steps = events
    assert isinstance(started, MeasurementStarted) and started.streamed and started.n_steps == n_layers + 1
    names = [*(f"model.layers.{i}" for i in range(n_layers)), "head"]
    assert [replace(step, remaining_s=0.0) for step in steps if isinstance(step, MeasurementStep)] == [
        MeasurementStep(name, i + 1, n_layers + 1, 0.0) for i, name in enumerate(names)
    ]


def test_one_layer_is_in_memory_at_a_time(
    llama: tuple[Path, Path], windows: TokenWindows, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch(monkeypatch)
    held: set[tuple[str, ...]] = set()
    run = layer_runner.LayerRunner.run

    def watched_run(runner: Any, layer: int, *inputs: Any) -> torch.Tensor:
        names = [
            f"{i}: {name}"
            for i, model in enumerate(seen.models)
            for name in model.parts
            if any(not p.is_meta for p in model.model.get_submodule(name).parameters())
        ]
        held.add(tuple(names))
        return run(runner, layer, *inputs)

    monkeypatch.setattr(layer_runner.LayerRunner, "run", watched_run)
    measure_fidelity(*llama, windows, Execution(stream=True))
    assert held == {(f"{i}: model.layers.{layer}",) for i in range(2) for layer in range(2)}


@pytest.mark.parametrize("before", [None, "0"])
def test_tensors_of_a_layer_are_loaded_one_after_the_other(
    before: str | None, llama: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What threads load at once, and what their heaps keep of it, is memory by chance."""
    source, _ = llama
    monkeypatch.delenv("HF_DEACTIVATE_ASYNC_LOAD", raising=False)
    if before is not None:
        monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", before)
    layered = LayeredModel(source, lambda: transformers.LlamaForCausalLM.from_pretrained(source))
    with monkeypatch.context() as patch:
        patch.setattr("transformers.core_model_loading.ThreadPoolExecutor", None)
        with layered.holding("model.layers.1"):
            held = layered.model.model.layers[1].mlp.up_proj.weight.clone()
    assert torch.equal(held, read_tensors(source)["model.layers.1.mlp.up_proj.weight"])
    assert os.environ.get("HF_DEACTIVATE_ASYNC_LOAD") == before


def test_hidden_states_that_do_not_fit_lie_in_files(
    llama: tuple[Path, Path], windows: TokenWindows, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (expected,) = measure_fidelity(*llama, windows, Execution(stream=True))
    folder = tmp_path / "states"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setattr(layered_memory, "available_bytes", lambda device: 10_000)
    n_files = []
    allocate = hidden_states.HiddenStates._allocate

    def counted(states: Any, state: torch.Tensor) -> torch.Tensor:
        kept = allocate(states, state)
        n_files.append(len(list(folder.rglob("tmp*"))))
        return kept

    monkeypatch.setattr(hidden_states.HiddenStates, "_allocate", counted)
    (found,) = measure_fidelity(*llama, windows, Execution(stream=True))
    assert values(found) == values(expected)
    assert max(n_files) == 2 * 3
    assert list(folder.iterdir()) == []


def test_full_disk_of_hidden_states_is_said(
    llama: tuple[Path, Path], windows: TokenWindows, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    monkeypatch.setattr(layered_memory, "available_bytes", lambda device: 10_000)
    with pytest.raises(DiskFullError, match=r"has no room for hidden states of 6,144 bytes a window"):
        measure_fidelity(*llama, windows, Execution(stream=True))


@pytest.mark.parametrize(("share", "is_streamed"), [(0.85, False), (0.95, True)])
def test_what_does_not_fit_is_streamed_unasked(
    llama: tuple[Path, Path], windows: TokenWindows, monkeypatch: pytest.MonkeyPatch, share: float, is_streamed: bool
) -> None:
    events: list[Event] = []
    monkeypatch.setattr("int8convert.verification.fidelity.in_memory.resident_bytes", lambda: 0)
    measure_fidelity(*llama, windows, Execution(stream=False), on_event=events.append)
    started = events[0]
    assert isinstance(started, MeasurementStarted)
    monkeypatch.setattr(
        "int8convert.verification.fidelity.level.available_bytes", lambda device: started.peak_memory_bytes / share
    )
    (report,) = measure_fidelity(*llama, windows)
    assert report.streamed == is_streamed


def test_scored_tokens_are_those_of_the_convention(
    llama: tuple[Path, Path], windows: TokenWindows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_runner, "LOGITS_AT_A_TIME", 5 * 128)  # five positions at a time
    windows = replace(windows, cut=Convention.STRIDED, first_scored=(1, 12, 12))
    (streamed,) = measure_fidelity(*llama, windows, Execution(stream=True))
    (in_memory,) = measure_fidelity(*llama, windows, Execution(stream=False))
    assert streamed.n_tokens == 23 + 12 + 12
    assert streamed.n_sequences == 3
    assert_same(streamed, in_memory)


def test_pickled_shards_are_streamed_like_safetensors(
    llama: tuple[Path, Path], windows: TokenWindows, tmp_path: Path
) -> None:
    pickled = save_as_pickles(llama[0], tmp_path / "pickled", 3)
    (found,) = measure_fidelity(pickled, llama[1], windows, Execution(stream=True))
    (expected,) = measure_fidelity(*llama, windows, Execution(stream=True))
    assert values(found) == values(expected)


def test_fp8_source_is_what_its_codes_stand_for(tmp_path: Path, windows: TokenWindows) -> None:
    plain = save_source(FAMILIES["llama"], tmp_path / "plain", torch.bfloat16)
    weights = save_fp8(plain, tmp_path / "fp8", "block")
    out = convert(tmp_path / "fp8", tmp_path / "int8")
    (streamed,) = measure_fidelity(tmp_path / "fp8", out, windows, Execution(stream=True))
    (in_memory,) = measure_fidelity(tmp_path / "fp8", out, windows, Execution(stream=False))
    assert_same(streamed, in_memory)
    model = transformers.LlamaForCausalLM.from_pretrained(plain, dtype=torch.float32)
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    with torch.no_grad():
        log_probs = model(windows.ids).logits[:, :-1].double().log_softmax(-1)
    nll = -log_probs.gather(2, windows.ids[:, 1:, None]).mean()
    assert streamed.reference_perplexity == pytest.approx(float(nll.exp()), rel=1e-5)


def test_fp8_that_transformers_does_not_decode_is_refused(tmp_path: Path, windows: TokenWindows) -> None:
    plain = save_source(FAMILIES["llama"], tmp_path / "plain", torch.bfloat16)
    save_fp8(plain, tmp_path / "fp8", "row")
    out = convert(tmp_path / "fp8", tmp_path / "int8")
    for stream in (False, True):
        with pytest.raises(SourceError, match="fp8' is in an FP8 form that transformers loads and cannot run"):
            measure_fidelity(tmp_path / "fp8", out, windows, Execution(stream=stream))


@pytest.fixture
def broken(llama: tuple[Path, Path]) -> Iterator[Callable[[str, Any], None]]:
    """Change or drop a tensor of the int8 checkpoint."""

    def change(name: str, make: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
        path = next(path for path in llama[1].glob("*.safetensors") if name in load_file(path))
        tensors = load_file(path)
        changed = make(tensors.pop(name))
        save_file(tensors if changed is None else {**tensors, name: changed}, path, {"format": "pt"})

    yield change


NAME = "model.layers.1.mlp.up_proj.weight"


def test_missing_weight_of_a_layer_is_named(
    llama: tuple[Path, Path], windows: TokenWindows, broken: Callable[..., None]
) -> None:
    broken(NAME, lambda tensor: None)
    with pytest.raises(CorruptFileError, match=f"int8' has no '{NAME}'"):
        measure_fidelity(*llama, windows, Execution(stream=True))


def test_weight_of_a_wrong_shape_is_named(
    llama: tuple[Path, Path], windows: TokenWindows, broken: Callable[..., None]
) -> None:
    broken(NAME, lambda tensor: tensor[:-1].contiguous())
    with pytest.raises(CorruptFileError, match=rf"holds '{NAME}' in the shape \[127, 64\], expected \[128, 64\]"):
        measure_fidelity(*llama, windows, Execution(stream=True))


def test_layers_that_share_weights_are_refused(tmp_path: Path, windows: TokenWindows) -> None:
    class Shared(transformers.LlamaForCausalLM):
        _tied_weights_keys: ClassVar = {"model.layers.1.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight"}

    source = save_source(lambda: Shared(transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True)), tmp_path / "s")
    layered = LayeredModel(source, lambda: Shared.from_pretrained(source))
    with (
        pytest.raises(SourceError, match=f"'{NAME}' of .* is a weight of another layer, too"),
        layered.holding("model.layers.1"),
    ):
        pass


def test_layers_that_hand_on_more_than_a_hidden_state_are_refused(tmp_path: Path, windows: TokenWindows) -> None:
    config = transformers.Gemma4TextConfig(
        **GROUPED,
        head_dim=16,
        global_head_dim=16,
        num_kv_shared_layers=1,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=128,
        layer_types=["full_attention"] * 3,
    )
    source = save_source(lambda: transformers.Gemma4ForCausalLM(config), tmp_path / "source")
    out = convert(source, tmp_path / "int8")
    (report,) = measure_fidelity(source, out, windows, Execution(stream=False))
    assert math.isfinite(report.mean_kl)
    with pytest.raises(SourceError, match="Gemma4ForCausalLM hands on more than a hidden state from its layer"):
        measure_fidelity(source, out, windows, Execution(stream=True))
