"""Compares the tokens that two checkpoints' tokenizers make of texts, as transformers loads them.

A class named in tokenizer_config.json may rebuild what tokenizer.json says. So files that look alike may give other
tokens, and different files the same. Each tokenizer runs in its own process.

Left out on purpose: decoding, in which versions of transformers differ by default.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from int8convert.errors import Int8ConvertError
from int8convert.runtime.text.tokenizer_process import TokenizerProcess
from int8convert.verification.checks import Finding

_WHERE = "the tokenizer"
_TEXTS = (
    "The quick brown fox, don't you know, jumps over 12 lazy dogs in 2024.",
    "  two spaces, a\ttab,\na line\r\n\n\nand four more \u00a0 at the end  ",
    "ALL CAPS mIxEd camelCase snake_case 1234567890 3.14159 -1e-5 0xFF",
    "Ünïcödé: naïve façade, e\u0301 and é, ﬁ ligature, ½, ２ wide",
    "Русский текст, ελληνικά, עברית, العربية, हिन्दी, ไทย",
    "中文字符，日本語のテキスト、한국어 문장",
    "👩‍👩‍👧 🙂 🇩🇪 \u200b\ufeff zero width",
    "def f(x):\n    return {'a': [1, 2], \"b\": x ** 2}  # <s> </s> <unk> [CLS] [MASK] ▁ Ġ ##",
    "",
    " ",
)
_MOST_SPECIAL, _MOST_IDS, _AT_ONCE = 50, 400, 20


def compare_tokenizers(copy: Path, original: Path) -> Iterator[Finding]:
    """Find differences between the tokenizers of two directories.

    Finds nothing if transformers cannot load the original, such as one that is code in the checkpoint.
    """
    try:
        source = TokenizerProcess(str(original), is_as_stated=True)
    except Int8ConvertError:
        return
    with source:
        special = [token for token in source.special_tokens.values() if isinstance(token, str)]
        try:
            with TokenizerProcess(str(copy), is_as_stated=True) as found:
                yield from _facts(found, source)
                words = [source.decode(ids) for ids in _some_ids(source.vocab_size)]
                texts = [*_TEXTS, *words, *(f"a {token}b" for token in special[:_MOST_SPECIAL])]
                yield from _readings(found, source, texts)
        except Int8ConvertError as error:
            yield Finding(_WHERE, "one that reads texts as the source's", error.message)


def _some_ids(n: int) -> Iterator[list[int]]:
    """Return ids from all over a vocabulary, in groups: their texts have words that the tokenizer knows."""
    ids = range(0, n, max(1, n // _MOST_IDS))
    return (list(ids[at : at + _AT_ONCE]) for at in range(0, len(ids), _AT_ONCE))


def _facts(found: TokenizerProcess, source: TokenizerProcess) -> Iterator[Finding]:
    pairs = {
        "padding side": (found.padding_side, source.padding_side),
        **{name: (found.special_ids.get(name), source.special_ids.get(name)) for name in sorted(source.special_ids)},
    }
    for name, (one, other) in pairs.items():
        if one != other:
            yield Finding(f"{_WHERE}: {name}", str(other), str(one))


def _readings(found: TokenizerProcess, source: TokenizerProcess, texts: list[str]) -> Iterator[Finding]:
    ones, others = (tokenizer(texts)["input_ids"] for tokenizer in (found, source))
    for text, one, other in zip(texts, ones, others, strict=True):
        if one != other:
            yield Finding(f"{_WHERE} reads {text[:40]!r}", _shown(other), _shown(one))
            return


def _shown(ids: list[int]) -> str:
    return f"{str(ids[:8])[:-1]}, ...]" if len(ids) > 8 else str(ids)
