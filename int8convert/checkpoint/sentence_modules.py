"""The folders of a sentence encoder: what sentence-transformers loads beside, or in place of, the model in the root."""

from __future__ import annotations

from int8convert.checkpoint.layout import CONFIG_NAME, quoted
from int8convert.checkpoint.listing import Listing
from int8convert.errors import SourceError

MODULES = "modules.json"

MAX_MODULES = 100
"""Modules of a sentence encoder. Real ones have under ten."""

_NOTHING = "nothing was written"


def module_folders(listing: Listing) -> tuple[str, ...]:
    """The folders that sentence-transformers loads beside the root.

    Raises:
        SourceError: one is outside the checkpoint, or holds a model that is loaded in place of the root's.
    """
    paths = _module_paths(listing)
    if len(paths) > MAX_MODULES:
        raise SourceError(
            f"'{MODULES}' names {len(paths):,} folders, expected at most {MAX_MODULES}",
            f"fetch this file again, or remove it; {_NOTHING}",
        )
    for path in paths:
        if path.startswith("/") or ".." in path.split("/"):
            raise SourceError(
                f"'{MODULES}' names the folder {quoted(path)}, outside the checkpoint",
                "fetch this file again, or remove it; nothing outside the checkpoint was read",
            )
    inner = inner_model(listing)
    if inner is not None:
        raise SourceError(
            f"'{MODULES}' has sentence-transformers load the model in {quoted(inner)}, transformers the one beside it",
            f"give that folder, or remove {MODULES}; {_NOTHING}",
        )
    return paths


def _module_paths(listing: Listing) -> tuple[str, ...]:
    """Distinct folders of modules.json, in its order; none where that is no list of modules, which nobody loads."""
    if MODULES not in listing.root:
        return ()
    modules = listing.read(MODULES)
    entries = modules if isinstance(modules, list) else []
    paths = (entry.get("path") for entry in entries if isinstance(entry, dict))
    folders = (path.rstrip("/") for path in paths if isinstance(path, str))
    return tuple(dict.fromkeys(folder for folder in folders if folder not in ("", ".")))


def inner_model(listing: Listing) -> str | None:
    """The first folder of modules.json that holds a transformers model of its own."""
    for folder in _module_paths(listing)[:MAX_MODULES]:
        name = f"{folder}/{CONFIG_NAME}"
        if name in listing.files_under(folder):
            config = listing.read(name)
            if isinstance(config, dict) and ("model_type" in config or "architectures" in config):
                return folder
    return None
