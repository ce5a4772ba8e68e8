"""The model card of a converted checkpoint: what was done to which model, how good it is, how it is run.

Everything in it is read from the output: the manifest, config.json, the headers, verify.json. What is not known is left
out, what was not verified is said. Names and texts in these files are strangers': `card_text` lets none of them end a
table, a block of code or the YAML.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from int8convert import __version__
from int8convert.checkpoint.inspection import Inspection
from int8convert.checkpoint.layout import OUTLIERS_FILE
from int8convert.checkpoint.safetensors_file import read_safetensors_header
from int8convert.publish.card_metadata import card_metadata, source_repository
from int8convert.publish.card_snippets import snippets
from int8convert.publish.card_text import code, count, percent, plain, size, table
from int8convert.publish.finished import FinishedOutput
from int8convert.publish.target import CARD_MARK

_RUN_HEADS = (
    *("arithmetic", "perplexity, source", "perplexity, int8", "change of NLL", "interval", "mean KL"),
    "same top token",
)
_PAPER = "[LLM.int8(), arXiv:2208.07339](https://arxiv.org/abs/2208.07339)"


def make_card(output: FinishedOutput, repository: str, found: Inspection) -> str:
    """The text of README.md.

    Args:
        repository: under which name it will be found.
        found: what `inspect` says of the checkpoint.
    """
    parts = [
        f"---\n{card_metadata(output, repository)}---",
        CARD_MARK,
        f"# {plain(repository)}",
        _what_it_is(output, found),
        _coverage(found),
        _weight_error(output),
        _fidelity(output),
        _outliers(output),
        snippets(output, repository),
        _hardware(found),
        _reproduce(output),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _what_it_is(output: FinishedOutput, found: Inspection) -> str:
    name = source_repository(output)
    commit = output.manifest.get("source_revision")
    if name is not None:
        at = f" at commit {code(str(commit)[:40])}" if isinstance(commit, str) else ""
        source = f"[{plain(name)}](https://huggingface.co/{name}){at}"
    else:
        last = str(output.manifest.get("source") or "").rstrip("/").rpartition("/")[2]  # once it was a path
        source = f"a local checkpoint, {code(last)}" if last else "a local checkpoint"
    tool = plain(str(output.manifest.get("tool") or "int8convert"))
    return (
        f"The weights of {source} in 8-bit integers, by the vector-wise quantization of {_PAPER}: each row of a weight "
        "matrix has a scale of its own, and when the model runs, input features with outliers are multiplied in 16 "
        "bits. "
        f"Converted by {tool}, row by row from the weights alone; nothing was trained.\n\n"
        f"{size(found.n_bytes)} in {found.n_shards} {'file' if found.n_shards == 1 else 'files'}, layout "
        f"{code(found.quant_method or '')}, model class {code(str(output.manifest.get('model_class') or 'unknown'))}."
    )


def _coverage(found: Inspection) -> str:
    n_int8_bytes = sum(group.n_bytes for group in found.groups if group.dtype == "I8" and not group.is_scale)
    kept: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for group in found.groups:
        if group.dtype != "I8" and not group.is_scale:
            kept[group.reason or "not said"][0] += group.n_tensors
            kept[group.reason or "not said"][1] += group.n_elements
    rows = [
        [reason, f"{n_tensors:,}", count(n), percent(n / max(1, found.n_parameters))]
        for reason, (n_tensors, n) in sorted(kept.items(), key=lambda item: -item[1][1])
    ]
    stays = f"\n\nWhat is not int8:\n\n{table(['why', 'tensors', 'parameters', 'share'], rows)}" if rows else ""
    return (
        f"## What is int8\n\n{percent(found.coverage)} of {count(found.n_parameters)} parameters, and "
        f"{percent(n_int8_bytes / max(1, found.n_bytes))} of the bytes of these files.{stays}"
    )


def _weight_error(output: FinishedOutput) -> str:
    by_kind: dict[str, list[tuple[float, str]]] = defaultdict(list)
    n_exact = 0
    for record in output.records:
        for name, tensor in record.tensors.items():
            if tensor.dtype == "I8" and tensor.reason is None:
                if tensor.sqnr_db is None:
                    n_exact += 1
                else:
                    by_kind[name.removesuffix(".weight").rpartition(".")[2]].append((tensor.sqnr_db, name))
    if not by_kind:
        return ""
    rows = []
    for kind, errors in sorted(by_kind.items(), key=lambda item: min(item[1])):
        worst_db, worst = min(errors)
        mean = sum(db for db, _ in errors) / len(errors)
        rows.append([kind, f"{len(errors)}", f"{mean:.1f}", f"{worst_db:.1f}", worst])
    exact = f" {n_exact:,} more matrices lost nothing." if n_exact else ""
    return (
        "## Weight error\n\nSignal to quantization noise of the weights in decibels, higher is better, as measured "
        f"while they were converted.{exact}\n\n{table(['layer', 'matrices', 'mean', 'worst', 'worst matrix'], rows)}"
    )


def _fidelity(output: FinishedOutput) -> str:
    if output.verify is None:
        return (
            "## Fidelity\n\n**Not verified**: it was not measured how far the model's predictions are from those of "
            "its source. `int8convert verify` does."
        )
    exact = output.verify.get("exact") or {}
    text = output.verify.get("text") or {}
    n_weights, n_different = (int(exact.get(key) or 0) for key in ("n_int8_weights", "n_different_codes"))
    said = (
        f"By {plain(str(output.verify.get('tool')))}. {n_weights:,} int8 weights were compared with the source, code "
        f"by code: {n_different:,} codes differ from the reference rounding."
    )
    runs = [run for run in output.verify.get("fidelity") or [] if isinstance(run, dict)]
    if not runs:
        return f"## Fidelity\n\n{said} The model was not run."
    read = (
        f"Source and int8 model read the same text, {plain(str(text.get('description') or text.get('name')))} (sha256 "
        f"{code(str(text.get('sha256'))[:16])}); {plain(str(text.get('convention')))}. Intervals are of 95 %."
    )
    rows = [_run_row(run) for run in runs]
    return "\n\n".join(["## Fidelity", said, read, table(_RUN_HEADS, rows), _tasks(output.verify)]).rstrip()


def _run_row(run: dict[str, Any]) -> list[str]:
    low, high = (run.get("delta_nll_interval") or [0.0, 0.0])[:2]
    return [
        str(run.get("mode")),
        *(_number(run.get(key), ".6g") for key in ("reference_perplexity", "perplexity")),
        _number(run.get("delta_nll"), "+.5f"),
        f"{_number(low, '+.5f')} to {_number(high, '+.5f')}",
        _number(run.get("mean_kl"), ".6f"),
        percent(float(run["same_top1"])) if isinstance(run.get("same_top1"), int | float) else "",
    ]


def _number(value: Any, form: str) -> str:
    return format(float(value), form) if isinstance(value, int | float) else str(value or "")


def _tasks(verify: dict[str, Any]) -> str:
    rows = [
        [
            str(task.get("task")),
            str(task.get("metric")),
            f"{int(task.get('n_samples') or 0):,}",
            *(_number(task.get(key), ".4f") for key in ("reference", "int8", "p_value")),
        ]
        for task in verify.get("tasks") or []
        if isinstance(task, dict)
    ]
    if not rows:
        return ""
    return "Zero-shot tasks, both models on the same questions; p by McNemar's exact test:\n\n" + table(
        ["task", "metric", "questions", "source", "int8", "p"], rows
    )


def _outliers(output: FinishedOutput) -> str:
    block = output.config.get("quantization_config")
    threshold = block.get("llm_int8_threshold") if isinstance(block, dict) else None
    said = []
    if isinstance(threshold, int | float):
        said.append(f"Input features with a magnitude of {threshold:g} or more are multiplied in 16 bits.")
    path = output.path / OUTLIERS_FILE
    if path.is_file():
        columns = [t for t in read_safetensors_header(path) if t.name.endswith(".outlier_columns")]
        n = sum(tensor.n_elements for tensor in columns)
        said.append(
            f"{code(OUTLIERS_FILE)} holds {n:,} columns of {len(columns):,} weights in 16 bits, those whose input "
            "features were found to matter most: int8convert multiplies them as they were in the source, not from "
            "their int8 form. Other loaders do not look at the file."
        )
    return "## Outlier features\n\n" + " ".join(said) if said else ""


def _hardware(found: Inspection) -> str:
    from int8convert.checkpoint.placement import MAX_GPUS

    fitting = [f"{place.n_gpus} x {place.gpu_gb} GB" for place in found.placements if place.n_gpus is not None]
    gpus = ", ".join(fitting) or f"more than {MAX_GPUS} x 80 GB"
    if found.quant_method == "bitsandbytes":
        speed = (
            "With bitsandbytes the gain is memory: the paper measures its int8 products slower than 16 bits for models "
            "below 6.7 B parameters (Appendix D). It runs on CPUs, too. vLLM loads this layout without tensor "
            "parallelism; for that, convert with `--format compressed-tensors`."
        )
    else:
        speed = (
            "This layout is for vLLM and SGLang, which quantize all activations to 8 bits, outliers as well. "
            "transformers decompresses the weights to 16 bits when it loads them, and cannot load int8 experts."
        )
    return f"## Hardware\n\nGPUs that hold the weights, the key-value cache aside: {gpus}.\n\n{speed}"


def _reproduce(output: FinishedOutput) -> str:
    options = output.request.get("options")
    options = options if isinstance(options, dict) else {}
    source = source_repository(output) or "SOURCE"
    words = ["int8convert", "quantize", source, "OUT"]
    commit = output.manifest.get("source_revision")
    if isinstance(commit, str) and source != "SOURCE":
        words += ["--revision", commit]
    if output.request.get("format") not in (None, "bitsandbytes"):
        words += ["--format", str(output.request["format"])]
    for key in ("skip", "only"):
        words += [word for pattern in options.get(key) or [] for word in (f"--{key}", str(pattern))]
    for key, usual, flag in (("threshold", 6.0, "--threshold"), ("on_nonfinite", "error", "--on-nonfinite")):
        if options.get(key, usual) != usual:
            words += [flag, f"{options[key]}"]
    if options.get("max_shard_bytes"):
        words += ["--max-shard-size", f"{options['max_shard_bytes']}"]
    if options.get("lora"):
        words += ["--lora", "ADAPTER"]
    from shlex import join

    command = join(words)
    return (
        f"## Reproduce\n\nThe same command writes the same bytes, on any machine (int8convert {__version__}):\n\n"
        f"```bash\n{plain(command, keep_marks=True)}\nint8convert verify OUT\n```"
    )
