"""Builds the model of a config on the meta device: classes and names, without memory.

transformers' class of the architecture comes first. The checkpoint's own code (`auto_map`) is used only where
transformers has none, and only if the user trusts it. Else the class of the model type is used, with a note.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version

from int8convert.checkpoint.library_errors import library_errors
from int8convert.errors import CorruptFileError, ModelMapError, RemoteCodeError, SourceError
from int8convert.planning.model_map.experts import CheckpointTensor
from int8convert.runtime.build_bounds import bounded_build, check_layer_counts
from int8convert.runtime.weight_reads import READS_VERSION
from int8convert.text import quoted
from int8convert.transformers_internals import get_class_from_dynamic_module, no_tie_weights

TORCH_DTYPE = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_FETCH_CONFIG = "fetch config.json again, or correct that entry"

# Where config.json names a class that transformers no longer has, the model type still leads to one. In this order:
# the first mapping that knows the type wins.
_AUTO_MAPPINGS = {
    "AutoModelForCausalLM": transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
    "AutoModelForSeq2SeqLM": transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    "AutoModelForMaskedLM": transformers.MODEL_FOR_MASKED_LM_MAPPING,
    "AutoModel": transformers.MODEL_MAPPING,
}


def build_model(
    directory: str, tensors: list[CheckpointTensor], trusts_code: bool, weights_dtype: str = "float32"
) -> tuple[Any, torch.dtype, list[str]]:
    """Build the model of the config in a directory.

    Args:
        weights_dtype: the dtype where the config has none, see `weights_dtype`.

    Returns:
        the model, the dtype it loads in, and notes on how its class was found.

    Raises:
        RemoteCodeError: the only class is in the checkpoint's own code, and that may not run.
        ModelMapError: that code has no such class or raises, the model is larger than the tensors could fill, or the
            dtype is unknown.
        LookupError: there is no class at all.
    """
    stated = json.loads((Path(directory) / "config.json").read_bytes())
    try:
        check_layer_counts(stated)
        return _build(directory, stated, tensors, trusts_code, weights_dtype)
    except CorruptFileError as error:
        raise ModelMapError(error.message, error.hint) from error


def _build(
    directory: str, stated: dict[str, Any], tensors: list[CheckpointTensor], trusts_code: bool, weights_dtype: str
) -> tuple[Any, torch.dtype, list[str]]:
    architecture = stated["architectures"][0]
    own_code = stated.get("auto_map")
    runs_code = bool(own_code) and trusts_code and not hasattr(transformers, architecture)
    if runs_code:
        config, model_class = _class_of_the_checkpoint(directory, architecture, own_code)
        notes = [f"{architecture} is code in the checkpoint, which was run: loading the output runs it, too"]
    else:
        if own_code and stated.get("model_type") not in transformers.CONFIG_MAPPING:
            raise RemoteCodeError(
                f"{architecture} is code in the checkpoint (auto_map in config.json): "
                f"transformers {transformers.__version__} has no such class",
                "read that code, then pass --trust-remote-code to have it run",
            )
        config = _read_config(directory, stated)
        model_class, notes = _class_of_transformers(config, architecture, has_code=bool(own_code))
    notes += _notes_on_reads(runs_code)
    dtype = _load_dtype(config, weights_dtype)
    if not dtype.is_floating_point:
        raise ModelMapError(f"'config.json' has the dtype {dtype}, expected a float such as float16", _FETCH_CONFIG)
    torch.set_default_dtype(dtype)
    for choice in ("_attn_implementation", "_experts_implementation"):
        if getattr(config, choice, None) not in (None, "eager", "sdpa"):
            setattr(config, choice, None)  # names a package, or kernels that would be fetched: nothing is run here
    n_elements = sum(math.prod(tensor.shape) for tensor in tensors)
    bounds = bounded_build(len(tensors) or None, n_elements or None)
    # As loaders build it: tied weights still apart, so that the last parameter is the one they take for the last.
    with torch.device("meta"), no_tie_weights(), bounds:
        return model_class(config).eval(), dtype, notes


def _notes_on_reads(runs_code: bool) -> Iterator[str]:
    """Yield what nobody has searched for weights that code reads itself, see `weight_reads`."""
    trial = "weights that it reads itself: run `int8convert verify`, which tries the output"
    if runs_code:
        yield f"the checkpoint's own code was not searched for {trial}"
    if Version(transformers.__version__) > Version(READS_VERSION):
        yield f"transformers {transformers.__version__}, newer than {READS_VERSION}, was not searched for {trial}"


def _read_config(directory: str, stated: dict[str, Any]) -> Any:
    """Return the config as transformers reads it. No loader takes a known model that it refuses."""
    try:
        with library_errors(f"transformers {transformers.__version__} cannot read 'config.json'", _FETCH_CONFIG):
            return transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except SourceError as error:
        model_type = stated.get("model_type")
        if isinstance(model_type, str) and model_type in transformers.CONFIG_MAPPING:
            raise ModelMapError(error.message, error.hint) from error
        raise (error.__cause__ or error) from None


def _class_of_transformers(config: Any, architecture: str, has_code: bool) -> tuple[Any, list[str]]:
    model_class = getattr(transformers, architecture, None)
    if model_class is not None:
        return model_class, []
    model_class = next((classes[type(config)] for classes in _AUTO_MAPPINGS.values() if type(config) in classes), None)
    if model_class is None:
        raise LookupError(f"no class for {architecture}")
    note = f"config.json names {architecture}, unknown to transformers: read as {model_class.__name__}"
    if has_code:
        note += "; the checkpoint's own code (auto_map) was not run, and the two may differ"
    return model_class, [note]


def _class_of_the_checkpoint(directory: str, architecture: str, own_code: Any) -> tuple[Any, Any]:
    """Return the config and the class that the checkpoint's code defines. Runs that code."""
    references = own_code if isinstance(own_code, dict) else {}
    reference = next((references[auto] for auto in _AUTO_MAPPINGS if isinstance(references.get(auto), str)), None)
    if reference is None:
        raise ModelMapError(
            f"auto_map in config.json names no class for {' or '.join(_AUTO_MAPPINGS)}",
            "fetch config.json again, or add the entry that loads the model",
        )
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=True)
        return config, get_class_from_dynamic_module(reference, directory, local_files_only=True)
    except Exception as error:  # a stranger's code may raise anything
        reason = quoted(" ".join(f"{type(error).__name__}: {error}".split()), 300)
        raise ModelMapError(
            f"the checkpoint's own code for {architecture}, {quoted(reference)}, raises {reason}",
            "check that all its files are beside config.json, and install what it imports",
        ) from error


def _load_dtype(config: Any, weights_dtype: str) -> torch.dtype:
    """Return the dtype in which `from_pretrained` loads the source: the config's, else that of its weights."""
    stated = weights_dtype if config.dtype is None else config.dtype
    dtype: Any = getattr(torch, stated, None) if isinstance(stated, str) else stated
    if config.dtype is None and dtype not in TORCH_DTYPE.values():
        raise ModelMapError(
            f"the dtype in the index of the weights is {quoted(weights_dtype)}, expected one such as 'float16'",
            "fetch the index again, or state the dtype in config.json",
        )
    found: torch.dtype = dtype
    return found
