"""What a conversion from the Hub, or through it, takes of disk and memory, sampled while it runs in its own process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers

from tests.tools.hub_repositories import NAME, add
from tests.tools.hub_server.hub import Hub

MIB = 1 << 20


@dataclass
class Peaks:
    """The largest samples, in bytes: of the disk under OUT and the client's cache, and of all processes' own memory."""

    disk_bytes: int = 0
    anonymous_bytes: int = 0


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 200 MB in shards of at most 40 MB. Nobody writes to it."""
    folder = tmp_path_factory.mktemp("large")
    config = transformers.OPTConfig(
        vocab_size=512,
        hidden_size=1024,
        ffn_dim=4096,
        num_hidden_layers=8,
        num_attention_heads=16,
        max_position_embeddings=64,
        word_embed_proj_dim=1024,
    )
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(config).to(torch.float16)
    model.save_pretrained(folder, max_shard_size="40MB")
    return folder


def convert_sampled(hub: Hub, out: Path, cache: Path, *options: str, xet: bool = False) -> Peaks:
    """Convert by the command, looking at it every few milliseconds."""
    environment = os.environ | hub.client_environment(hub.token, xet=xet) | {"HF_HOME": str(cache)}
    command = [sys.executable, "-m", "int8convert", "quantize", NAME, str(out), "--quiet", *options]
    peaks = Peaks()
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peaks.disk_bytes = max(peaks.disk_bytes, used_bytes(out) + used_bytes(cache))
            peaks.anonymous_bytes = max(peaks.anonymous_bytes, anonymous_bytes(process.pid))
            time.sleep(0.005)
    assert process.returncode == 0
    return peaks


def used_bytes(folder: Path) -> int:
    """Of the disk, by the files in a folder."""
    total = 0
    for parent, _, names in os.walk(folder):  # which bears that folders go meanwhile
        for name in names:
            with suppress(FileNotFoundError):
                total += 512 * os.lstat(os.path.join(parent, name)).st_blocks
    return total


def anonymous_bytes(pid: int) -> int:
    """Of a process and its children."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    own = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")]
    return 1024 * sum(map(int, own)) + sum(map(anonymous_bytes, children))


def test_stream_takes_no_disk_and_download_that_of_two_shards(hub: Hub, large: Path, tmp_path: Path) -> None:
    weights = add(hub, large)
    sizes = sorted(path.stat().st_size for path in weights.values())
    assert sum(sizes) > 180 * MIB and len(sizes) >= 5
    hub.bandwidth.bytes_per_s = 150e6

    stream = convert_sampled(hub, tmp_path / "stream", tmp_path / "cache", "--reader", "stream")
    output = used_bytes(tmp_path / "stream")
    download = convert_sampled(hub, tmp_path / "download", tmp_path / "cache", "--reader", "download")

    assert output > 90 * MIB
    assert stream.disk_bytes <= output + MIB, "100 MB are allowed, and none is needed"
    assert output < download.disk_bytes <= output + sum(sizes[-2:]) + MIB
    for peaks in (stream, download):
        assert peaks.anonymous_bytes <= 600_000_000


@pytest.mark.parametrize(("has_xet", "reader"), [(False, "stream"), (True, "download")])
def test_conversion_through_a_small_disk_takes_no_more_of_it(
    has_xet: bool, reader: str, large: Path, tmp_path: Path
) -> None:
    """100 MB of output through 62: a shard that is converted, one on its way, and 20 MB kept for small files; of
    downloads, two of the source's besides. Counted is the cache of the client, too."""
    if has_xet:
        pytest.importorskip("hf_xet")
    with Hub(tmp_path / "hub", xet=has_xet) as hub:
        weights = add(hub, large)
        sizes = sorted(path.stat().st_size for path in weights.values())
        most = 62_000_000 + (sum(sizes[-2:]) if reader == "download" else 0)
        options = ("--upload", "me/int8", "--max-disk", f"{most}", "--reader", reader)

        peaks = convert_sampled(hub, tmp_path / "work", tmp_path / "cache", *options, xet=has_xet)

        there = hub.repo("me/int8").files
        assert sum(len(content) for name, content in there.items() if name.endswith(".safetensors")) > 90_000_000
        assert "config.json" in there and not (tmp_path / "work").exists()
        assert 20_000_000 < peaks.disk_bytes <= most
        assert peaks.anonymous_bytes <= 600_000_000
