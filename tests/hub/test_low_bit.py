"""Low-bit weights from the Hub become what the same files on the disk become, by both readers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from int8convert.errors import SourceError
from tests.decoding.test_fp4 import gpt_oss  # noqa: F401, a fixture
from tests.decoding.test_integers import KINDS
from tests.hub.test_readers import READERS
from tests.tools.hub_repositories import NAME, add, convert, payload
from tests.tools.hub_server.fixtures import Connect
from tests.tools.hub_server.hub import Hub
from tests.tools.low_bit_checkpoints import save_coded
from tests.tools.tiny_models import save_checkpoint

pytestmark = pytest.mark.usefixtures("map_in_process", "small_pieces")


@pytest.mark.parametrize("kind", KINDS)
def test_readers_give_the_bytes_of_a_local_conversion(kind: str, hub: Hub, connect: Connect, tmp_path: Path) -> None:
    plain = save_checkpoint("llama", tmp_path / "plain", torch.bfloat16)
    save_coded(plain, tmp_path / "source", *KINDS[kind])
    _compare(tmp_path / "source", hub, connect, tmp_path)


def test_fused_experts_are_read_from_interleaved_rows(
    gpt_oss: Path,  # noqa: F811
    hub: Hub,
    connect: Connect,
    tmp_path: Path,
) -> None:
    _compare(gpt_oss, hub, connect, tmp_path, format="compressed-tensors")


def test_scales_that_fill_the_memory_are_refused(
    hub: Hub, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = save_checkpoint("llama", tmp_path / "plain", torch.bfloat16)
    save_coded(plain, tmp_path / "source", *KINDS["pack-quantized"])
    add(hub, tmp_path / "source")
    connect(hub)
    monkeypatch.setattr("int8convert.conversion.readers._MAX_PREFETCHED_BYTES", 1000)
    with pytest.raises(SourceError, match="the scales of this repository take"):
        convert(NAME, tmp_path / "out", reader="stream")
    convert(tmp_path / "source", tmp_path / "out")


def _compare(source: Path, hub: Hub, connect: Connect, folder: Path, **options: str) -> None:
    add(hub, source)
    connect(hub)
    (source / "LICENSE.md").write_bytes(b"OPT")
    convert(source, folder / "local", **options)
    for reader in READERS:
        convert(NAME, folder / reader, reader=reader, **options)
        assert payload(folder / reader) == payload(folder / "local"), reader
