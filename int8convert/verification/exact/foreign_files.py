"""Compares auxiliary files of checkpoints that other tools wrote, without the differences that saving makes.

transformers saves a tokenizer in the form of its own version: other entries, templates in a separate file. The rest is
compared. Files that transformers does not write must be the source's, byte by byte. A file that the source lacks is
accepted if transformers derives it from files of the source, and if it says the same.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from int8convert.checkpoint.hashing import file_sha256
from int8convert.checkpoint.json_file import read_json_object
from int8convert.checkpoint.loaders.files import is_inert
from int8convert.checkpoint.source import CheckpointSource
from int8convert.errors import CorruptFileError
from int8convert.verification.checks import Finding
from int8convert.verification.opened import ExaminedCheckpoint

_TOKENIZER, _TOKENIZER_CONFIG, _TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_SPECIAL_TOKENS, _ADDED_TOKENS, _GENERATION = "special_tokens_map.json", "added_tokens.json", "generation_config.json"

_PREPROCESSOR, _PROCESSOR = "preprocessor_config.json", "processor_config.json"
_PARTS = frozenset({"image_processor", "feature_extractor", "video_processor"})
"""Entries of processor_config.json that older versions save as preprocessor_config.json."""

_REWRITTEN = {
    _TOKENIZER_CONFIG: frozenset(
        {
            *("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "add_bos_token"),
            *("add_eos_token", "add_prefix_space", "backend", "chat_template", "clean_up_tokenization_spaces"),
            *("is_local", "legacy", "local_files_only", "name_or_path", "padding_side", "sp_model_kwargs"),
            *("spaces_between_special_tokens", "special_tokens_map_file", "tokenizer_class", "tokenizer_file"),
            *("use_default_system_prompt", "use_fast", "transformers_version", "processor_class"),
        }
    ),
    _PREPROCESSOR: frozenset({"processor_class"}),
    _GENERATION: frozenset({"_from_model_config", "transformers_version", "use_cache"}),
}
"""File -> entries that saving adds, drops or spells differently. tokenizer.json has the tokens themselves."""

_SAVED = frozenset(
    {
        *(_TOKENIZER, _TOKENIZER_CONFIG, _SPECIAL_TOKENS, _ADDED_TOKENS, _GENERATION, _TEMPLATE),
        *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    }
)
"""Files that transformers writes when it saves a model or a tokenizer, whether the source has them or not."""

_TOKENIZER_FILES = tuple(sorted(_SAVED - {_GENERATION, _TEMPLATE}))


def is_saved_by_others(name: str, originals: Collection[str]) -> bool:
    """Return whether a file that the source lacks is allowed beside its `originals`. Its content is then compared."""
    return name in _SAVED or (name == _PROCESSOR and _PREPROCESSOR in originals)


def check_foreign_files(examined: ExaminedCheckpoint, source: CheckpointSource) -> tuple[int, list[Finding]]:
    """Compare the auxiliary files of a checkpoint without a manifest; return their number, and the findings."""
    originals = {path.relative_to(source.directory).as_posix(): path for path in source.auxiliary_files}
    pair = _Pair(examined, originals, source.config)
    findings: list[Finding] = []
    n_checked = 0
    for name in sorted((originals.keys() | _SAVED | {_PROCESSOR}) & examined.names):
        copy, original = examined.path_of(name), originals.get(name)
        if copy is None or is_inert(name) or name == _TEMPLATE:
            continue
        n_checked += 1
        if original is not None and file_sha256(copy) == file_sha256(original):
            continue
        try:
            findings += pair.compare(name, copy, original)
        except CorruptFileError as error:
            findings.append(Finding(name, "what the source has", error.message))
    findings += pair.compare_templates()
    if not findings:  # a difference in the files explains one in the readings
        findings += pair.compare_readings(source.directory)
    return n_checked, findings


@dataclass(frozen=True, slots=True)
class _Pair:
    """A checkpoint without a manifest, and auxiliary files and config of its source."""

    examined: ExaminedCheckpoint
    originals: Mapping[str, Path] = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)

    def compare(self, name: str, copy: Path, original: Path | None) -> Iterator[Finding]:
        """Compare a file whose bytes differ from the source's."""
        if name.endswith(".json"):
            found = read_json_object(copy)
            expected = read_json_object(original) if original is not None else self._derived(name)
            if expected is not None and name == _PROCESSOR and original is None:
                yield from _processor_differences(found, expected)
            elif expected is not None:
                yield from _differences(name, found, expected, is_derived=original is None)
        elif original is not None:
            yield Finding(name, "the source's content", "another")

    def compare_readings(self, directory: Path) -> Iterator[Finding]:
        """Compare how both tokenizers read texts, if there are two and their files differ."""
        both = {name: (self.examined.path_of(name), self.originals.get(name)) for name in _TOKENIZER_FILES}
        copies, originals = ([pair[i] for pair in both.values() if pair[i] is not None] for i in (0, 1))
        if copies and originals and any(map(_is_other, both.values())):
            from int8convert.verification.exact.foreign_tokenizer import compare_tokenizers  # imports transformers

            yield from compare_tokenizers(self.examined.source.directory, directory)

    def _derived(self, name: str) -> Mapping[str, Any] | None:
        """Return the entries from which transformers derives a file that the source lacks; None if there are none."""
        if name == _GENERATION:
            return self.config
        if name == _PROCESSOR:
            return self._read(_PREPROCESSOR)
        if name == _SPECIAL_TOKENS:
            return self._read(_TOKENIZER_CONFIG)
        tokenizer = self._read(_TOKENIZER)
        if name != _ADDED_TOKENS or tokenizer is None:
            return None
        added = tokenizer.get("added_tokens")
        tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
        return {str(token.get("content")): token.get("id") for token in tokens}

    def _read(self, name: str) -> Mapping[str, Any] | None:
        return read_json_object(self.originals[name]) if name in self.originals else None

    def compare_templates(self) -> Iterator[Finding]:
        """Compare chat templates, which are in a file or in tokenizer_config.json; the file takes precedence."""
        paths = {name: self.examined.path_of(name) for name in (_TEMPLATE, _TOKENIZER_CONFIG)}
        if not any(paths.values()):
            return
        found, expected = _template(paths), _template({name: self.originals.get(name) for name in paths})
        if found != expected:
            what = "no chat template" if expected is None else "the source's chat template"
            yield Finding(_TEMPLATE, what, "none" if found is None else "another")


def _template(paths: Mapping[str, Path | None]) -> Any:
    if (path := paths[_TEMPLATE]) is not None:
        return path.read_bytes().decode(errors="replace")
    try:
        return read_json_object(path).get("chat_template") if (path := paths[_TOKENIZER_CONFIG]) is not None else None
    except CorruptFileError:
        return None  # `compare` reports it


def _differences(
    name: str, found: Mapping[str, Any], expected: Mapping[str, Any], is_derived: bool
) -> Iterator[Finding]:
    """Yield the entries that differ. For a derived file, entries that the original does not have are ignored."""
    left_out = _REWRITTEN.get(name, frozenset())
    keys = found.keys() if is_derived else found.keys() | expected.keys()
    for key in sorted(keys - left_out):
        one, other = (_canonical(key, values.get(key)) for values in (found, expected))
        if one != other:
            yield Finding(f"{name}: {key[:60]!r}", f"{other[:60]}", f"{one[:60]}")


def _is_other(pair: tuple[Path | None, Path | None]) -> bool:
    one, other = pair
    if one is None or other is None:
        return one is not other
    return file_sha256(one) != file_sha256(other)


def _processor_differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield numbers, switches and lists that differ; versions spell classes and sizes differently."""
    for key in sorted(found.keys() - _PARTS - {"processor_class"}):
        yield Finding(f"{_PROCESSOR}: {key[:60]!r}", "no such entry", json.dumps(found[key])[:60])
    for part in sorted(found.keys() & _PARTS):
        entries = found[part] if isinstance(found[part], dict) else {"": found[part]}
        if "auto_map" in entries:
            yield Finding(f"{_PROCESSOR}: 'auto_map'", "no such entry", json.dumps(entries["auto_map"])[:60])
        for key in sorted(entries.keys() & expected.keys()):
            one, other = entries[key], expected[key]
            if type(one) is type(other) and isinstance(one, int | float | list) and one != other:
                yield Finding(f"{_PROCESSOR}: {key[:60]!r}", json.dumps(other)[:60], json.dumps(one)[:60])


def _canonical(key: str, value: Any) -> str:
    """Return an entry's JSON, without differences of form between versions."""
    if key == "model" and isinstance(value, dict):  # of tokenizer.json; later versions write more of its defaults
        value = {name: entry for name, entry in value.items() if entry is not None and entry is not False}
        merges = value.get("merges")
        if isinstance(merges, list):
            value["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    elif isinstance(value, dict) and isinstance(value.get("content"), str):  # a token with how it is split off
        value = value["content"]
    return json.dumps(value, sort_keys=True)
