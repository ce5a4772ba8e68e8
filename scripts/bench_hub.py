"""Measure how well fetching from the Hub and converting overlap, and what the stream and the download can take.

How it goes:
1. A checkpoint of random weights is served by the tests' Hub, on loopback, over a line of so many MB/s.
2. In turns, each in a process of its own: its shards are streamed and thrown away (`fetch`); it is converted from the
   disk (`convert`); it is converted from the Hub, by stream and by download. Model map and page cache are warm.
3. Wall time of the last two over the larger of the first two alone is what overlapping leaves: 1 would be perfect.

The server computes on the same cores as what is measured. Peak anonymous memory is that of all processes of a command.

Left out on purpose: the latency and the errors of a real network.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from bench_convert import WORK_PARENT, describe_machine
from bench_rounds import ensure_checkpoint
from measure_command import Measurement, measure_command, warm_page_cache
from tests.hub_server.hub import Hub

NAME = "bench/model"
FETCH = """
import sys
from int8convert.checkpoint.hub.shard_stream import ShardStream
from int8convert.checkpoint.source import open_source
source = open_source(sys.argv[1])
stream = ShardStream(source.shards, [shard.n_bytes for shard in source.shards], 48 << 20)
for shard in source.shards:
    stream.finish(shard)
stream.close()
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="opt-1.3b", help="of the checkpoint, see make_checkpoint.py")
    parser.add_argument("--rates", default="50,100,200,0", help="MB/s of the line; 0 is no limit")
    parser.add_argument("--json", type=Path, help="write all numbers into this file, too")
    return parser.parse_args()


def run(command: list[str], environment: dict[str, str]) -> Measurement:
    """A command with this environment; the program ends if it fails."""
    with tempfile.TemporaryFile() as log:
        before = dict(os.environ)
        os.environ.update(environment)
        try:
            measured = measure_command(command, log)
        finally:
            os.environ.clear()
            os.environ.update(before)
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
    commands = {
        "fetch": [python, "-c", FETCH, NAME],
        "convert": [*quantize, str(source), str(out)],
        "stream": [*quantize, NAME, str(out), "--reader", "stream"],
        "download": [*quantize, NAME, str(out), "--reader", "download"],
    }
    found: dict[str, dict[str, object]] = {}
    for name, command in commands.items():
        warm_page_cache(source)
        found[name] = asdict(run(command, hub.client_environment()))
        shutil.rmtree(out, ignore_errors=True)
    return found


def main() -> None:
    arguments = parse_arguments()
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
            print(f"{arguments.shape}, {n_bytes / 1e9:.2f} GB; seconds, and over the larger of the first two alone")
            print("| line MB/s | fetch | convert | stream | download | memory of stream | of download |")
            print("|---|---|---|---|---|---|---|")
            for rate in (float(text) for text in arguments.rates.split(",")):
                found = rates[f"{rate:g}"] = measure_rate(rate, source, work, hub)
                print_row(rate, found)
            report["rates"] = rates
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def print_row(rate: float, found: dict[str, dict[str, object]]) -> None:
    seconds = {name: float(str(measured["wall_s"])) for name, measured in found.items()}
    alone = max(seconds["fetch"], seconds["convert"])
    memory = {name: float(str(measured["peak_anonymous_bytes"])) / 1e6 for name, measured in found.items()}
    print(
        f"| {rate:g} | {seconds['fetch']:.1f} | {seconds['convert']:.1f} "
        + "".join(f"| {seconds[name]:.1f} ({seconds[name] / alone:.2f}x) " for name in ("stream", "download"))
        + f"| {memory['stream']:.0f} MB | {memory['download']:.0f} MB |",
        flush=True,
    )


if __name__ == "__main__":
    subprocess.run(["sync"], check=False)
    main()
