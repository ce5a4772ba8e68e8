"""Reads stored outlier columns from a checkpoint, attaches them to a model's layers, and saves them.

`int8convert/outliers.safetensors` holds, for int8 modules P of the checkpoint, `P.outlier_columns` (int32 [n],
ascending) and `P.outlier_weight` ([out_features, n], in the source's dtype): the columns before quantization. Its
metadata may name the calibration text under `calibration`. Other columns are refused: each value must lie within its
code's step.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cuda_kernels.reference import N_STEPS
from int8convert.checkpoint.atomic import create_file, make_folder, rename_into_place, temporary_path
from int8convert.checkpoint.names import MAX_STEPS_AWAY, OUTLIERS_FILE
from int8convert.checkpoint.safetensors_file import read_safetensors_header
from int8convert.checkpoint.utf8_path import utf8_path
from int8convert.errors import CorruptFileError
from int8convert.runtime.linear import Int8Linear
from int8convert.runtime.modes import OutlierMode
from int8convert.text import quoted

_WRITE_AGAIN = "write it again with int8convert outliers --write, or remove it"


@dataclass(frozen=True, slots=True)
class StoredOutliers:
    """The 16-bit columns of one layer.

    Attributes:
        columns: int32 [n], ascending.
        weight: [out_features, n], before quantization.
    """

    columns: torch.Tensor
    weight: torch.Tensor


def read_outliers(path: str | os.PathLike[str]) -> dict[str, StoredOutliers]:
    """Return module name -> stored columns.

    Raises:
        CorruptFileError: the file is damaged, or holds something else.
    """
    read_safetensors_header(Path(path))  # describes what is wrong with a file in another format
    tensors = load_file(utf8_path(path))
    modules = {name.rpartition(".")[0] for name in tensors}
    found = {}
    for module_name in sorted(modules):
        columns, weight = (tensors.pop(f"{module_name}.{leaf}", None) for leaf in ("outlier_columns", "outlier_weight"))
        if columns is None or weight is None or not _is_set(columns, weight):
            raise CorruptFileError(
                f"{quoted(module_name)} in '{os.fspath(path)}' lacks ascending columns with one weight each",
                _WRITE_AGAIN,
            )
        found[module_name] = StoredOutliers(columns.to(torch.int32), weight)
    if tensors:
        raise CorruptFileError(
            f"'{os.fspath(path)}' holds {quoted(min(tensors))}, expected outlier columns and their weights",
            _WRITE_AGAIN,
        )
    return found


def _is_set(columns: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        columns.dtype in (torch.int32, torch.int64)
        and weight.is_floating_point()
        and (columns.dim(), weight.dim()) == (1, 2)
        and columns.numel() == weight.shape[1]
        and bool((columns[1:] > columns[:-1]).all() and (columns >= 0).all())
    )


def write_outliers(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the stored columns of a model's int8 layers beside its checkpoint."""
    tensors = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Int8Linear) and layer.outlier_columns.numel():
            tensors[f"{name}.outlier_columns"] = layer.outlier_columns.cpu()
            tensors[f"{name}.outlier_weight"] = layer.outlier_weight.cpu().contiguous()
    path = Path(directory) / OUTLIERS_FILE
    make_folder(path.parent)
    os.close(create_file(temporary_path(path)))  # safetensors opens by name, and would follow a link of that name
    save_file(tensors, temporary_path(path), {"format": "pt"})
    rename_into_place(path)


def attach_outliers(model: Any, outliers: Mapping[str, StoredOutliers], mode: OutlierMode) -> None:
    """Attach stored columns to a model's int8 layers, and set their mode. Layers of other kinds are skipped.

    Layers whose codes are offloaded to disk are not compared with their columns.

    Raises:
        CorruptFileError: the columns belong to another model.
    """
    modules = dict(model.named_modules())
    layers = {name: module for name, module in modules.items() if isinstance(module, Int8Linear)}
    names = live_names(model, outliers)
    for name, stored in outliers.items():
        if name in modules and name not in layers:
            continue
        layer = layers.get(names.get(name, ""))
        is_fit = layer is not None and stored.weight.shape[0] == layer.out_features
        if layer is None or not is_fit or (stored.columns.numel() and int(stored.columns[-1]) >= layer.in_features):
            raise CorruptFileError(
                f"{OUTLIERS_FILE} has outlier columns for {quoted(name)}, which fit no int8 layer of the model",
                _WRITE_AGAIN,
            )
        _check_belongs(name, layer, stored)
        layer.set_outliers(stored.columns, stored.weight)
    for layer in layers.values():
        layer.mode = mode
    model.save_pretrained = MethodType(save_with_outliers, model)


def _check_belongs(name: str, layer: Int8Linear, stored: StoredOutliers) -> None:
    """Reject columns of the right shape that belong to another layer; they would silently corrupt outputs."""
    if layer.weight.is_meta or not stored.columns.numel():
        return
    columns = stored.columns.to(layer.weight.device).long()
    step = (layer.weight_absmax / N_STEPS)[:, None]
    away = (stored.weight.to(step) - layer.weight[:, columns] * step).abs() > MAX_STEPS_AWAY * step
    away |= ~stored.weight.to(step).isfinite()
    if bool(away.any()):
        row, i = (int(index) for index in away.nonzero()[0])
        raise CorruptFileError(
            f"{OUTLIERS_FILE} holds for {quoted(name)} at row {row:,}, column {int(columns[i]):,} the weight "
            f"{float(stored.weight[row, i]):.4g}, the checkpoint's int8 weight is "
            f"{float(layer.weight[row, columns[i]] * step[row, 0]):.4g}",
            _WRITE_AGAIN,
        )


def save_with_outliers(model: Any, save_directory: str | os.PathLike[str], **options: Any) -> None:
    """Save a model, without its stored columns among the parameters, and the columns beside it."""
    type(model).save_pretrained(model, save_directory, **options)
    write_outliers(model, save_directory)


def live_names(model: Any, module_names: Iterable[str]) -> dict[str, str]:
    """Return module name in a checkpoint -> name in the model, without names that the model has no weight for.

    transformers renames some on loading.

    Args:
        model: a model of transformers, int8 or not; or any module, whose names then are the checkpoint's.
        module_names: tensor names without `.weight`.
    """
    names, modules = list(module_names), {name for name, _ in model.named_modules()}
    found = {name: name for name in names if name in modules}
    others = [name for name in names if name not in found]
    if not others or not hasattr(model, "base_model_prefix"):
        return found
    from int8convert.transformers_internals import (
        WeightRenaming,
        get_model_conversion_mapping,
        rename_source_key,
    )

    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    parameters = model.state_dict()
    for name in others:
        key, _ = rename_source_key(f"{name}.weight", renamings, [], model.base_model_prefix, parameters)
        if key in parameters:
            found[name] = key.removesuffix(".weight")
    return found
