"""How a published checkpoint is loaded: a few lines for each loader, which a test runs as they stand in the card."""

from __future__ import annotations

from int8convert.checkpoint.names import OUTLIERS_FILE
from int8convert.publish.card_metadata import pipeline_of
from int8convert.publish.finished import FinishedOutput

_AUTO_CLASSES = {
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
}
_GENERATING = ("text-generation", "text2text-generation")


def snippets(output: FinishedOutput, repository: str) -> str:
    """The section on loading."""
    method = output.quant_method
    pipeline = pipeline_of(output)
    auto_class = _AUTO_CLASSES.get(pipeline or "", "AutoModel")
    generates = pipeline in _GENERATING and (output.path / "tokenizer_config.json").is_file()
    has_columns = (output.path / OUTLIERS_FILE).is_file()
    needs = "bitsandbytes" if method == "bitsandbytes" else "compressed-tensors"
    parts = [
        "## Use",
        f"transformers (`pip install transformers accelerate {needs}`):",
        _block(_transformers(repository, auto_class, generates)),
        f"int8convert, by its own runtime{', which also uses the stored outlier columns' if has_columns else ''}:",
        _block(_int8convert(repository, generates)),
    ]
    if pipeline == "text-generation" and serves_in_vllm(output):
        needs = "vllm vllm-bnb-plugin" if method == "bitsandbytes" else "vllm"
        parts += [f"vLLM (`pip install {needs}`):", _block(_vllm(repository))]
    return "\n\n".join(parts)


def serves_in_vllm(output: FinishedOutput) -> bool:
    """Whether vLLM has a loader for this layout of this model: that of bitsandbytes refuses all models with experts,
    also if these are in 16 bits (vLLM 0.32 with vllm-bnb-plugin 0.0.3)."""
    block = output.config.get("quantization_config")
    if not isinstance(block, dict) or block.get("quant_method") != "bitsandbytes":
        return True
    reasons = {tensor.reason or "" for record in output.records for tensor in record.tensors.values()}
    return not any(reason == "router" or reason.startswith("experts") for reason in reasons)


def _block(lines: list[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


def _generate(repository: str) -> list[str]:
    return [
        f'tokenizer = AutoTokenizer.from_pretrained("{repository}")',
        'inputs = tokenizer("The answer is", return_tensors="pt").to(model.device)',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))",
    ]


def _transformers(repository: str, auto_class: str, generates: bool) -> list[str]:
    names = f"{auto_class}, AutoTokenizer" if generates else auto_class
    return [
        f"from transformers import {names}",
        "",
        f'model = {auto_class}.from_pretrained("{repository}", device_map="auto")',
        *(_generate(repository) if generates else []),
    ]


def _int8convert(repository: str, generates: bool) -> list[str]:
    return [
        "import int8convert",
        *(["from transformers import AutoTokenizer"] if generates else []),
        "",
        f'model = int8convert.load("{repository}")',
        *(_generate(repository) if generates else []),
    ]


def _vllm(repository: str) -> list[str]:
    return [
        "from vllm import LLM",
        "",
        'if __name__ == "__main__":  # vLLM starts processes that import this file',
        f'    model = LLM("{repository}")',
        '    print(model.generate("The answer is")[0].outputs[0].text)',
    ]
