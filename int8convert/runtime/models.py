"""Opens a checkpoint, int8 or not, as a model to measure, and its tokenizer, on a device that torch has."""

from __future__ import annotations

import os
import re
from typing import Any

import torch

from int8convert.checkpoint.library_errors import TRUST_CODE
from int8convert.decoding.fp8 import FP8_DTYPES
from int8convert.errors import CorruptFileError, DeviceError, SourceError
from int8convert.formats.skip_list import checked_names
from int8convert.runtime import pretrained
from int8convert.runtime.load import load
from int8convert.runtime.text.tokenizer_process import TokenizerProcess
from int8convert.runtime.text.windows import TokenWindows
from int8convert.sources import open_source

_CORRECT = "correct that, or give the int8 checkpoint made from it"
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def open_tokenizer(path: str | os.PathLike[str], trust_remote_code: bool = False, label: str = "") -> TokenizerProcess:
    """Open a checkpoint's tokenizer in a process of its own. The caller closes it.

    Args:
        label: the user's name of the checkpoint; empty for its path.

    Raises:
        SourceError: there is no checkpoint, or no tokenizer that transformers can read.
        RemoteCodeError: it is code in the checkpoint, which may not run.
    """
    if not os.path.isdir(path):  # transformers would look for it on the Hub; of a repository, its weights may be there
        open_source(path)
    label = label or os.fspath(path)
    tokenizer = TokenizerProcess(os.fspath(path), TRUST_CODE, trust_remote_code, label)
    if tokenizer.vocab_size == 0:  # what transformers makes of no files for some models
        tokenizer.close()
        raise SourceError(
            f"'{label}' has no tokenizer that transformers can read: its vocabulary is empty",
            "copy the files of the source's tokenizer into it",
        )
    return tokenizer


def is_int8(path: str | os.PathLike[str]) -> bool:
    """Return whether a directory holds a quantized checkpoint, other than FP8, which transformers loads by itself."""
    block = open_source(path).config.get("quantization_config")
    return isinstance(block, dict) and "fp8" not in str(block.get("quant_method"))


def read_config(path: str | os.PathLike[str], trust_remote_code: bool = False) -> Any:
    """Return the transformers config of a checkpoint.

    Raises:
        SourceError: transformers cannot read it.
        RemoteCodeError: its classes are code in the checkpoint, which may not run.
    """
    open_source(path)  # transformers would look for a path that is not there on the hub
    return pretrained.read_config(os.fspath(path), _CORRECT, TRUST_CODE, trust_remote_code)


def load_model(path: str | os.PathLike[str], device: str, *, trust_remote_code: bool = False) -> Any:
    """Return a checkpoint's model in eval mode.

    An int8 one is loaded by `int8convert.load`. Others are float32 on the CPU, where 16 bits are slower and less exact,
    and have their own dtype elsewhere.

    Raises:
        SourceError: it cannot be loaded.
        CorruptFileError: weights are missing.
    """
    if is_int8(path):
        return load(path, device_map={"": device}, trust_remote_code=trust_remote_code)
    name = os.fspath(path)
    _check_fp8_form(path)
    config = read_config(path, trust_remote_code)
    model, info = pretrained.load_model(
        name,
        config,
        hint=_CORRECT,
        code_hint=TRUST_CODE,
        trust_remote_code=trust_remote_code,
        dtype=torch.float32 if device == "cpu" else "auto",
        device_map={"": device},
    )
    lacking = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
    if lacking:
        raise CorruptFileError(
            f"'{name}' has no weights, or none of the right shape, for {lacking[0]!r}"
            + (f" and {len(lacking) - 1:,} more" if len(lacking) > 1 else ""),
            "its config.json and its weights do not belong together; fetch the checkpoint again",
        )
    settle_dtype(model, path, device)
    return model.eval()


def settle_dtype(module: torch.nn.Module, path: str | os.PathLike[str], device: str) -> None:
    """Convert a model that is not int8, or a part of it, to float32 on the CPU.

    transformers decodes FP8 weights while it loads, and leaves the other tensors in their dtypes.

    Raises:
        SourceError: weights are still in FP8.
    """
    if device != "cpu":
        return
    if any(parameter.dtype in _FP8 for parameter in module.parameters()):
        raise _foreign_fp8(path)
    torch.nn.Module.float(module)


def _check_fp8_form(path: str | os.PathLike[str]) -> None:
    """Refuse FP8 whose scales have a name that transformers does not know: it would take the codes for weights.

    Refuse also a list of modules that holds regular expressions, which transformers would match.
    """
    source = open_source(path)
    block = source.config.get("quantization_config")
    if not isinstance(block, dict):
        return
    checked_names(block, "modules_to_not_convert")
    if block.get("quant_method") != "fp8":
        return
    names = {tensor.name for tensor in source.tensors}
    if any(tensor.dtype in FP8_DTYPES and f"{tensor.name}_scale_inv" not in names for tensor in source.tensors):
        raise _foreign_fp8(path)


def _foreign_fp8(path: str | os.PathLike[str]) -> SourceError:
    return SourceError(
        f"'{os.fspath(path)}' is in an FP8 form that transformers loads and cannot run",
        "give the checkpoint in 16 bits that it was made of",
    )


def check_length(model: Any, windows: TokenWindows) -> None:
    n_positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(n_positions, int) and windows.ids.shape[1] > n_positions:
        raise SourceError(
            f"the model takes {n_positions:,} tokens, and the windows have {windows.ids.shape[1]:,}",
            f"pass --length {n_positions} or less",
        )


def choose_device(device: str) -> str:
    """Return "cpu" or "cuda[:n]".

    Args:
        device: "auto", which is the GPU if there is one, "cpu" or "cuda[:n]".

    Raises:
        DeviceError: torch has no such device here.
        ValueError: it is not the name of a device.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    match = re.fullmatch(r"cpu|cuda(:(\d+))?", device)
    if match is None:
        raise ValueError(f"device must be auto, cpu or cuda[:n], not {device!r}")
    n_gpus = torch.cuda.device_count()
    if device != "cpu" and int(match[2] or 0) >= n_gpus:
        found = f"torch finds {n_gpus} here" if n_gpus else "torch finds no usable GPU here"
        raise DeviceError(f"--device {device}: {found}", "pass --device cpu, or leave it out")
    return device
