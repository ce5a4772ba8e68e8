"""The config that transformers reads from a checkpoint, and the entries of it that send transformers elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from int8convert.checkpoint.loaders.listing import Listing
from int8convert.checkpoint.names import CONFIG_NAME
from int8convert.errors import CorruptFileError, SourceError
from int8convert.text import quoted

DETOURS = ("configuration_files", "transformers_weights")
"""Entries of config.json that send transformers to other files. A converted checkpoint has none."""


def find_config(listing: Listing) -> tuple[str | None, dict[str, Any]]:
    if CONFIG_NAME not in listing.root:
        return None, {}
    config = _read_object(listing, CONFIG_NAME)
    if "configuration_files" not in config:
        return CONFIG_NAME, config
    name = _versioned_config(config["configuration_files"], version("transformers"))
    if name == CONFIG_NAME:
        return name, config
    if name not in listing.root:
        raise CorruptFileError(
            f"'{CONFIG_NAME}' has transformers read {quoted(name)} in its place, which is not there",
            f"fetch that file, or remove configuration_files from {CONFIG_NAME}",
        )
    return name, _read_object(listing, name)


def _read_object(listing: Listing, name: str) -> dict[str, Any]:
    value = listing.read(name)
    if not isinstance(value, dict):
        raise CorruptFileError(
            f"{quoted(name)} holds a JSON {type(value).__name__}, not an object",
            "fetch this file again",
        )
    return value


def _versioned_config(names: Any, own_version: str) -> str:
    """Return the config that a version of transformers chooses. Versions are sorted as texts, as transformers does."""
    from packaging.version import InvalidVersion, Version

    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CorruptFileError(
            f"'{CONFIG_NAME}' has configuration_files that are no list of names",
            "fetch this file again, or remove configuration_files from it",
        )
    versions = {name.removeprefix("config.").removesuffix(".json"): name for name in filter(is_versioned_config, names)}
    chosen = CONFIG_NAME
    try:
        for found in sorted(versions):
            if Version(found) > Version(own_version):
                break
            chosen = versions[found]
    except InvalidVersion:
        raise CorruptFileError(
            f"'{CONFIG_NAME}' names the configuration file {quoted(versions[found])}, which has no version in its name",
            "remove it from configuration_files; transformers does not load the checkpoint either",
        ) from None
    return chosen


def is_versioned_config(name: str) -> bool:
    """Return whether transformers takes a file for a config of some version of its own, if config.json names it."""
    return name.startswith("config.") and name.endswith(".json") and name != CONFIG_NAME


def check_nested(config: Mapping[str, Any]) -> None:
    """Refuse `transformers_weights` in a nested config: which nested config transformers reads depends on the class."""
    for key, part in config.items():
        if isinstance(part, dict) and part.get("transformers_weights") is not None:
            raise SourceError(
                f"'{CONFIG_NAME}' names transformers_weights in {quoted(key)}, where some classes of transformers "
                "look for it and others do not",
                f"move that entry to the top of {CONFIG_NAME}, or remove it",
            )


def without_detours(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config's entries without those that send transformers to other files."""
    return {key: value for key, value in config.items() if key not in DETOURS}
