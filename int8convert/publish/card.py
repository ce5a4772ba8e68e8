"""The model card of a converted checkpoint: what was done to which model, how good it is, how it is run.

Everything in it is read from the output: the manifest, config.json, the headers, verify.json. What is not known is left
out, what was not verified is said. Names and texts in these files are strangers': `card_text` lets none of them end a
table, a block of code or the YAML.
"""

from __future__ import annotations

from collections import defaultdict

from int8convert.checkpoint.names import OUTLIERS_FILE
from int8convert.formats.modules import module_of
from int8convert.hub.branch import CARD_MARK
from int8convert.inspection import Inspection
from int8convert.publish.card_commands import reproduce
from int8convert.publish.card_fidelity import fidelity
from int8convert.publish.card_metadata import card_metadata
from int8convert.publish.card_snippets import serves_in_vllm, snippets
from int8convert.publish.card_source import licence, named_source, source_repository
from int8convert.publish.card_stored_columns import read_stored_columns
from int8convert.publish.card_text import code, count, percent, plain, size, table
from int8convert.publish.finished import FinishedOutput

_PAPER = "[LLM.int8(), arXiv:2208.07339](https://arxiv.org/abs/2208.07339)"
_TOOL = (
    "int8convert is the Python package of that name, which turns checkpoints into LLM.int8() ones, shard by shard and "
    "with no GPU needed, and compares them with their source."
)


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
        fidelity(output, repository),
        _outliers(output),
        snippets(output, repository),
        _hardware(output),
        reproduce(output, repository),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _what_it_is(output: FinishedOutput, found: Inspection) -> str:
    commit = output.manifest.get("source_revision")
    at = f" at commit {code(commit[:40])}" if isinstance(commit, str) and source_repository(output) else ""
    tool = plain(str(output.manifest.get("tool") or "int8convert"))
    outliers = ", and when the model runs, input features with outliers are multiplied in 16 bits"
    return (
        f"The weights of {named_source(output)}{at}, in 8-bit integers, by the vector-wise quantization of {_PAPER}: "
        f"each row of a weight matrix has a scale of its own{outliers if found.threshold is not None else ''}. "
        f"Converted by {tool}, row by row from the weights alone; nothing was trained. {_TOOL}\n\n"
        f"{_size(output, found)}, layout {code(found.quant_method or '')}, model class "
        f"{code(str(output.manifest.get('model_class') or 'unknown'))}.\n\n{licence(output)}"
    )


def _size(output: FinishedOutput, found: Inspection) -> str:
    before = 0
    match output.request:
        case {"source": {"files": dict(files)}}:
            sizes = [file.get("n_bytes") for file in files.values() if isinstance(file, dict)]
            before = sum(n_bytes for n_bytes in sizes if isinstance(n_bytes, int))
    instead = f", instead of the {size(before)} of its source" if before and "arithmetic" in output.request else ""
    return f"{size(found.n_bytes)} in {found.n_shards} {'file' if found.n_shards == 1 else 'files'}{instead}"


def _coverage(found: Inspection) -> str:
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
    return f"## What is int8\n\n{percent(found.coverage)} of {count(found.n_parameters)} parameters.{stays}"


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


def _outliers(output: FinishedOutput) -> str:
    block = output.config.get("quantization_config")
    threshold = block.get("llm_int8_threshold") if isinstance(block, dict) else None
    said = []
    if isinstance(threshold, int | float) and 0 <= threshold < 3e38:  # an integer may have more digits than a float
        said.append(f"Input features with a magnitude of {threshold:g} or more are multiplied in 16 bits.")
    stored = read_stored_columns(output)
    if stored is not None:
        weights = f"{stored.n_weights:,} {'weight' if stored.n_weights == 1 else 'weights'}"
        said.append(
            f"{code(OUTLIERS_FILE)} holds {stored.n_columns:,} columns of {weights} in 16 bits, {stored.chosen}: "
            "int8convert multiplies them as they were in the source, not from their int8 form. Other loaders do not "
            "look at the file."
        )
    return "## Outlier features\n\n" + " ".join(said) if said else ""


def _hardware(output: FinishedOutput) -> str:
    if output.format is not None and module_of(output.format).GAINS_MEMORY_ONLY:
        vllm = "vLLM loads this layout without tensor parallelism, and not of every model class"
        if not serves_in_vllm(output):
            vllm = "vLLM does not load this layout of a model with experts"
        speed = (
            "With bitsandbytes the gain is memory: the paper measures its int8 products slower than 16 bits for models "
            f"below 6.7 B parameters (Appendix D). It runs on CPUs, too. {vllm}; for that, convert with "
            "`--format compressed-tensors`."
        )
    else:
        speed = (
            "This layout is for vLLM and SGLang, which quantize all activations to 8 bits, outliers as well. "
            "SGLang 0.5.23 serves int8 experts of it with `--quantization w8a8_int8` alone. "
            "transformers decompresses the weights to 16 bits when it loads them, and cannot load int8 experts. "
            "It rounds the scales, which are in float32 here, to the model's dtype: by up to 0.4 % in bf16."
        )
    return f"## Hardware\n\n{speed}"
