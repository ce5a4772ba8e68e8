"""What `quantize` tells of a run, of one that had less to do, and of one that is only planned."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import int8convert
from int8convert.cli import console, progress
from int8convert.conversion import device
from int8convert.events import PlanMade, ShardStarted, SourceFetched, TensorKept
from int8convert.text import format_bytes
from tests.cli.conftest import Run
from tests.tools.hub_repositories import NAME, add, opt_pickles
from tests.tools.hub_server.fixtures import Connect, connect, hub
from tests.tools.hub_server.hub import Hub
from tests.tools.tiny_models import save_checkpoint

__all__ = ["connect", "hub"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_checkpoint("opt", tmp_path / "source", max_shard_size="60KB")


@pytest.fixture
def commit(hub: Hub, connect: Connect, tmp_path: Path) -> str:
    """Of the repository NAME."""
    add(hub, opt_pickles(tmp_path))
    connect(hub, hub.token)
    return str(hub.repo(NAME).refs["main"])


def test_finished_one_says_that_nothing_was_read(run: Run, source: Path, tmp_path: Path) -> None:
    run("quantize", source, tmp_path / "out")
    code, out, _ = run("quantize", source, tmp_path / "out")
    assert code == 0 and "/s" not in out
    assert out.splitlines()[1].endswith(" in 3 shards; 3 of 3 were done already, nothing was read")

    report = json.loads(run("quantize", source, tmp_path / "out", "--json")[1])
    assert (report["n_done_shards"], report["n_read_now_bytes"]) == (3, 0)


def test_resumed_one_counts_what_it_read_itself(run: Run, source: Path, tmp_path: Path) -> None:
    plan = int8convert.plan(source)
    run("quantize", source, tmp_path / "out")
    (tmp_path / "out" / plan.shards[1].file_name).unlink()
    n_bytes = plan.shards[1].n_read_bytes
    _, out, err = run("quantize", source, tmp_path / "out", "--check")
    now = f"2 of 3 were done already, {format_bytes(n_bytes)} were read now, "
    assert re.search(rf"in 3 shards; {now}[\d.]+ s on cpu, [\d.]+ [kM]B/s\n", out)
    lines = [line for line in err.splitlines() if line.startswith("shard ")]
    assert lines[0] == f"shard 1 of 3: {plan.shards[0].file_name} is done from an earlier run, sha256 checked"
    assert re.fullmatch(r"shard 2 of 3: \S+ [\d.]+ kB written, [\d.]+ [kM]B/s read", lines[2])


def test_rate_leaves_out_shards_that_were_done(run: Run, source: Path, tmp_path: Path) -> None:
    run("quantize", source, tmp_path / "out")
    events: list[object] = []
    int8convert.quantize(source, tmp_path / "out", on_event=events.append)
    counter = progress._Counter()
    for event in events * 2:  # as if it began again, for weights that are not finite
        counter.add(event)  # type: ignore[arg-type]
    assert (counter.read_bytes, counter.passed_bytes) == (0, int8convert.plan(source).n_read_bytes)


def test_json_tells_commit_and_reader_and_every_note(
    run: Run, commit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "the disk has room for two of its shards beside the output"
    plan = json.loads(run("quantize", NAME, "--dry-run", "--json")[1])
    assert (plan["commit"], plan["reader"], plan["reader_reason"]) == (commit, "download", reason)

    _, _, err = run("quantize", NAME, tmp_path / "said")
    report = json.loads(run("quantize", NAME, tmp_path / "out", "--json")[1])
    assert (report["commit"], report["reader"], report["reader_reason"]) == (commit, "download", reason)
    assert report["notes"] == re.findall("note: (.*)", err)
    assert report["notes"][0].startswith(f"reading {NAME} at {commit[:12]} by download: {reason}")

    again = json.loads(run("quantize", NAME, tmp_path / "out", "--json")[1])
    assert (again["reader"], again["notes"]) == (None, []), "nothing was read"

    monkeypatch.chdir(tmp_path)
    gone = json.loads(run("quantize", NAME, "--upload", "me/x", "--json")[1])
    kept = json.loads(run("quantize", NAME, "kept", "--upload", "me/x", "--keep", "--json")[1])
    assert (gone["out"], kept["out"]) == (None, "kept")


def test_tensors_of_the_plan_in_json_are_in_its_order(run: Run, source: Path) -> None:
    plan = json.loads(run("quantize", source, "--dry-run", "--json")[1])
    assert list(plan["tensors"]) == [tensor.output_name for tensor in int8convert.plan(source).tensors]


def test_cpu_is_no_news_without_a_gpu(run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_NVIDIA", tmp_path / "nothing")
    assert "quantizing on" not in run("quantize", source, tmp_path / "a")[2]
    monkeypatch.setattr(device, "_NVIDIA", tmp_path)
    assert "note: quantizing on cpu: " in run("quantize", source, tmp_path / "b")[2]


def test_dry_run_tells_what_the_reader_would_be_and_what_is_to_be_fetched(
    run: Run, commit: str, tmp_path: Path
) -> None:
    _, out, _ = run("quantize", NAME, "--dry-run")
    assert re.search(r"--reader download: .* more memory; chosen: the disk has room for two of its shards", out)
    _, out, _ = run("quantize", NAME, "--dry-run", "--reader", "stream")
    assert re.search(r"--reader stream: .* more memory; chosen\n", out)

    run("quantize", NAME, tmp_path / "out", "--cache-dir", tmp_path / "cache")
    _, out, _ = run("quantize", NAME, "--dry-run", "--cache-dir", tmp_path / "cache")
    assert "network: nothing to fetch, everything is in the cache\n" in out and "0 B; " not in out


def test_dry_run_of_an_upload_tells_its_disk_and_asks_nothing_of_the_repository(
    run: Run, commit: str, hub: Hub
) -> None:
    hub.log.clear()
    _, out, _ = run("quantize", NAME, "--upload", "me/x", "--dry-run", "--reader", "stream")
    plan = json.loads(run("quantize", NAME, "--upload", "me/x", "--dry-run", "--json", "--reader", "stream")[1])
    disk = format_bytes(plan["disk_bytes"])
    assert plan["disk_bytes"] > 20_000_000 and f"--reader stream: {disk} of disk" in out
    assert (
        f"--upload: at most {disk} of the output on this disk at a time; whether {hub.endpoint}/me/x accepts it" in out
    )
    assert plan["upload"] == {"url": f"{hub.endpoint}/me/x", "commit": None}
    assert not [request for request in hub.log.requests() if "me/x" in request.path]

    code, _, err = run("quantize", NAME, "--upload", "me/x", "--dry-run", "--max-disk", "1MB")
    assert code == 1 and "--max-disk allows" in err
    _, out, _ = run("quantize", NAME, "out", "--upload", "me/x", "--keep", "--dry-run")
    assert re.search("--upload: .* stay here; whether", out)


def test_dry_run_of_a_tiny_model_has_no_noise(run: Run, source: Path) -> None:
    _, out, _ = run("quantize", source, "--dry-run")
    assert "time: under 0.1 s of arithmetic" in out


@pytest.mark.parametrize("option", ["--quiet", "--json"])
def test_result_that_finds_no_room_is_two_lines(option: str, source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "int8convert", "quantize", str(source), str(tmp_path / "out"), option]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    first, second = done.stderr.splitlines()
    assert done.returncode == 1
    assert first == "error: the result cannot be written to stdout: No space left on device"
    assert second.startswith("hint: the command has done its work")


@pytest.mark.parametrize(("arguments", "code"), [(["inspect", "/nowhere"], 1), (["inspect"], 2)])
def test_error_that_finds_no_room_on_stdout_is_still_the_error(arguments: list[str], code: int) -> None:
    command = [sys.executable, "-m", "int8convert", *arguments, "--json"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert "'/nowhere' is not a checkpoint directory" in done.stderr or "Missing argument" in done.stderr


def test_names_in_tables_stay_whole_on_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "stdout", Console(highlight=False, soft_wrap=True, width=60))
    name = "model.decoder.layers.1.self_attn.out_proj.weight"
    console.print_table("Title", ("kind", "why", "worst tensor"), [("k_proj", "left alone by its loader", name)])
    out = capsys.readouterr().out
    assert name in out and "left alone" not in out


def test_bar_and_percentage_outlast_numbers_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {}
    for width in (60, 80, 110):
        screen = Console(file=io.StringIO(), width=width, force_terminal=True, soft_wrap=True)
        monkeypatch.setattr(progress, "stderr", screen)
        with progress._LiveBar("reading the model class") as bar:
            sink = progress._Renderer("", bar)
            sink(PlanMade("opt", None, "OPTForCausalLM", 14, 900_000, 14, 500_000, 0.9))
            sink(ShardStarted(1, 14, "model-00002-of-00014.safetensors"))
            sink(SourceFetched("model-00001-of-00014.safetensors", 59_800_000))
            sink(TensorKept("embed.weight", "embed.weight", 50, 300_000, 300_000, "F16", "not a matrix product"))
        drawn = screen.file.getvalue().replace("\r", "\n")  # type: ignore[attr-defined]
        frames = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", drawn).splitlines()
        shown[width] = [frame for frame in frames if "shard 2 of 14" in frame][-1]
        assert "━━━━" in shown[width] and " % " in shown[width]
        assert "…" not in shown[width] and "/s in" in shown[width]
    assert "fetched" in shown[110] and "fetched" not in shown[80]
    assert "written" in shown[80] and "written" not in shown[60]


def test_terminal_that_cannot_redraw_gets_lines(source: Path, tmp_path: Path) -> None:
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "int8convert", "quantize", str(source), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=child, env={**os.environ, "TERM": "dumb"}):
        os.close(child)
        shown = b""
        while True:
            try:
                shown += os.read(parent, 65536)
            except OSError:  # a closed pseudo-terminal ends with EIO, not with an empty read
                break
    os.close(parent)
    assert re.findall(rb"shard (\d) of 3: ", shown) == [b"1", b"2", b"3"]
