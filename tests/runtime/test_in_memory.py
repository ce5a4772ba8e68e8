"""`quantize_`: which modules of a model in memory become int8, with which bytes, and what the model computes then."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

import int8convert
from int8convert.errors import CoverageError, FormatError, NonFiniteWeightError, PatternError
from int8convert.runtime.linear import Int8Linear
from int8convert.runtime.stored_columns import StoredOutliers
from tests.runtime.float_twin import int8_names
from tests.tools.tiny_models import build_model, read_tensors, save_checkpoint

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
TOKENS = torch.arange(3, 43).reshape(2, 20)


def two_layers(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 16, bias=False)).to(dtype)


def logits(model: Any) -> torch.Tensor:
    decoder = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=TOKENS, **decoder).logits
    return result


def loaded_model(name: str, directory: Path) -> Any:
    """As users have it: in 16 bits, with what transformers keeps in 32."""
    return type(build_model(name)).from_pretrained(save_checkpoint(name, directory))


def same_bytes(layer: Any, weight: torch.Tensor) -> bool:
    """Whether a layer holds what the formula makes of a weight, said here once more, in torch's own words."""
    absmax = weight.float().abs().amax(1)
    codes = (weight.float() * (127.0 / absmax)[:, None]).round().to(torch.int8)
    return torch.equal(layer.weight, codes) and torch.equal(layer.SCB, absmax)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_layers_become_their_codes_and_compute_in_the_dtype_of_their_input(dtype: torch.dtype) -> None:
    model = two_layers(dtype)
    before = copy.deepcopy(model)
    assert int8convert.quantize_(model) is model
    assert int8_names(model) == ["0", "2"]
    for i in (0, 2):
        assert same_bytes(model[i], before[i].weight)
    assert torch.equal(model[0].bias, before[0].bias) and model[2].bias is None
    x = torch.randn(5, 32, dtype=dtype)
    y, expected = model(x), before(x)
    assert y.dtype == dtype
    # 1/254 of the largest value for each factor of each of two layers, and errors that are not all of one sign.
    assert (y - expected).abs().max() < 0.02 * expected.abs().max()
    assert not torch.equal(y, expected)


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "t5"])
def test_codes_are_those_the_converter_writes(name: str, tmp_path: Path, map_in_process: None) -> None:
    model = loaded_model(name, tmp_path / "source")
    int8convert.quantize(tmp_path / "source", tmp_path / "int8", on_event=lambda event: None)
    written = read_tensors(tmp_path / "int8")
    held = int8convert.quantize_(model).state_dict()
    codes = {key for key, tensor in written.items() if tensor.dtype == torch.int8}
    assert codes == {key for key, tensor in held.items() if tensor.dtype == torch.int8} != set()
    for key in codes:
        assert torch.equal(held[key], written[key]), key
        scale = key.replace(".weight", ".SCB")
        assert torch.equal(held[scale], written[scale]), scale
    assert torch.equal(logits(model), logits(int8convert.load(tmp_path / "int8")))


def test_codes_of_fp16_weights_are_those_of_bitsandbytes() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = two_layers(torch.float16)
    weights = [model[i].weight.detach().clone() for i in (0, 2)]
    int8convert.quantize_(model)
    for i, weight in zip((0, 2), weights, strict=True):
        codes, absmax, _ = bitsandbytes.functional.int8_vectorwise_quant(weight)
        assert torch.equal(model[i].weight, codes) and torch.equal(model[i].SCB, absmax)


def test_conv1d_of_gpt2_is_transposed() -> None:
    torch.manual_seed(0)
    conv = Conv1D(48, 32)
    nn.init.normal_(conv.bias)
    model = nn.Sequential(copy.deepcopy(conv))
    int8convert.quantize_(model)
    assert same_bytes(model[0], conv.weight.t()) and torch.equal(model[0].bias, conv.bias)
    x = torch.randn(5, 32)
    assert (model(x) - conv(x)).abs().max() < 0.01 * conv(x).abs().max()


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Named(nn.Linear):
    """As Falcon's: a name of its own, and nothing else."""


def test_subclass_with_another_forward_is_left_alone() -> None:
    model = nn.Sequential(Doubled(32, 32), Named(32, 32))
    int8convert.quantize_(model)
    assert int8_names(model) == ["1"]
    assert type(model[0]) is Doubled


def test_weights_that_modules_share_are_left_alone() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(64, 32), "fc": nn.Linear(32, 32), "head": nn.Linear(32, 64)})
    model["head"].weight = model["embed"].weight
    int8convert.quantize_(model)
    assert int8_names(model) == ["fc"] and model["head"].weight is model["embed"].weight


def test_layer_that_stands_in_two_places_is_one_int8_layer_in_both() -> None:
    body = two_layers()
    model = nn.ModuleDict({"body": body, "alias": body, "again": nn.Sequential(body[0], nn.Linear(48, 16))})
    first = body[0]
    int8convert.quantize_(model)
    assert isinstance(body[0], Int8Linear) and model["again"][0] is body[0] and model["alias"][2] is body[2]
    assert not any(module is first for module in model.modules())


def test_what_transformers_keeps_is_kept() -> None:
    opt = int8convert.quantize_(build_model("opt"))
    assert len(int8_names(opt)) == 12 and not isinstance(opt.lm_head, Int8Linear)
    untied = build_model("llama")
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    assert not isinstance(int8convert.quantize_(untied).lm_head, Int8Linear)


@pytest.mark.parametrize("skip", [(), ("layer.0.*",)])
def test_modules_wanted_in_fp32_are_kept_whatever_else_is_skipped(skip: tuple[str, ...]) -> None:
    t5 = int8convert.quantize_(build_model("t5"), skip=skip)
    assert int8_names(t5) and not any(name.endswith(".wo") for name in int8_names(t5))
    assert any("layer.0." in name for name in int8_names(t5)) == (not skip)
    assert logits(t5).isfinite().all()


def test_skip_takes_full_names_dotted_tails_and_wildcards() -> None:
    for skip, n_int8 in ((["model.layers.0.mlp.up_proj"], 13), (["up_proj"], 12), (["layers.1.*", "k_proj"], 6)):
        assert len(int8_names(int8convert.quantize_(build_model("llama"), skip=skip))) == n_int8


def test_skip_that_matches_nothing_is_an_error_and_changes_nothing() -> None:
    model = two_layers()
    with pytest.raises(PatternError, match="'fc9' matches no module"):
        int8convert.quantize_(model, skip=["0", "fc9"])
    assert int8_names(model) == []


def test_skip_of_what_is_kept_anyway_is_no_error() -> None:
    assert len(int8_names(int8convert.quantize_(build_model("llama"), skip=["lm_head"]))) == 14


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weight_that_is_not_finite_is_an_error_and_changes_nothing(value: float) -> None:
    model = two_layers()
    model[2].weight.data[1, 2:4] = value
    with pytest.raises(NonFiniteWeightError, match=r"'2\.weight' holds 2 values") as caught:
        int8convert.quantize_(model)
    assert caught.value.module_name == "2" and int8_names(model) == []
    int8convert.quantize_(model, skip=[caught.value.module_name])
    assert int8_names(model) == ["0"]


def test_layer_alone_is_an_error_that_says_what_to_do() -> None:
    layer = nn.Linear(32, 16)
    with pytest.raises(ValueError, match=r"Int8Linear\.from_float"):
        int8convert.quantize_(layer)
    assert same_bytes(Int8Linear.from_float(layer.weight, layer.bias), layer.weight)


def test_model_without_any_linear_layer_is_an_error() -> None:
    with pytest.raises(CoverageError, match="Sequential has no layer"):
        int8convert.quantize_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))


def test_weights_in_other_dtypes_stay() -> None:
    model = nn.Sequential(nn.Linear(32, 32, dtype=torch.float64), nn.Linear(32, 32))
    assert int8_names(int8convert.quantize_(model)) == ["1"]


def test_second_time_changes_nothing() -> None:
    model = int8convert.quantize_(two_layers(), outliers="none")
    layer, codes = model[0], model[0].weight.clone()
    int8convert.quantize_(model, outliers="dynamic")
    assert model[0] is layer and torch.equal(layer.weight, codes) and layer.mode == "none"


def test_training_flag_is_kept_module_by_module() -> None:
    model = two_layers().train()
    model[2].eval()
    int8convert.quantize_(model)
    assert (model[0].training, model[2].training) == (True, False)


def test_only_the_replaced_weights_are_frozen() -> None:
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32))
    int8convert.quantize_(model)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == ["0.weight", "0.bias"]


def test_state_dict_and_copies_compute_the_same() -> None:
    model = int8convert.quantize_(two_layers())
    other = int8convert.quantize_(two_layers().apply(lambda m: m.reset_parameters() if hasattr(m, "bias") else None))
    x = torch.randn(5, 32)
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x)) and torch.equal(copy.deepcopy(model)(x), model(x))


@pytest.mark.parametrize("mode", ["none", "dynamic"])
def test_mode_decides_what_becomes_of_an_outlier_column(mode: str) -> None:
    """One column a thousand times as large as the others: in int8 it takes all the steps, and they become 0."""
    model = int8convert.quantize_(two_layers()[:1], outliers=mode)
    x = torch.randn(5, 32)
    x[:, 7] = 1000
    weight = model[0].dequantize()
    from_column = x[:, 7:8] * weight[:, 7] + model[0].bias
    others = functional.linear(x.index_fill(1, torch.tensor(7), 0), weight)
    expected = from_column if mode == "none" else from_column + others
    assert (model(x) - expected).abs().max() < 0.02 * others.abs().max()


def test_threshold_decides_which_columns_are_outliers() -> None:
    x = torch.randn(5, 32).clamp(-2, 2)
    x[:, 7] = 5
    low, high = (int8convert.quantize_(two_layers()[:1], threshold=threshold) for threshold in (4.0, 6.0))
    exact = functional.linear(x, low[0].dequantize(), low[0].bias)
    assert (low(x) - exact).abs().max() < 0.6 * (high(x) - exact).abs().max()


@pytest.mark.parametrize(
    "outliers",
    [
        {"3": StoredOutliers(torch.tensor([1]), torch.ones(16, 1))},
        {"2": StoredOutliers(torch.tensor([48]), torch.ones(16, 1))},
        {"2": StoredOutliers(torch.tensor([1]), torch.ones(15, 1))},
        {"2": StoredOutliers(torch.tensor([1, 2]), torch.ones(16, 1))},
        {"1": StoredOutliers(torch.tensor([1]), torch.ones(16, 1))},
    ],
    ids=["no such module", "no such column", "other rows", "other columns", "no weight"],
)
def test_outliers_of_another_model_are_an_error_and_change_nothing(outliers: dict[str, StoredOutliers]) -> None:
    model = two_layers()
    with pytest.raises(ValueError, match="fit no layer"):
        int8convert.quantize_(model, outliers=outliers)
    assert int8_names(model) == []


def test_model_saved_by_transformers_still_loads_its_own_way(tmp_path: Path) -> None:
    """quantize_ changes the model in memory, and nothing of the class or the library."""
    source = save_checkpoint("opt", tmp_path / "source")
    model = transformers.OPTForCausalLM.from_pretrained(source)
    expected = logits(model)
    int8convert.quantize_(model)
    assert not torch.equal(logits(model), expected)
    assert torch.equal(logits(transformers.OPTForCausalLM.from_pretrained(source)), expected)


@pytest.mark.parametrize("build", [lambda: build_model("opt", torch.bfloat16), lambda: build_model("gpt2")])
def test_logits_stay_near_those_before(build: Callable[[], Any]) -> None:
    model = build()
    expected = logits(model).float()
    int8convert.quantize_(model)
    error = (logits(model).float() - expected).square().mean().sqrt()
    assert 0 < error < 0.02 * expected.square().mean().sqrt()


# Saving.


@pytest.mark.parametrize("name", ["opt", "gpt2", "t5", "gemma3"])
def test_quantized_model_saves_an_int8_checkpoint(name: str, tmp_path: Path) -> None:
    model = int8convert.quantize_(loaded_model(name, tmp_path / "source"), threshold=5.0)
    expected = logits(model)
    model.save_pretrained(tmp_path / "int8")
    loaded = int8convert.load(tmp_path / "int8")
    assert int8_names(loaded) == int8_names(model) and loaded.config.quantization_config.outlier_threshold == 5.0
    assert torch.equal(logits(loaded), expected)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_checkpoint_it_saves_loads_with_bitsandbytes(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = int8convert.quantize_(build_model("llama"), skip=["layers.0.*"])
    model.save_pretrained(tmp_path)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    int8 = {name for name, module in theirs.named_modules() if type(module).__name__ == "Linear8bitLt"}
    assert int8 == set(int8_names(model)) and len(int8) == 7
    error = (logits(theirs) - logits(model)).abs().max()
    assert error < 0.01 * logits(model).abs().max()


def test_stored_columns_are_saved_and_loaded(tmp_path: Path) -> None:
    model = loaded_model("llama", tmp_path / "source")
    outliers = int8convert.choose_outliers(model, [TOKENS], threshold=2.0)
    assert sum(len(found.columns) for found in outliers.values()) > 10
    int8convert.quantize_(model, outliers=outliers)
    model.save_pretrained(tmp_path / "int8")
    loaded = int8convert.load(tmp_path / "int8")
    assert torch.equal(logits(loaded), logits(model))
    for name in int8_names(model):
        layer: Any = loaded.get_submodule(name)
        assert torch.equal(layer.outlier_weight, outliers[name].weight) and layer.mode == "static+guard"


def with_subclass(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.__class__ = Named


def with_name_inside_another(model: Any) -> None:
    model.up_proj, model.also = nn.Linear(8, 8), nn.Linear(8, 8)
    model.also.weight = model.up_proj.weight


@pytest.mark.parametrize("change", [with_subclass, with_name_inside_another])
def test_model_that_no_loader_would_read_refuses_to_be_saved(change: Callable[[Any], None], tmp_path: Path) -> None:
    """bitsandbytes replaces no subclasses, and takes the name of a module left out for the tail of others."""
    model = build_model("llama")
    change(model)
    int8convert.quantize_(model)
    with pytest.raises(FormatError, match=r"'model\.layers\.0\.mlp\.up_proj'"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
