"""What torchao demands in the header of each file: for every tensor of the model, what to make of its parts.

Each file names all tensors of the model, not its own alone: transformers merges the headers and believes the last one.

Source: torchao/prototype/safetensors, version 0.18; transformers/integrations/torchao.py, version 5.23.
"""

from __future__ import annotations

import json

from int8convert.checkpoint.safetensors_file import read_safetensors_metadata
from int8convert.errors import CorruptFileError
from int8convert.formats.int8_checkpoint import Int8Checkpoint, Int8Weight
from int8convert.formats.int8_config import Int8Format
from int8convert.text import quoted

_PLAIN = json.dumps({"_type": "Tensor"})


def torchao_metadata(checkpoint: Int8Checkpoint) -> dict[str, str]:
    """The header entries; of a checkpoint that is torchao's already, those of its files together.

    Raises:
        CorruptFileError: its headers say nothing of an int8 weight, so that torchao could not read it.
    """
    if checkpoint.format is Int8Format.TORCHAO:
        return _merged_metadata(checkpoint)
    entries = {
        f"{item.module_name}.weight" if isinstance(item, Int8Weight) else item.name: (
            _int8_tensor(item.codes.stored.shape[1], checkpoint.dtype) if isinstance(item, Int8Weight) else _PLAIN
        )
        for item in checkpoint.items
    }
    return {**entries, "tensor_names": json.dumps(list(entries))}


def _merged_metadata(checkpoint: Int8Checkpoint) -> dict[str, str]:
    merged: dict[str, str] = {}
    for shard in checkpoint.source.shards:
        merged |= read_safetensors_metadata(shard.path)
    entries = {name: value for name, value in merged.items() if value.startswith('{"_type"')}
    for weight in checkpoint.weights:
        if f"{weight.module_name}.weight" not in entries:
            raise CorruptFileError(
                f"no header says what {quoted(weight.codes.name)} is, so torchao could not read it",
                "fetch the checkpoint again, or name another format with --format",
            )
    return {**entries, "tensor_names": json.dumps(list(entries))}


def _int8_tensor(n_columns: int, dtype: str) -> str:
    """A weight with one scale a row, which activations of 16 bits are multiplied by.

    Args:
        n_columns: of the weight.
        dtype: what it is dequantized to.
    """
    attributes = {
        "act_quant_kwargs": None,
        "reduce_range": False,
        "block_size": [1, n_columns],
        "dtype": {"_type": "torch.dtype", "_data": dtype},
    }
    parts = ["zero_point", "qdata", "scale"]
    return json.dumps({"_type": "Int8Tensor", "_data": attributes, "_tensor_data_names": parts})
