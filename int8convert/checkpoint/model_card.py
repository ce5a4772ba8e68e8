"""What a source's model card says that a checkpoint made of it has to say, too: above all its licence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from int8convert.checkpoint.names import CARD_NAME, find_file, open_regular
from int8convert.errors import CorruptFileError
from int8convert.text import quoted

_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\n(.*?)\n---[ \t]*(?:\n|$)", re.DOTALL)
_MAX_LENGTH = 100_000

MAX_CARD_BYTES = 10_000_000
"""Bytes of a model card. Long ones have 0.1 MB."""

_MAX_TEXT = 200


def read_card(path: Path) -> bytes:
    """The whole of a model card.

    Raises:
        CorruptFileError: it is no file, or larger than any card.
    """
    with open(open_regular(path), "rb") as file:
        content = file.read(MAX_CARD_BYTES + 1)
    if len(content) > MAX_CARD_BYTES:
        raise CorruptFileError(
            f"the model card {quoted(str(path), 200)} has more than {MAX_CARD_BYTES:,} bytes",
            "make it shorter, or remove it to have one written",
        )
    return content


def find_card(directory: Path) -> Path | None:
    """Return the path of a checkpoint's card; None if README.md is missing, or a directory, pipe, socket or device.

    Raises:
        SourceError, CorruptFileError: as `find_file`, for a link out of the checkpoint and a Git LFS pointer.
    """
    path = directory / CARD_NAME
    return None if path.exists() and not path.is_file() else find_file(directory, CARD_NAME)


def read_source_card(directory: Path) -> dict[str, Any]:
    """The inherited entries of the card's YAML; none of a card that is missing or cannot be read.

    Values are strings, or lists of strings, and print.
    """
    import yaml

    class LoaderWithoutAliases(yaml.SafeLoader):  # type: ignore[misc]
        """Aliases can double a text as often as the card has lines. No card needs one."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("an alias")
            return super().compose_node(parent, index)

    path = find_card(directory)
    if path is None:
        return {}
    with open(open_regular(path), encoding="utf-8", errors="replace") as file:
        block = _FRONT_MATTER.match(file.read(_MAX_LENGTH))
    try:
        entries = yaml.load(block[1], LoaderWithoutAliases) if block else {}
    except (yaml.YAMLError, ValueError, RecursionError):  # a stranger's text
        return {}
    found = entries if isinstance(entries, dict) else {}
    return {name: found[name] for name in _INHERITED if name in found and _is_plain(found[name])}


def _is_plain(value: Any) -> bool:
    values = value if isinstance(value, list) and len(value) <= _MAX_TEXT else [value]
    return all(isinstance(one, str) and one.isprintable() and len(one) <= _MAX_TEXT for one in values)
