"""Recognizes names of repositories on the Hub, and their addresses."""

from __future__ import annotations

import re
from urllib.parse import unquote

_NAME_PART = r"[A-Za-z0-9][\w.-]{0,95}"
_REPOSITORY_NAME = re.compile(f"{_NAME_PART}/{_NAME_PART}", re.ASCII)
"""ORGANIZATION/NAME. The few names without an organization count as directories."""

_REPOSITORY_ADDRESS = re.compile(
    r"(?:https?://[^/]+/|(?:huggingface|hf)\.co/|hf://|(?=[^/]+/[^/]+@))(?!datasets/|spaces/)(?:models/)?"
    rf"(?P<name>{_NAME_PART}/{_NAME_PART})(?:(?:/(?:tree|blob|resolve)/|@)(?P<revision>[^/?#]+))?(?:[/?#].*)?",
    re.ASCII,
)
"""Addresses of a repository's pages, and the notations of other tools."""


def looks_like_repository(name: str) -> bool:
    """Return whether a repository could have this name."""
    return _REPOSITORY_NAME.fullmatch(name) is not None


def name_of_address(address: str) -> str | None:
    """Return the name in a repository's address, with the option for its revision; None if it is no such address."""
    found = _REPOSITORY_ADDRESS.fullmatch(address)
    if found is None:
        return None
    revision = found["revision"]
    return f"{found['name']}, with --revision {unquote(revision)}" if revision else found["name"]
