"""Judges the weights that a checkpoint lacks: notes and errors from the needs that the model map found.

An output that looks complete must not make a loader invent weights. Where name rules made the map, the model is
unknown, and nothing is judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from int8convert.checkpoint.source import CheckpointSource
from int8convert.errors import CorruptFileError, MissingWeightsError, PatternError
from int8convert.patterns import is_allowed
from int8convert.planning.model_map.model_map import ModelMap, ModelNeeds
from int8convert.text import quoted


def made_up(model_map: ModelMap) -> list[str]:
    """Return the missing tensors whose values a loader would make up, in the model's order."""
    needs = model_map.needs
    return [name for name in needs.missing if name not in needs.counters] if needs else []


def check_needs(model_map: ModelMap, source: CheckpointSource, allow_missing: Sequence[str]) -> None:
    """Refuse a checkpoint that does not give its model the weights it needs.

    Args:
        allow_missing: patterns of the tensors whose values loaders may make up.

    Raises:
        CorruptFileError: a parameter has another shape than the model's, or is stored as integers, which may be codes.
        MissingWeightsError: a parameter is in no file, and no pattern allows that.
        PatternError: a pattern matches no missing tensor, which is most likely a typing error.
    """
    needs = model_map.needs
    if needs is not None and needs.mismatched:
        raise CorruptFileError(*_mismatch(model_map, needs))
    if needs is not None and needs.integers:
        raise CorruptFileError(*_integers(model_map, needs))
    for pattern in allow_missing if needs is not None else ():
        if needs is not None and not any(is_allowed(name, [pattern]) for name in needs.missing):
            raise PatternError(f"--allow-missing {pattern!r} matches no tensor that the source lacks", _lacking(needs))
    lost = [name for name in made_up(model_map) if not is_allowed(name, allow_missing)]
    if needs is not None and lost:
        raise MissingWeightsError(*_missing(model_map, needs, source, lost))


def _lacking(needs: ModelNeeds) -> str:
    """The hint for a pattern that matches none of the missing tensors."""
    if not needs.missing:
        return "leave --allow-missing out: the source lacks no tensor"
    return f"it lacks {', '.join(map(quoted, list(needs.missing)[:3]))}; name one of these"


def _mismatch(model_map: ModelMap, needs: ModelNeeds) -> tuple[str, str]:
    name, (found, has) = next(iter(needs.mismatched.items()))
    others = f", and {len(needs.mismatched) - 1:,} more do not fit" if len(needs.mismatched) > 1 else ""
    given = (
        f"the tensors that make {quoted(name)} do not fit together"
        if found is None
        else f"{quoted(name)} has shape {list(found)} in the weight files"
    )
    return (
        f"{given}, expected {list(has)} for the {model_map.model_class} of config.json{others}",
        "fetch config.json and the weights of one version",
    )


def _integers(model_map: ModelMap, needs: ModelNeeds) -> tuple[str, str]:
    name, dtype = next(iter(needs.integers.items()))
    others = f", and {len(needs.integers) - 1:,} more are integers" if len(needs.integers) > 1 else ""
    lost = ": most likely codes that have lost their scale" if dtype in ("I8", "U8") else ""
    return (
        f"{quoted(name)} is stored as {dtype}, expected floats for the {model_map.model_class} of config.json"
        f"{others}{lost}",
        "fetch the weights again, or convert the 16-bit checkpoint they were made from",
    )


def _missing(model_map: ModelMap, needs: ModelNeeds, source: CheckpointSource, lost: list[str]) -> tuple[str, str]:
    first = f"{quoted(lost[0])} {list(needs.missing[lost[0]])}"
    what = f"{first} is" if len(lost) == 1 else f"{len(lost):,} tensors, the first {first}, are"
    absent = next(iter(source.index.absent), None)
    named = f"; the index names {quoted(absent)}, which no file holds" if absent else ""
    if unnamed := _unnamed_shard(source):
        named += f"; {quoted(unnamed)} is beside the other files, and the index does not name it"
    return (
        f"{what} in no weight file, and {model_map.model_class} needs {'it' if len(lost) == 1 else 'them'}: "
        f"loaders would make up the values{named}",
        f"fetch the weight files again; pass --allow-missing {lost[0].rpartition('.')[0] or lost[0]!r} only if it is "
        "to be trained",
    )


def _unnamed_shard(source: CheckpointSource) -> str | None:
    """Return a file that is named like the local shards and is not in the index, which may be incomplete; or None."""
    named = {shard.path.name for shard in source.shards}
    first = min(named)
    if source.commit is not None or "-of-" not in first:
        return None
    beside = (path.name for path in source.directory.iterdir() if path.suffix == source.shards[0].path.suffix)
    return min((name for name in beside if "-of-" in name and name not in named), default=None)


def needs_notes(model_map: ModelMap, source: CheckpointSource) -> Iterator[str]:
    """Yield notes on tensors that are missing, unused, or elsewhere than the index says."""
    yield from source.index.notes()
    needs = model_map.needs
    if needs is None:
        return
    lost = made_up(model_map)
    if lost:
        yield f"{_first_of(lost)} in no weight file: loaders make up the values"
    if needs.counters:
        yield f"{_first_of(needs.counters)} in no weight file: {model_map.model_class} sets the values itself"
    if needs.defaulted:
        yield (
            f"{_first_of(needs.defaulted)} in no weight file: {model_map.model_class} allows that, and loaders leave "
            "the values that the class begins with"
        )
    if source.index.absent and not lost:
        absent = list(source.index.absent)
        yield f"the index names {_first_of(absent, '')}, which no file holds: {model_map.model_class} does without"
    if needs.unexpected:
        yield f"{_first_of(needs.unexpected)} of no use to {model_map.model_class}, and kept as stored"


def _first_of(names: Sequence[str], verb: str = "is") -> str:
    """Return the first name and how many more there are, as the subject of a sentence."""
    if len(names) == 1:
        return f"{quoted(names[0])} {verb}".rstrip()
    return f"{quoted(names[0])} and {len(names) - 1:,} more {'are' if verb else ''}".rstrip()
