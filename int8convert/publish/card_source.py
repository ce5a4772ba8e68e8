"""What a card says of the model that was converted: its name, where it is, and its licence."""

from __future__ import annotations

import re
from typing import Any

from int8convert.publish.card_text import code, plain
from int8convert.publish.finished import FinishedOutput

_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_FILE_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
_LINK = re.compile(r"https?://[\w.~/%#?=&:+-]+", re.ASCII)
_LOGIN = re.compile(r"(?<=//)[^/@]*@")


def source_repository(output: FinishedOutput) -> str | None:
    """The repository on the Hub that was converted; None if it was a directory."""
    source = output.request.get("source")
    name = source.get("repository") if isinstance(source, dict) else None
    return name if isinstance(name, str) and _NAME.fullmatch(name) else None


def named_source(output: FinishedOutput) -> str:
    """The source by its name, with a link if it has a page: on the Hub in use now, which should be the one it is on."""
    from int8convert.hub.errors import endpoint

    name = source_repository(output)
    if name is not None:
        return f"[{plain(name)}]({_LOGIN.sub('', endpoint())}/{name})"
    last = str(output.manifest.get("source") or "").rstrip("/").rpartition("/")[2]  # once it was a path
    return f"a local checkpoint, {code(last)}" if last else "a local checkpoint"


def inherited(output: FinishedOutput) -> dict[str, Any]:
    """What the source's own card says of its licence, language and task."""
    card = output.manifest.get("source_card")
    return card if isinstance(card, dict) else {}


def licence_file(output: FinishedOutput) -> str | None:
    """The name of the text of the licence that was carried over; None if there is none."""
    names = (path.name for path in sorted(output.path.iterdir()) if path.is_file() and _FILE_NAME.fullmatch(path.name))
    return next((name for name in names if name.upper().startswith(("LICENSE", "LICENCE"))), None)


def licence(output: FinishedOutput) -> str:
    """Whose licence it is, and as far as known which, and where it is to be read."""
    card = inherited(output)
    named = next((card[key] for key in ("license_name", "license") if isinstance(card.get(key), str)), None)
    whose = named_source(output) if source_repository(output) else "the source"
    which = f", {code(named)}" if named else "" if source_repository(output) else ", which is not known here"
    link, file = card.get("license_link"), licence_file(output)
    if isinstance(link, str) and _LINK.fullmatch(link):
        see = f", see <{link}>"
    else:
        see = f", see [{plain(file)}]({file})" if file else ""
    return f"Licence: that of {whose}{which}{see}."
