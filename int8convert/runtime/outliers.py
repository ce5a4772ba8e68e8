"""Stored outlier columns: read from a checkpoint, given to a model's layers, found by calibration.

`int8convert/outliers.safetensors` holds, for each int8 module P of the checkpoint, `P.outlier_columns` (int32 [n],
ascending) and `P.outlier_weight` ([out_features, n], in the source's dtype): the columns before quantization.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from int8convert.errors import CorruptFileError
from int8convert.runtime.linear import Int8Linear, OutlierMode

OUTLIERS_FILE = "int8convert/outliers.safetensors"


@dataclass(frozen=True, slots=True)
class StoredOutliers:
    """The columns of one layer that stay 16-bit.

    Attributes:
        columns: int32 [n], ascending.
        weight: [out_features, n], before quantization.
    """

    columns: torch.Tensor
    weight: torch.Tensor


def read_outliers(path: str | os.PathLike[str]) -> dict[str, StoredOutliers]:
    """Module name -> its stored columns.

    Raises:
        CorruptFileError: the two tensors of a module do not fit together.
    """
    tensors = load_file(path)
    found = {}
    for name in sorted(tensors):
        module_name, _, leaf = name.rpartition(".")
        if leaf != "outlier_columns":
            continue
        columns, weight = tensors[name], tensors.get(f"{module_name}.outlier_weight")
        is_ascending = columns.dim() == 1 and bool((columns[1:] > columns[:-1]).all())
        if weight is None or not is_ascending or weight.dim() != 2 or weight.shape[1] != columns.numel():
            raise CorruptFileError(
                f"'{os.fspath(path)}' holds for '{module_name}' no ascending columns with a weight for each",
                "write it again with int8convert outliers --write, or remove it",
            )
        found[module_name] = StoredOutliers(columns.to(torch.int32), weight)
    return found


def write_outliers(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the stored columns of a model's int8 layers beside its checkpoint."""
    tensors = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Int8Linear) and layer.outlier_columns.numel():
            tensors[f"{name}.outlier_columns"] = layer.outlier_columns.cpu()
            tensors[f"{name}.outlier_weight"] = layer.outlier_weight.cpu().contiguous()
    path = Path(directory) / OUTLIERS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"format": "pt"})


def attach_outliers(model: Any, outliers: Mapping[str, StoredOutliers], mode: OutlierMode) -> None:
    """Give the int8 layers of a model their stored columns, and the mode to run in; layers of other kinds need none.

    Raises:
        CorruptFileError: they are of another model.
    """
    modules = dict(model.named_modules())
    layers = {name: module for name, module in modules.items() if isinstance(module, Int8Linear)}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for name, stored in outliers.items():
        if name in modules and name not in layers:
            continue
        layer = layers.get(name) or layers.get(prefix + name) or layers.get(name.removeprefix(prefix))
        is_fit = layer is not None and stored.weight.shape[0] == layer.out_features
        if layer is None or not is_fit or (stored.columns.numel() and int(stored.columns[-1]) >= layer.in_features):
            raise CorruptFileError(
                f"{OUTLIERS_FILE} has outlier columns for '{name}', which fit no int8 layer of the model",
                "write it again with int8convert outliers --write, or remove it",
            )
        layer.set_outliers(stored.columns, stored.weight)
    for layer in layers.values():
        layer.mode = mode
    model.save_pretrained = MethodType(save_with_outliers, model)


def save_with_outliers(model: Any, save_directory: str | os.PathLike[str], **options: Any) -> None:
    """`save_pretrained` of a model with stored columns, which are no parameters of other loaders' layers."""
    type(model).save_pretrained(model, save_directory, **options)
    write_outliers(model, save_directory)
