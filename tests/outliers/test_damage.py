"""The estimated damage of rounding against the divergence that the same rounding causes when it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

import int8convert
from int8convert.errors import SourceError
from int8convert.formats.layers import is_conv1d_layer
from int8convert.outliers.damage import LayerDamage, estimate_damage
from int8convert.outliers.folded_model import fold_model
from int8convert.outliers.keep import choose_kept
from int8convert.planning.fold import Fold
from int8convert.planning.folding.folding import Folding
from int8convert.runtime.in_memory import modules_to_replace
from int8convert.runtime.models import load_model
from int8convert.runtime.text.texts import Text
from tests.tools.language_models import build_tokenizer, language_model
from tests.tools.outlier_models import outlier_model, save


def tokens(n: int = 6, length: int = 48) -> torch.Tensor:
    return torch.randint(5, 200, (n, length), generator=torch.Generator().manual_seed(3))


def model_of(family: str) -> Any:
    """A model whose predictions are sharp enough to be spoilt."""
    tokenizer = build_tokenizer()
    if family == "opt":
        return outlier_model(tokenizer, shifted={}, scaled={})
    model = language_model(family, tokenizer).eval()
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter.data, std=0.2)
    return model


def layers_of(model: Any) -> dict[str, nn.Module]:
    return {name: model.get_submodule(name) for name in modules_to_replace(model)}


def rounded(values: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    step = absmax / 127
    return torch.where(step > 0, (values / step).round() * step, values)


def by_token(x: torch.Tensor) -> torch.Tensor:
    return rounded(x, x.abs().amax(-1, keepdim=True))


def by_rule(x: torch.Tensor) -> torch.Tensor:
    found = x.abs().flatten(0, -2).amax(0) >= 6
    return torch.where(found, x, by_token(x.masked_fill(found, 0)))


def by_blocks(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([by_token(block) for block in x.split(128, dim=-1)], dim=-1)


@contextmanager
def rounding(
    layers: dict[str, Any], weights: bool | torch.dtype, inputs: Callable[[torch.Tensor], torch.Tensor] | None
) -> Iterator[None]:
    kept = {name: layer.weight.data for name, layer in layers.items()}
    hooks = []
    for layer in layers.values():
        if weights:
            rows = layer.weight.data.t() if is_conv1d_layer(layer) else layer.weight.data
            by_row = rounded(rows, rows.abs().amax(1, keepdim=True)) if weights is True else rows.to(weights).float()
            layer.weight.data = by_row.t() if is_conv1d_layer(layer) else by_row
        if inputs is not None:
            hooks.append(layer.register_forward_pre_hook(lambda _, x: (inputs(x[0]),)))
    yield
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        layer.weight.data = kept[name]


@torch.no_grad()
def divergence(model: Any, layers: dict[str, Any], ids: torch.Tensor, **what: Any) -> float:
    exact = torch.cat([model(row[None]).logits[0].double().log_softmax(-1) for row in ids])
    with rounding(layers, **what):
        found = torch.cat([model(row[None]).logits[0].double().log_softmax(-1) for row in ids])
    return float((exact.exp() * (exact - found)).sum(-1).mean())


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2"])
def test_estimate_is_what_rounding_causes(family: str) -> None:
    model, ids = model_of(family), tokens()
    layers = layers_of(model)
    damage = estimate_damage(model, layers, ids, dtype=torch.bfloat16)

    for part, what in {
        "source_rounding": {"weights": torch.bfloat16, "inputs": None},
        "weights": {"weights": True, "inputs": None},
        "inputs_by_token": {"weights": False, "inputs": by_token},
        "inputs_by_rule": {"weights": False, "inputs": by_rule},
        "inputs_by_blocks": {"weights": False, "inputs": by_blocks},
    }.items():
        measured = divergence(model, layers, ids, **what)
        assert measured / 1.6 < sum(getattr(layer, part) for layer in damage) < 1.6 * measured, part


def test_layer_that_matters_more_is_ranked_higher_than_by_its_own_error() -> None:
    """The layers are alike, but what the second one adds to the hidden state is scaled down to nothing."""
    model, ids = model_of("opt"), tokens()
    for layer in model.model.decoder.layers:
        layer.fc2.bias.data.zero_()
    model.model.decoder.layers[1].fc2.weight.data *= 1e-3
    layers = {name: layer for name, layer in layers_of(model).items() if name.endswith("fc1")}
    first, second = estimate_damage(model, layers, ids)
    measured = [divergence(model, {name: layer}, ids, weights=True, inputs=None) for name, layer in layers.items()]
    assert second.weights < first.weights / 1e4 and measured[1] < measured[0] / 1e4


def test_blocks_cost_less_than_one_scale_a_token_where_a_row_has_several() -> None:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=300, hidden_size=96, ffn_dim=384, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=96
    )
    model = OPTForCausalLM(config).eval()
    damage = {
        layer.module_name.rpartition(".")[2]: layer for layer in estimate_damage(model, layers_of(model), tokens())
    }
    assert damage["fc1"].inputs_by_blocks == pytest.approx(damage["fc1"].inputs_by_token, rel=1e-5)
    assert 0 < damage["fc2"].inputs_by_blocks < 0.8 * damage["fc2"].inputs_by_token


def test_model_is_left_as_it_was() -> None:
    model, ids = model_of("llama"), tokens(2)
    parameters = dict(model.named_parameters())
    parameters["lm_head.weight"].requires_grad_(False)
    before = {name: (p.requires_grad, p.clone()) for name, p in parameters.items()}
    first = estimate_damage(model, layers_of(model), ids)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None and parameter.requires_grad == before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert not any(module._forward_hooks for module in model.modules())
    assert first == estimate_damage(model, layers_of(model), ids), "the same tokens and seed give the same"


def test_layers_that_read_the_same_tensor_are_a_group() -> None:
    model = model_of("llama")
    damage = {layer.module_name: layer.group for layer in estimate_damage(model, layers_of(model), tokens(2))}
    for i in range(model.config.num_hidden_layers):
        attention, mlp = (f"model.layers.{i}.{part}" for part in ("self_attn", "mlp"))
        q, k, v, o = (damage[f"{attention}.{name}_proj"] for name in "qkvo")
        gate, up, down = (damage[f"{mlp}.{name}_proj"] for name in ("gate", "up", "down"))
        assert q == k == v and gate == up and len({q, o, gate, down}) == 4


class Experts(nn.Module):
    """Two experts with a Linear each, of which a window takes one; the other gets no token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.n_calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        taken, other = self.n_calls % 2, 1 - self.n_calls % 2
        self.n_calls += 1
        nothing = self.experts[other](x[..., :0, :]).sum()
        return self.experts[taken](x) + nothing


def test_experts_without_tokens_and_layers_that_never_run_have_no_part_in_it() -> None:
    model = model_of("opt")
    model.model.decoder.layers[1].fc1 = nn.Sequential(Experts(64), model.model.decoder.layers[1].fc1)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and "fc1" in name}
    damage = estimate_damage(model, layers, tokens(4))
    names = [layer.module_name.partition("layers.1.fc1.")[2] for layer in damage]
    assert [name for name in names if name] == ["0.experts.0", "0.experts.1", "1"]
    assert all(layer.weights > 0 for layer in damage)
    assert len({layer.group for layer in damage}) == len(damage), "experts of different windows read different tensors"


def test_embeddings_may_be_changed_in_place() -> None:
    model, ids = model_of("llama"), tokens(2)
    expected = estimate_damage(model, layers_of(model), ids)
    model.model.layers[0].register_forward_pre_hook(lambda _module, inputs: (inputs[0].mul_(1.0), *inputs[1:]))
    assert estimate_damage(model, layers_of(model), ids) == expected


def test_threshold_is_that_of_the_rule() -> None:
    model, ids = outlier_model(build_tokenizer()), tokens(2)
    at_6, never = (estimate_damage(model, layers_of(model), ids, threshold) for threshold in (6.0, 1e9))
    assert [layer.inputs_by_rule for layer in never] == pytest.approx([layer.inputs_by_token for layer in never])
    assert sum(layer.inputs_by_rule for layer in at_6) < sum(layer.inputs_by_rule for layer in never) / 3


def test_predictions_that_are_not_finite_and_models_without_gradient_are_errors() -> None:
    model = model_of("opt")
    broken = layers_of(model)
    model.model.decoder.layers[0].fc1.weight.data[0, 0] = float("nan")
    with pytest.raises(SourceError, match="predicts values that are not finite") as caught:
        estimate_damage(model, broken, tokens(1))
    assert caught.value.hint == "leave out --damage"
    model = model_of("opt")
    model.model.decoder.layers[1].fc1.register_forward_hook(
        lambda _module, _inputs, y: y.detach().requires_grad_().mul_(1)
    )
    with pytest.raises(SourceError, match="damage of rounding OPTForCausalLM cannot be measured: RuntimeError"):
        estimate_damage(model, layers_of(model), tokens(1))
    assert all(parameter.requires_grad for parameter in model.parameters())


def entry(name: str, n_weights: int, group: int, cost: float) -> LayerDamage:
    return LayerDamage(name, n_weights, group, cost / 2, 0.0, cost / 2, 0.0)


def test_kept_are_the_groups_of_most_damage_for_their_weights() -> None:
    damage = [
        entry("q", 100, 0, 9.0),
        entry("k", 100, 0, 0.0),
        entry("o", 100, 1, 4.0),
        entry("down", 600, 2, 30.0),
        entry("up", 100, 3, 1.0),
    ]
    kept = {
        budget: {e.module_name for e in choose_kept(damage, budget, "inputs_by_rule")} for budget in (0, 100, 300, 1000)
    }
    assert kept[0] == set() and kept[100] == {"o"} and kept[300] == {"q", "k", "o"} and len(kept[1000]) == 5


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tokenizer = build_tokenizer()
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog and then some " * 200)
    return save(outlier_model(tokenizer), tmp_path / "source", tokenizer)


def test_int8_checkpoint_has_no_weights_from_before(source: Path, tmp_path: Path, map_in_process: None) -> None:
    int8convert.quantize(source, tmp_path / "out", on_event=lambda event: None)
    with pytest.raises(SourceError, match="out' is int8") as caught:
        int8convert.find_outliers(tmp_path / "out", Text(tmp_path / "text.txt", length=32), with_damage=True)
    assert caught.value.hint == "give the source"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_columns_add_up_to_the_damage_of_their_layer(family: str) -> None:
    model = model_of(family)
    for layer in estimate_damage(model, layers_of(model), tokens(2)):
        assert (
            layer.columns is not None
            and len(layer.columns) == model.get_submodule(layer.module_name).weight.shape[0 if family == "gpt2" else 1]
        )
        assert float(layer.columns.sum()) == pytest.approx(layer.weights + layer.inputs_by_rule, rel=1e-4)


def test_column_costs_what_storing_it_takes_away() -> None:
    """Against the divergence with the errors of these columns alone; other columns keep theirs out of it."""
    model, ids = model_of("llama"), tokens(8)
    layers = {name: layer for name, layer in layers_of(model).items() if name.endswith("1.mlp.down_proj")}
    ((name, layer),) = layers.items()
    (found,) = estimate_damage(model, layers, ids)
    assert found.columns is not None
    half = found.columns.topk(len(found.columns) // 4).indices
    weight = layer.weight.data.clone()
    exact = torch.cat([model(row[None]).logits[0].double().log_softmax(-1) for row in ids]).detach()
    step = weight.abs().amax(1, keepdim=True) / 127
    layer.weight.data = weight.clone()
    layer.weight.data[:, half] = ((weight / step).round() * step)[:, half]

    def round_some(_module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        x = inputs[0].clone()
        x[..., half] = by_rule(inputs[0])[..., half]
        return (x,)

    hook = layer.register_forward_pre_hook(round_some)
    with torch.no_grad():
        rounded_some = torch.cat([model(row[None]).logits[0].double().log_softmax(-1) for row in ids])
    hook.remove()
    measured = float((exact.exp() * (exact - rounded_some)).sum(-1).mean())
    assert measured / 1.6 < float(found.columns[half].sum()) < 1.6 * measured, name


def test_columns_are_bought_where_they_matter_and_not_where_the_layer_says_so(tmp_path: Path) -> None:
    """Two layers alike, but what the second adds to the hidden state is scaled down to nothing."""
    tokenizer = build_tokenizer()
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog and then some " * 200)
    model = outlier_model(tokenizer, {}, {})
    for layer in model.model.decoder.layers:
        layer.fc2.bias.data.zero_()
    model.model.decoder.layers[1].fc2.weight.data *= 1e-3
    source = save(model, tmp_path / "source", tokenizer, torch.float32)
    text = Text(tmp_path / "text.txt", n_sequences=2, length=32)
    n_columns = {}
    for with_damage in (False, True):
        report = int8convert.find_outliers(source, text, with_damage=with_damage, budget=0.05, device="cpu")
        assert report.static_set_bytes <= 0.05 * report.int8_bytes
        assert report.calibration()["by_damage"] is with_damage
        n_columns[with_damage] = [
            sum(len(report.static_set.get(f"model.decoder.layers.{i}.{name}", ())) for name in ("fc1", "fc2"))
            for i in (0, 1)
        ]
    assert n_columns[False][1] >= n_columns[False][0] / 2 > 0 and n_columns[True][1] == 0 < n_columns[True][0]


def test_layers_whose_shared_input_a_loader_rotates_stay_a_group(tmp_path: Path, map_in_process: None) -> None:
    tokenizer = build_tokenizer()
    source = save(language_model("llama", tokenizer), tmp_path / "source", tokenizer, torch.float32)
    plan = int8convert.plan(source)
    names = [f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "qkv"]
    folds = {f"{name}.weight": (Fold(input_block=64), False) for name in names}
    model, ids = load_model(source, "cpu"), tokens(1)
    with torch.no_grad():
        before = model(ids).logits
        fold_model(model, replace(plan, folding=Folding(folds, None, ())))
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-3, atol=1e-4)
    groups = {layer.module_name: layer.group for layer in estimate_damage(model, layers_of(model), ids)}
    first, second = ({groups[name] for name in part} for part in (names[:3], names[3:]))
    assert len(first) == len(second) == 1 and first != second
