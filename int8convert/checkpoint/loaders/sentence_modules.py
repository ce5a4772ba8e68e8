"""The folders of a sentence encoder, which sentence-transformers loads beside the model in the root or in its place."""

from __future__ import annotations

from collections.abc import Iterator

from int8convert.checkpoint.loaders.listing import Listing
from int8convert.checkpoint.names import CONFIG_NAME
from int8convert.errors import SourceError
from int8convert.text import quoted

MODULES = "modules.json"

ROUTER = "router_config.json"
"""Name of the `Router` file that lists the folders of its own modules."""

MAX_MODULES = 100
"""Modules of a sentence encoder. Real ones have under ten."""


def module_folders(listing: Listing) -> tuple[str, ...]:
    """Return the folders that sentence-transformers loads beside the root.

    Raises:
        SourceError: one is outside the checkpoint, or holds a model that is loaded in place of the root's.
    """
    paths = _module_paths(listing)
    if len(paths) > MAX_MODULES:
        raise SourceError(
            f"'{MODULES}' names {len(paths):,} folders, expected at most {MAX_MODULES}",
            "fetch this file again, or remove it",
        )
    for path in paths:
        if _is_outside(path):
            raise SourceError(
                f"'{MODULES}' names the folder {quoted(path)}, outside the checkpoint",
                "fetch this file again, or remove it; nothing outside the checkpoint was read",
            )
    inner = inner_model(listing)
    if inner is not None:
        raise SourceError(
            f"'{MODULES}' has sentence-transformers load the model in {quoted(inner)}, transformers the one beside it",
            f"give that folder, or remove {MODULES}",
        )
    return paths


def _module_paths(listing: Listing) -> tuple[str, ...]:
    """Return the distinct folders of modules.json, in its order; () if modules.json is not a list.

    Each is spelled `a/b`, as in every listing. A router's own folders are among them, so that its modules are copied.
    """
    if MODULES not in listing.root:
        return ()
    modules = listing.read(MODULES)
    entries = modules if isinstance(modules, list) else []
    paths: dict[str, None] = {}
    for entry in entries:
        path = entry.get("path") if isinstance(entry, dict) else None
        if isinstance(path, str) and _plain(path) not in paths:
            paths.update(dict.fromkeys(_plain(inner) for inner in (path, *_routed(listing, _plain(path)))))
    return tuple(path for path in paths if path not in ("", "."))


def _plain(path: str) -> str:
    """Return a folder's path in the form `a/b`. A path that leads outside keeps its `..` and first `/`."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    return f"{'/' if path.startswith('/') else ''}{'/'.join(parts)}"


def _routed(listing: Listing, folder: str) -> Iterator[str]:
    """Yield the folders that a router in a folder or in the root names."""
    within = f"{folder}/" if folder not in ("", ".") else ""
    if _is_outside(folder) or f"{within}{ROUTER}" not in (listing.files_under(folder) if within else listing.root):
        return
    router = listing.read(f"{within}{ROUTER}")
    structure = router.get("structure") if isinstance(router, dict) else None
    routes = structure.values() if isinstance(structure, dict) else ()
    for route in routes:
        yield from (f"{within}{name}" for name in (route if isinstance(route, list) else ()) if isinstance(name, str))


def _is_outside(path: str) -> bool:
    """Return whether a folder's path leads out of the checkpoint."""
    return path.startswith("/") or ".." in path.split("/")


def inner_model(listing: Listing) -> str | None:
    """Return the first folder of modules.json that holds a transformers model of its own."""
    for folder in _module_paths(listing)[:MAX_MODULES]:
        name = f"{folder}/{CONFIG_NAME}"
        if name in listing.files_under(folder):
            config = listing.read(name)
            if isinstance(config, dict) and ("model_type" in config or "architectures" in config):
                return folder
    return None
