"""Chooses and stores outlier columns, for `outliers --write` and `quantize --columns`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from int8convert.checkpoint.manifest import Manifest
from int8convert.cli.console import print_line
from int8convert.errors import Int8ConvertError
from int8convert.events import EventSink
from int8convert.text import format_bytes

if TYPE_CHECKING:
    from int8convert.outliers.find import OutlierReport
    from int8convert.outliers.store import StaticSet


def check_columns(src: str, path: Path, revision: str | None, cache_dir: Path | None) -> None:
    """Refuse a calibration of another source; a text, or a source without a tokenizer, before hours of conversion."""
    from int8convert.calibration.folder import read_calibration
    from int8convert.runtime.models import open_tokenizer
    from int8convert.runtime.text.windows import read_text
    from int8convert.sources import open_source

    source = open_source(src, revision, cache_dir)
    if path.is_dir():
        read_calibration(path, source)
        return
    read_text(path)
    open_tokenizer(source.directory, label=src).close()


def store_columns(
    src: str, out: str, path: Path, lora: str | None, trust_remote_code: bool, device: str, on_event: EventSink
) -> StaticSet:
    """Store a new checkpoint's most important outlier columns.

    Args:
        path: a calibration folder of the source, or a text to run through `out`.
    """
    try:
        if path.is_dir():
            return _store_calibrated(src, out, path, trust_remote_code)
        return _run_and_store(src, out, path, lora, trust_remote_code, device, on_event)
    except Int8ConvertError as error:
        adds = "the same command" if path.is_dir() else f"int8convert outliers {out} --text {path} --write {out}"
        error.state = f"'{out}' is complete but for stored columns, which {adds} adds"
        raise


def _run_and_store(
    src: str, out: str, text: Path, lora: str | None, trust_remote_code: bool, device: str, on_event: EventSink
) -> StaticSet:
    from int8convert.outliers.find import find_outliers
    from int8convert.outliers.store import int8_modules
    from int8convert.runtime.text.texts import Text

    report = find_outliers(
        out,
        Text(text),
        module_names=int8_modules(out),
        device=device,
        trust_remote_code=trust_remote_code,
        on_event=on_event,
    )
    return store(report, src, out, lora, trust_remote_code)


def _store_calibrated(src: str, out: str, folder: Path, trust_remote_code: bool) -> StaticSet:
    from int8convert.calibration.folder import read_calibration
    from int8convert.outliers.calibrated import calibrated_columns, describe
    from int8convert.outliers.store import store_outliers

    revision = Manifest(Path(out)).read_commit()
    calibration = read_calibration(folder)
    columns = calibrated_columns(calibration, src, out, trust_remote_code=trust_remote_code, revision=revision)
    return store_outliers(
        src, out, columns, describe(calibration), trust_remote_code=trust_remote_code, revision=revision
    )


def store(report: OutlierReport, src: str, out: str, lora: str | None, trust_remote_code: bool) -> StaticSet:
    """Copy the columns that a report chose from the source into `out`."""
    from int8convert.outliers.store import store_outliers

    return store_outliers(
        src,
        out,
        report.static_set,
        report.calibration(),
        lora=lora,
        trust_remote_code=trust_remote_code,
        revision=Manifest(Path(out)).read_commit(),
    )


def print_stored(stored: StaticSet) -> None:
    print_line(
        f": {stored.n_columns:,} outlier columns of {stored.n_modules:,} layers in 16 bits, "
        f"{format_bytes(stored.n_bytes)}",
        head=stored.path,
    )
