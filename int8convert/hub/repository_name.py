"""The names of repositories on the Hub, and the addresses people have for them."""

from __future__ import annotations

import re
from urllib.parse import unquote

_NAME_PART = r"[A-Za-z0-9][\w.-]{0,95}"
_REPOSITORY_NAME = re.compile(f"{_NAME_PART}/{_NAME_PART}", re.ASCII)
"""Names without an organization, which a few old repositories have, are taken for directories."""

_REPOSITORY_ADDRESS = re.compile(
    r"(?:https?://[^/]+/|(?:huggingface|hf)\.co/|hf://|(?=[^/]+/[^/]+@))(?!datasets/|spaces/)(?:models/)?"
    rf"(?P<name>{_NAME_PART}/{_NAME_PART})(?:(?:/(?:tree|blob|resolve)/|@)(?P<revision>[^/?#]+))?(?:[/?#].*)?",
    re.ASCII,
)
"""What people have at hand that names a repository and is no name: a page of it, a form of other tools."""


def looks_like_repository(name: str) -> bool:
    """Whether a repository could have this name."""
    return _REPOSITORY_NAME.fullmatch(name) is not None


def name_of_address(address: str) -> str | None:
    """Return the name in a repository's address, with the option for its revision; None if it is no such address."""
    found = _REPOSITORY_ADDRESS.fullmatch(address)
    if found is None:
        return None
    revision = found["revision"]
    return f"{found['name']}, with --revision {unquote(revision)}" if revision else found["name"]
