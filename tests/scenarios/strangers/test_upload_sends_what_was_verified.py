"""`upload` sends the files that verify.json vouches for, in those bytes; all else is refused or left, by name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import int8convert
from int8convert.checkpoint.names import MANIFEST_NAME, VERIFY_FILE
from int8convert.errors import CorruptFileError, Int8ConvertError, OutputError, UnverifiedError
from int8convert.hub.branch import Branch
from int8convert.inspection import inspect
from int8convert.publish.card import make_card
from int8convert.publish.finished import read_finished
from int8convert.publish.upload import UploadReport
from int8convert.publish.verify_command import Gates
from int8convert.runtime.text.texts import Text
from int8convert.verification.earlier_runs import write_report
from int8convert.verification.options import Execution
from int8convert.verification.verify import verify
from tests.conftest import in_this_process
from tests.scenarios.strangers.conftest import Copy
from tests.scenarios.strangers.makers import change, passes_exact, write
from tests.tools.hub_server.fixtures import Connect, connect, hub
from tests.tools.hub_server.hub import Hub
from tests.tools.tiny_models import file_bytes

__all__ = ["connect", "hub"]

pytestmark = pytest.mark.usefixtures("map_in_process")

REPO = "me/model"
FILES = {
    *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *(MANIFEST_NAME, VERIFY_FILE, "README.md"),
}
"""What is published of the output of this folder's fixture."""


@pytest.fixture(scope="module")
def verified_once(made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output, passed by the exact level. Nobody writes to it."""
    out = Path(shutil.copytree(made[1], tmp_path_factory.mktemp("verified") / "out"))
    with in_this_process():
        assert passes_exact(out)
    return out


@pytest.fixture(scope="module")
def measured_once(made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output, passed by the fidelity level. Nobody writes to it."""
    out = Path(shutil.copytree(made[1], tmp_path_factory.mktemp("measured") / "out"))
    with in_this_process():
        report = verify(out, text=Text(n_sequences=2, length=16), execution=Execution("cpu"), gates=Gates(9.0, 9.0))
    write_report(report)
    return out


@pytest.fixture
def verified(verified_once: Path, copy: Copy, hub: Hub, connect: Connect) -> Path:
    """A copy of an output that the exact level passed, and a Hub to send it to."""
    connect(hub, hub.token)
    return copy(verified_once)


def dry_run(out: Path, **options: Any) -> UploadReport:
    return int8convert.upload(out, REPO, dry_run=True, **options)


CHANGED = {
    "tokenizer.json": '{"changed": 1}',
    "tokenizer_config.json": "{}",
    "generation_config.json": '{"eos_token_id": 99}',
    "config.json": "{}",
    MANIFEST_NAME: None,
    "pytorch_model.bin": "cos\nsystem\n",
    "modeling_x.py": "import os",
    "extra.safetensors": "not verified",
    "Extra.SafeTensors": "not verified",
    "chat_template.jinja": "{{ 1 }}",
    "assets/run.py": "import os",
    "notes.txt": "a vocabulary by its name",
    ".tokenizer.model": "hidden, and loaded",
    "int8convert/notes": "in our own folder",
    "int8convert/outliers.safetensors": "stored since",
}


@pytest.mark.parametrize("name", CHANGED)
def test_file_that_was_not_verified_is_refused_by_name(name: str, verified: Path) -> None:
    content = CHANGED[name]
    if content is None:
        manifest = json.loads((verified / name).read_text())
        content = json.dumps({**manifest, "tool": "another"})
    write(verified / name, content)

    with pytest.raises(UnverifiedError) as caught:
        dry_run(verified)

    assert f"'{name}' is no" in caught.value.message and caught.value.state == "nothing was sent"


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_file_that_is_gone_is_refused_by_name(name: str, verified: Path) -> None:
    (verified / name).unlink()
    with pytest.raises(UnverifiedError, match=f"'{name}' was verified and is gone"):
        dry_run(verified)


def test_weights_that_were_changed_are_refused(verified: Path) -> None:
    path = verified / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for options in ({}, {"allow_unverified": True}):
        with pytest.raises(CorruptFileError, match=r"has sha256 .*, as the manifest says"):
            dry_run(verified, **options)


def test_what_was_verified_is_sent_and_nothing_else(verified: Path, hub: Hub) -> None:
    left = ("assets/plot.png", "notes.md", "report.html")
    for name in (*left, ".env", ".cache/token", "int8convert/local.json", "int8convert/lock"):
        write(verified / name, "of this machine")
    before = file_bytes(verified)

    assert dry_run(verified).skipped_files == left
    report = int8convert.upload(verified, REPO)

    assert (report.skipped_files, report.is_verified) == (left, True)
    assert hub.repo(REPO).files.keys() == FILES
    sent = {name: content for name, content in hub.repo(REPO).files.items() if name != "README.md"}
    assert sent == {name: before[name] for name in sent}


def test_files_that_no_loader_reads_are_not_vouched_for(out: Path, hub: Hub, connect: Connect) -> None:
    """They lay there when verify ran: a page of it holds the places of this machine."""
    write(out / "report.html", str(out))
    assert passes_exact(out)
    connect(hub, hub.token)
    assert dry_run(out).skipped_files == ("report.html",)


def test_licence_of_the_source_goes_along(source: Path, tmp_path: Path, hub: Hub, connect: Connect) -> None:
    write(source / "LICENSE", "MIT")
    out = tmp_path / "licensed"
    int8convert.quantize(source, out, on_event=lambda event: None)
    assert passes_exact(out)
    connect(hub, hub.token)
    report = dry_run(out)
    assert "LICENSE" in report.sent and report.skipped_files == ()


def test_unverified_output_is_sent_as_the_conversion_wrote_it(out: Path, hub: Hub, connect: Connect) -> None:
    connect(hub, hub.token)
    strange = {"modeling_x.py", "pytorch_model.bin", "notes.md", "special_tokens_map.json", "int8convert/notes"}
    for name in strange:
        write(out / name, "x")
    with pytest.raises(UnverifiedError, match="not verified yet"):
        dry_run(out)

    report = int8convert.upload(out, REPO, allow_unverified=True)

    assert set(report.skipped_files) == strange and not report.is_verified
    assert hub.repo(REPO).files.keys() == FILES - {VERIFY_FILE}
    assert "**Not verified**" in hub.repo(REPO).files["README.md"].decode()


def test_unverified_output_leaves_carried_files_that_were_changed(verified: Path, hub: Hub) -> None:
    """And the verify.json that passed other bytes than these."""
    write(verified / "tokenizer_config.json", "private")
    report = int8convert.upload(verified, REPO, allow_unverified=True)
    assert set(report.skipped_files) == {"tokenizer_config.json", VERIFY_FILE} and not report.is_verified
    assert hub.repo(REPO).files.keys() == FILES - {"tokenizer_config.json", VERIFY_FILE}


RECORDED: dict[str, tuple[Any, bool]] = {
    "failed": ({"is_passed": False, "failures": ["beside: x"]}, True),
    "failed on other bytes": ({"is_passed": False, "failures": ["x"], "files": {"config.json": "0" * 64}}, False),
    "failed without a reason": ({"is_passed": False, "failures": []}, False),
    "not as verify writes it": ({"text": 7}, False),
}


@pytest.mark.parametrize("name", RECORDED)
def test_report_is_sent_only_if_it_is_about_these_bytes(name: str, verified: Path) -> None:
    entries, is_sent = RECORDED[name]
    change(verified / VERIFY_FILE, **entries)
    report = dry_run(verified, allow_unverified=True)
    assert (VERIFY_FILE in report.sent, VERIFY_FILE in report.skipped_files) == (is_sent, not is_sent)


def test_report_that_cannot_be_read_is_left(verified: Path) -> None:
    write(verified / VERIFY_FILE, "{")
    assert dry_run(verified, allow_unverified=True).skipped_files == (VERIFY_FILE,)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json", MANIFEST_NAME, VERIFY_FILE])
@pytest.mark.parametrize("allow_unverified", [False, True])
def test_file_that_changes_while_the_hub_is_asked_is_not_sent(
    name: str, allow_unverified: bool, verified: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = Branch.find

    def change_and_find(self: Branch, *arguments: Any) -> Any:
        change(verified / name, private=True)
        return find(self, *arguments)

    monkeypatch.setattr(Branch, "find", change_and_find)
    with pytest.raises(CorruptFileError, match=r"was changed after it was compared"):
        int8convert.upload(verified, REPO, allow_unverified=allow_unverified)
    assert hub.repo(REPO).files == {}


def test_card_of_the_user_s_own_is_sent_as_it_is(verified: Path, hub: Hub) -> None:
    write(verified / "README.md", "# mine")
    report = int8convert.upload(verified, REPO)
    assert report.keeps_card == "output" and hub.repo(REPO).files["README.md"] == b"# mine"


LINKS = ["assets/key", "int8convert/key", "notes.txt", "README.md", "tokenizer.json", "model.safetensors", "assets"]


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("allow_unverified", [False, True])
def test_link_out_of_the_output_is_refused(name: str, allow_unverified: bool, verified: Path) -> None:
    private = write(verified.parent / "private" / "key", "a private key")
    (verified / name).unlink(missing_ok=True)
    (verified / name).parent.mkdir(exist_ok=True)
    (verified / name).symlink_to(private.parent if name == "assets" else private)
    if name != "README.md":  # with a card of our own, opening the output to write one would refuse the link
        write(verified / "README.md", "# mine")
    with pytest.raises(OutputError) as caught:
        dry_run(verified, allow_unverified=allow_unverified)
    assert f"'{name}' in " in caught.value.message and "a link" in caught.value.message
    needed = name in ("notes.txt", "tokenizer.json", "model.safetensors")
    assert caught.value.hint == f"{'replace the link with a copy of the file' if needed else 'remove it'}"


def test_own_folder_that_is_a_link_is_refused(verified: Path) -> None:
    (verified / "int8convert").rename(verified.parent / "elsewhere")
    (verified / "int8convert").symlink_to(verified.parent / "elsewhere")
    with pytest.raises(Int8ConvertError):
        dry_run(verified)


def test_link_within_the_output_is_sent_as_the_file_it_leads_to(out: Path, hub: Hub, connect: Connect) -> None:
    (out / "tokenizer.json").rename(out / "tokenizer-1.md")
    (out / "tokenizer.json").symlink_to("tokenizer-1.md")
    assert passes_exact(out)
    connect(hub, hub.token)
    int8convert.upload(out, REPO)
    assert hub.repo(REPO).files["tokenizer.json"] == (out / "tokenizer-1.md").read_bytes()


@pytest.mark.parametrize("name", ["pipe", "assets/pipe", "int8convert/pipe"])
def test_pipe_is_refused_and_not_opened(name: str, verified: Path) -> None:
    (verified / name).parent.mkdir(exist_ok=True)
    os.mkfifo(verified / name)
    with pytest.raises(OutputError, match=f"'{name}' in .* is a pipe"):
        dry_run(verified)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_card_that_is_no_file_is_refused_before_anything_is_sent(
    make: Callable[[Path], None], verified: Path, hub: Hub
) -> None:
    make(verified / "README.md")
    with pytest.raises(OutputError, match=r"README\.md' .*is a (pipe|directory)"):
        int8convert.upload(verified, REPO, on_event=lambda event: None)
    with pytest.raises(KeyError):
        hub.repo(REPO)


def test_file_that_changes_while_others_are_sent_is_not_sent(verified: Path, hub: Hub) -> None:
    def change_config(event: Any) -> None:
        write(verified / "model.safetensors", "other weights")

    with pytest.raises(CorruptFileError, match=r"'model\.safetensors' was changed after it was compared"):
        int8convert.upload(verified, REPO, on_event=change_config)
    assert hub.repo(REPO).files == {}


def test_manifest_that_is_not_understood_ends_in_two_lines(verified: Path) -> None:
    manifest = json.loads((verified / MANIFEST_NAME).read_text())
    manifest["conversion"]["source"]["files"]["model.safetensors"]["n_bytes"] = 10**400
    write(verified / MANIFEST_NAME, manifest)
    with pytest.raises(CorruptFileError, match=r"is not understood: .*n_bytes") as caught:
        dry_run(verified, allow_unverified=True)
    assert caught.value.state == "nothing was sent"


def test_report_of_an_older_version_vouches_for_too_little(verified: Path) -> None:
    content = json.loads((verified / VERIFY_FILE).read_text())
    names = ("config.json", MANIFEST_NAME)
    change(verified / VERIFY_FILE, files={name: content["files"][name] for name in names})
    with pytest.raises(UnverifiedError, match=r"'model\.safetensors' is not the one that was verified"):
        dry_run(verified)


def places_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all entries of a JSON value; of lists, the first two."""
    if path:
        yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from places_in(entry, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


@pytest.mark.parametrize("name", [VERIFY_FILE, MANIFEST_NAME, "config.json"])
@pytest.mark.parametrize("nonsense", [10**400, "x", [1], {"a": None}], ids=["digits", "text", "list", "object"])
def test_card_of_nonsense_says_what_is_known_or_ends_in_two_lines(
    name: str, nonsense: Any, measured_once: Path, copy: Copy
) -> None:
    """Forty entries, one at a time; what is spoiled agrees with the sha256 that verify.json names."""
    out = copy(measured_once)
    content = json.loads((out / name).read_text())
    recorded = json.loads((out / VERIFY_FILE).read_text())
    places = list(places_in(content))
    for path in random.Random(name).sample(places, min(40, len(places))):
        write(out / name, replaced(content, path, nonsense))
        if name != VERIFY_FILE:
            digest = hashlib.sha256((out / name).read_bytes()).hexdigest()
            write(out / VERIFY_FILE, {**recorded, "files": {**recorded["files"], name: digest}})
        with contextlib.suppress(Int8ConvertError):
            assert make_card(read_finished(out), REPO, inspect(out)).startswith("---")


def test_gate_without_a_limit_is_a_number(out: Path) -> None:
    write_report(
        verify(out, text=Text(n_sequences=2, length=16), execution=Execution("cpu"), gates=Gates(math.inf, 9.0))
    )
    assert "--max-dnll inf" in make_card(read_finished(out), REPO, inspect(out))
