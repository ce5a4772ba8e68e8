"""The seed: structures of the model families that transformers knows, which ship with the package.

`scripts/make_seed_maps` makes them of transformers' own answers. They hold for the version of transformers, and for the
modules of int8convert, that they were made with. Where no transformers is installed, they are all there is.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from int8convert.planning.model_map.cache import code_hashes, installed_version
from int8convert.planning.model_map.sizes import UnknownStructureError
from int8convert.planning.model_map.structure_match import apply_structure

SEED = Path(__file__).with_name("seed_maps.zip")
_ORIGIN = "made_from.json"


def seed_answer(config: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the child's answer on a checkpoint, by the structures of its class; None if it has none of them.

    Args:
        config: config.json.
        request: see `process.worker_request`.
    """
    version = installed_version("transformers")
    for structure in _structures(config["architectures"][0], version):
        try:
            answer = apply_structure(structure, config, request)
        except UnknownStructureError:
            continue
        if not version:
            answer["notes"] = [*answer["notes"], "transformers is not installed to confirm the map of the model"]
        found: dict[str, Any] = answer
        return found
    return None


def _structures(model_class: str, version: str) -> list[dict[str, Any]]:
    try:
        with zipfile.ZipFile(SEED) as seed:
            origin = json.loads(seed.read(_ORIGIN))
            is_current = origin["code"] == code_hashes() and version in ("", origin["transformers"])
            found: list[dict[str, Any]] = json.loads(seed.read(f"{model_class}.json")) if is_current else []
            return found
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return []


def write_seed(path: Path, structures: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write the structures of each class."""
    origin = {"transformers": installed_version("transformers"), "code": code_hashes()}
    files = {_ORIGIN: origin, **{f"{name}.json": structures[name] for name in sorted(structures)}}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as seed:
        for name, content in files.items():
            # The date of an entry is that of ZipInfo, so equal structures make equal bytes.
            seed.writestr(zipfile.ZipInfo(name), json.dumps(content, separators=(",", ":")), zipfile.ZIP_DEFLATED)
