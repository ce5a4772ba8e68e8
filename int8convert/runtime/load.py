"""Loading an int8 checkpoint as an ordinary transformers model, with its stored outlier columns."""

from __future__ import annotations

import os
from typing import Any

import transformers
from transformers.utils.hub import cached_file

from int8convert.checkpoint.layout import OUTLIERS_FILE
from int8convert.errors import CorruptFileError, SourceError
from int8convert.runtime.linear import OutlierMode
from int8convert.runtime.outliers import attach_outliers, read_outliers
from int8convert.runtime.transformers_plugin import Int8ConvertConfig

_NOT_NEEDED = "weight_format"
"""Checkpoints of early bitsandbytes have none; ours is zero then, which is what it would say."""


def load(
    path_or_repo: str | os.PathLike[str],
    *,
    device_map: Any = None,
    outliers: str | None = None,
    threshold: float | None = None,
    dtype: Any = "auto",
    **options: Any,
) -> Any:
    """Load an int8 checkpoint, in the bitsandbytes or the compressed-tensors layout, whoever wrote it.

    Each tensor goes straight to its device; what `device_map` sends to "disk" stays in the checkpoint's files, as int8.

    Args:
        path_or_repo: a directory, or the id of a repository.
        device_map: as `from_pretrained` has it; None is the CPU.
        outliers: "static", "static+guard", "dynamic" or "none", see `int8convert.runtime.linear`; None is static+guard
            where the checkpoint has stored outlier columns, else dynamic.
        threshold: magnitude from which a column is an outlier; None takes the checkpoint's, or 6.
        dtype: what the rest of the model is held in; "auto" takes what config.json says.
        options: for `from_pretrained`.

    Returns:
        a transformers model of the class config.json names, in eval mode.

    Raises:
        SourceError: there is none, it is not int8, or static outliers are asked for and it has none.
        CorruptFileError: tensors are missing, or some fit nothing in the model.
    """
    path = os.fspath(path_or_repo)
    trusts = {name: options[name] for name in ("trust_remote_code",) if name in options}
    config = read_int8_config(path, **_hub_options(options), **trusts)
    block = config.quantization_config
    mode = OutlierMode(outliers) if outliers else None
    run_config = Int8ConvertConfig(outliers, threshold)
    run_config.for_checkpoint(block)  # what it cannot read is refused before anything is fetched
    stored = cached_file(path, OUTLIERS_FILE, _raise_exceptions_for_missing_entries=False, **_hub_options(options))
    if stored is None and mode is not None and mode.uses_stored:
        raise SourceError(
            f"outliers='{mode}' asks for stored outlier columns, and '{path}' has none",
            "int8convert outliers SRC --write finds and stores them; outliers='dynamic' needs none",
        )
    model, info = model_class(config).from_pretrained(
        path,
        config=config,
        quantization_config=run_config,
        device_map=device_map,
        dtype=dtype,
        output_loading_info=True,
        **options,
    )
    _check_complete(path, info)
    if stored is not None:
        attach_outliers(model, read_outliers(stored), mode or OutlierMode.STATIC_GUARD)
    return model


def read_int8_config(path: str, **hub_options: Any) -> Any:
    """The transformers config of an int8 checkpoint.

    Raises:
        SourceError: there is no such checkpoint, its config cannot be read, or it is not int8.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(path, **hub_options)
    except (OSError, ValueError) as error:
        is_there = os.path.isdir(path)
        what = "cannot be read as a checkpoint" if is_there else "is no directory, and no repository within reach"
        raise SourceError(
            f"'{path}' {what}: {str(error).splitlines()[0]}",
            "give the directory that int8convert quantize wrote, or the id of a repository",
        ) from error
    if getattr(config, "quantization_config", None) is None:
        raise SourceError(
            f"'{path}' is no int8 checkpoint: its config.json has no quantization_config",
            "int8convert quantize makes one; Int8ConvertConfig for from_pretrained quantizes while it loads",
        )
    return config


def _hub_options(options: dict[str, Any]) -> dict[str, Any]:
    names = ("revision", "cache_dir", "token", "local_files_only", "subfolder", "force_download")
    return {name: options[name] for name in names if name in options}


def model_class(config: Any) -> Any:
    """The class the weights were saved from; by the model's type where transformers has none of that name."""
    architecture = (config.architectures or [""])[0]
    return getattr(transformers, architecture, None) or transformers.AutoModelForCausalLM


def _check_complete(path: str, info: dict[str, Any]) -> None:
    """transformers warns of missing weights and makes them up; here they are an error."""
    missing = sorted(name for name in info["missing_keys"] if not name.endswith(_NOT_NEEDED))
    wrong = sorted(name if isinstance(name, str) else name[0] for name in info["mismatched_keys"])
    for what, names in (
        ("has no", missing),
        ("holds, and the model has no,", sorted(info["unexpected_keys"])),
        ("has in a shape that does not fit", wrong),
    ):
        if names:
            rest = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            raise CorruptFileError(
                f"'{path}' {what} '{names[0]}'{rest}",
                "its config.json and its weights do not belong together; write or fetch the checkpoint again",
            )
