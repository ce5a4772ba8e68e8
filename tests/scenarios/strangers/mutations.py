"""Seeded mutations of every file of an int8 checkpoint: cut, flipped, of other types, of other classes, hostile."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

from int8convert.checkpoint.names import MANIFEST_NAME, OUTLIERS_FILE
from tests.tools.attacks.mutate import mutate_bytes, mutate_json_text, odd_value

ESCAPE = "\x1b[2J\x1b]0;owned\x07"

TEMPLATES = (
    *("{{ 1 + 'a' }}", "{{ 1 / 0 }}", "{% for", "{{ messages[9].x.y }}", "{{ raise_exception('" + ESCAPE + "') }}"),
    *("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "", "\x00"),
    *("{% include 'config.json' %}", "{{ messages | tojson }}", "{{ 'w5 ' * 200 }}", ESCAPE, "{{ strftime_now(7) }}"),
)
CLASSES = (
    *("Trainer", "AutoModel", "pipeline", "PreTrainedModel", "GPT2LMHeadModel", "LlamaModel", "T5Model", "LlamaConfig"),
    *("LlamaForSequenceClassification", "MistralForCausalLM", "WhisperForConditionalGeneration", "logging", "__doc__"),
    *("CLIPModel", "MambaForCausalLM", "PreTrainedTokenizerFast", "", ESCAPE, "os.system", "BertModel", "list"),
)
MODEL_TYPES = (
    *("gpt2", "opt", "bloom", "t5", "bert", "mistral", "qwen2", "qwen3_moe", "mamba", "clip", "whisper", "llava"),
    *("phi3", "gemma2", "encoder-decoder", "falcon", "gpt_oss", "deepseek_v3", "llama4", ESCAPE, "x", ""),
)
TOKENIZERS = (
    *(
        "LlamaTokenizer",
        "GPT2Tokenizer",
        "T5Tokenizer",
        "BertTokenizer",
        "Trainer",
        "PreTrainedTokenizer",
        "MBartTokenizer",
    ),
    *(
        "WhisperTokenizer",
        "TokenizersBackend",
        "PythonBackend",
        "NllbTokenizerFast",
        "Wav2Vec2CTCTokenizer",
        ESCAPE,
        "x",
    ),
)
SECTIONS = (
    "normalizer",
    "pre_tokenizer",
    "post_processor",
    "decoder",
    "model",
    "truncation",
    "padding",
    "added_tokens",
)
PARTS: tuple[Any, ...] = (
    *({"type": "Nope"}, {"type": "Split", "pattern": {"Regex": "((a+)+)+$"}, "behavior": "Isolated", "invert": False}),
    *({"type": "Replace", "pattern": {"Regex": "("}, "content": "x"}, {"type": "BPE", "vocab": {}, "merges": []}),
    *(
        {"type": "WordLevel", "vocab": {"<unk>": 2**31}, "unk_token": "<unk>"},
        {"type": "ByteLevel"},
        {"type": "Sequence"},
    ),
    *({"type": "WordLevel", "vocab": {"w5": 5}, "unk_token": "absent"}, {"type": "Metaspace", "replacement": "__"}),
    *({"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}, {"type": "Unigram", "vocab": []}),
    *({"type": "Precompiled", "precompiled_charsmap": "AAAA"}, {"direction": "Left", "max_length": 0, "stride": 9}),
    *({"strategy": {"Fixed": 10**6}, "pad_id": 0, "pad_type_id": 0, "pad_token": "x", "direction": "Left"}, [], 7, "x"),
)
NUMBERS = (0, -1, 1, 3, 10**9, 2**63, -(2**40), 1e308, float("nan"), 0.5, True)


def mutate(out: Path, rng: random.Random) -> str:
    """Spoil one file of an output in place; what was done, in words."""
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.name != "verify.json")
    kinds: list[Callable[[Path, random.Random], str]] = [
        lambda out, rng: _any_file(rng.choice(files), out, rng),
        *(_entry, _entry, _class_name, _tokenizer_section, _generation_entry, _template, _weights),
    ]
    return rng.choice(kinds)(out, rng)


def _any_file(path: Path, out: Path, rng: random.Random) -> str:
    content = path.read_bytes()
    change = mutate_json_text if path.suffix == ".json" and rng.random() < 0.7 else mutate_bytes
    path.write_bytes(change(content, rng))
    return f"{change.__name__} of {path.relative_to(out)}"


def _entry(out: Path, rng: random.Random) -> str:
    """One entry of a JSON file, replaced by another type or an odd number."""
    names = ("config.json", "config.json", "tokenizer_config.json", "generation_config.json", MANIFEST_NAME)
    path = out / rng.choice([name for name in names if (out / name).is_file()])
    value = json.loads(path.read_bytes())
    holder = value["quantization_config"] if "quantization_config" in value and rng.random() < 0.3 else value
    key = rng.choice(sorted(holder))
    holder[key] = rng.choice(NUMBERS) if rng.random() < 0.6 else odd_value(rng)
    path.write_text(json.dumps(value))
    return f"{path.name}: {key} = {holder[key]!r:.60}"


def _class_name(out: Path, rng: random.Random) -> str:
    name, key, values = rng.choice(
        (
            ("config.json", "architectures", [[name] for name in CLASSES]),
            ("config.json", "model_type", list(MODEL_TYPES)),
            ("tokenizer_config.json", "tokenizer_class", list(TOKENIZERS)),
            ("config.json", "auto_map", [{"AutoConfig": "own.C"}, {"AutoModelForCausalLM": "a/b--own.M"}, 7]),
            ("tokenizer_config.json", "auto_map", [{"AutoTokenizer": ["own.T", None]}, ["own.T", "own.T"], "x"]),
            ("config.json", "attn_implementation", ["some/kernels", "eager", "flash_attention_2", "nope", {"": "a/b"}]),
            ("config.json", "dtype", ["float64", "float8_e4m3fn", "int8", "bool", "nn", "complex64", "float32"]),
            ("config.json", "fusion_config", [{"a": 1}, True]),
        )
    )
    return _set(out / name, key, rng.choice(values))


def _tokenizer_section(out: Path, rng: random.Random) -> str:
    return _set(out / "tokenizer.json", rng.choice(SECTIONS), rng.choice(PARTS))


def _generation_entry(out: Path, rng: random.Random) -> str:
    """Any entry that generation configs have."""
    fields = sorted(vars(transformers.GenerationConfig()))
    values = [*NUMBERS, "x", "low", ["w6", "w7"], [[5, 6]], {"a": 1}, [[[5], 9.0]], None, "static", "paged", [5, 6]]
    return _set(out / "generation_config.json", rng.choice(fields), rng.choice(values))


def _template(out: Path, rng: random.Random) -> str:
    template = rng.choice(TEMPLATES)
    (out / "chat_template.jinja").write_text(template)
    return f"chat template {template[:60]!r}"


def _weights(out: Path, rng: random.Random) -> str:
    """A safetensors file: cut, flipped in its header or in its data."""
    path = rng.choice([*sorted(out.glob("*.safetensors")), out / OUTLIERS_FILE])
    content = bytearray(path.read_bytes())
    n_header = 8 + int.from_bytes(content[:8], "little")
    match rng.randrange(4):
        case 0:
            what, changed = "cut", bytes(content[: rng.randrange(len(content))])
        case 1:
            what, changed = "bit of the header", _flip(content, rng.randrange(n_header), rng)
        case 2:
            what, changed = "bit of the data", _flip(content, rng.randrange(n_header, len(content)), rng)
        case _:
            what, header = "header", mutate_json_text(bytes(content[8:n_header]), rng)
            changed = len(header).to_bytes(8, "little") + header + bytes(content[n_header:])
    path.write_bytes(changed)
    return f"{path.name}: {what}"


def _flip(content: bytearray, at: int, rng: random.Random) -> bytes:
    content[at] ^= 1 << rng.randrange(8)
    return bytes(content)


def _set(path: Path, key: str, value: Any) -> str:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), key: value}))
    return f"{path.name}: {key} = {value!r:.60}"
