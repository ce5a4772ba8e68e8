"""The YAML at the head of a model card, by which the Hub sorts and links it.

Source: https://huggingface.co/docs/hub/model-cards, for the keys and `model-index`.
"""

from __future__ import annotations

import math
from typing import Any

from int8convert.publish.card_source import inherited, licence_file, source_repository
from int8convert.publish.finished import FinishedOutput

_PIPELINES = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForConditionalGeneration": "text2text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
}
"""By the end of the architecture's name, where the source's card says nothing."""

_INHERITED = ("license", "license_name", "license_link", "language")
_METRICS = {
    "perplexity": "Perplexity, int8",
    "reference_perplexity": "Perplexity, source",
    "mean_kl": "Mean KL divergence from the source, nats a token",
    "same_top1": "Share of tokens with the source's most likely next token",
}


def card_metadata(output: FinishedOutput, repository: str) -> str:
    """The YAML, without the lines around it."""
    import yaml

    found = inherited(output)
    entries: dict[str, Any] = {key: found[key] for key in _INHERITED if found.get(key)}
    if entries.get("license") == "other" and licence_file(output):  # of others the Hub has the text
        entries.setdefault("license_link", licence_file(output))
    name = source_repository(output)
    if name is not None:
        entries |= {"base_model": name, "base_model_relation": "quantized"}
    entries["library_name"] = "transformers"
    pipeline = found.get("pipeline_tag") or pipeline_of(output)
    if pipeline:
        entries["pipeline_tag"] = pipeline
    layout = output.quant_method or "bitsandbytes"
    entries["tags"] = ["int8", "llm.int8", "8-bit", layout]
    results = _results(output, str(pipeline or "text-generation"))
    if results:
        entries["model-index"] = [{"name": repository.rpartition("/")[2], "results": results}]
    dumped: str = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True, width=1000)
    return dumped


def pipeline_of(output: FinishedOutput) -> str | None:
    """What the model is for, by its class; None if that does not tell."""
    architectures = output.config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else ""
    return next((tag for end, tag in _PIPELINES.items() if isinstance(name, str) and name.endswith(end)), None)


def _rounded(value: float) -> float:
    """To six digits, which is more than another machine gives again."""
    return float(f"{value:.6g}")


def _results(output: FinishedOutput, task: str) -> list[dict[str, Any]]:
    verify = output.verify or {}
    text = verify.get("text") or {}
    runs = [run for run in verify.get("fidelity") or [] if isinstance(run, dict)]
    results = []
    if runs:
        metrics = [
            {"type": key, "value": _rounded(runs[0][key]), "name": shown}
            for key, shown in _METRICS.items()
            if isinstance(runs[0].get(key), int | float) and math.isfinite(runs[0][key])
        ]
        dataset = {"name": str(text.get("description") or "text"), "type": str(text.get("dataset") or "custom")}
        if dataset["type"] == "custom" and not text.get("is_default"):
            dataset["name"] = f"custom text, {text.get('name')}"
        results.append({"task": {"type": task}, "dataset": dataset, "metrics": metrics})
    for one in verify.get("tasks") or []:
        if isinstance(one, dict) and isinstance(one.get("int8"), int | float):
            named, measure = str(one.get("task")), str(one.get("metric"))
            metric = {"type": measure, "value": _rounded(one["int8"]), "name": f"{measure}, int8"}
            results.append({"task": {"type": task}, "dataset": {"name": named, "type": named}, "metrics": [metric]})
    return results
