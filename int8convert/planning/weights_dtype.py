"""Finds the dtype of a checkpoint whose config.json states none, by the rule of `from_pretrained`.

1. `metadata.dtype` of the index.
2. The first tensor of the first file in a float dtype, FP8 aside, in the order in which that file's loader lists them:
   safetensors by name, pickles as they were saved.

Source: transformers 5.24, `_get_dtype` and `get_state_dict_dtype`. Where the first file has no such tensor,
transformers fails, and the later files decide here.
"""

from __future__ import annotations

from int8convert.checkpoint.source import CheckpointSource
from int8convert.decoding.fp8 import FP8_DTYPES
from int8convert.planning.name_rules import CONFIG_DTYPE


def dtype_of_weights(source: CheckpointSource) -> str:
    """Return the dtype's name as in config.json: float16. That of an index is returned unchecked."""
    if source.index_dtype is not None:
        return source.index_dtype
    first = sorted(source.shards[0].tensors, key=lambda tensor: (tensor.rank, tensor.name))
    found = next((CONFIG_DTYPE[tensor.dtype] for tensor in first if tensor.dtype in CONFIG_DTYPE), None)
    decoded = CONFIG_DTYPE | dict.fromkeys(FP8_DTYPES, "bfloat16")
    others = (decoded[tensor.dtype] for tensor in source.tensors if tensor.dtype in decoded)
    return found or next(others, "float32")
