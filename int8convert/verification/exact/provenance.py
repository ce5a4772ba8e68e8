"""How an int8 checkpoint came about, as far as its manifest tells: from which source, with which options.

An export's manifest names the int8 checkpoint it was made of, whose manifest names the source: the chain is followed as
long as its directories are there. Without a manifest - a checkpoint that transformers and bitsandbytes wrote - the
source has to be named, and which modules were left out is read from config.json.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from int8convert.checkpoint.manifest import Manifest
from int8convert.checkpoint.source import CheckpointSource
from int8convert.errors import AdapterError, CorruptFileError, SourceError
from int8convert.formats.config import read_format
from int8convert.formats.format import Format
from int8convert.formats.modules import module_of
from int8convert.planning.adapter import open_adapter
from int8convert.planning.recorded_request import RecordedRequest, read_recorded_request
from int8convert.sources import is_repository_name
from int8convert.text import quoted

_MAX_EXPORTS = 20
"""Of exports of exports; a chain that is longer goes in circles."""

_NOT_FINITE = "not finite in int8"
"""The reason `quantize` gives for modules that `--on-nonfinite keep` left alone."""


@dataclass(frozen=True, slots=True)
class ExportStep:
    """An export between the conversion and the checkpoint.

    Attributes:
        directory: the int8 checkpoint it was made from.
        format: what it was to be written in, a `Format`.
    """

    directory: Path
    format: str


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where an int8 checkpoint comes from.

    Attributes:
        reference: the checkpoint it was converted from: a directory, or a repository on the Hub.
        revision: the commit of that repository, if the manifest tells it.
        format: what `quantize` was asked to write, by which it was decided what becomes int8.
        skip, only, allow_missing: its options.
        threshold: the one it wrote; None if that is not known.
        lora: the adapter that was merged, as the user names it now.
        kept_for_values: modules that were left alone because their values are said to have no int8 form.
        source_files: what the manifest says of the source, see `manifest.describe_source`; empty if it says nothing.
        is_known: a manifest tells all this; if not, the codes may have been computed in some other way.
        exports: those that lie between the conversion and the checkpoint, in their order.
        problem: why the checkpoint's manifest is not understood; "" if it is, or if there is none.
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
    problem: str = ""

    @property
    def is_exported(self) -> bool:
        return bool(self.exports)


def find_provenance(
    out: CheckpointSource, reference: str | os.PathLike[str] | None = None, lora: str | os.PathLike[str] | None = None
) -> Provenance:
    """Follow an int8 checkpoint's manifest to its source.

    Args:
        reference: the source; None takes the one the manifest names.
        lora: the adapter that was merged, which the manifest knows by its hash alone.

    Raises:
        SourceError: it is no int8 checkpoint, or its source is neither named nor found.
        AdapterError: an adapter was merged, and another or none is given.
    """
    found = _follow(out.directory)
    named = os.fspath(reference) if reference is not None else found.source
    is_there = named is not None and (Path(named).is_dir() or is_repository_name(named))
    if named is None or (reference is None and not is_there):
        raise SourceError(
            f"what {quoted(out.label, 200)} was made of is not known: "
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
    )


@dataclass(frozen=True, slots=True)
class _Followed:
    """What a chain of manifests leads to.

    Attributes:
        manifest: the last one, of the conversion.
        request: what it says; None if there is none, or none that can be understood.
        source: the directory or repository it names; None if `request` is.
    """

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
        directory = Path(manifest.read_source() or "nowhere")
        exports.insert(0, ExportStep(directory, request.format))
        manifest = Manifest(directory)
        try:
            request = read_recorded_request(directory)
        except CorruptFileError:  # of another checkpoint, which is not the one that is judged
            request = None
    if request is None or request.is_export:
        return _Followed(manifest)
    return _Followed(manifest, request, manifest.read_source(), tuple(exports))


def _kept_for_values(manifest: Manifest) -> tuple[str, ...]:
    return tuple(
        name.removesuffix(".weight")
        for record in manifest.read_finished_records().values()
        for name, tensor in record.tensors.items()
        if tensor.reason == _NOT_FINITE
    )


def _check_adapter(merged: Any, given: str | None) -> None:
    """The adapter given is the one that was merged."""
    if merged is None and given is None:
        return
    if given is None:
        raise AdapterError(
            "a LoRA adapter was merged into the checkpoint, and its manifest knows it by its hash alone",
            "name it with --lora ADAPTER",
        )
    if merged is None or open_adapter(given).identity() != merged:
        what = "none was merged" if merged is None else "another one was merged"
        raise AdapterError(
            f"the adapter {quoted(given, 200)} is not what the checkpoint was made with: {what}",
            "name the adapter of the conversion, or leave --lora out",
        )
