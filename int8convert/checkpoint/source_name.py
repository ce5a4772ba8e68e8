"""What a user may call a source: a directory, or a repository on the Hub by its name; what to say of anything else."""

from __future__ import annotations

import os
import re
from pathlib import Path
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


def is_repository_name(src: str | os.PathLike[str]) -> bool:
    """Whether this names a repository on the Hub: it looks like one, and no file or directory has that name."""
    return isinstance(src, str) and looks_like_repository(src) and not Path(src).exists()


def looks_like_repository(name: str) -> bool:
    """Whether a repository could have this name."""
    return _REPOSITORY_NAME.fullmatch(name) is not None


def naming_hint(label: str) -> str:
    """What to name in place of something that is no directory."""
    if address := _REPOSITORY_ADDRESS.fullmatch(label):
        revision = address["revision"]
        there = f"{address['name']}, with --revision {unquote(revision)}" if revision else address["name"]
        return f"name it {there}"
    return "give a checkpoint directory, or ORGANIZATION/NAME on the Hub, such as openai-community/gpt2"
