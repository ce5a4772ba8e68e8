"""Conversions whose shards go to the Hub, and what stops them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from int8convert.conversion.destination import PublishedDestination
from int8convert.events import ShardStarted
from int8convert.publish.shard_publisher import HubPublisher
from tests.tools.hub_repositories import NAME, convert
from tests.tools.hub_server.hub import Hub

REPO = "me/opt-66b-int8"


def through(out: Path, *, keeps: bool = False, max_disk: int | None = None, **options: Any) -> list[object]:
    """Convert with all shards sent; the events."""
    destination = PublishedDestination(HubPublisher(REPO), keeps, max_disk)
    return list(convert(NAME, out, **{"reader": "stream", "destination": destination, **options}))


def on_the_hub(hub: Hub) -> dict[str, bytes]:
    """All files but the model card."""
    return {name: content for name, content in hub.repo(REPO).files.items() if name != "README.md"}


class Stopped(Exception):
    """Ends a conversion from within."""


def at_shard(n: int, act: Callable[[], object]) -> Callable[[object], None]:
    """An event sink that acts when shard n begins."""

    def sink(event: object) -> None:
        if isinstance(event, ShardStarted) and event.i == n:
            act()

    return sink


def stop_at(n: int) -> Callable[[object], None]:
    """An event sink that gives up when shard n begins."""

    def stop() -> None:
        raise Stopped

    return at_shard(n, stop)
