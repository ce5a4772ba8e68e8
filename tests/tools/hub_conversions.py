"""Conversions of repositories in this process, and what they may leave behind."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from int8convert.events import EventSink
from tests.tools.hub_server.hub import Hub
from tests.tools.options import quantize
from tests.tools.tiny_models import file_bytes

READERS = ("stream", "download")


def convert(
    source: str | Path, out: Path, reader: str = "auto", on_event: EventSink = lambda event: None, **options: Any
) -> dict[str, bytes]:
    """The files of the output, by name."""
    quantize(source, out, reader=reader, workers=2, on_event=on_event, **options)
    return file_bytes(out)


def looks_complete(out: Path) -> bool:
    """Whether a loader would take it for a checkpoint."""
    return (out / "config.json").exists()


def begin_anew(hub: Hub, client_cache: Path) -> None:
    """As before the first conversion: no faults, an empty log, nothing in the client's cache."""
    hub.await_restart()
    hub.faults.clear()
    hub.log.clear()
    shutil.rmtree(client_cache, ignore_errors=True)


def places(seeds: range, n_bytes: int) -> Iterator[tuple[int, int]]:
    """Each seed with a place within so many bytes, drawn from its own part of them: all parts get their turn."""
    for i, seed in enumerate(seeds):
        yield seed, int((i + random.Random(seed).random()) / len(seeds) * n_bytes)
