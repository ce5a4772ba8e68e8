"""Which files of a checkpoint loaders read."""

from __future__ import annotations

_TEXT_SUFFIXES = (".md", ".rst", ".html", ".pdf")
_PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".bmp", ".ico", ".tif", ".tiff")
_INERT_STEMS = frozenset({"readme", "license", "licence", "notice", "copying", "copyright", "authors", "changelog"})
_LOADED_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".json", ".model", ".jinja", ".py", ".txt")
"""Endings that loaders look for among all files of a folder: `*.model` finds `.model`, too."""


def is_inert(name: str) -> bool:
    """Return whether no loader reads a file of a checkpoint: texts about it, pictures, hidden files.

    The list is short on purpose: every other name counts as read. Upper and lower case are the same.

    Args:
        name: the file's path in the checkpoint, with `/`.
    """
    *folders, file_name = name.lower().split("/")
    if not file_name or ".." in folders:
        return False
    if any(folder.startswith(".") and folder != "." for folder in folders):
        return True
    if file_name.startswith("."):
        return not file_name.endswith(_LOADED_SUFFIXES)
    if file_name.endswith((*_TEXT_SUFFIXES, *_PICTURE_SUFFIXES)):
        return True
    stem, _, suffix = file_name.partition(".")
    return stem.split("-")[0] in _INERT_STEMS and suffix in ("", "txt")
