"""A converted language model, verified, and a Hub to put it on."""

from __future__ import annotations

from pathlib import Path

import pytest

import int8convert
from int8convert.hub import retry
from int8convert.publish.verify_json import Gates
from int8convert.runtime.text.texts import Text
from int8convert.verification.earlier_runs import write_report
from int8convert.verification.options import Execution
from tests.tools.hub_repositories import NAME, add, convert, opt_pickles
from tests.tools.hub_server.fixtures import Connect, connect, hub, xet_hub
from tests.tools.hub_server.hub import Hub
from tests.tools.language_models import build_tokenizer
from tests.tools.outlier_models import outlier_model, save
from tests.tools.tiny_models import file_bytes

__all__ = ["connect", "expected", "hub", "out", "soon", "source", "verified", "xet_hub"]

LOOSE = Gates(max_dnll=9.0, max_kl=9.0)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries for seconds, and waits of milliseconds."""
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(retry, "CALL_RETRY_S", 2.0)
    monkeypatch.setenv("INT8CONVERT_HUB_RETRY_SECONDS", "2")


@pytest.fixture
def expected(hub: Hub, connect: Connect, tmp_path: Path) -> dict[str, bytes]:
    """What a conversion of a repository on the Hub to the disk gives, of five shards."""
    add(hub, opt_pickles(tmp_path, 5))
    connect(hub, hub.token)
    convert(NAME, tmp_path / "expected", reader="stream")
    return file_bytes(tmp_path / "expected")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model with outlier features and a tokenizer, a card with a licence, and the licence."""
    tokenizer = build_tokenizer()
    source = save(outlier_model(tokenizer), tmp_path / "source", tokenizer)
    (source / "README.md").write_text(
        "---\nlicense: mit\nlanguage:\n- en\n- de\npipeline_tag: text-generation\n---\nHi"
    )
    (source / "LICENSE").write_text("MIT")
    return source


@pytest.fixture
def out(source: Path, tmp_path: Path, map_in_process: None) -> Path:
    """Converted, into several shards."""
    int8convert.quantize(
        source, tmp_path / "out", int8convert.PlanOptions(max_shard_size="100KB"), on_event=lambda event: None
    )
    return tmp_path / "out"


@pytest.fixture
def verified(out: Path) -> Path:
    """And verified."""
    report = int8convert.verify(out, text=Text(n_sequences=4, length=16), execution=Execution("cpu"), gates=LOOSE)
    assert report.is_passed
    write_report(report)
    return out


@pytest.fixture(autouse=True)
def remembered_maps(shared_maps: None) -> None:
    """Commands find the maps of models that an earlier test converted: a child to make one costs five seconds."""
