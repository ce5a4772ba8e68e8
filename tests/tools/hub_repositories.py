"""Repositories as people find them on the Hub, and what comes out of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

from int8convert.events import Event
from tests.tools.hub_server.http_messages import Origin
from tests.tools.hub_server.hub import Hub
from tests.tools.options import quantize
from tests.tools.tiny_models import file_bytes, save_as_pickles, save_checkpoint

NAME = "facebook/opt-66b"
CARD = b"---\nlicense: other\nlicense_name: opt\nlanguage: en\ntags: [x]\n---\n# OPT\n"


def opt_pickles(folder: Path, n_shards: int = 3) -> Path:
    """Built like facebook/opt-66b: `.bin` shards, an index, keys without `model.`, the head tied to the embedding."""
    return save_as_pickles(
        save_checkpoint("opt", folder / "safe"), folder / "pickles", n_shards, lambda name: name.removeprefix("model.")
    )


def add(hub: Hub, directory: Path, name: str = NAME, **more: bytes) -> dict[str, Path]:
    """Put a directory on the Hub, with what such repositories also hold; its weight files by name."""
    files: dict[str, Any] = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*.*")}
    files |= {"README.md": CARD, "flax_model.msgpack": b"f" * 1000, "tf_model.h5": b"t" * 1000, "LICENSE.md": b"OPT"}
    hub.add_repo(name, files | more)
    return {name: path for name, path in files.items() if name.endswith((".bin", ".safetensors"))}


def convert(name: str | Path, out: Path, **options: Any) -> list[Event]:
    """Convert; the events."""
    events: list[Event] = []
    quantize(name, out, **{"on_event": events.append, **options})
    return events


def payload(out: Path) -> dict[str, bytes]:
    """All files but the manifest, which says where the source was."""
    return {name: content for name, content in file_bytes(out).items() if name != "int8convert/manifest.json"}


def fetched_bytes(hub: Hub, weights: dict[str, Path]) -> Counter[str]:
    """Bytes the store sent of each weight file."""
    names = {hashlib.sha256(path.read_bytes()).hexdigest(): name for name, path in weights.items()}
    counted: Counter[str] = Counter()
    for request in hub.log.requests("GET", origin=Origin.STORAGE):
        name = names.get(request.path.rpartition("/")[2])
        if name is not None:
            counted[name] += request.sent_bytes
    return counted
