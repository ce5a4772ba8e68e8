"""Every crafted checkpoint ends in the error written beside it: two clean lines, nothing run, nothing outside read."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from int8convert.errors import Int8ConvertError, SourceError
from int8convert.inspection import inspect
from tests.tools.attacks.make_attacks import make_attack
from tests.tools.attacks.open_measured import (
    RUNS_CODE,
    MeasuringProcesses,
    check_lines,
    check_source,
    open_checkpoint,
    time_limit,
    watched_events,
)
from tests.tools.attacks.registry import ATTACKS, CANARY, SECRET, Attack, prepare, write_config

LIGHT = [attack for attack in ATTACKS.values() if not attack.is_heavy]
HEAVY = [pytest.param(attack, id=attack.name) for attack in ATTACKS.values() if attack.is_heavy]

MAX_PEAK_BYTES = 250_000_000
"""What may be taken beside twenty times what the files hold on the disk."""

MAX_WALL_S = 40
"""The slowest takes 14 s on two shared cores: 30 MB of pickle in steps of two bytes."""


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes | str]]:
    """What is in a folder: types, sizes, contents; nothing is opened that could block or is large."""
    found: dict[str, tuple[int, int, bytes | str]] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content: bytes | str = ""
        if path.is_symlink():
            content = os.readlink(path)
        elif stat.S_ISREG(status.st_mode) and status.st_size < 10_000_000:
            content = path.read_bytes()
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_size, content)
    return found


@pytest.mark.parametrize("attack", LIGHT, ids=lambda attack: attack.name)
def test_attack_ends_as_expected(attack: Attack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make_attack(attack, tmp_path / attack.name)
    before = snapshot(tmp_path)
    monkeypatch.chdir(tmp_path)
    with time_limit(MAX_WALL_S), watched_events() as events:
        if attack.error is None:
            check_source(open_checkpoint(checkpoint))
        else:
            with pytest.raises(attack.error, match=attack.match or ".") as caught:
                open_checkpoint(checkpoint)
    assert not (tmp_path / CANARY).exists(), "code of the attack was run"
    assert snapshot(tmp_path) == before, "something was created or changed"
    assert not [event for event in events if event[0] in RUNS_CODE]
    assert not read_outside(events, tmp_path, checkpoint)
    if attack.error is not None:
        check_lines(caught.value.message, caught.value.hint)
        assert SECRET.decode() not in caught.value.message + caught.value.hint


def read_outside(events: list[tuple[str, str]], folder: Path, checkpoint: Path) -> list[str]:
    """Files that were opened and belong to this machine, not to the checkpoint."""
    blobs = [folder / checkpoint.parent.name / cache / "blobs" for cache in ("cache", "hub")]
    allowed = [Path(os.path.realpath(checkpoint)), *blobs]
    opened = [Path(os.path.realpath(path)) for kind, path in events if kind == "open" and not path.isdigit()]
    private = [Path("/etc"), Path("/dev/zero"), folder]
    return [
        str(path)
        for path in opened
        if any(path.is_relative_to(p) for p in private) and not any(path.is_relative_to(a) for a in allowed)
    ]


@pytest.fixture(scope="module")
def measuring() -> Iterator[MeasuringProcesses]:
    with MeasuringProcesses() as processes:
        yield processes


@pytest.mark.parametrize("attack", HEAVY)
def test_heavy_attack_takes_memory_and_time_in_proportion(
    attack: Attack, tmp_path: Path, measuring: MeasuringProcesses
) -> None:
    checkpoint = make_attack(attack, tmp_path / attack.name)
    before = snapshot(tmp_path)
    stored_bytes = sum(path.lstat().st_blocks * 512 for path in checkpoint.iterdir())
    outcome = measuring.open(checkpoint, tmp_path)
    assert outcome.error == (attack.error.__name__ if attack.error else ""), outcome.message
    if attack.error is not None:
        assert re.search(attack.match, outcome.message)
        check_lines(outcome.message, outcome.hint)
    assert outcome.peak_bytes < 20 * stored_bytes + MAX_PEAK_BYTES
    assert outcome.wall_s < MAX_WALL_S
    assert not (tmp_path / CANARY).exists(), "code of the attack was run"
    assert snapshot(tmp_path) == before, "something was created or changed"


@pytest.mark.parametrize("name", [name for name in ATTACKS if name.startswith("config_")])
def test_inspection_prints_clean_text_of_any_config(name: str, tmp_path: Path) -> None:
    checkpoint = make_attack(ATTACKS[name], tmp_path / name)
    try:
        inspection = inspect(checkpoint)
    except Int8ConvertError as error:
        check_lines(error.message, error.hint)
        return
    for text in (*inspection.architectures, *inspection.skip_modules, inspection.quant_method or ""):
        assert text == "" or (text.isprintable() and len(text) < 600)
    json.dumps(inspection.to_json())


@pytest.mark.parametrize("block", [{"llm_int8_threshold": 10**400}, {"llm_int8_skip_modules": [{}, "\x1b[2J", 7]}])
def test_inspection_survives_an_odd_quantization_block(block: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = prepare(tmp_path / "x")
    write_config(checkpoint.parent, {"architectures": ["\x1b"], "quantization_config": {**block, "quant_method": {}}})
    inspection = inspect(checkpoint)
    assert all(text.isprintable() for text in (*inspection.architectures, *inspection.skip_modules))
    assert inspection.quant_method is None and inspection.threshold is None


def test_disk_that_fails_is_an_error_of_two_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = prepare(tmp_path / "x")

    def fail(*arguments: object, **options: object) -> object:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(checkpoint / "model\n.safetensors"))

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(
        SourceError, match=r"'model\\n\.safetensors' in .* cannot be read: Input/output error"
    ) as caught:
        open_checkpoint(checkpoint)
    check_lines(caught.value.message, caught.value.hint)


def test_file_in_the_way_of_our_own_folder_is_not_carried(tmp_path: Path) -> None:
    checkpoint = prepare(tmp_path / "x")
    (checkpoint / "int8convert").write_text("in the way")
    assert [path.name for path in open_checkpoint(checkpoint).auxiliary_files] == ["tokenizer.json"]


def test_corpus_is_the_same_every_time(tmp_path: Path) -> None:
    for attack in LIGHT:
        make_attack(attack, tmp_path / "a" / attack.name)
        make_attack(attack, tmp_path / "b" / attack.name)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_canary_sings_when_code_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pickles do what they are made for: an ordinary unpickler runs them, and what watches for that notices."""
    import pickle

    from tests.tools.attacks.pickles import RUNS

    monkeypatch.chdir(tmp_path)
    for name in ("reduce", "reduce_eval", "inst", "obj", "stack_global"):
        with watched_events() as events:
            pickle.loads(b"\x80\x04" + RUNS[name] + b".")
        assert (tmp_path / CANARY).exists(), name
        assert {event[0] for event in events} & RUNS_CODE, name
        (tmp_path / CANARY).unlink()


def test_links_are_what_lets_a_reader_out(tmp_path: Path) -> None:
    """What watches for reading outside notices it: the shard of this attack, opened by its name, is the secret."""
    checkpoint = make_attack(ATTACKS["shard_that_is_a_link_outside"], tmp_path / "x")
    with watched_events() as events:
        (checkpoint / "model.safetensors").read_bytes()
    assert read_outside(events, tmp_path, checkpoint)


def test_every_error_is_of_our_tree() -> None:
    assert all(attack.error is None or issubclass(attack.error, Int8ConvertError) for attack in ATTACKS.values())
