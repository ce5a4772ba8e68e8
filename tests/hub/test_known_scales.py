"""Scales of FP8 codes are fetched by range, for which the Hub has no hash; what they were counts only when it shows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from int8convert.events import ShardRepeated
from tests.hub.test_readers import fp8_with_scales_elsewhere, sha256_of
from tests.tools.hub_repositories import NAME, add, convert
from tests.tools.hub_server.faults import FaultKind
from tests.tools.hub_server.fixtures import Connect
from tests.tools.hub_server.http_messages import Origin
from tests.tools.hub_server.hub import Hub
from tests.tools.tiny_models import file_bytes

pytestmark = pytest.mark.usefixtures("map_in_process", "quick_waits")


@pytest.mark.parametrize("reader", ["stream", "download"])
def test_wrong_scale_that_gives_plausible_weights_is_found_when_its_shard_comes(
    hub: Hub, connect: Connect, tmp_path: Path, reader: str
) -> None:
    """1.0 with all bits turned over is -4.0: all numbers stay finite, so nothing but the bytes themselves can tell."""
    source = fp8_with_scales_elsewhere(tmp_path)
    scales = source / "model-00002-of-00002.safetensors"
    save_file({name: torch.ones_like(tensor) for name, tensor in load_file(scales).items()}, scales)
    add(hub, source)
    connect(hub)
    convert(NAME, tmp_path / "right", reader=reader)
    # Behind the request for the header; the file is small, so its scales are one request.
    hub.faults.add(FaultKind.WRONG_BYTES, path=sha256_of(scales), origin=Origin.STORAGE, nth=2, after_bytes=0)

    events = convert(NAME, tmp_path / "out", reader=reader)

    assert [event for event in events if isinstance(event, ShardRepeated)]
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "right")
