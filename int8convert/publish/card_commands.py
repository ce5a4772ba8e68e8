"""The commands by which a converted checkpoint is made and measured again, and what they do not give again."""

from __future__ import annotations

import re
from shlex import join
from typing import Any

from int8convert.checkpoint.names import OUTLIERS_FILE
from int8convert.formats.format import DEFAULT_FORMAT, Format
from int8convert.publish.card_source import source_repository
from int8convert.publish.card_stored_columns import read_stored_columns
from int8convert.publish.card_text import code, plain
from int8convert.publish.finished import FinishedOutput
from int8convert.publish.verify_json import gate_options, task_options, text_options

_MAX_COMMAND = 10_000
_FILE_NAME = re.compile(r"\w[\w. -]{0,99}", re.ASCII)


def reproduce(output: FinishedOutput, repository: str) -> str:
    """The section. What has stored columns is measured where it was published: the first command makes none."""
    tool = plain(str(output.manifest.get("tool") or "int8convert"))
    said = f"The first command writes the same bytes, on any machine ({tool}){_exceptions(output)}.{_measured(output)}"
    measured = ["OUT"]
    if read_stored_columns(output) is not None:
        measured = [repository, *([] if source_repository(output) else ["--reference", "SOURCE"])]
    commands = [join(_convert(output)), join(_verify(output, measured))]
    block = "\n".join(plain(command, keep_marks=True, max_length=_MAX_COMMAND) for command in commands)
    return f"## Reproduce\n\n{said}\n\n```bash\n{block}\n```"


def _options(output: FinishedOutput) -> dict[str, Any]:
    options = output.request.get("options")
    return options if isinstance(options, dict) else {}


def _exceptions(output: FinishedOutput) -> str:
    said = []
    if _options(output).get("lora"):
        said.append("but for the last bits of what the adapter was merged into, which depend on the processor")
    stored = read_stored_columns(output)
    if stored is not None:
        said.append(f"but not {code(OUTLIERS_FILE)}, whose columns were {stored.chosen}")
    return "".join(f", {what}" for what in said)


def _measured(output: FinishedOutput) -> str:
    """What the second command needs, and what it gives."""
    text = (output.verify or {}).get("text")
    if not isinstance(text, dict):
        return ""
    name = "the text that comes with int8convert" if text.get("is_default") else code(_text_name(text))
    return (
        f" The second one measures the numbers above, but for digits that depend on the processor; {name} has the "
        f"sha256 {code(str(text.get('sha256')))}."
    )


def _text_name(text: dict[str, Any]) -> str:
    """Of the file, for a command."""
    name = text.get("name")
    return name if isinstance(name, str) and _FILE_NAME.fullmatch(name) else "FILE"


def _convert(output: FinishedOutput) -> list[str]:
    options = _options(output)
    source = source_repository(output) or "SOURCE"
    made = output.request.get("format")
    if "arithmetic" not in output.request:
        words = ["int8convert", "export", "SOURCE", "OUT"]
        words += ["--format" if made in tuple(Format) else "--dequantize", str(made)]
    else:
        words = ["int8convert", "quantize", source, "OUT"]
        commit = output.manifest.get("source_revision")
        if isinstance(commit, str) and source != "SOURCE":
            words += ["--revision", commit]
        if made not in (None, DEFAULT_FORMAT):
            words += ["--format", str(made)]
    for key in ("skip", "only"):
        words += [word for pattern in options.get(key) or [] for word in (f"--{key}", str(pattern))]
    for key, usual, flag in (("threshold", 6.0, "--threshold"), ("on_nonfinite", "error", "--on-nonfinite")):
        if options.get(key, usual) != usual:
            words += [flag, f"{options[key]}"]
    if options.get("max_shard_bytes"):
        words += ["--max-shard-size", f"{options['max_shard_bytes']}"]
    return words + (["--lora", "ADAPTER"] if options.get("lora") else [])


def _verify(output: FinishedOutput, measured: list[str]) -> list[str]:
    """As it was measured, as far as verify.json tells: it does not know of tasks in a folder, or of how many
    questions."""
    words = ["int8convert", "verify", *measured, *(["--lora", "ADAPTER"] if _options(output).get("lora") else [])]
    verify = output.verify
    text = verify.get("text") if verify is not None else None
    if verify is None or not isinstance(text, dict):
        return [*words, "--level", "exact"] if verify is not None or _options(output).get("lora") else words
    words += text_options(text, _text_name(text))
    tasks = {str(task.get("task")): None for task in verify.get("tasks") or [] if isinstance(task, dict)}
    if tasks:
        words += task_options(tasks)
    return words + gate_options(verify.get("gates") or {}, bool(tasks))
