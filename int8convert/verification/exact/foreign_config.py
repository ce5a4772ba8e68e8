"""Compares config.json of checkpoints that other tools wrote, without the differences that saving makes.

transformers writes config.json from the loaded model: it adds the entries below, and writes the others in the form of
its own version. So configs that differ are compared as the model's class reads them. Everything else must be the
source's. `foreign_files` does the same for auxiliary files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from int8convert.errors import Int8ConvertError
from int8convert.formats.format import Difference
from int8convert.runtime.worker_process import Worker, WorkerError

WRITTEN_BY_OTHERS = frozenset(
    {"quantization_config", "transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache"}
)
"""Entries, at any depth, that saving a model writes. None of them changes what is computed from int8 weights. The dtype
may be that of kept tensors, which are compared one by one."""

_SENDS_ELSEWHERE = frozenset({"auto_map", "configuration_files", "transformers_weights", "custom_pipelines"})
"""Entries that name code or files for a loader; no config class of transformers reads them."""

_MOST_ADDED = 200
"""Largest number of added entries for which the model's class is asked whether it reads them."""

_DTYPES = ("float16", "bfloat16", "float32")


def foreign_entries(found: Mapping[str, Any], source: Mapping[str, Any]) -> Iterator[Difference]:
    """Yield entries that differ from the source's, except `WRITTEN_BY_OTHERS`."""
    dtype = found.get("dtype") or found.get("torch_dtype")
    if dtype is not None and dtype not in _DTYPES:
        yield "dtype", f"one of {', '.join(_DTYPES)}", str(dtype)[:40]
    differing = _differing(found, source)
    added = sorted(differing - source.keys())
    if differing and len(added) <= _MOST_ADDED:
        plain, original = _without(found), _without(source)
        lacking = [{name: value for name, value in plain.items() if name != key} for key in added]
        one, other, *others = as_loaded([plain, original, *lacking])
        # Another loader or version may read what the class ignores, such as rope_theta by its older name.
        ignored = {key for key, loaded in zip(added, others, strict=True) if loaded == one} - other.keys()
        differing = (differing & _SENDS_ELSEWHERE) | ignored | _differing(one, other)
        found, source = {**found, **one}, {**source, **other}
    for key in sorted(differing):
        yield key, _shown(source, key), _shown(found, key)


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> set[str]:
    found, expected = _comparable(one), _comparable(other)
    return {key for key in found.keys() | expected.keys() if found.get(key, ...) != expected.get(key, ...)}


def _comparable(config: Mapping[str, Any]) -> dict[str, str]:
    """Return entry -> its JSON, without the entries that saving writes."""
    return {key: json.dumps(_without(value), sort_keys=True) for key, value in _without(config).items()}


def _without(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: _without(entry) for key, entry in value.items() if key not in WRITTEN_BY_OTHERS}


def _shown(config: Mapping[str, Any], key: str) -> str:
    return json.dumps(config[key])[:80] if key in config else "no such entry"


LIMIT_S = 120.0
"""Seconds until the child is stopped."""


def as_loaded(configs: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return configs as transformers reads them; unchanged if it knows no class of the model, or the class refuses."""
    plain = [dict(config) for config in configs]
    worker = Worker("int8convert.verification.exact.as_loaded_worker")
    try:
        found: list[dict[str, Any]] = worker.result(plain, LIMIT_S)
    except (WorkerError, Int8ConvertError):
        return plain
    finally:
        worker.stop()
    return found
