"""A verification as one HTML page: the verdict and pictures first, then every number.

The page is one file with its pictures inside, no script and nothing from a network: it opens from a disk years later.
The template engine escapes all text that comes from a checkpoint. The same report gives the same bytes with one version
of matplotlib.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from int8convert.checkpoint.atomic import write_text
from int8convert.checkpoint.manifest import Manifest
from int8convert.errors import OutputError, SourceError
from int8convert.inspection import inspect
from int8convert.outliers.figures import encode_figure, prepare_folder, write_figures
from int8convert.sources import open_source
from int8convert.verification.page_figures import coverage_shares, report_figures
from int8convert.verification.verify_report import VerifyReport, cause_lines, cause_rows, fidelity_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from int8convert.outliers.find import OutlierReport

_TEMPLATE = "page.html.jinja"


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure, and its content in words."""

    name: str
    alt: str
    figure: Figure

    @property
    def data_uri(self) -> str:
        svg = encode_figure(self.name, self.figure, "svg")
        return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")


def prepare(page: Path | None, folder: Path | None) -> None:
    """Make the folders for a page and for pictures, before minutes are spent on measuring.

    Raises:
        SourceError: matplotlib or jinja2 is not installed.
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
                raise _output_error(error, path) from error


def draw_pictures(report: VerifyReport, outliers: OutlierReport | None = None) -> list[Picture]:
    inspection = inspect(report.out, report.exact.commit)
    return [Picture(*drawn) for drawn in report_figures(report, inspection, outliers)]


def write_pictures(pictures: Sequence[Picture], folder: Path) -> list[Path]:
    """Write each picture as PNG and SVG; return the paths."""
    prepare_folder(folder)
    return write_figures(((picture.name, picture.figure) for picture in pictures), folder)


def write_page(report: VerifyReport, pictures: Sequence[Picture], path: Path) -> None:
    """Write the page, whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, render(report, pictures))
    except OSError as error:
        raise _output_error(error, path) from error


def render(report: VerifyReport, pictures: Sequence[Picture]) -> str:
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
        cause_rows=cause_rows,
        cause_lines=cause_lines,
        layer_rows=[
            (each[0][0], [error for _, error in each])
            for each in zip(*(run.layer_errors for run in report.fidelity), strict=True)
        ],
    )


def say_verdict(report: VerifyReport) -> str:
    """Return the outcome in one or two sentences."""
    if report.failures:
        return f"Failed. {report.failures[0]}."
    if report.undecided:
        return f"Too few tokens to say. {report.undecided[0].line}."
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


def _provenance(report: VerifyReport) -> list[tuple[str, str]]:
    """Return (name, value) rows: origin of the checkpoint by its manifest, version, text and hashes."""
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


def _output_error(error: OSError, path: Path) -> OutputError:
    return OutputError(f"the report cannot be written to '{path}': {error.strerror}", "name another place")
