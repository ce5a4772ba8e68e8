"""The commands by which a converted checkpoint is made and measured again."""

from __future__ import annotations

import re
from shlex import join

from int8convert.formats.format import DEFAULT_FORMAT, Format
from int8convert.publish.finished import FinishedOutput
from int8convert.publish.verify_command import gate_options, task_options, text_options

_REPOSITORY_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_FILE_NAME = re.compile(r"\w[\w. -]{0,99}", re.ASCII)


def source_repository(output: FinishedOutput) -> str | None:
    """Return the repository on the Hub that was converted; None if it was a directory."""
    source = output.request.get("source")
    name = source.get("repository") if isinstance(source, dict) else None
    return name if isinstance(name, str) and _REPOSITORY_NAME.fullmatch(name) else None


def text_file(output: FinishedOutput) -> str:
    """Return the name of the text file that was measured on, for a command."""
    text = (output.verify or {}).get("text") or {}
    name = text.get("name")
    return name if isinstance(name, str) and _FILE_NAME.fullmatch(name) else "FILE"


def convert_command(output: FinishedOutput) -> str:
    """Return the command that writes the same checkpoint."""
    options = output.options
    source = source_repository(output) or "SOURCE"
    format_name = output.request.get("format")
    if "arithmetic" not in output.request:
        words = ["int8convert", "export", source, "OUT"]
        words += ["--format" if format_name in tuple(Format) else "--dequantize", str(format_name)]
    else:
        words = ["int8convert", "quantize", source, "OUT"]
        if format_name not in (None, DEFAULT_FORMAT):
            words += ["--format", str(format_name)]
    commit = output.manifest.get("source_revision")
    if isinstance(commit, str) and source != "SOURCE":
        words += ["--revision", commit]
    for key in ("skip", "only"):
        words += [word for pattern in options.get(key) or [] for word in (f"--{key}", str(pattern))]
    for key, default, flag in (("threshold", 6.0, "--threshold"), ("on_nonfinite", "error", "--on-nonfinite")):
        if options.get(key, default) != default:
            words += [flag, f"{options[key]}"]
    if options.get("max_shard_bytes"):
        words += ["--max-shard-size", f"{options['max_shard_bytes']}"]
    uses = [key for key in ("smooth", "round") if options.get(key)]
    words += ["--calibration", "CAL"] if uses else []
    words += [word for key in uses for word in (f"--{key}", "calibrated")]
    words += [f"--{key.replace('_', '-')}" for key in ("rotate", "rotate_inputs") if options.get(key)]
    words += ["--round-source", str(options["round_source"])] if options.get("round_source") else []
    return join(words + (["--lora", "ADAPTER"] if options.get("lora") else []))


def verify_command(output: FinishedOutput, measured: list[str]) -> str:
    """Return the command that measures the same, as far as verify.json records it.

    verify.json knows neither tasks in a folder nor a limit on the questions.

    Args:
        measured: the checkpoint to measure, with further words.
    """
    has_adapter = bool(output.options.get("lora"))
    words = ["int8convert", "verify", *measured, *(["--lora", "ADAPTER"] if has_adapter else [])]
    verify = output.verify
    text = verify.get("text") if verify is not None else None
    if verify is None or text is None:
        return join([*words, "--level", "exact"] if verify is not None or has_adapter else words)
    words += text_options(text, text_file(output))
    tasks = [str(task.get("task")) for task in verify.get("tasks") or []]
    if tasks:
        words += task_options(tasks)
    return join(words + gate_options(verify.get("gates") or {}, bool(tasks)))
