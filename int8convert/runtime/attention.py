"""nn.MultiheadAttention with int8 projections, whose weight for queries, keys and values is not a Linear layer's.

torch's encoders have a fast path that multiplies by the weights of their layers without calling them. `leave_fast_path`
disables it in encoders that hold an int8 layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from int8convert.runtime.linear import Int8Linear
from int8convert.runtime.modes import OutlierMode


class Int8MultiheadAttention(nn.Module):
    """Replaces an nn.MultiheadAttention whose queries, keys and values have one size.

    Attributes:
        q_proj, k_proj, v_proj, out_proj: [embed_dim, embed_dim] each.
    """

    # What torch's encoder layers look at before anything else.
    in_proj_bias = None
    _qkv_same_embed_dim = True

    def __init__(self, attention: nn.MultiheadAttention, projections: list[Int8Linear], out_proj: Int8Linear) -> None:
        super().__init__()
        self.embed_dim = attention.embed_dim
        self.num_heads = attention.num_heads
        self.batch_first = attention.batch_first
        self.dropout = attention.dropout
        self.q_proj, self.k_proj, self.v_proj = projections
        self.out_proj = out_proj

    @staticmethod
    def can_replace(module: Any) -> bool:
        """Return whether keys and values have the queries' size, and no learned or zero token is appended."""
        return (
            isinstance(module, nn.MultiheadAttention)
            and type(module).forward is nn.MultiheadAttention.forward
            and module._qkv_same_embed_dim
            and module.bias_k is None
            and not module.add_zero_attn
        )

    @classmethod
    def from_float(
        cls, attention: nn.MultiheadAttention, mode: OutlierMode, threshold: float
    ) -> Int8MultiheadAttention:
        """Quantize the projections of an attention."""
        assert attention.in_proj_weight is not None
        weights = attention.in_proj_weight.chunk(3)
        biases = [None] * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        out = attention.out_proj
        *projections, out_proj = (
            Int8Linear.from_float(weight, bias, mode=mode, threshold=threshold)
            for weight, bias in zip((*weights, out.weight), (*biases, out.bias), strict=True)
        )
        return cls(attention, projections, out_proj).train(attention.training)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Do what nn.MultiheadAttention does: [batch, tokens, embed_dim] if `batch_first`, else [tokens, batch, ...].

        `is_causal` is a hint that `attn_mask` is the causal one. It changes nothing.

        Raises:
            ValueError: the hint comes without that mask.
            TypeError: a mask is of another dtype than bool and the floats.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint on attn_mask, which is missing: pass the causal mask itself")
        if query.dim() == 2:
            batch_axis = 0 if self.batch_first else 1
            padding = None if key_padding_mask is None else key_padding_mask[None]
            inputs = (t.unsqueeze(batch_axis) for t in (query, key, value))
            y, weights = self(*inputs, padding, need_weights, attn_mask, average_attn_weights, is_causal)
            return y.squeeze(batch_axis), None if weights is None else weights[0]
        if not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = self._heads(self.q_proj(query)), self._heads(self.k_proj(key)), self._heads(self.v_proj(value))
        mask = self._mask(q, k, key_padding_mask, attn_mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
            weights = functional.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = functional.scaled_dot_product_attention(q, k, v, mask, dropout)
        y = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return y if self.batch_first else y.transpose(0, 1), weights

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """Return [batch, heads, tokens, head_dim] of [batch, tokens, embed_dim]."""
        return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)

    def _mask(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        key_padding_mask: torch.Tensor | None,
        attn_mask: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Return both masks as one summand of the scores, [batch, heads or 1, queries, keys]."""
        mask = None
        if attn_mask is not None:
            shape = (q.shape[0], self.num_heads, q.shape[2], k.shape[2]) if attn_mask.dim() == 3 else attn_mask.shape
            mask = _to_add(attn_mask, q.dtype).reshape(shape)
        if key_padding_mask is not None:
            padding = _to_add(key_padding_mask, q.dtype)[:, None, None, :]
            mask = padding if mask is None else mask + padding
        return mask


def leave_fast_path(model: nn.Module) -> None:
    """Make torch's encoders that hold an int8 layer call their modules in evaluation, too."""
    for module in model.modules():
        if not any(isinstance(inner, Int8Linear) for inner in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        elif isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # the number of a fused activation; `activation` itself stays


def _to_add(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a mask as a summand: a bool mask with -inf where it is True, which hides a key."""
    if mask.is_floating_point():
        return mask.to(dtype)
    if mask.dtype != torch.bool:
        raise TypeError(f"the mask has dtype {mask.dtype}, expected a float or torch.bool, where True hides a position")
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
