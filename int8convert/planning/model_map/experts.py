"""Finds the tensors of a checkpoint that hold experts, and their layout, by the model's class and its conversions.

Runs in the child process. Does not know experts under other parameter names than transformers' usual ones and DBRX's;
they stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from int8convert.planning.expert_layouts import ExpertLayout, fits
from int8convert.planning.model_map.keys import LoadedInto
from int8convert.transformers_internals import Concatenate, Interleave, MergeModulelist, Transpose


@dataclass(frozen=True)
class CheckpointTensor:
    """One tensor of the checkpoint.

    Attributes:
        place: file, storage, offset, strides and stored dtype, which are only compared; None where tensors cannot share
            bytes, as in safetensors.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    place: list[Any] | None


_PROJECTIONS = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "gate_proj": ("gate_proj",),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}


def is_one_expert(module: Any, into: LoadedInto, tensor: CheckpointTensor) -> bool:
    """Return whether a matrix is one projection of one expert, [out, in], which loading only stacks with others."""
    stacks = all(isinstance(operation, MergeModulelist | Concatenate) for operation in into.operations)
    leaf = into.parameter.rpartition(".")[2]
    is_stacked = into.is_converted and stacks and leaf in _PROJECTIONS and getattr(module, leaf).dim() == 3
    return is_stacked and len(tensor.shape) == 2 and min(tensor.shape) > 0 and tensor.name.endswith(".weight")


def fused_layout(module: Any, into: LoadedInto, tensor: CheckpointTensor) -> ExpertLayout | None:
    """Return the layout of a tensor of all experts; None if it holds none, or in an unknown layout."""
    path, _, leaf = into.parameter.rpartition(".")
    if type(module).__name__ == "DbrxExpertGLU":
        projection = {"w1": "gate_proj", "v1": "up_proj", "w2": "down_proj"}.get(leaf)
        found = projection and ExpertLayout(
            path.removesuffix(".mlp"), (projection,), "weight", module.moe_num_experts, leaf == "w2", False
        )
        return found if found and fits(found, tensor.shape) else None
    is_bias = leaf.endswith("_bias")
    projections = _PROJECTIONS.get(leaf.removesuffix("_bias"))
    is_transposed = _experts_are_transposed(module)
    if projections is None or is_transposed is None or not _is_only_turned(into):
        return None
    expected = tuple(getattr(module, leaf).shape)
    turned = (*expected[:-2], expected[-1], expected[-2])
    always = any(isinstance(operation, Transpose) and not operation.check_dims for operation in into.operations)
    if tensor.shape != expected and tensor.shape != turned:
        return None
    if not is_bias and (always or tensor.shape != expected):
        is_transposed = not is_transposed
    is_interleaved = any(isinstance(operation, Interleave) for operation in into.operations)
    is_interleaved = is_interleaved or not getattr(module, "is_concatenated", True)
    layout = ExpertLayout(
        path,
        projections,
        "bias" if is_bias else "weight",
        expected[0],
        is_transposed and not is_bias,
        is_interleaved and len(projections) > 1,
    )
    return layout if fits(layout, tensor.shape) else None


def _is_only_turned(into: LoadedInto) -> bool:
    """Return whether loading leaves the matrices of a fused tensor whole."""
    return all(isinstance(operation, Transpose | Interleave) for operation in into.operations)


def _experts_are_transposed(module: Any) -> bool | None:
    """Return whether the model holds its experts as [in, out]; None if it has none, or if that is unknown.

    Where the class does not state it, the shapes decide: the second projection's inputs are the first one's outputs.
    """
    down = getattr(module, "down_proj", None)
    first = getattr(module, "gate_up_proj", None)
    if not (isinstance(down, nn.Parameter) and down.dim() == 3):
        return None
    stated = getattr(module, "is_transposed", None)
    if stated is not None:
        return bool(stated)
    if not (isinstance(first, nn.Parameter) and first.dim() == 3):
        return None
    if (first.shape[1], first.shape[2]) == (2 * down.shape[2], down.shape[1]):
        return False
    return True if (first.shape[2], first.shape[1]) == (2 * down.shape[1], down.shape[2]) else None
