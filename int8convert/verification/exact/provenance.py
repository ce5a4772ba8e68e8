"""Provenance of an int8 checkpoint by its manifest: the source, and the options of the conversion.

An export's manifest names its int8 checkpoint, whose manifest names the source. The chain is followed while its
directories exist. Without a manifest, as for checkpoints that transformers and bitsandbytes wrote, the user must name
the source, and config.json tells which modules were kept.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from int8convert.checkpoint.manifest import Manifest, TensorRecord
from int8convert.checkpoint.names import MANIFEST_NAME, SMOOTHING_FILE, find_file
from int8convert.checkpoint.source import CheckpointSource
from int8convert.errors import AdapterError, CorruptFileError, HubError, SourceError
from int8convert.formats.config import read_format
from int8convert.formats.format import Format
from int8convert.formats.modules import module_of
from int8convert.hub.cached_copy import fetch_beside
from int8convert.planning.adapters.adapter import open_adapter
from int8convert.planning.calibrated_rounding import CALIBRATED
from int8convert.planning.recorded_request import RecordedRequest, read_recorded_request
from int8convert.sources import is_repository_name, open_source
from int8convert.text import quoted

_MAX_EXPORTS = 20
"""Longest chain of exports that is followed; a longer one is a circle."""

_NOT_FINITE = "not finite in int8"
"""The reason that `quantize` records for modules that `--on-nonfinite keep` kept."""


@dataclass(frozen=True, slots=True)
class ExportStep:
    """An export between the conversion and the checkpoint.

    Attributes:
        source: the int8 checkpoint that was exported: a directory, or a repository on the Hub.
        revision: the commit of the repository; None for a directory.
    """

    source: str
    revision: str | None
    format: str


@dataclass(frozen=True, slots=True)
class Provenance:
    """The origin of an int8 checkpoint.

    Attributes:
        reference: the source: a directory, or a repository on the Hub.
        format: the format that `quantize` wrote, which decides what becomes int8.
        skip, only, allow_missing, rotate, rotate_inputs, round_source: options of the conversion.
        threshold: the outlier threshold of the conversion; None if unknown.
        lora: the adapter that was merged, as the user names it now.
        kept_for_values: modules that were kept because their values have no int8 form.
        source_files: the manifest's description of the source, by `describe_source`; {} if it has none.
        is_known: whether a manifest says all this. If not, another tool may have computed the codes.
        exports: exports between the conversion and the checkpoint, in order.
        revision: the commit of a source on the Hub, if the manifest names it.
        calibrated: int8 modules whose codes a calibration chose.
        factors: the file of the factors that were folded into the weights; None if none were.
        factors_sha256: its hash in the manifest; "" if there is none.
        problem: why the checkpoint's manifest cannot be read; "" if it can, or if there is none.
    """

    reference: str
    format: Format
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    threshold: float | None = None
    lora: str | None = None
    kept_for_values: tuple[str, ...] = ()
    source_files: Mapping[str, Any] = field(default_factory=dict, repr=False)
    is_known: bool = False
    exports: tuple[ExportStep, ...] = ()
    revision: str | None = None
    allow_missing: tuple[str, ...] = ()
    rotate: bool = False
    rotate_inputs: bool = False
    round_source: str | None = None
    calibrated: frozenset[str] = frozenset()
    factors: Path | None = None
    factors_sha256: str = ""
    problem: str = ""


def find_provenance(
    out: CheckpointSource, reference: str | os.PathLike[str] | None = None, lora: str | os.PathLike[str] | None = None
) -> Provenance:
    """Follow an int8 checkpoint's manifest to its source.

    Args:
        reference: the source; None for the one that the manifest names.
        lora: the adapter that was merged; the manifest has only its hash.

    Raises:
        SourceError: `out` is no int8 checkpoint, or its source is neither named nor found.
        AdapterError: an adapter was merged, and another or none is given.
    """
    found = _follow(out.directory)
    named = os.fspath(reference) if reference is not None else found.source
    is_there = named is not None and (Path(named).is_dir() or is_repository_name(named))
    if named is None or (reference is None and not is_there):
        raise SourceError(
            f"the source of {quoted(out.label, 200)} is not known: "
            + (
                found.problem or "no manifest names it"
                if named is None
                else f"its manifest names {quoted(named, 200)}, which is not there"
            ),
            "name the 16-bit checkpoint with --reference SRC",
        )
    adapter = os.fspath(lora) if lora is not None else None
    request = found.request
    if request is None:
        planned_as = module_of(read_format(out.config)).PLANNED_AS
        return Provenance(named, planned_as, lora=adapter, problem=found.problem)
    _check_adapter(request.lora, adapter)
    return Provenance(
        reference=named,
        format=Format(request.format),
        skip=request.skip,
        only=request.only,
        threshold=request.threshold,
        lora=adapter,
        kept_for_values=_kept_for_values(found.manifest) if request.on_nonfinite == "keep" else (),
        source_files=request.source,
        is_known=True,
        exports=found.exports,
        revision=request.commit if named == found.source else None,
        allow_missing=request.allow_missing,
        rotate=request.rotate,
        rotate_inputs=request.rotate_inputs,
        round_source=request.round_source,
        calibrated=_calibrated(found.manifest) if request.round == CALIBRATED else frozenset(),
        factors=_find_factors(found.manifest) if request.smooth else None,
        factors_sha256=request.smooth or "",
    )


def _find_factors(manifest: Manifest) -> Path:
    """Return the file of the factors beside the manifest of the conversion."""
    path = find_file(manifest.folder.parent, SMOOTHING_FILE)
    if path is None:
        raise SourceError(
            f"{quoted(SMOOTHING_FILE)} is missing, by whose factors the weights were made",
            "fetch it again, or convert the source again",
        )
    return path


@dataclass(frozen=True, slots=True)
class _Followed:
    """The end of a chain of manifests; `request` is None if the conversion's cannot be read."""

    manifest: Manifest
    request: RecordedRequest | None = None
    source: str | None = None
    exports: tuple[ExportStep, ...] = ()
    problem: str = ""


def _follow(directory: Path) -> _Followed:
    """Follow manifests from a checkpoint back to its conversion."""
    manifest = Manifest(directory)
    try:
        request = read_recorded_request(directory)
    except CorruptFileError as error:
        return _Followed(manifest, problem=error.message)
    exports: list[ExportStep] = []
    while request is not None and request.is_export and len(exports) < _MAX_EXPORTS:
        step = ExportStep(manifest.read_source() or "nowhere", request.commit, request.format)
        exports.insert(0, step)
        try:
            directory = _with_manifest(step)
            manifest, request = Manifest(directory), read_recorded_request(directory)
        except (SourceError, HubError):  # another checkpoint's manifest, which is not judged here
            request = None
    if request is None or request.is_export:
        return _Followed(manifest)
    return _Followed(manifest, request, manifest.read_source(), tuple(exports))


def _with_manifest(step: ExportStep) -> Path:
    """Return the directory in which the source of an export has its manifest; of a repository, that in the cache."""
    if step.revision is None:
        return Path(step.source)
    source = open_source(step.source, step.revision)
    fetch_beside(source, [MANIFEST_NAME, SMOOTHING_FILE])
    return source.directory


def _kept_for_values(manifest: Manifest) -> tuple[str, ...]:
    return tuple(module for module, tensor in _records(manifest) if tensor.reason == _NOT_FINITE)


def _calibrated(manifest: Manifest) -> frozenset[str]:
    return frozenset(module for module, tensor in _records(manifest) if tensor.rounding is not None)


def _records(manifest: Manifest) -> Iterator[tuple[str, TensorRecord]]:
    """Yield the module of each tensor, and the tensor's record."""
    for record in manifest.read_finished_records().values():
        for name, tensor in record.tensors.items():
            yield name.removesuffix(".weight"), tensor


def _check_adapter(merged: Any, given: str | None) -> None:
    """Check that the given adapter is the one that was merged."""
    if merged is None and given is None:
        return
    if given is None:
        raise AdapterError(
            "a LoRA adapter was merged into the checkpoint, and the manifest has only its hash",
            "name it with --lora ADAPTER",
        )
    if merged is None or open_adapter(given).identity() != merged:
        what = "none was merged" if merged is None else "another one was merged"
        raise AdapterError(
            f"the adapter {quoted(given, 200)} is not the one of the conversion: {what}",
            "name the adapter of the conversion, or leave --lora out",
        )
