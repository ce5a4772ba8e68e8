"""A verification as one page: the verdict and pictures first, then every number.

The page is one file, pictures inside, with no script and nothing from a network: it opens from a disk, and years later.
Whatever a checkpoint says of itself is escaped by the template engine. The same report gives the same page, byte for
byte, with one version of matplotlib.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from int8convert.checkpoint.atomic import write_bytes, write_text
from int8convert.checkpoint.manifest import Manifest
from int8convert.errors import OutputError, SourceError
from int8convert.inspection import inspect
from int8convert.sources import open_source
from int8convert.verification.page_figures import coverage_shares, report_figures
from int8convert.verification.verify_report import VerifyReport, fidelity_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from int8convert.outliers.find import OutlierReport
    from int8convert.verification.fidelity.level import FidelityReport

_TEMPLATE = "page.html.jinja"


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure, and what it shows in words."""

    name: str
    alt: str
    figure: Figure

    def svg(self) -> bytes:
        """Without a date, and with names that do not change from run to run."""
        import matplotlib

        buffer = io.BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": self.name}):
            self.figure.savefig(buffer, format="svg", metadata={"Date": None})
        return buffer.getvalue()

    def png(self) -> bytes:
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=150)
        return buffer.getvalue()

    @property
    def data_uri(self) -> str:
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg()).decode("ascii")


def prepare(page: Path | None, folder: Path | None) -> None:
    """Make the folders for a page and for pictures, before minutes are spent on measuring.

    Raises:
        SourceError: what draws and fills the page is not installed.
        OutputError: a folder cannot be made.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise SourceError(
            f"a report needs {error.name}, which is not installed",
            "pip install 'int8convert[report]', or leave out --report and --figures",
        ) from None
    for path in (page.parent if page else None, folder):
        if path is not None:
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise _as_output_error(error, path) from error


def draw_pictures(report: VerifyReport, outliers: OutlierReport | None = None) -> list[Picture]:
    """Everything there is to see."""
    inspection = inspect(report.out, report.exact.commit)
    return [Picture(*drawn) for drawn in report_figures(report, inspection, outliers)]


def write_pictures(pictures: Sequence[Picture], folder: Path) -> list[Path]:
    """Each as PNG and as SVG.

    Raises:
        OutputError: the folder cannot be made or written to.
    """
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            paths += [folder / f"{picture.name}.png", folder / f"{picture.name}.svg"]
            write_bytes(paths[-2], picture.png())
            write_bytes(paths[-1], picture.svg())
    except OSError as error:
        raise _as_output_error(error, folder) from error
    return paths


def write_page(report: VerifyReport, pictures: Sequence[Picture], path: Path) -> None:
    """The page, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, render(report, pictures))
    except OSError as error:
        raise _as_output_error(error, path) from error


def render(report: VerifyReport, pictures: Sequence[Picture]) -> str:
    """The page as text."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(_TEMPLATE).render(
        report=report,
        verdict=say_verdict(report),
        pictures=pictures,
        coverage=coverage_shares(inspect(report.out, report.exact.commit)),
        provenance=_provenance(report),
        fidelity_rows=fidelity_rows,
        layer_rows=_layer_rows(report.fidelity),
    )


def say_verdict(report: VerifyReport) -> str:
    """What came out, in one or two sentences."""
    if not report.is_passed:
        return f"Failed. {report.failures[0]}."
    weights = f"Passed. {report.exact.n_int8_weights:,} int8 weights are what rounding those of the source gives"
    if not report.fidelity:
        return f"{weights}; the models were not run."
    first = report.fidelity[0]
    low, high = first.delta_nll_interval
    return (
        f"{weights}. Run as {first.mode}, the model gives {first.n_tokens:,} tokens a log-likelihood that differs from "
        f"its source's by {-first.delta_nll:+.5f} nats a token (95 %: {-high:+.5f} to {-low:+.5f}), with a mean KL "
        f"divergence of {first.mean_kl:.3g}, and finds the same token the likeliest at {first.same_top1:.2%} of them."
    )


def _layer_rows(reports: Sequence[FidelityReport]) -> list[tuple[str, list[float]]]:
    """Layer -> the error of each arithmetic after it."""
    columns = [dict(each.layer_errors) for each in reports]
    return [(name, [column[name] for column in columns]) for name in (columns[0] if columns else ())]


def _provenance(report: VerifyReport) -> list[tuple[str, str]]:
    """(what, value): where the checkpoint comes from, by its manifest, and what was measured with."""
    found = [("int8 checkpoint", report.out), ("source", report.reference or "not known")]
    commits = {"its commit": report.exact.commit, "the source's commit": report.exact.reference_commit}
    found += [(what, commit) for what, commit in commits.items() if commit is not None]
    manifest = Manifest(open_source(report.out, report.exact.commit).directory)
    conversion: dict[str, Any] = manifest.read_request() or {}
    for name, value in sorted(dict(conversion.get("options") or {}).items()):
        found.append((f"conversion: {name}", str(value)))
    found += [("verified by", report.tool)]
    if report.text is not None:
        found += [("text", report.text.description), ("sha256 of the text", report.text.sha256)]
    found += [(f"sha256 of {name}", digest) for name, digest in report.files.items()]
    found += [(f"sha256 of {name}", shard.sha256) for name, shard in manifest.read_records().items()]
    return found


def _as_output_error(error: OSError, path: Path) -> OutputError:
    return OutputError(f"the report cannot be written to '{path}': {error.strerror}", "name another place")
