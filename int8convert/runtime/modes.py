"""The modes of an int8 layer: which columns of its input stay 16-bit, and which share a scale.

- static: a set stored with the layer, found once by calibration, with its 16-bit weights. A token's output depends on
  that token alone.
- static+guard: the stored set, and other columns that reach the threshold in this batch.
- dynamic: the columns that reach the threshold in this batch, by the paper's rule. Their weights are taken from the
  codes, as in bitsandbytes, and a token's output depends on the other tokens of its batch.
- none: every column is int8.

In these modes x_absmax is one number for each token, as in the paper. Three modes have one for each token and block of
128 adjacent columns, so that a large activation costs the columns of its block precision and no others:

- static+blocks, dynamic+blocks: outlier columns as in static and in dynamic.
- blocks: every column is int8. A token's output depends on that token alone.

Source: LLM.int8(), arXiv:2208.07339, Sec. 2 and 3. Scales for blocks of inputs: those of llama.cpp's Q8_0, and of the
FP8 products of DeepSeek-V3, arXiv:2412.19437, Sec. 3.3.2.
"""

from __future__ import annotations

from enum import StrEnum

BLOCK_SIZE = 128
"""Columns of a block. Smaller blocks are more exact and slower: on a trained Qwen2 of 0.5B, over a KL divergence of
0.0015 by its int8 weights alone, blocks of 128, 64 and 32 add 0.0013, 0.0008 and 0.0004 (1,024 tokens)."""


class OutlierMode(StrEnum):
    """How a layer quantizes its input: which columns stay 16-bit, and which share a scale; see the module."""

    STATIC = "static"
    STATIC_GUARD = "static+guard"
    DYNAMIC = "dynamic"
    NONE = "none"
    STATIC_BLOCKS = "static+blocks"
    DYNAMIC_BLOCKS = "dynamic+blocks"
    BLOCKS = "blocks"

    @property
    def uses_stored(self) -> bool:
        return self in (OutlierMode.STATIC, OutlierMode.STATIC_GUARD, OutlierMode.STATIC_BLOCKS)

    @property
    def finds(self) -> bool:
        return self in (OutlierMode.STATIC_GUARD, OutlierMode.DYNAMIC, OutlierMode.DYNAMIC_BLOCKS)

    @property
    def block_size(self) -> int:
        """Columns that share a token's scale; 0 for all of them."""
        return BLOCK_SIZE if self in (OutlierMode.STATIC_BLOCKS, OutlierMode.DYNAMIC_BLOCKS, OutlierMode.BLOCKS) else 0
