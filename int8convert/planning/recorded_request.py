"""Reads a finished manifest's source and options, and checks each value's type and size.

A manifest is untrusted. It is read here once, as a whole; other modules use `RecordedRequest`, never the JSON. An entry
that is missing, unknown, out of range or of another type is an error, and not the same as no manifest.
`manifest.parse_record` reads the records of the shards by the same rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from int8convert.checkpoint.json_file import read_own_json
from int8convert.checkpoint.manifest import ARITHMETIC_VERSION, EXPORT_ARITHMETIC_VERSION
from int8convert.checkpoint.names import MANIFEST_NAME, find_file
from int8convert.checkpoint.stored_tensor import is_size
from int8convert.errors import CorruptFileError, SourceError
from int8convert.formats.format import QUANTIZE_FORMATS, Format
from int8convert.planning.calibrated_rounding import NEAREST, ROUNDINGS
from int8convert.planning.plan import ROUNDED_DTYPES
from int8convert.text import quoted

_SCHEMA = 1
_LARGEST = 1.7976931348623157e308
_OPTIONS = frozenset(
    {
        *("skip", "only", "threshold", "max_shard_bytes", "on_nonfinite", "lora", "allow_missing"),
        *("keep_budget", "keep_text", "rotate", "rotate_inputs", "smooth", "round", "calibration"),
        "round_source",
    }
)
_PLAIN_DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class RecordedRequest:
    """The request of the conversion or the export that wrote a checkpoint.

    Attributes:
        is_export: made from another int8 checkpoint and not from a 16-bit one.
        format: a `Format`; of an export also the dtype it was dequantized to.
        source: see `describe_source`.
        skip, only, threshold, on_nonfinite, max_shard_bytes, allow_missing: the options of `quantize`.
        lora: the identity of the adapter that was merged; None if none was.
        rotate, rotate_inputs: see `PlanOptions`.
        smooth: sha256 of the file of the factors that were folded into the weights; None if none were.
        round_source: the dtype that decoded weights were rounded to first; None if they were not.
        round: how weights became codes, see `PlanOptions`.
    """

    is_export: bool
    format: str
    source: Mapping[str, Any] = field(repr=False)
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    threshold: float = 0.0
    on_nonfinite: str = "error"
    max_shard_bytes: int | None = None
    lora: Mapping[str, Any] | None = None
    allow_missing: tuple[str, ...] = ()
    rotate: bool = False
    rotate_inputs: bool = False
    round: str = NEAREST
    smooth: str | None = None
    round_source: str | None = None

    @property
    def commit(self) -> str | None:
        """The commit of the repository it was made from; None for a directory."""
        return self.source.get("commit")


def read_recorded_request(out: Path) -> RecordedRequest | None:
    """Read the request in a finished manifest; None if there is no manifest.

    Raises:
        CorruptFileError: the manifest is there and is not understood.
    """
    try:
        path = find_file(out, MANIFEST_NAME)
    except SourceError:
        return None  # a link or a pipe is no manifest; the check of all files reports it
    if path is None:
        return None
    whole = read_own_json(path)
    _check_version("schema", whole.get("schema"), _SCHEMA)
    auxiliary = _Entries(whole).object("carried") if "carried" in whole else {}
    for name in auxiliary:
        _Entries(auxiliary, "carried.").text(name)
    request = _Entries(whole).object("conversion")
    source = _Entries(request).object("source")
    _check_source(source)
    if "arithmetic" not in request:  # exports have a version of their own; the first ones did not record it
        _check_version("export_arithmetic", request.get("export_arithmetic", 1), EXPORT_ARITHMETIC_VERSION)
        allowed = (*Format, *_PLAIN_DTYPES)
        return RecordedRequest(True, _Entries(request).one_of("format", allowed), source)
    _check_version("arithmetic", request["arithmetic"], ARITHMETIC_VERSION)
    options = _Entries(request).object("options")
    entries = _Entries(options, "options.")
    entries.check_known(_OPTIONS)
    if "keep_budget" in options or "keep_text" in options:  # what they chose is in `skip`
        entries.number("keep_budget")
        entries.text("keep_text")
    if "smooth" in options:  # what the factors were chosen by
        entries.text("smooth")
    return RecordedRequest(
        is_export=False,
        format=_Entries(request).one_of("format", QUANTIZE_FORMATS),
        source=source,
        skip=entries.texts("skip"),
        only=entries.texts("only"),
        threshold=entries.number("threshold"),
        on_nonfinite=entries.one_of("on_nonfinite", ("error", "keep")),
        max_shard_bytes=entries.size("max_shard_bytes"),
        lora=entries.object("lora") if options.get("lora") is not None else None,
        allow_missing=entries.texts("allow_missing") if "allow_missing" in options else (),
        rotate="rotate" in options and entries.flag("rotate"),
        rotate_inputs="rotate_inputs" in options and entries.flag("rotate_inputs"),
        round=entries.one_of("round", ROUNDINGS) if "round" in options else NEAREST,
        round_source=entries.one_of("round_source", tuple(ROUNDED_DTYPES)) if "round_source" in options else None,
        smooth=_Entries(whole).text("smoothing_sha256") if "smooth" in options else None,
    )


def _check_version(name: str, found: Any, expected: int) -> None:
    if type(found) is not int or found != expected:
        raise _not_understood(name, f"{expected}", found)


def _check_source(source: Mapping[str, Any]) -> None:
    entries = _Entries(source, "source.")
    for name in ("repository", "commit"):
        if name in source:
            entries.text(name)
    files = entries.object("files")
    for name in files:
        file = _Entries(_Entries(files, "source.files.").object(name), f"source.files.{name}.")
        file.text("header_sha256")
        if file.size("n_bytes") is None:
            raise _not_understood(f"source.files.{name}.n_bytes", "a number of bytes", None)


class _Entries:
    """The entries of one JSON object, each taken by its type."""

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self._values = values
        self._path = path

    def check_known(self, names: frozenset[str]) -> None:
        for name in sorted(self._values.keys() - names):
            raise _not_understood(self._path + name, "no such entry", self._values[name])

    def object(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self._take(name, "an object", lambda value: type(value) is dict)
        return found

    def text(self, name: str) -> str:
        return str(self._take(name, "a text", lambda value: type(value) is str))

    def texts(self, name: str) -> tuple[str, ...]:
        def are_texts(value: Any) -> bool:
            return type(value) is list and all(type(item) is str for item in value)

        return tuple(self._take(name, "a list of texts", are_texts))

    def one_of(self, name: str, allowed: tuple[str, ...]) -> str:
        return str(self._take(name, f"one of {', '.join(allowed)}", lambda value: value in allowed))

    def flag(self, name: str) -> bool:
        return bool(self._take(name, "true or false", lambda value: type(value) is bool))

    def number(self, name: str) -> float:
        """Return a float that is not negative. Integers of any length are compared before they become floats."""

        def is_number(value: Any) -> bool:
            return type(value) in (int, float) and (0 <= value <= _LARGEST or value == float("inf"))

        return float(self._take(name, "a number, not negative", is_number))

    def size(self, name: str) -> int | None:
        found: int | None = self._take(name, "a number of bytes", lambda value: value is None or is_size(value))
        return found

    def _take(self, name: str, expected: str, is_right: Callable[[Any], bool]) -> Any:
        value = self._values.get(name)
        if not is_right(value):
            raise _not_understood(self._path + name, expected, value)
        return value


def _not_understood(name: str, expected: str, found: Any) -> CorruptFileError:
    shown = "nothing" if found is None else _short(found)
    return CorruptFileError(
        f"{quoted(MANIFEST_NAME)} is not understood: {quoted(name)[1:-1]}: expected {expected}, found {shown}",
        "use the version of int8convert that wrote it, or convert the source again",
    )


def _short(value: Any) -> str:
    """Return an untrusted value in a few characters. Python refuses to print integers of thousands of digits."""
    if type(value) is int and abs(value) > 10**30:
        return f"an integer of {value.bit_length():,} bits"
    return quoted(str(value), 60) if isinstance(value, str | int | float) else f"a JSON {type(value).__name__}"
