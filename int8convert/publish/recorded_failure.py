"""The command that answers what verify.json tells of: a failure stands until the same is measured again."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from int8convert.checkpoint.json_file import read_own_json
from int8convert.checkpoint.names import VERIFY_FILE, find_file
from int8convert.checkpoint.stored_tensor import is_size
from int8convert.errors import CorruptFileError, SourceError
from int8convert.publish.verify_command import gate_options, task_options, text_options


def clearing_command(out: Path) -> str:
    """Return the `int8convert verify` that lets an output pass once it passes itself.

    Of a gate that was broken, it measures on the same text with the same gates; else it is the plain command.
    """
    return shlex.join(["int8convert", "verify", str(out), *_options(_read(out))])


def _read(out: Path) -> dict[str, Any]:
    try:
        path = find_file(out, VERIFY_FILE)
        return read_own_json(path) if path is not None else {}
    except (CorruptFileError, SourceError):
        return {}


def _options(report: Mapping[str, Any]) -> list[str]:
    """Of the first failure that can be measured again; none where the file is not what `verify` writes."""
    for failure in (*_earlier(report), report):
        gates, text = failure.get("gates"), failure.get("text")
        gates = gates if isinstance(gates, dict) else {}
        lines = failure.get("failures")
        lines = [line for line in lines if isinstance(line, str)] if isinstance(lines, list) else []
        tasks = [line.split(" ")[1] for line in lines if line.startswith("tasks: ")]
        is_of_text = isinstance(text, dict) and is_size(text.get("n_sequences")) and is_size(text.get("length"))
        try:
            if any(line.startswith("fidelity (") for line in lines) and isinstance(text, dict) and is_of_text:
                return [*text_options(text, str(text.get("name"))), *gate_options(gates, has_tasks=False)]
            if tasks:
                return [*task_options(tasks), *gate_options(gates, has_tasks=True)]
        except (TypeError, ValueError, OverflowError):
            continue
    return []


def _earlier(report: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The failures of earlier runs that stand."""
    found = report.get("earlier_failures")
    for failure in found if isinstance(found, list) else []:
        if isinstance(failure, dict) and failure.get("status") == "stands":
            yield failure
