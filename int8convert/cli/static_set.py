"""Chooses and stores outlier columns, for `outliers --write` and `quantize --calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from int8convert.checkpoint.manifest import Manifest
from int8convert.cli.console import print_line
from int8convert.errors import Int8ConvertError
from int8convert.text import format_bytes

if TYPE_CHECKING:
    from int8convert.outliers.find import OutlierReport
    from int8convert.outliers.store import StaticSet


def check_calibration(src: str, text: Path, revision: str | None, cache_dir: Path | None) -> None:
    """Refuse a text, or a source without a tokenizer, before hours of conversion."""
    from int8convert.runtime.models import open_tokenizer
    from int8convert.runtime.text.windows import read_text
    from int8convert.sources import open_source

    read_text(text)
    open_tokenizer(open_source(src, revision, cache_dir).directory, label=src).close()


def calibrate_output(
    src: str, out: str, text: Path, lora: str | None, trust_remote_code: bool, device: str
) -> StaticSet:
    """Run a text through a new checkpoint and store its most important outlier columns."""
    from int8convert.outliers.find import find_outliers
    from int8convert.outliers.store import int8_modules
    from int8convert.runtime.text.texts import Text

    try:
        report = find_outliers(
            out, Text(text), module_names=int8_modules(out), device=device, trust_remote_code=trust_remote_code
        )
        return store(report, src, out, lora, trust_remote_code)
    except Int8ConvertError as error:
        error.state = (
            f"'{out}' is complete but for stored columns, which "
            f"int8convert outliers {out} --text {text} --write {out} adds"
        )
        raise


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
