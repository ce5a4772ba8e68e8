"""Keeps model maps in the user's cache folder, so that the second command on a model does not start transformers.

A map is a function of config.json, of the request to the child process, and of the code that runs there. All of them
are in the key. Where the answer has a structure, that is kept in its place, under a key without sizes: then a model of
another size is known, too. The newest maps are kept; removing the folder costs seconds.

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
from int8convert.planning.model_map.sizes import UnknownStructureError
from int8convert.planning.model_map.structure import Sample, find_structure, outline
from int8convert.planning.model_map.structure_match import apply_structure

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

_STRUCTURE = ("links", "name_patterns", "sizes", "structure", "structure_match")
STRUCTURE_MODULES = tuple(f"planning/model_map/{name}" for name in _STRUCTURE)
"""The modules that make a structure of a map, and a map of a structure."""


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
        self._config, self._request = config, request
        self._names = {name for name, *_ in request["tensors"]}
        code = {
            "code": code_hashes(),
            "versions": [platform.python_version(), installed_version("torch"), installed_version("transformers")],
        }
        key = {**code, "config": config, **{name: value for name, value in request.items() if name != "directory"}}
        self._path = _path_of(key)
        self._structure_path = _path_of({**code, "outline": outline(config, request)})

    def read(self) -> dict[str, Any] | None:
        """Return the cached answer of the child; None if there is none, or it is damaged."""
        try:
            answer = _read(self._structure_path)
            if answer is not None:
                answer = apply_structure(answer, self._config, self._request)
        except (LookupError, TypeError, ValueError, AttributeError, UnknownStructureError):
            answer = None
        answer = answer or _read(self._path)
        try:
            return answer if answer is not None and answer["tensors"].keys() == self._names else None
        except (LookupError, TypeError, AttributeError):
            return None

    def write(self, answer: dict[str, Any]) -> None:
        """Write an answer or its structure, and remove the oldest ones beyond MAX_MAPS."""
        structure = find_structure([Sample(self._config, self._request, answer)])
        if _read(self._structure_path) is not None:
            structure = None  # there is one, in which this checkpoint does not fit
        path = self._path if structure is None else self._structure_path
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, answer if structure is None else structure)
            maps = sorted(path.parent.glob("*.json"), key=lambda path: path.stat().st_mtime)
            for path in maps[:-MAX_MAPS]:
                path.unlink(missing_ok=True)
        except OSError:
            pass


def code_hashes() -> list[str]:
    """Return the sha256 of each module that shapes a map or a structure."""
    return [_sha256((_PACKAGE / f"{name}.py").read_bytes()) for name in (*SHAPING_MODULES, *STRUCTURE_MODULES)]


def _path_of(key: Any) -> Path | None:
    folder = cache_folder()
    return folder / f"{_sha256(json.dumps(key).encode())}.json" if folder is not None else None


def _read(path: Path | None) -> Any:
    """Return the object in a file; None if there is none."""
    try:
        return json.loads(path.read_bytes()) if path is not None else None
    except (OSError, ValueError):
        return None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def installed_version(package: str) -> str:
    """Return the version of a package; "" if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
