"""`quantize --upload`: where finished shards go, and what is told of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from int8convert.cli.console import format_bytes, note, print_line, stderr
from int8convert.sources import is_repository_name

if TYPE_CHECKING:
    from int8convert.conversion.destination import Publishing
    from int8convert.hub.branch import FileSent


def make_publishing(
    repository: str, private: bool | None, keep: bool, max_disk: str | None, is_quiet: bool
) -> Publishing:
    """Where finished shards go, by the options."""
    from int8convert.conversion.destination import Publishing
    from int8convert.publish.shard_publisher import HubPublisher
    from int8convert.text import parse_size

    def on_file(file: FileSent) -> None:
        if not is_quiet:
            stderr.print(f"{file.name}: {format_bytes(file.n_bytes)} sent")

    return Publishing(HubPublisher(repository, private, on_file=on_file), keep, parse_size(max_disk))


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
