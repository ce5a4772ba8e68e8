"""Compares config.json of an int8 checkpoint, entry by entry, with the one that its conversion writes.

With a manifest, the whole file is rebuilt from the source's by the functions that `quantize` and `export` call, and
every entry must be the same. Without one, the source's entries must be present, see `foreign_config`.

Entries in the lists of modules that a loader keeps are compared as names. A regular expression there is a finding: what
it matches depends on the loader. No expression is run here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from int8convert.checkpoint.source import CheckpointSource
from int8convert.formats.config import read_format
from int8convert.formats.format import Format
from int8convert.formats.int8_checkpoint import open_int8_checkpoint
from int8convert.formats.modules import module_of
from int8convert.planning.export_plan import Target, exported_config
from int8convert.planning.plan import ConversionPlan
from int8convert.sources import open_source
from int8convert.text import quoted
from int8convert.verification.checks import Check, Finding, make_check
from int8convert.verification.exact.foreign_config import foreign_entries
from int8convert.verification.exact.provenance import Provenance

BLOCK = "quantization_config"
_LIST_KEYS = ("llm_int8_skip_modules", "ignore", "modules_to_not_convert")
_PLAIN_NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)


def check_config(out: CheckpointSource, plan: ConversionPlan, provenance: Provenance, int8_modules: set[str]) -> Check:
    """Compare config.json with what the conversion writes, by its rebuilt plan and the names of the int8 modules."""
    expected = _expected_config(plan, provenance)
    findings = [*_threshold(out, expected), *_lists(out, expected, int8_modules)]
    if expected is None:
        findings += (_entry(*found) for found in module_of(read_format(out.config)).foreign_entries(out.config[BLOCK]))
        findings += (_entry(*found) for found in foreign_entries(out.config, plan.source.config))
    else:
        reported = {"llm_int8_threshold", *_LIST_KEYS}
        findings += _differences(out.config[BLOCK], expected[BLOCK], reported, f"{BLOCK}.")
        findings += _differences(out.config, expected, {BLOCK})
    return make_check("config", max(1, len(out.config)), findings)


def _expected_config(plan: ConversionPlan, provenance: Provenance) -> dict[str, Any] | None:
    """Return what quantize, and the exports after it, write; None without a manifest."""
    if not provenance.is_known or provenance.threshold is None:
        return None
    config = plan.config(provenance.threshold)
    for step in provenance.exports:
        checkpoint = open_int8_checkpoint(replace(open_source(step.source, step.revision), config=config))
        config = exported_config(checkpoint, Target(checkpoint.format, Format(step.format)))
    return config


def _threshold(out: CheckpointSource, expected: Mapping[str, Any] | None) -> Iterator[Finding]:
    if not module_of(read_format(out.config)).HAS_THRESHOLD:
        return
    found = out.config[BLOCK].get("llm_int8_threshold")
    if found is None and expected is None:
        return
    if type(found) is not float or not found >= 0:
        yield _entry("llm_int8_threshold", "a number with a decimal point, not negative", shown(found))
        return
    wanted = expected[BLOCK].get("llm_int8_threshold") if expected is not None else found
    if found != wanted:
        yield _entry("llm_int8_threshold", "no such entry" if wanted is None else f"{wanted:g}", f"{found:g}")


def _lists(out: CheckpointSource, expected: Mapping[str, Any] | None, int8_modules: Iterable[str]) -> Iterator[Finding]:
    """Yield the first fault in the names of modules that loaders leave alone.

    A loader that leaves an int8 module alone reads codes as weights; one that does not leave alone a 16-bit module
    looks for scales that are not there.
    """
    leaves_alone = module_of(read_format(out.config)).leaves_alone
    lists = {key: out.config[BLOCK][key] for key in _LIST_KEYS if key in out.config[BLOCK]}
    wanted = {key: expected[BLOCK][key] for key in _LIST_KEYS if key in expected[BLOCK]} if expected is not None else {}
    if not any(isinstance(names, list) for names in lists.values()):
        # Loaders then decide by the model's class, as the writer of the checkpoint did.
        if expected is not None:
            yield _entry(BLOCK, "a list of the modules to leave alone", "no such list")
        return
    for names in lists.values():
        yield from (
            _entry(BLOCK, "plain names of the modules to leave alone", shown(name))
            for name in (names if isinstance(names, list) else [])
            if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name)
        )
    for module in sorted(int8_modules):
        if leaves_alone(module, out.config[BLOCK]):
            yield _entry(BLOCK, f"{module} to be loaded as int8", "it is among those to leave alone")
            return
    if expected is not None:
        yield from _list_differences(lists, wanted)


def _list_differences(lists: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[Finding]:
    for key in sorted(lists.keys() | wanted.keys()):
        found, names = lists.get(key), wanted.get(key)
        if _same(found, names):
            continue
        if not isinstance(found, list) or not isinstance(names, list):
            yield _entry(f"{BLOCK}.{key}", shown(names), shown(found))
            continue
        lacking, extra = sorted(set(names) - set(map(str, found))), sorted(set(map(str, found)) - set(names))
        for name, others, what, is_there in (
            *((name, lacking, "among", "it is not") for name in lacking[:1]),
            *((name, extra, "not among", "it is") for name in extra[:1]),
        ):
            more = f" and {len(others) - 1:,} more" if len(others) > 1 else ""
            yield _entry(BLOCK, f"{quoted(name)[1:-1]} {what} the modules to leave alone", f"{is_there}{more}")
        if not lacking and not extra:
            yield _entry(f"{BLOCK}.{key}", "each name once, in order", "the same names in another way")


def _differences(
    found: Mapping[str, Any], expected: Mapping[str, Any], left_out: set[str], path: str = ""
) -> Iterator[Finding]:
    for key in sorted((found.keys() | expected.keys()) - left_out):
        if not _same(found.get(key, ...), expected.get(key, ...)):
            yield _entry(path + key, shown(expected.get(key)), shown(found.get(key)))


def _same(one: Any, other: Any) -> bool:
    """Return whether two values are the same in JSON: True is not 1, 6 not 6.0, and NaN is NaN."""
    if one is ... or other is ...:
        return one is other
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _entry(key: str, expected: str, found: str) -> Finding:
    return Finding(f"config.json: {quoted(key)[1:-1]}", expected, found)


def shown(value: Any) -> str:
    """Return a value of config.json in a few characters."""
    if type(value) is int and abs(value) > 10**30:  # Python writes no integer of thousands of digits
        return f"an integer of {value.bit_length():,} bits"
    return quoted(str(value), 80) if value is not None else "no such entry"
