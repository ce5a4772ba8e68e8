"""PEFT's adapters on int8 models: the same as on the weights the codes stand for, trainable, and never merged."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

import int8convert
from int8convert.errors import AdapterError
from int8convert.runtime.linear import Int8Linear
from tests.runtime.float_twin import exact_products, float_twin, int8_names
from tests.tools.tiny_models import build_model, save_checkpoint

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks

TOKENS = torch.arange(3, 43).reshape(2, 20)
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A float checkpoint beside its int8 one, `llama` and `int8`."""
    source = save_checkpoint("llama", tmp_path / "llama", torch.float32)
    int8convert.quantize_(transformers.LlamaForCausalLM.from_pretrained(source)).save_pretrained(tmp_path / "int8")
    return source


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=TOKENS).logits
    return result


def randomize(model: Any) -> Any:
    """Values for adapters, which begin as nothing."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def with_adapter(model: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return randomize(peft.get_peft_model(model, config).eval())


def lora(**options: Any) -> Any:
    return peft.LoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM", **options)


def codes(model: nn.Module) -> list[torch.Tensor]:
    return [module.weight.clone() for module in model.modules() if isinstance(module, Int8Linear)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(*pair) for pair in zip(a, b, strict=True))


@contextmanager
def straight_through() -> Iterator[None]:
    """Int8 layers whose gradient is, by autograd's own account, that of the product with the dequantized weight."""
    forward = Int8Linear.forward

    def through(self: Int8Linear, x: torch.Tensor) -> torch.Tensor:
        float_y = functional.linear(x, self.dequantize(x.dtype), self.bias)
        return float_y + (forward(self, x.detach()) - float_y).detach()

    Int8Linear.forward = through  # type: ignore[method-assign]
    try:
        yield
    finally:
        Int8Linear.forward = forward  # type: ignore[method-assign]


# Loading.


def test_adapter_of_the_float_model_loads_on_the_int8_one(llama: Path, tmp_path: Path) -> None:
    base = transformers.LlamaForCausalLM.from_pretrained(llama)
    plain = logits(base)
    trained = with_adapter(base, lora())
    trained.save_pretrained(tmp_path / "adapter")
    expected = logits(trained)
    model = peft.PeftModel.from_pretrained(int8convert.load(tmp_path / "int8"), tmp_path / "adapter")
    effect, error = (expected - plain).square().mean().sqrt(), (logits(model) - expected).square().mean().sqrt()
    assert error < 0.02 * expected.square().mean().sqrt() and error < 0.05 * effect


def test_adapter_of_the_int8_model_loads_on_the_float_one(llama: Path, tmp_path: Path) -> None:
    model = with_adapter(int8convert.load(tmp_path / "int8"), lora())
    model.save_pretrained(tmp_path / "adapter")
    base = transformers.LlamaForCausalLM.from_pretrained(llama)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert (logits(loaded) - logits(model)).square().mean().sqrt() < 0.02 * logits(model).square().mean().sqrt()


@pytest.mark.parametrize(
    "config",
    [
        lora(),
        lora(use_dora=True),
        lora(use_rslora=True, init_lora_weights="gaussian"),
        peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
        peft.LoHaConfig(target_modules=TARGETS),
        peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8),
    ],
    ids=["lora", "dora", "rslora", "ia3", "loha", "oft"],
)
def test_adapter_is_what_it_is_on_the_weights_the_codes_stand_for(config: Any) -> None:
    base = build_model("llama", torch.float32)
    int8_model = int8convert.quantize_(copy.deepcopy(base))
    expected = logits(with_adapter(float_twin(base, int8_model), copy.deepcopy(config)))
    model = with_adapter(int8_model, config)
    with exact_products():
        assert (logits(model) - expected).abs().max() < 1e-5


def test_adapter_of_a_conv1d_loads_on_its_int8_form(tmp_path: Path) -> None:
    """Conv1D stores its weight the other way round, which an adapter's config says and an int8 layer does not do."""
    base = build_model("gpt2", torch.float32)
    int8_model = int8convert.quantize_(copy.deepcopy(base))
    config = peft.LoraConfig(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    trained = with_adapter(float_twin(base, int8_model), config)
    trained.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to True")
        model = peft.PeftModel.from_pretrained(int8_model, tmp_path)
    with exact_products():
        assert (logits(model) - logits(trained)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_adapter_in_float32_on_a_model_in_16_bits(dtype: torch.dtype) -> None:
    base = build_model("llama", dtype)
    model = with_adapter(int8convert.quantize_(copy.deepcopy(base)), lora())
    expected = logits(with_adapter(base, lora())).float()
    y = logits(model)
    assert y.dtype == dtype and (y.float() - expected).square().mean().sqrt() < 0.03 * expected.square().mean().sqrt()


# Training.


def loss_of(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=TOKENS, labels=TOKENS).loss
    return result


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["none", "dynamic"])
def test_gradients_are_those_of_the_dequantized_weight(mode: str) -> None:
    model = with_adapter(
        int8convert.quantize_(build_model("llama", torch.float32), outliers=mode, threshold=2.0), lora()
    )
    found = gradients(model)
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in found) and len(found) == 12
    with straight_through():
        expected = gradients(model)
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() < 1e-5 * gradient.abs().max(), name
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("mode", ["none", "dynamic"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_steps_lower_the_loss_and_leave_the_codes(mode: str, use_dora: bool) -> None:
    model = int8convert.quantize_(build_model("llama", torch.float32), outliers=mode)
    before = codes(model)
    scales = [p.clone() for name, p in model.named_parameters() if name.endswith("SCB")]
    model = with_adapter(model, lora(use_dora=use_dora)).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1 and losses == sorted(losses, reverse=True)
    assert same(codes(model), before)
    assert same([p for name, p in model.named_parameters() if name.endswith("SCB")], scales)


def test_gradient_checkpointing_changes_no_gradient(llama: Path, tmp_path: Path) -> None:
    model = peft.prepare_model_for_kbit_training(int8convert.load(tmp_path / "int8"))
    model = with_adapter(model, lora()).train()
    expected = gradients(model)
    n_forwards = 0

    def count(*_: Any) -> None:
        nonlocal n_forwards
        n_forwards += 1

    model.base_model.model.model.layers[0].mlp.down_proj.base_layer.register_forward_hook(count)
    model.activation_checkpointing_enable()
    found = gradients(model)
    assert n_forwards == 2, "the layer was not run again for the backward"
    assert len(found) == len(expected) == 12
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_preparing_for_kbit_training_leaves_codes_and_scales(tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "source", torch.bfloat16)
    int8convert.quantize_(transformers.LlamaForCausalLM.from_pretrained(source)).save_pretrained(tmp_path / "int8")
    model = int8convert.load(tmp_path / "int8")
    before, plain = codes(model), logits(model)
    peft.prepare_model_for_kbit_training(model)
    assert same(codes(model), before) and not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.int8, torch.float32}
    assert (logits(model) - plain).square().mean().sqrt() < 0.02 * plain.float().square().mean().sqrt()


def train(model: Any, directory: Path) -> Any:
    arguments = transformers.TrainingArguments(
        directory, max_steps=4, learning_rate=0.05, report_to=[], save_strategy="no", use_cpu=True,
        logging_steps=1, disable_tqdm=True, per_device_train_batch_size=2, dataloader_pin_memory=False,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in TOKENS] * 4
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_trainer_of_transformers_trains_an_adapter(llama: Path, tmp_path: Path) -> None:
    model = with_adapter(int8convert.load(tmp_path / "int8"), lora())
    before = codes(model)
    losses = train(model, tmp_path / "run")
    assert losses[-1] < losses[0] - 0.05 and same(codes(model), before)


def test_trainer_refuses_an_int8_model_without_an_adapter(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="purely quantized models"):
        train(int8convert.load(tmp_path / "int8"), tmp_path / "run")


# What would be wrong without a word.

MERGES: dict[str, Callable[[Any], Any]] = {
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "merge_and_unload, safe": lambda model: model.merge_and_unload(safe_merge=True),
    "merge_adapter": lambda model: model.merge_adapter(),
    "merge_adapter, safe": lambda model: model.merge_adapter(safe_merge=True),
}


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES.keys())
@pytest.mark.parametrize(
    "config",
    [
        lora(),
        lora(use_dora=True),
        peft.IA3Config(target_modules=TARGETS, feedforward_modules=[]),
        peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8),
        peft.MissConfig(target_modules=TARGETS, r=8),
    ],
    ids=["lora", "dora", "ia3", "oft", "miss"],
)
def test_merging_is_refused_and_changes_nothing(config: Any, merge: Callable[[Any], Any]) -> None:
    model = with_adapter(int8convert.quantize_(build_model("llama", torch.float32)), copy.deepcopy(config))
    before, expected = codes(model), logits(model)
    with pytest.raises(AdapterError, match="cannot be merged into an int8 weight") as caught:
        merge(model)
    assert "--lora ADAPTER" in caught.value.hint
    assert same(codes(model), before) and torch.equal(logits(model), expected)


def test_copy_of_a_model_refuses_too_and_unloading_gives_the_base_back() -> None:
    base = int8convert.quantize_(build_model("llama", torch.float32))
    expected, names = logits(base), int8_names(base)
    model = copy.deepcopy(with_adapter(base, lora()))
    with pytest.raises(AdapterError):
        model.merge_and_unload(safe_merge=True)
    unloaded = model.unload()
    assert int8_names(unloaded) == names and torch.equal(logits(unloaded), expected)


def test_adapter_around_another_refuses_too() -> None:
    model = int8convert.quantize_(build_model("llama", torch.float32))
    mixed = peft.get_peft_model(model, lora(), "first", mixed=True)
    mixed.add_adapter("second", peft.LoHaConfig(target_modules=TARGETS))
    mixed.set_adapter(["first", "second"])
    randomize(mixed)
    with pytest.raises(AdapterError, match="cannot be merged"):
        mixed.merge_and_unload(safe_merge=True)


def test_adapter_of_float_layers_merges_as_ever() -> None:
    """On a float model, and on the output head of an int8 one."""
    base = build_model("llama", torch.float32)
    for model, targets in ((base, TARGETS), (int8convert.quantize_(copy.deepcopy(base)), ["lm_head"])):
        adapted = with_adapter(model, peft.LoraConfig(target_modules=targets))
        expected = logits(adapted)
        assert (logits(adapted.merge_and_unload(safe_merge=True)) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (peft.HRAConfig(target_modules=TARGETS), "hra"),
        (peft.HiraConfig(target_modules=TARGETS), "hira"),
        (peft.PeanutConfig(target_modules=TARGETS), "peanut"),
        (peft.UniLoraConfig(target_modules=TARGETS), "unilora"),
        (lora(kasa_config=peft.KasaConfig()), "KaSA"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_adapter_that_computes_with_the_weight_is_refused(config: Any, name: str) -> None:
    model = int8convert.quantize_(build_model("llama", torch.float32))
    before = codes(model)
    with pytest.raises(AdapterError, match=f"PEFT's {name} computes with the weight"):
        peft.get_peft_model(model, config)
    assert same(codes(model), before)
