"""What the commands' options share: what a value may be, and what is said of one that it may not."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, errors included; implies --quiet.")
]


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
    """Refuse what is none of the choices.

    Args:
        option: its name, for those who do not ask in a callback of it.
    """
    *others, last = choices
    if value is not None and value not in (*others, last):
        raise typer.BadParameter(f"it is {', '.join(others)} or {last}, not {value!r}", param_hint=option)


def given_options(context: typer.Context) -> list[str]:
    """Names of the parameters on the command line; a variable of the environment may be of no concern to a command."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]


def check_remote(option: str, path: str, what: str) -> None:
    """Refuse an option of a repository on the Hub where a directory is named.

    Args:
        what: what the command takes, in the plural.
    """
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
    """Bytes a second, with their unit: a bare 50 may be meant as MB, or as Mbit."""
    from int8convert.text import parse_size

    if rate is None:
        return None
    size = rate.strip().removesuffix("/s")
    try:
        parse_size(size)
    except ValueError:
        size = ""
    if not re.search(r"[Bb]$", size):
        raise UsageError(f"--bandwidth is bytes a second, such as 50MB; 100 Mbit/s are 12.5MB; not {rate!r}")
    return size


def check_device(device: str) -> str:
    from int8convert.conversion.device import check_device_name

    try:
        check_device_name(device)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return device
