"""`--upload`: where finished shards go, and what is printed about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from int8convert.cli.console import note, print_line
from int8convert.sources import is_repository_name

if TYPE_CHECKING:
    from int8convert.conversion.destination import Destination
    from int8convert.events import EventSink


def make_destination(
    repository: str | None, private: bool | None, keep: bool, max_disk: str | None, on_event: EventSink
) -> Destination:
    from int8convert.conversion.destination import LocalDestination, PublishedDestination
    from int8convert.publish.shard_publisher import HubPublisher
    from int8convert.text import parse_size

    if repository is None:
        return LocalDestination()
    return PublishedDestination(HubPublisher(repository, private, on_event=on_event), keep, parse_size(max_disk))


def print_published(repository: str, there: dict[str, Any], src: str) -> None:
    """Print where the shards of SRC are; `there` is what `destination.outcome` returns."""
    print_line(f"commit: {there['commit']}; all shards compared by hash")
    if there["keeps_card"]:
        note(f"{repository} has a README.md not written by int8convert: it is kept; --overwrite replaces it")
    where = "" if is_repository_name(src) else " on a machine that has the source"
    note(f"not verified yet: run `int8convert verify {repository} --level exact`{where}")
