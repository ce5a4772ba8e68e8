"""Checks that an int8 checkpoint has every weight of its model once, in the file that its index names.

The plan says what the source lacks (`model_map.ModelNeeds`), and the check of tensors (`layout`) that the checkpoint
has all the rest. Together they cover every parameter of the model.
"""

from __future__ import annotations

from collections.abc import Iterator

from int8convert.checkpoint.loaders.shard_index import IndexDifferences
from int8convert.checkpoint.source import CheckpointSource
from int8convert.patterns import is_allowed
from int8convert.planning.model_map.model_map import ModelMap
from int8convert.planning.needs import made_up
from int8convert.verification.checks import Check, Finding, make_check
from int8convert.verification.exact.provenance import Provenance


def check_needs(out: CheckpointSource, model_map: ModelMap, provenance: Provenance) -> Check:
    """Find weights that loaders would initialize at random, or take from another file than the index says.

    Args:
        model_map: the source's. If name rules made it, the needs of the model are unknown.
    """
    n_tensors = sum(len(shard.tensors) for shard in out.shards)
    return make_check("needs", n_tensors, [*_lacking(model_map, provenance), *_misplaced(out.index)])


def _lacking(model_map: ModelMap, provenance: Provenance) -> Iterator[Finding]:
    needs = model_map.needs
    if needs is None:
        return
    for name in made_up(model_map):
        if not is_allowed(name, provenance.allow_missing):
            expected = f"{list(needs.missing[name])}, which {model_map.model_class} needs"
            yield Finding(name, expected, "no such tensor: loaders initialize it at random")
    for name, (found, has) in needs.mismatched.items():
        given = "tensors that do not fit together" if found is None else str(list(found))
        yield Finding(name, f"{list(has)}, which {model_map.model_class} has", given)
    for name, dtype in needs.integers.items():
        yield Finding(name, f"floats in the source, as {model_map.model_class} has them", dtype)


def _misplaced(index: IndexDifferences) -> Iterator[Finding]:
    for name, file_name in index.absent.items():
        yield Finding(name, f"a tensor in {file_name}, as the index says", "no such tensor")
    for name, (said, found) in index.moved.items():
        yield Finding(name, f"a tensor in {said}, as the index says", f"it in {found}")
    for repeated in index.repeated:
        yield Finding(repeated.name, "a tensor in one file", f"it in {' and '.join(repeated.files)}")


def allowed_note(model_map: ModelMap, provenance: Provenance) -> str | None:
    """Return what the conversion was allowed to leave out, as a sentence; None if nothing."""
    allowed = [name for name in made_up(model_map) if is_allowed(name, provenance.allow_missing)]
    if not allowed:
        return None
    more = f" and {len(allowed) - 1:,} more" if len(allowed) > 1 else ""
    return (
        f"{allowed[0]}{more}, which {model_map.model_class} needs, is in no file: the conversion was allowed this by "
        f"--allow-missing {' '.join(provenance.allow_missing)}"
    )
