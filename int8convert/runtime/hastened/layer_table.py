"""The decoder layers that the kernels know, and the table that describes one to them; see `kernels.decoder.table`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from cuda_kernels import ops
from cuda_kernels.cpu.decoder_layer import DecoderLayer, float_field
from cuda_kernels.cpu.kernels.decoder import table
from int8convert.runtime.hastened.float_linear import FloatLinear
from int8convert.runtime.linear import Int8Linear, max_found_columns


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the parts of a class of layers are.

    Attributes:
        norms: of the input, queries, keys and MLP; None for none.
        linears: products of queries, keys, values, attention's output, gate, up and down; None for none.
        norm: kind of the norms.
        activation: name of the config's entry, the value that is known, and its kind.
        is_rotated: whether positions rotate queries and keys.
        scales_queries: whether queries are scaled, and rounded, before the scores.
    """

    norms: tuple[str | None, ...]
    linears: tuple[str | None, ...]
    norm: int
    activation: tuple[str, str, int]
    is_rotated: bool
    scales_queries: bool


_GATED = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
_LLAMA = Layout(
    ("input_layernorm", None, None, "post_attention_layernorm"),
    _GATED,
    table.RMS_NORM,
    ("hidden_act", "silu", table.SILU),
    is_rotated=True,
    scales_queries=False,
)
_QWEN3 = replace(_LLAMA, norms=("input_layernorm", "self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm"))
_OPT = Layout(
    ("self_attn_layer_norm", None, None, "final_layer_norm"),
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", None, "fc2"),
    table.LAYER_NORM,
    ("activation_function", "relu", table.RELU),
    is_rotated=False,
    scales_queries=True,
)
LAYERS = {
    "LlamaDecoderLayer": _LLAMA,
    "MistralDecoderLayer": _LLAMA,
    "Qwen2DecoderLayer": _LLAMA,
    "Qwen3DecoderLayer": _QWEN3,
    "OPTDecoderLayer": _OPT,
}
"""Classes of transformers' models whose code the kernels know."""


class Kept:
    """The tensors whose addresses a table holds, and those that some of them are copies of."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.sources: list[torch.Tensor] = []


def describe(
    module: nn.Module, layout: Layout, parts: Sequence[nn.Module], dtype: torch.dtype, kept: Kept
) -> DecoderLayer | None:
    """Return the kernels of a layer; None if it holds something that they do not know."""
    attention: Any = module.self_attn
    entry, value, activation = layout.activation
    if getattr(attention.config, entry, None) != value or not getattr(module, "do_layer_norm_before", True):
        return None
    norms: list[Any] = [None if name is None else module.get_submodule(name) for name in layout.norms]
    linears: list[Any] = [None if name is None else module.get_submodule(name) for name in layout.linears]
    if any(part._parameters and part not in norms and part not in linears for part in parts):
        return None
    norm_fields = [_norm_fields(norm, dtype, kept) for norm in norms]
    linear_fields = [_linear_fields(linear, dtype, kept) for linear in linears]
    if any(value is None for fields in (*norm_fields, *linear_fields) for value in fields):
        return None
    head_size = attention.head_dim
    query, key = linears[table.QUERY], linears[table.KEY]
    sizes = [query.out_features // head_size, key.out_features // head_size, head_size]
    scalars = [*sizes, query.in_features, linears[table.GATE].out_features, layout.norm, activation]
    scales = (attention.scaling, 1.0) if layout.scales_queries else (1.0, attention.scaling)
    return DecoderLayer([*scalars, *map(float_field, scales)], norm_fields, linear_fields, kept.tensors)  # type: ignore[arg-type]


def _address(tensor: torch.Tensor | None, dtype: torch.dtype, kept: Kept) -> int | None:
    """Return where a tensor is, and keep it; 0 for no tensor, None if it has another dtype or is not contiguous."""
    if tensor is None:
        return 0
    if tensor.dtype != dtype or not tensor.is_contiguous() or not ops.is_plain(tensor):
        return None
    kept.tensors.append(tensor)
    return tensor.data_ptr()


def _norm_fields(norm: Any, dtype: torch.dtype, kept: Kept) -> list[int | None]:
    if norm is None:
        return [0] * table.N_NORM_FIELDS
    weight, bias = (_address(getattr(norm, name, None), dtype, kept) for name in ("weight", "bias"))
    eps = norm.eps if isinstance(norm, nn.LayerNorm) else norm.variance_epsilon
    return [weight, bias, float_field(eps)]


def _linear_fields(linear: Any, dtype: torch.dtype, kept: Kept) -> list[int | None]:
    """Return the fields of a product, one of them None if its layer is not known."""
    if linear is None:
        return [0] * table.N_LINEAR_FIELDS
    bias = _address(linear.bias, dtype, kept)
    if type(linear) is FloatLinear:
        weight = _address(linear.weight, dtype, kept)
        return [table.FLOAT, linear.out_features, linear.in_features, weight, 0, 0, bias, 0, 0, 0, 0, 0]
    if type(linear) is Int8Linear and linear.input_block == 1:
        return _int8_fields(linear, bias, dtype, kept)
    return [None]


def _int8_fields(linear: Int8Linear, bias: int | None, dtype: torch.dtype, kept: Kept) -> list[int | None]:
    kept.sources += [getattr(linear, linear.scale_name), linear.outlier_weight, linear.outlier_columns]
    columns, side_weight = linear.outlier_columns, linear.outlier_weight
    if not linear.mode.uses_stored:
        columns, side_weight = columns[:0], side_weight[:, :0]
    elif side_weight.dtype != dtype:
        side_weight = side_weight.to(dtype)
    finds = linear.mode.finds and linear.threshold > 0
    operands = ((linear.weight, torch.int8), (linear.weight_absmax.contiguous(), torch.float32))
    weight, absmax = (_address(tensor, kind, kept) for tensor, kind in operands)
    side = _address(side_weight.contiguous(), dtype, kept)
    stored = _address(columns.contiguous(), torch.int32, kept)
    rule = (max_found_columns(linear.in_features) if finds else 0, linear.mode.block_size or linear.in_features)
    place = (linear.out_features, linear.in_features, weight, absmax, side, bias, stored, columns.numel())
    return [table.INT8, *place, *rule, float_field(linear.threshold)]
