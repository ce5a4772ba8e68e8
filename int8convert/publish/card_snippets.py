"""How a published checkpoint is loaded: a few lines for each loader, which a test runs as they stand in the card."""

from __future__ import annotations

from int8convert.checkpoint.names import OUTLIERS_FILE
from int8convert.formats.format import Format
from int8convert.formats.modules import module_of
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
    pipeline = pipeline_of(output)
    auto_class = _AUTO_CLASSES.get(pipeline or "", "AutoModel")
    generates = pipeline in _GENERATING and (output.path / "tokenizer_config.json").is_file()
    has_columns = (output.path / OUTLIERS_FILE).is_file()
    layout = module_of(output.format or Format.COMPRESSED_TENSORS)
    parts = [
        "## Use",
        f"transformers (`pip install transformers accelerate {layout.PACKAGES}`):",
        _block(_transformers(repository, auto_class, generates)),
        f"int8convert, by its own runtime{', which also uses the stored outlier columns' if has_columns else ''}:",
        _block(_int8convert(repository, generates)),
    ]
    if pipeline == "text-generation" and serves_in_vllm(output):
        parts += [f"vLLM (`pip install {layout.VLLM_PACKAGES}`):", _block(_vllm(repository))]
    return "\n\n".join(parts)


def serves_in_vllm(output: FinishedOutput) -> bool:
    """Return whether vLLM loads this format of this model: some loaders refuse all models with experts."""
    if output.format is None or module_of(output.format).VLLM_LOADS_EXPERTS:
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
