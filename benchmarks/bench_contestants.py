"""Who takes part in `bench_convert`, with what each needs, and the command line that makes it convert a checkpoint.

A peer is one file in `bench_peers`, run by the Python that has it; which of its packages that environment holds, and in
which versions, is asked in a process of its own.

Left out on purpose: versions in the pip lines. The results say which version ran.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PEERS = Path(__file__).resolve().with_name("bench_peers")
OURS, AGAIN, COPY, DISK = "int8convert", "int8convert_again", "cp", "disk"
_OUR_PACKAGES = ("int8convert", "torch", "transformers", "numba")


@dataclass(frozen=True)
class Contestant:
    """One command to measure. It can run where the first of `packages` is installed; `pip` is the line that does so."""

    name: str
    label: str
    packages: tuple[str, ...]
    pip: str


CONTESTANTS = (
    Contestant(OURS, "int8convert, new model", _OUR_PACKAGES, "./scripts/setup"),
    Contestant(AGAIN, "int8convert, known model", _OUR_PACKAGES, "./scripts/setup"),
    Contestant(COPY, "cp -r", (), ""),
    Contestant(DISK, "the disk alone: half of SRC", (), ""),
    Contestant(
        "transformers_bitsandbytes",
        "transformers + bitsandbytes",
        ("bitsandbytes", "transformers", "torch", "accelerate"),
        "pip install bitsandbytes transformers accelerate",
    ),
    Contestant(
        "torchao_int8",
        "torchao int8",
        ("torchao", "transformers", "torch", "accelerate"),
        "pip install torchao transformers accelerate",
    ),
    Contestant(
        "optimum_quanto",
        "optimum-quanto qint8",
        ("optimum-quanto", "transformers", "torch", "accelerate"),
        "pip install optimum-quanto transformers accelerate",
    ),
    Contestant(
        "llm_compressor",
        "llm-compressor, 2 workers",
        ("llmcompressor", "compressed-tensors", "transformers", "torch"),
        "pip install llmcompressor  # in an environment of its own: it pins an older transformers",
    ),
)


@dataclass(frozen=True)
class Entrant:
    """A contestant that can run here: with which Python, and which versions that one has."""

    contestant: Contestant
    python: Path
    versions: dict[str, str]


def find_entrants(wanted: list[Contestant], pythons: dict[str, Path]) -> tuple[list[Entrant], list[Contestant]]:
    """Split the wanted contestants into those that can run and those that are not installed."""
    entrants, missing = [], []
    for contestant in wanted:
        python = pythons.get(contestant.name, Path(sys.executable))
        versions = read_versions(python, contestant.packages) if contestant.packages else {}
        if contestant.packages and contestant.packages[0] not in versions:
            missing.append(contestant)
        else:
            entrants.append(Entrant(contestant, python, versions))
    return entrants, missing


def read_versions(python: Path, packages: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of those `packages` that are installed in the environment of `python`."""
    program = (
        "import importlib.metadata as m, json, sys\n"
        "found = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps({p: found[p] for p in sys.argv[1:] if p in found}))"
    )
    answer = subprocess.run([str(python), "-c", program, *packages], check=True, capture_output=True, text=True)
    versions: dict[str, str] = json.loads(answer.stdout)
    return versions


def build_command(contestant: Contestant, python: Path, src: Path, out: Path, cache: Path) -> list[str]:
    """Return the command line that converts, or copies, the checkpoint `src` into `out`.

    `cache` is where int8convert remembers models it has seen.
    """
    if contestant.name == COPY:
        return ["cp", "-r", str(src), str(out)]
    if contestant.name in (OURS, AGAIN):
        command = [str(python.parent / "int8convert"), "quantize", str(src), str(out), "--overwrite"]
        return ["env", f"XDG_CACHE_HOME={cache}", *command]
    return [str(python), str(PEERS / f"{contestant.name}.py"), str(src), str(out)]
