"""Measure how well fetching from the Hub and converting overlap, and what the stream and the download can take.

How it goes:
1. A checkpoint of random weights is served by the tests' Hub, on loopback, over a line of so many MB/s.
2. In turns, each in a process of its own: its shards are fetched and thrown away, by each reader; it is converted from
   the disk; it is converted from the Hub, by each reader. Model map and page cache are warm.
3. Wall time of a conversion from the Hub over the larger of fetching and converting alone is what overlapping leaves: 1
   would be perfect.

With `--plan` none of that: the plan of a repository of facebook/opt-66b's shape is timed, what it fetched is counted.

The server computes on the same cores as what is measured. Peak anonymous memory is that of all processes of a command.

Left out on purpose: the latency and the errors of a real network.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks.bench_convert import WORK_PARENT, describe_machine
from benchmarks.bench_rounds import ensure_checkpoint
from benchmarks.hub_look_alike import NAME as OPT_66B
from benchmarks.hub_look_alike import add_opt_66b
from scripts.measure_command import Measurement, measure_command, warm_page_cache
from tests.tools.hub_server.hub import Hub

NAME = "bench/model"
READERS = ("stream", "download")
FETCH = """
import sys
from pathlib import Path
from int8convert.hub.download import ShardDownload
from int8convert.hub.stream import ShardStream
from int8convert.sources import open_source
name, reader, folder = sys.argv[1:]
shards = open_source(name).shards
if reader == "stream":
    access = ShardStream(shards, [shard.n_bytes for shard in shards], 48 << 20)
else:
    access = ShardDownload(shards, Path(folder))
for shard in shards:
    access.finish(shard)
access.close()
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="opt-1.3b", help="of the checkpoint, see make_checkpoint.py")
    parser.add_argument("--rates", default="50,100,200,0", help="MB/s of the line; 0 is no limit")
    parser.add_argument("--plan", action="store_true", help="time the plan of a 66B repository instead")
    parser.add_argument("--json", type=Path, help="write all numbers into this file, too")
    return parser.parse_args()


def run(command: list[str], environment: dict[str, str]) -> Measurement:
    """A command with this environment; the program ends if it fails."""
    with tempfile.TemporaryFile() as log:
        measured = measure_command(command, log, environment=environment)
        if measured.exit_code:
            log.seek(0)
            sys.exit(log.read().decode())
    return measured


def measure_rate(rate: float, source: Path, work: Path, hub: Hub) -> dict[str, dict[str, object]]:
    """All commands at one speed of the line."""
    hub.bandwidth.bytes_per_s = rate * 1e6 or None
    python = sys.executable
    out = work / "out"
    quantize = [python, "-m", "int8convert", "quantize", "--quiet"]
    commands = {"convert": [*quantize, str(source), str(out)]}
    for reader in READERS:
        commands[f"fetch by {reader}"] = [python, "-c", FETCH, NAME, reader, str(out)]
        commands[reader] = [*quantize, NAME, str(out), "--reader", reader]
    found: dict[str, dict[str, object]] = {}
    for name, command in commands.items():
        warm_page_cache(source)
        found[name] = asdict(run(command, hub.client_environment()))
        shutil.rmtree(out, ignore_errors=True)
    return found


def measure_plan() -> None:
    """The plan of a 66B repository: of a model that is new, and of one that is known."""
    WORK_PARENT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WORK_PARENT) as folder, Hub(Path(folder) / "hub") as hub:
        n_bytes = add_opt_66b(hub, Path(folder) / "model")
        environment = hub.client_environment() | {"XDG_CACHE_HOME": str(Path(folder) / "maps")}
        command = [sys.executable, "-m", "int8convert", "quantize", OPT_66B, "--dry-run", "--bandwidth", "50MB"]
        print("| model | wall s | requests | bytes fetched | of the weights |")
        print("|---|---|---|---|---|")
        for model in ("new", "known"):
            hub.log.clear()
            measured = run(command, environment)
            requests, fetched = len(hub.log.requests()), hub.log.sent_bytes()
            print(f"| {model} | {measured.wall_s:.1f} | {requests} | {fetched:,} | 1 in {n_bytes // fetched:,} |")
            shutil.rmtree(Path(environment["HF_HOME"]), ignore_errors=True)


def main() -> None:
    arguments = parse_arguments()
    if arguments.plan:
        measure_plan()
        return
    source = WORK_PARENT / arguments.shape
    ensure_checkpoint(arguments.shape, source)
    n_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    with tempfile.TemporaryDirectory(dir=WORK_PARENT) as folder:
        work = Path(folder)
        report: dict[str, object] = {"machine": describe_machine(work), "shape": arguments.shape, "n_bytes": n_bytes}
        with Hub(work / "hub") as hub:
            hub.add_repo(NAME, {path.name: path for path in source.iterdir() if path.is_file()})
            command = [sys.executable, "-m", "int8convert", "quantize", NAME, "--dry-run"]
            run(command, hub.client_environment())  # the model map, and the small files
            rates = {}
            print(f"{arguments.shape}, {n_bytes / 1e9:.2f} GB; seconds, and over the larger of the two alone")
            print("| line MB/s | convert | fetch by stream | both | fetch by download | both | memory |")
            print("|---|---|---|---|---|---|---|")
            for rate in (float(text) for text in arguments.rates.split(",")):
                found = rates[f"{rate:g}"] = measure_rate(rate, source, work, hub)
                print_row(rate, found)
            report["rates"] = rates
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def print_row(rate: float, found: dict[str, dict[str, object]]) -> None:
    seconds = {name: float(str(measured["wall_s"])) for name, measured in found.items()}
    memory = [float(str(found[reader]["peak_anonymous_bytes"])) / 1e6 for reader in READERS]
    cells = [f"{rate:g}", f"{seconds['convert']:.1f}"]
    for reader in READERS:
        fetch = seconds[f"fetch by {reader}"]
        cells += [f"{fetch:.1f}", f"{seconds[reader]:.1f} ({seconds[reader] / max(fetch, seconds['convert']):.2f}x)"]
    print(f"| {' | '.join(cells)} | {memory[0]:.0f} and {memory[1]:.0f} MB |", flush=True)


if __name__ == "__main__":
    subprocess.run(["sync"], check=False)
    main()
