"""Loads an int8 checkpoint as an ordinary transformers model, with its stored outlier columns."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from int8convert.checkpoint.names import OUTLIERS_FILE
from int8convert.errors import CorruptFileError, SourceError
from int8convert.formats.format import QUANTIZE_FORMATS
from int8convert.formats.modules import endings_beside
from int8convert.patterns import is_allowed
from int8convert.runtime.hastened.decoder_layer import hasten_layers
from int8convert.runtime.hastened.float_linear import hasten
from int8convert.runtime.int8_head import quantize_head
from int8convert.runtime.modes import OutlierMode
from int8convert.runtime.pretrained import hub_options, load_model, locate_file, read_config
from int8convert.runtime.stored_columns import attach_outliers, read_outliers
from int8convert.runtime.transformers_plugin import Int8ConvertConfig

_NOT_NEEDED = ("weight_format", "position_ids", "num_batches_tracked")
"""Ends of the names of tensors that may lack. Early bitsandbytes wrote no format, which is zero then. A class sets its
buffers of positions and of counts itself."""

_INT8_PARTS = endings_beside(QUANTIZE_FORMATS)
"""Ends of the names of tensors that only an int8 layer has. If the model has no such layer, their codes are lost."""


def load(
    path_or_repo: str | os.PathLike[str],
    *,
    device_map: Any = None,
    outliers: str | None = None,
    threshold: float | None = None,
    dtype: Any = None,
    torch_dtype: Any = None,
    trust_remote_code: bool = False,
    allow_missing: Sequence[str] = (),
    int8_head: bool = False,
    **options: Any,
) -> Any:
    """Load an int8 checkpoint of any tool, in the bitsandbytes or the compressed-tensors layout.

    Each tensor goes straight to its device. Modules that `device_map` sends to "disk" stay int8 in the checkpoint's
    files.

    Args:
        path_or_repo: a directory, or the id of a repository.
        device_map: see `from_pretrained`; None is the CPU.
        outliers: a mode, such as "dynamic+blocks", see `int8convert.runtime.modes`; None is static+guard where the
            checkpoint has stored outlier columns, else dynamic.
        threshold: magnitude from which a column is an outlier; None takes the checkpoint's, or 6.
        dtype: dtype of the rest of the model; None or "auto" takes config.json's.
        torch_dtype: the name of `dtype` before transformers 5.
        trust_remote_code: run code of the checkpoint; else a checkpoint that needs it is refused.
        allow_missing: patterns, as for `quantize`, of tensors that the checkpoint may lack. transformers makes up their
            values.
        int8_head: also run the output head in int8, which checkpoints keep in 16 bits; see `int8_head`.
        options: for `from_pretrained`.

    Returns:
        a transformers model of the class that config.json names, in eval mode.

    Raises:
        SourceError: there is no checkpoint, it is not int8, or it lacks the static outliers that are asked for; or the
            model has no head that could be int8.
        CorruptFileError: tensors are missing, or int8 ones fit nothing in the model. Other unused tensors are ignored,
            as by transformers.
        RemoteCodeError: the checkpoint needs code of its own, and `trust_remote_code` is False.
        ValueError: `dtype` and `torch_dtype` differ.
    """
    path = os.fspath(path_or_repo)
    hub = hub_options(options)
    config = read_int8_config(path, trust_remote_code, **hub)
    mode = OutlierMode(outliers) if outliers else None
    run_config = Int8ConvertConfig(outliers, threshold)
    run_config.for_checkpoint(config.quantization_config)  # what it cannot read is refused before anything is fetched
    stored = locate_file(path, OUTLIERS_FILE, **hub)
    if stored is None and mode is not None and mode.uses_stored:
        raise SourceError(
            f"outliers {mode} needs stored columns, and '{path}' has none",
            f"run `int8convert outliers SRC --text FILE --write {path}`, or choose the outliers dynamic",
        )
    model, info = load_model(
        path,
        config,
        trust_remote_code=trust_remote_code,
        quantization_config=run_config,
        device_map=device_map,
        dtype=_dtype(dtype, torch_dtype),
        **options,
    )
    _check_complete(path, info, allow_missing)
    if stored is not None:
        attach_outliers(model, read_outliers(stored), mode or OutlierMode.STATIC_GUARD)
    if int8_head:
        quantize_head(model)
    hasten(model)
    hasten_layers(model)
    return model


def _dtype(dtype: Any, torch_dtype: Any) -> Any:
    """Return the dtype that was given under either name."""
    if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
        raise ValueError(f"dtype={dtype} and torch_dtype={torch_dtype} are two names of one thing: give one")
    chosen = dtype if dtype is not None else torch_dtype
    return "auto" if chosen is None else chosen


def read_int8_config(path: str, trust_remote_code: bool = False, **hub: Any) -> Any:
    """Return the transformers config of an int8 checkpoint.

    Raises:
        SourceError: there is no such checkpoint, its config cannot be read, or it is not int8.
        RemoteCodeError: its class is code in the checkpoint, and `trust_remote_code` is False.
    """
    config = read_config(path, trust_remote_code=trust_remote_code, **hub)
    if getattr(config, "quantization_config", None) is None:
        raise SourceError(
            f"'{path}' is no int8 checkpoint: its config.json has no quantization_config",
            f"convert it first: `int8convert quantize {path} OUT`",
        )
    return config


def _check_complete(path: str, info: dict[str, Any], allow_missing: Sequence[str]) -> None:
    """Refuse missing weights, of which transformers only warns, and lost int8 ones."""
    missing = [name for name in info["missing_keys"] if not name.endswith(_NOT_NEEDED)]
    missing = sorted(name for name in missing if not is_allowed(name, allow_missing))
    unexpected = sorted(name for name in info["unexpected_keys"] if name.endswith(_INT8_PARTS))
    wrong = sorted(name if isinstance(name, str) else name[0] for name in info["mismatched_keys"])
    for what, names in (
        ("has no", missing),
        ("holds, and the model has no,", unexpected),
        ("has in a shape that does not fit", wrong),
    ):
        if names:
            rest = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            hint = "its config.json and its weights do not belong together; write or fetch the checkpoint again"
            if names is missing:
                module = names[0].rpartition(".")[0] or names[0]
                hint = f"fetch the checkpoint again; pass allow_missing=[{module!r}] only if it is to be trained"
            raise CorruptFileError(f"'{path}' {what} '{names[0]}'{rest}", hint)
