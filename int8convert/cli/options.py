"""Options that several commands share, and the checks of their values."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import typer

EXIT_CODES = "Exit codes: 0 done; 1 failed; 2 wrong usage; 130 interrupted, 143 terminated."


class UsageError(typer.BadParameter):
    """Wrong usage, in our words alone: typer's own errors begin with "Invalid value for" the option."""

    def format_message(self) -> str:
        return self.message


def check_named(parameter: typer.CallbackParam, value: str | None) -> str | None:
    """Refuse "", which a shell makes of a variable that is not set, and Path of that the current directory."""
    if value == "":
        raise UsageError(f"{parameter.metavar} is empty")
    return value


def check_choice(value: str | None, choices: Iterable[str], option: str | None = None) -> None:
    """Refuse a value that is not one of the choices.

    Args:
        option: its name, where this is not called in a callback of the option.
    """
    *others, last = choices
    if value is not None and value not in (*others, last):
        expected = f"{', '.join(others)} or {last}" if others else last
        raise typer.BadParameter(f"it is {expected}, not {value!r}", param_hint=option)


def given_options(context: typer.Context) -> list[str]:
    """Return the names of the parameters on the command line.

    A variable of the environment does not count: it may not concern this command.
    """
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]


def option_name(parameter: str) -> str:
    """Return the option of a parameter: --max-disk of max_disk."""
    return f"--{parameter.replace('_', '-')}"


def check_needs(context: typer.Context, needs: Mapping[str, str]) -> None:
    """Refuse options that have no effect without another one.

    Args:
        needs: parameter -> the option it needs, as shown: "--upload REPO".
    """
    given = given_options(context)
    for name, needed in needs.items():
        if name in given and needed.split()[0].lstrip("-").replace("-", "_") not in given:
            option = "--public" if name == "private" and context.params[name] is False else option_name(name)
            raise UsageError(f"{option} needs {needed}")


def check_upload_options(context: typer.Context) -> None:
    """Refuse options of --upload without it, and those that contradict each other."""
    check_needs(context, dict.fromkeys(("keep", "max_disk", "private"), "--upload REPO"))
    if {"keep", "max_disk"} <= set(given_options(context)):
        raise UsageError("--max-disk limits the local disk; --keep keeps all of the output: give one of them")


def check_remote(option: str, path: str, what: str) -> None:
    """Refuse an option of a repository on the Hub where a directory is named; `what` is what the command takes."""
    if Path(path).exists():
        raise UsageError(f"{option} applies to Hub {what} only; {path!r} is a local path")


def check_size(size: str | None) -> str | None:
    from int8convert.text import parse_size

    try:
        parse_size(size)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return size


def check_bandwidth(rate: str | None) -> str | None:
    """Return bytes a second, which must have a unit: a bare 50 may be meant as MB, or as Mbit."""
    from int8convert.text import parse_size

    if rate is None:
        return None
    size = rate.strip().removesuffix("/s")
    try:
        parse_size(size)
    except ValueError:
        size = ""
    if not re.search(r"[Bb]$", size):
        raise UsageError(f"--bandwidth must be bytes a second, such as 50MB, not {rate!r}; 100 Mbit/s are 12.5MB")
    return size


def parse_percent(value: str) -> float:
    """Return the number of "5" or "5%"; typer also passes defaults, which are numbers."""
    try:
        percent = float(str(value).strip().removesuffix("%"))
    except ValueError:
        percent = -1.0
    if not 0 <= percent <= 100:
        raise typer.BadParameter(f"it is from 0 to 100 percent, not {value!r}")
    return percent


def check_device(device: str) -> str:
    from int8convert.conversion.device import check_device_name

    try:
        check_device_name(device)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return device


def _check_reader(name: str) -> str:
    from int8convert.conversion.readers import Reader

    check_choice(name, Reader)
    return name


def turn_off_xet(is_asked: bool) -> None:
    """Obey --no-xet. huggingface_hub reads the variable when it is imported, which it is not yet."""
    if is_asked:
        os.environ["HF_HUB_DISABLE_XET"] = "1"


AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, errors included; implies --quiet.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print notes, but no progress.")]
Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC", callback=check_named, help="A checkpoint directory, or ORGANIZATION/NAME on the Hub."
    ),
]
Int8Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="OUT", callback=check_named, help="The int8 checkpoint: a directory, or ORG/NAME on the Hub."
    ),
]
Revision = Annotated[
    str | None, typer.Option(metavar="REVISION", help="Branch, tag or commit on the Hub.  [default: main]")
]
OutlierThreshold = Annotated[
    float,
    typer.Option(
        min=0.0, metavar="X", envvar="INT8CONVERT_THRESHOLD", help="Magnitude from which a value is an outlier."
    ),
]
WindowLength = Annotated[
    int | None,
    typer.Option(
        "--length", min=2, metavar="N", help="Tokens of each window.  [default: 256, or what the model takes]"
    ),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="DEVICE",
        callback=check_device,
        envvar="INT8CONVERT_DEVICE",
        help="Where the model runs: auto, cpu or cuda[:n].",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run the checkpoint's own code if transformers has no class for the model."
    ),
]
Sequences = Annotated[int, typer.Option(min=1, metavar="N", help="Windows of the text to run.")]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", envvar="INT8CONVERT_WORKERS", help="Number of threads.  [default: one for each core]"
    ),
]
ReaderName = Annotated[
    str,
    typer.Option(
        metavar="READER",
        callback=_check_reader,
        envvar="INT8CONVERT_READER",
        help="How to read Hub weights: stream (no extra disk), download (up to two shards on disk), or auto "
        "(download if the disk has room, else stream).",
    ),
]
CacheDir = Annotated[Path | None, typer.Option(metavar="DIR", help="Keep downloads from the Hub in this cache.")]
Check = Annotated[bool, typer.Option("--check", help="When resuming, compare finished shards with their sha256.")]
Upload = Annotated[
    str | None,
    typer.Option(metavar="REPO", help="Send each finished shard to this repository on the Hub, and keep no copy."),
]
Keep = Annotated[bool, typer.Option("--keep", help="With --upload: also keep the output here.")]
MaxDisk = Annotated[
    str | None,
    typer.Option(metavar="SIZE", callback=check_size, help="With --upload: limit disk use, e.g. to 20GB."),
]
Private = Annotated[
    bool | None,
    typer.Option(
        "--private/--public", help="With --upload: who can see a new repository.  [default: the account's setting]"
    ),
]
TraceFile = Annotated[
    Path | None,
    typer.Option("--trace", metavar="FILE", help="Write a timeline of the threads, for ui.perfetto.dev."),
]
NoXet = Annotated[bool, typer.Option("--no-xet", help="Use HTTP in place of the Hub's xet protocol.")]
