"""A converted language model, verified, and a Hub to put it on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import int8convert
from int8convert.checkpoint.names import LOCAL_FILE, VERIFY_FILE
from int8convert.hub import retry
from int8convert.publish.verify_command import Gates
from int8convert.runtime.text.texts import Text
from int8convert.verification.earlier_runs import write_report
from int8convert.verification.options import Execution
from tests.conftest import in_this_process
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


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `source` and `out`, converted and verified. Nobody writes to it."""
    folder = tmp_path_factory.mktemp("published")
    tokenizer = build_tokenizer()
    source = save(outlier_model(tokenizer), folder / "source", tokenizer)
    (source / "README.md").write_text(
        "---\nlicense: mit\nlanguage:\n- en\n- de\npipeline_tag: text-generation\n---\nHi"
    )
    (source / "LICENSE").write_text("MIT")
    with in_this_process():
        int8convert.quantize(
            source, folder / "out", int8convert.PlanOptions(max_shard_size="100KB"), on_event=lambda event: None
        )
        text = Text(n_sequences=4, length=16)
        report = int8convert.verify(folder / "out", text=text, execution=Execution("cpu"), gates=LOOSE)
    assert report.is_passed
    write_report(report)
    return folder


@pytest.fixture
def source(made: Path, tmp_path: Path) -> Path:
    """A model with outlier features and a tokenizer, a card with a licence, and the licence."""
    return Path(shutil.copytree(made / "source", tmp_path / "source"))


@pytest.fixture
def out(made: Path, source: Path, tmp_path: Path, map_in_process: None) -> Path:
    """Converted from `source`, into several shards."""
    out = tmp_path / "out"
    shutil.copytree(made / "out", out, ignore=shutil.ignore_patterns("verify.json"))
    (out / LOCAL_FILE).write_text(json.dumps({"source": str(source)}))
    return out


@pytest.fixture
def verified(made: Path, out: Path) -> Path:
    """And verified."""
    shutil.copy(made / "out" / VERIFY_FILE, out / VERIFY_FILE)
    return out


@pytest.fixture(autouse=True)
def remembered_maps(shared_maps: None) -> None:
    """Commands find the maps of models that an earlier test converted: a child to make one costs five seconds."""
