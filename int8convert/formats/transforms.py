"""Inputs that are rotated while the model runs, as `transform_config` in a compressed-tensors block names them.

The input of a module is multiplied by a Hadamard matrix, block by block, before it is quantized. The weights are made
for rotated inputs, so a loader that overlooks the entry computes something else. int8convert.load reads it. vLLM reads
it on a single GPU, with its Hadamard kernel, for layers without a bias. transformers overlooks it.

Source: compressed-tensors 0.20, transform/; vLLM 0.33, compressed_tensors/transform/. A matrix of 1 and -1
is stored beside each weight, because llm-compressor writes one and vLLM allocates one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from cuda_kernels.reference import hadamard

BLOCK_SIZE = 128
"""Columns that are rotated together."""

_ENTRY = "transform_config"
_SCHEME = "inputs"


def matrix_name(weight_name: str) -> str:
    """Return the name of the matrix beside a weight."""
    return f"{weight_name.removesuffix('.weight')}.{_SCHEME}_input.weight"


def matrix() -> np.ndarray[Any, np.dtype[np.float16]]:
    """Return the matrix that is stored under that name: float16 [128, 128]."""
    rotated = hadamard(np.eye(BLOCK_SIZE, dtype=np.float32), BLOCK_SIZE)
    return np.sign(rotated).astype(np.float16)


def with_transforms(block: Mapping[str, Any], module_names: Iterable[str]) -> dict[str, Any]:
    """Return a block that makes loaders rotate the inputs of these modules; the same block if there are none."""
    names = sorted(module_names)
    return {**block, _ENTRY: _config(names)} if names else dict(block)


def _config(names: list[str]) -> dict[str, Any]:
    places = ({"location": "input", "inverse": False}, {"location": "weight_input", "inverse": True})
    return {
        "config_groups": {
            _SCHEME: {
                "type": "hadamard",
                "head_dim": BLOCK_SIZE,
                "randomize": False,
                "apply": [{"targets": names, "ignore": [], **place} for place in places],
            }
        }
    }


def rotated_inputs(block: Any) -> frozenset[str]:
    """Return the modules whose inputs a block rotates, by full names; none of what is no block.

    Does not know transforms of another form, see `transform_problem`.
    """
    return frozenset(_targets(block)) if isinstance(block, dict) and block.get(_ENTRY) else frozenset()


def _targets(block: Mapping[str, Any]) -> list[str]:
    try:
        found = block[_ENTRY]["config_groups"][_SCHEME]["apply"][0]["targets"]
    except (LookupError, TypeError):
        return []
    return found if isinstance(found, list) and all(isinstance(name, str) for name in found) else []


def transform_problem(block: Mapping[str, Any]) -> str:
    """Return why a block's transforms are not those that are read here, or ""."""
    found = block.get(_ENTRY)
    is_known = not found or (bool(names := _targets(block)) and found == _config(names))
    return "" if is_known else "it rotates inputs or weights in another way than int8convert does"
