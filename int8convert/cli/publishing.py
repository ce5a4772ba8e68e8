"""`quantize --upload`: where finished shards go, and what is told of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from int8convert.cli.console import note, print_line
from int8convert.sources import is_repository_name

if TYPE_CHECKING:
    from int8convert.conversion.destination import Publishing
    from int8convert.events import EventSink


def make_publishing(
    repository: str | None, private: bool | None, keep: bool, max_disk: str | None, on_event: EventSink
) -> Publishing | None:
    """Return where finished shards go, by the options; None without --upload."""
    if repository is None:
        return None
    from int8convert.conversion.destination import Publishing
    from int8convert.publish.shard_publisher import HubPublisher
    from int8convert.text import parse_size

    return Publishing(HubPublisher(repository, private, on_event=on_event), keep, parse_size(max_disk))


def published(publishing: Publishing) -> dict[str, Any]:
    """What is to be told of where the shards went."""
    publisher = publishing.publisher
    return {"url": publisher.url, "commit": publisher.commit, "keeps_card": publisher.keeps_card}


def print_published(repository: str, there: dict[str, Any], src: str) -> None:
    """Tell where the shards of SRC went; `there` is what `published` gives."""
    print_line(f"commit: {there['commit']}; all shards compared by hash")
    if there["keeps_card"]:
        note(f"{repository} has a README.md not written by int8convert: it is kept; --overwrite replaces it")
    where = "" if is_repository_name(src) else " on a machine that has the source"
    note(f"not verified yet: run `int8convert verify {repository} --level exact`{where}")
