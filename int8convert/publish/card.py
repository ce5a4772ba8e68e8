"""Fills the model card of a converted checkpoint, `card.md.jinja`, with values from the output.

All values come from the manifest, config.json, the headers and verify.json. Unknown values are left out. Texts in these
files may be a stranger's: the template escapes every expression that is not `Markdown`, so that none can end a table, a
block of code or the YAML.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from int8convert.checkpoint.json_file import parse_json_object
from int8convert.checkpoint.names import OUTLIERS_FILE, find_file
from int8convert.checkpoint.safetensors_file import read_safetensors_header, read_safetensors_metadata
from int8convert.errors import CorruptFileError
from int8convert.formats.config import BLOCK
from int8convert.formats.format import DEFAULT_FORMAT, Format
from int8convert.formats.modules import module_of
from int8convert.formats.transforms import rotated_inputs
from int8convert.hub.branch import CARD_MARK
from int8convert.hub.errors import endpoint
from int8convert.inspection import Inspection
from int8convert.planning.calibrated_rounding import CALIBRATED
from int8convert.publish.card_commands import convert_command, source_repository, text_file, verify_command
from int8convert.publish.finished import FinishedOutput
from int8convert.publish.verify_json import Status, failures_on_record
from int8convert.publish.vouched_files import NEVER_VERIFIED
from int8convert.text import format_bytes, format_count, format_percent

if TYPE_CHECKING:
    import jinja2
    from huggingface_hub import EvalResult

_TEMPLATE = "card.md.jinja"
_MARKS = re.compile(r"([\\`*_{}\[\]<>#|~])")
_MAX_LENGTH = 300
_MAX_VERBATIM = 10_000
_FILE_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
_LINK = re.compile(r"https?://[\w.~/%#?=&:+-]+", re.ASCII)
_LOGIN = re.compile(r"(?<=//)[^/@]*@")
_DIGITS = 6
_MAX_OVERRULED = 4
_INHERITED = ("license", "license_name", "license_link", "language")
_PIPELINES = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForConditionalGeneration": "text2text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
}
"""End of the architecture's name -> pipeline tag, where the source's card has none."""

_AUTO_CLASSES = {
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
}
_METRICS = {
    "perplexity": "Perplexity, int8",
    "reference_perplexity": "Perplexity, source",
    "mean_kl": "Mean KL divergence from the source, nats a token",
    "same_top1": "Share of tokens with the source's most likely next token",
}


class Markdown(str):
    """Text that is Markdown already. The template prints it unchanged."""


def plain(text: str) -> Markdown:
    """Return text as at most 300 characters on one line without a meaning in Markdown or HTML."""
    return Markdown(_MARKS.sub(r"\\\1", _on_one_line(text, _MAX_LENGTH)))


def verbatim(text: str) -> Markdown:
    """Return text on one line for the inside of a block of code, which it cannot end."""
    return Markdown(_on_one_line(text, _MAX_VERBATIM).replace("```", "` ` `"))


def code(text: str) -> Markdown:
    return Markdown(f"`{_on_one_line(text, _MAX_LENGTH).replace('`', chr(39)) or ' '}`")


def _on_one_line(text: str, max_length: int) -> str:
    return "".join(character if character.isprintable() else " " for character in text)[:max_length]


def number(value: Any, form: str) -> Markdown:
    """Return a formatted number; anything else, such as the text "inf", as text."""
    return Markdown(format(value, form)) if isinstance(value, int | float) else plain(str(value or ""))


def _alike(*values: Any) -> list[Markdown]:
    """Format numbers for comparison: all with the decimals that give the largest its digits."""
    finite = [abs(value) for value in values if isinstance(value, int | float) and value and math.isfinite(value)]
    n_decimals = max(0, _DIGITS - 1 - math.floor(math.log10(max(finite, default=1.0))))
    return [number(value, f".{n_decimals}f") for value in values]


def _escaped(value: Any) -> Any:
    return value if isinstance(value, Markdown | int | float) else plain(str(value))


@cache
def _template() -> jinja2.Template:
    """Return the compiled template. Compiling takes five times as long as filling it."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.ChainableUndefined,  # entries that verify.json lacks are unknown
        finalize=_escaped,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": code, "number": number, "verbatim": verbatim}
    environment.filters |= {"bytes": format_bytes, "count": format_count, "percent": format_percent}
    return environment.get_template(_TEMPLATE)


def make_card(output: FinishedOutput, repository: str, found: Inspection) -> str:
    """Return the text of README.md; `repository` is the one that the card is for."""
    return _template().render(
        mark=Markdown(CARD_MARK),
        metadata=Markdown(_metadata(output, repository)),
        repository=repository,
        found=found,
        tool=str(output.manifest.get("tool") or "int8convert"),
        model_class=str(output.manifest.get("model_class") or "unknown"),
        alike=_alike,
        outliers_file=OUTLIERS_FILE,
        **_source(output),
        **_contents(output, found),
        **_verification(output),
        **_loaders(output),
        **_commands(output, repository),
    )


def _source(output: FinishedOutput) -> dict[str, Any]:
    name = source_repository(output)
    commit = output.manifest.get("source_revision")
    if name is not None:  # on the Hub in use now, which should be the one the source is on
        link = f"[{plain(name)}]({_LOGIN.sub('', endpoint())}/{name})"
    else:
        last = str(output.manifest.get("source") or "").rstrip("/").rpartition("/")[2]  # once it was a path
        link = f"a local checkpoint, {code(last)}" if last else "a local checkpoint"
    card = _source_card(output)
    licence_link = card.get("license_link")
    return {
        "source": name,
        "source_link": Markdown(link),
        "source_commit": commit[:40] if isinstance(commit, str) and name else "",
        "source_bytes": _source_bytes(output),
        "licence": next((card[key] for key in ("license_name", "license") if isinstance(card.get(key), str)), ""),
        "licence_link": licence_link if isinstance(licence_link, str) and _LINK.fullmatch(licence_link) else "",
        "licence_file": _licence_file(output),
    }


def _source_bytes(output: FinishedOutput) -> int:
    """Return the bytes of the source's weights; 0 where they are unknown, and for exports."""
    match output.request:
        case {"arithmetic": _, "source": {"files": dict(files)}}:
            sizes = [file.get("n_bytes") for file in files.values() if isinstance(file, dict)]
            return sum(n_bytes for n_bytes in sizes if isinstance(n_bytes, int))
    return 0


def _source_card(output: FinishedOutput) -> dict[str, Any]:
    """Return licence, language and task of the source's own card."""
    card = output.manifest.get("source_card")
    return card if isinstance(card, dict) else {}


def _licence_file(output: FinishedOutput) -> str:
    names = (path.name for path in sorted(output.path.iterdir()) if path.is_file() and _FILE_NAME.fullmatch(path.name))
    return next((name for name in names if name.upper().startswith(("LICENSE", "LICENCE"))), "")


def _contents(output: FinishedOutput, found: Inspection) -> dict[str, Any]:
    kept: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for group in found.groups:
        if group.dtype != "I8" and not group.is_scale:
            kept[group.reason or "not said"][0] += group.n_tensors
            kept[group.reason or "not said"][1] += group.n_elements
    tensors = [item for record in output.records for item in record.tensors.items()]
    by_kind: dict[str, list[tuple[float, str]]] = defaultdict(list)
    int8 = [(name, tensor.sqnr_db) for name, tensor in tensors if tensor.dtype == "I8" and tensor.reason is None]
    for name, sqnr_db in int8:
        if sqnr_db is not None:
            by_kind[name.removesuffix(".weight").rpartition(".")[2]].append((sqnr_db, name))
    errors = [
        (kind, len(found), sum(db for db, _ in found) / len(found), *min(found)) for kind, found in by_kind.items()
    ]
    return {
        "kept": [
            (reason, n_tensors, n, n / max(1, found.n_parameters))
            for reason, (n_tensors, n) in sorted(kept.items(), key=lambda item: -item[1][1])
        ],
        "weight_errors": sorted(errors, key=lambda row: row[3:]),
        "n_exact": sum(sqnr_db is None for _, sqnr_db in int8),
        "threshold": _threshold(output),
        "columns": _stored_columns(output),
    }


def _threshold(output: FinishedOutput) -> float | None:
    block = output.config.get("quantization_config")
    threshold = block.get("llm_int8_threshold") if isinstance(block, dict) else None
    if isinstance(threshold, int | float) and 0 <= threshold < 3e38:  # an integer may have more digits than a float
        return float(threshold)
    return None


@dataclass(frozen=True, slots=True)
class _StoredColumns:
    """Stored outlier columns: number of columns and of weights that have any, and the choice as a phrase."""

    n_columns: int
    n_weights: int
    chosen: Markdown


def _stored_columns(output: FinishedOutput) -> _StoredColumns | None:
    path = find_file(output.path, OUTLIERS_FILE)
    if path is None:
        return None
    columns = [tensor for tensor in read_safetensors_header(path) if tensor.name.endswith(".outlier_columns")]
    try:
        encoded = read_safetensors_metadata(path).get("calibration", "")
        calibration = parse_json_object(encoded.encode(), "calibration", "")
    except CorruptFileError:
        calibration = {}
    chosen = "chosen in a way that the file does not record"
    match calibration:
        case {"text": str(text), "text_sha256": str(sha256), "n_sequences": int(n), "length": int(length)}:
            windows = f"{n:,} windows of {length:,} tokens of {code(text)} (sha256 {code(sha256[:16])})"
            chosen = f"chosen by running {windows} through the model"
    return _StoredColumns(sum(tensor.n_elements for tensor in columns), len(columns), Markdown(chosen))


def _verification(output: FinishedOutput) -> dict[str, Any]:
    verify = output.verify
    never = output.unverified == NEVER_VERIFIED
    return {
        "verify": verify,
        "text": (verify or {}).get("text"),
        "text_file": text_file(output),
        "unverified": "how far it is from its source was not measured" if never else output.unverified,
        "gates": _gates(verify or {}),
        "overruled": Markdown("; ".join(_overruled(verify or {}))),
    }


def _gates(verify: Mapping[str, Any]) -> list[str]:
    """Return the gates that were passed, as phrases."""
    gates = verify.get("gates") or {}
    # Versions without three verdicts compared the mean itself with its gate.
    of_kl = "upper end of the interval of the mean" if "verdict" in verify else "mean"
    limits = [
        ("fidelity", "upper end of the interval of the change of NLL at most", gates.get("max_dnll")),
        ("fidelity", f"{of_kl} KL divergence at most", gates.get("max_kl")),
        ("tasks", "no task done worse with p below", gates.get("min_task_p")),
    ]
    return [f"{what} {limit:g}" for part, what, limit in limits if verify.get(part) and isinstance(limit, int | float)]


def _overruled(verify: Mapping[str, Any]) -> list[str]:
    """Return measurements that broke stricter gates than those that were passed since."""
    failures = [failure for failure in failures_on_record(verify) if failure.status is Status.OVERRULED]
    return [plain(line) for failure in failures for line in failure.failures[:_MAX_OVERRULED]]


def _pipeline(output: FinishedOutput) -> str:
    """Return the pipeline tag of the model's class; "" if it is unknown."""
    architectures = output.config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else ""
    return next((tag for end, tag in _PIPELINES.items() if isinstance(name, str) and name.endswith(end)), "")


def _loaders(output: FinishedOutput) -> dict[str, Any]:
    pipeline = _pipeline(output)
    reasons = {tensor.reason or "" for record in output.records for tensor in record.tensors.values()}
    has_experts = any(reason == "router" or reason.startswith("experts") for reason in reasons)
    layout = module_of(output.format or Format.COMPRESSED_TENSORS)
    is_generative = pipeline in ("text-generation", "text2text-generation")
    return {
        "packages": layout.PACKAGES,
        "vllm_packages": layout.VLLM_PACKAGES,
        "gains_memory_only": layout.GAINS_MEMORY_ONLY,
        "serves_in_vllm": layout.VLLM_LOADS_EXPERTS or not has_experts,
        "rotates_inputs": bool(rotated_inputs(output.config.get(BLOCK) or {})),
        "pipeline": pipeline,
        "auto_class": _AUTO_CLASSES.get(pipeline, "AutoModel"),
        "generates": is_generative and (output.path / "tokenizer_config.json").is_file(),
    }


def _commands(output: FinishedOutput, repository: str) -> dict[str, Any]:
    # Columns are measured where they were published: the first command makes none.
    measured = ["OUT"]
    if find_file(output.path, OUTLIERS_FILE) is not None:
        measured = [repository, *([] if source_repository(output) else ["--reference", "SOURCE"])]
    return {
        "has_adapter": bool(output.options.get("lora")),
        "is_calibrated": output.options.get("round") == CALIBRATED,
        "convert_command": convert_command(output),
        "verify_command": verify_command(output, measured),
    }


def _metadata(output: FinishedOutput, repository: str) -> str:
    """Return the YAML by which the Hub sorts and links the card.

    Source: https://huggingface.co/docs/hub/model-cards.
    """
    from huggingface_hub import ModelCardData

    card, base = _source_card(output), source_repository(output)
    entries = {key: card[key] for key in _INHERITED if card.get(key)}
    if entries.get("license") == "other" and _licence_file(output):  # the Hub has the text of all other licences
        entries.setdefault("license_link", _licence_file(output))
    if base is not None:
        entries |= {"base_model": base, "base_model_relation": "quantized"}
    pipeline = card.get("pipeline_tag") or _pipeline(output) or None
    results = _results(output, str(pipeline or "text-generation"))
    data = ModelCardData(
        **entries,
        library_name="transformers",
        pipeline_tag=pipeline,
        tags=["int8", "llm.int8", "8-bit", output.quant_method or DEFAULT_FORMAT.value],
        model_name=repository.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
    return f"{data.to_yaml()}\n"


def _results(output: FinishedOutput, task: str) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    verify = output.verify or {}
    text = verify.get("text") or {}
    runs = verify.get("fidelity") or [{}]
    dataset = str(text.get("dataset") or "custom")
    name = str(text.get("description") or "text")
    if dataset == "custom" and not text.get("is_default"):
        name = f"custom text, {text.get('name')}"
    results = [
        EvalResult(task, dataset, name, key, _rounded(runs[0][key]), metric_name=shown)
        for key, shown in _METRICS.items()
        if isinstance(runs[0].get(key), int | float) and math.isfinite(runs[0][key])
    ]
    for entry in verify.get("tasks") or []:
        if isinstance(entry.get("int8"), int | float):
            named, metric = str(entry.get("task")), str(entry.get("metric"))
            value = _rounded(entry["int8"])
            results.append(EvalResult(task, named, named, metric, value, metric_name=f"{metric}, int8"))
    return results


def _rounded(value: float) -> float:
    """Round to six digits. Another machine does not reproduce more."""
    return float(f"{value:.6g}")
