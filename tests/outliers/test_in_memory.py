"""`choose_outliers`: the columns it finds, what it leaves alone, and what `quantize_` and int8 layers make of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import int8convert
from tests.tools.language_models import language_model
from tests.tools.tiny_models import build_model

TOKENS = torch.arange(3, 43).reshape(2, 20)


class TwoLayers(nn.Module):
    """A model of two layers that takes token ids, with outliers in columns 3 and 40 of the second layer's input."""

    def __init__(self, conv1d: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 48)
        self.drop = nn.Dropout(0.5)
        self.first = Conv1D(64, 48) if conv1d else nn.Linear(48, 64)
        self.second = nn.Linear(64, 32)
        nn.init.uniform_(self.first.weight, -0.1, 0.1)
        self.first.bias.data[3], self.first.bias.data[40] = 300.0, -250.0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(input=self.drop(self.first(self.embed(ids))))
        return result


IDS = torch.arange(40)


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
def test_calibrated_columns_are_stored_exact(conv1d: bool) -> None:
    model = TwoLayers(conv1d).train()
    before = copy.deepcopy(model)
    outliers = int8convert.choose_outliers(model, [IDS])
    assert model.training and hooks_of(model) == 0
    assert outliers["second"].columns.tolist() == [3, 40] and outliers["first"].columns.tolist() == []
    int8convert.quantize_(model, outliers=outliers)
    layer: Any = model.second
    assert layer.mode == "static+guard"
    assert torch.equal(layer.outlier_weight, before.second.weight[:, [3, 40]])
    # Against the same layer with the columns out of its codes: what is left is the error of the other columns.
    x = before.eval()(IDS[None])
    plain = int8convert.quantize_(copy.deepcopy(before))
    assert (model.eval()(IDS[None]) - x).abs().max() < 0.1 * (plain(IDS[None]) - x).abs().max()


def test_calibrated_columns_of_a_conv1d_are_its_input_features() -> None:
    model = nn.Sequential(nn.Embedding(50, 48), Conv1D(64, 48))
    model[0].weight.data[:, 5] = 100
    outliers = int8convert.choose_outliers(model, [IDS])
    weight = model[1].weight.detach().clone()
    int8convert.quantize_(model, outliers=outliers)
    assert model[1].outlier_columns.tolist() == [5] and torch.equal(model[1].outlier_weight, weight[5:6].t())


def test_threshold_itself_and_nan_count_as_outliers() -> None:
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))
    model[0].weight.data = torch.tensor([[5.99, 0, 0, 0], [0, -6.0, 0, 0], [0, 0, float("nan"), 0], [0, 0, 0, 1.0]])
    assert int8convert.choose_outliers(model, [torch.arange(4)])["1"].columns.tolist() == [1, 2]
    assert int8convert.choose_outliers(model, [torch.arange(4)], threshold=5.0)["1"].columns.tolist() == [0, 1, 2]
    # NaN in the first token does not hide what a later one shows.
    assert int8convert.choose_outliers(model, [torch.tensor([2, 1, 0])])["1"].columns.tolist() == [1, 2]


def test_calibration_takes_what_any_text_shows() -> None:
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))
    model[0].weight.data = torch.diag(torch.tensor([7.0, 7.0, 7.0, 7.0]))
    texts = [torch.tensor([0]), torch.tensor([], dtype=torch.long), torch.tensor([[2], [2]])]
    assert int8convert.choose_outliers(model, texts)["1"].columns.tolist() == [0, 2]


def test_calibration_runs_without_dropout_and_leaves_the_modules_as_they_were() -> None:
    """Dropout doubles what it leaves: 4 would become 8."""
    model = nn.Sequential(nn.Embedding(4, 4), nn.Dropout(0.5), nn.Linear(4, 4)).train()
    model[0].weight.data.fill_(4.0)
    model[2].eval()
    assert int8convert.choose_outliers(model, [torch.zeros(64, dtype=torch.long)])["2"].columns.tolist() == []
    assert [module.training for module in model] == [True, True, False]


class Routed(nn.Module):
    """Even tokens go to the first expert, odd ones to the second."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.experts = nn.Embedding(4, 4), nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, ids: torch.Tensor) -> list[torch.Tensor]:
        return [expert(self.embed(ids[ids % 2 == i])) for i, expert in enumerate(self.experts)]


def test_expert_that_no_token_goes_to_has_no_outliers() -> None:
    model = Routed()
    model.embed.weight.data[:, 1] = 9.0
    found = int8convert.choose_outliers(model, [torch.tensor([0, 2])])
    assert [found[f"experts.{i}"].columns.tolist() for i in (0, 1)] == [[1], []]


def test_hooks_are_removed_when_the_model_fails() -> None:
    model = TwoLayers()
    with pytest.raises(IndexError):
        int8convert.choose_outliers(model, [torch.tensor([99])])
    assert hooks_of(model) == 0


def test_calibration_with_no_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="no text"):
        int8convert.choose_outliers(TwoLayers(), [])


def test_calibration_with_strings_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="tokenizer"):
        int8convert.choose_outliers(build_model("opt"), ["text"])


def test_strings_are_cut_to_what_the_model_takes(tokenizer: Any) -> None:
    """64 positions; 512 would be past its table."""
    model = language_model("opt", tokenizer)
    found = int8convert.choose_outliers(model, ["the cat sat on the mat " * 50, ""], tokenizer=tokenizer)
    assert found.keys() >= {"model.decoder.layers.0.fc1", "lm_head"}


def test_one_string_is_one_text(tokenizer: Any) -> None:
    model, seen = TwoLayers(), []
    model.embed = nn.Embedding.from_pretrained(torch.randn(len(tokenizer), 48))
    model.embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].tolist()))
    int8convert.choose_outliers(model, "the cat sat", tokenizer=tokenizer)
    assert seen == [[tokenizer("the cat sat")["input_ids"]]]


def test_encoder_decoder_is_calibrated_on_both_sides() -> None:
    model = build_model("t5", torch.float32)
    model.shared.weight.data[:, 5] = 1000
    found = int8convert.choose_outliers(model, [TOKENS])
    for side in ("encoder", "decoder"):
        assert len(found[f"{side}.block.1.layer.0.SelfAttention.o"].columns) < 64
        assert f"{side}.block.0.layer.0.SelfAttention.q" in found


def test_int8_model_that_is_calibrated_keeps_the_columns_it_has() -> None:
    """Those stored before quantization are exact, and no calibration brings them back."""
    model = TwoLayers()
    weight = model.second.weight.detach().clone()
    int8convert.quantize_(model)
    layer: Any = model.second
    layer.set_outliers(torch.tensor([3, 7]), weight[:, [3, 7]])
    found = int8convert.choose_outliers(model, [IDS])["second"]
    assert found.columns.tolist() == layer.outlier_columns.tolist() == [3, 7, 40] and layer.mode == "static+guard"
    assert torch.equal(layer.outlier_weight[:, :2], weight[:, [3, 7]])
    step = layer.SCB / 127
    assert torch.equal(layer.outlier_weight[:, 2], layer.weight[:, 40] * step)
