"""Keeps model maps in the user's cache folder, so that the second command on a model does not start transformers.

A map is a function of config.json, of the request to the child process, and of the code that runs there. All of them
are in the key. The newest maps are kept; removing the folder costs seconds.

Does not know an edit in an installed transformers or torch that keeps its version.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from int8convert.checkpoint.atomic import write_json

MAX_MAPS = 100

_PACKAGE = Path(__file__).parents[2]
_FORMATS = ("format", "modules", "layers", "skip_list", "bitsandbytes", "compressed_tensors", "torchao")
SHAPING_MODULES = (
    *(
        f"planning/model_map/{name}"
        for name in ("build", "experts", "int8_choice", "keys", "model_map", "needs", "worker")
    ),
    *("planning/expert_layouts", "planning/name_rules"),
    *("runtime/build_bounds", "runtime/linear_subclasses", "runtime/weight_reads"),
    *(f"formats/{name}" for name in _FORMATS),
    *("checkpoint/stored_tensor", "patterns", "transformers_internals"),
)
"""The modules of int8convert that shape a map: those that the child process imports, without those that only name
files, report errors, and read or write weights and config blocks. Code that shapes the request is not among them: the
request itself is in the key."""


def cache_folder() -> Path | None:
    """Return `int8convert/model_maps` in $XDG_CACHE_HOME, by default ~/.cache; None without a home."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder) / "int8convert" / "model_maps" if os.path.isabs(folder) else None


class ModelMapCache:
    """The cached map of one request. A folder that cannot be read or written counts as an empty cache.

    Args:
        config: what the directory in the request holds as config.json.
        request: see `process.worker_request`.
    """

    def __init__(self, config: Mapping[str, Any], request: Mapping[str, Any]) -> None:
        self._names = {name for name, *_ in request["tensors"]}
        key = {
            "code": [_sha256((_PACKAGE / f"{name}.py").read_bytes()) for name in SHAPING_MODULES],
            "versions": [platform.python_version(), _version("torch"), _version("transformers")],
            "config": config,
            **{name: value for name, value in request.items() if name != "directory"},
        }
        folder = cache_folder()
        self._path = folder / f"{_sha256(json.dumps(key).encode())}.json" if folder is not None else None

    def read(self) -> dict[str, Any] | None:
        """Return the cached answer of the child; None if there is none, or it is damaged."""
        if self._path is None:
            return None
        try:
            answer = json.loads(self._path.read_bytes())
            return answer if answer["tensors"].keys() == self._names else None
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None

    def write(self, answer: dict[str, Any]) -> None:
        """Write an answer, and remove the oldest ones beyond MAX_MAPS."""
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, answer)
            maps = sorted(self._path.parent.glob("*.json"), key=lambda path: path.stat().st_mtime)
            for path in maps[:-MAX_MAPS]:
                path.unlink(missing_ok=True)
        except OSError:
            pass


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
