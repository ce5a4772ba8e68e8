"""The page: every number of the report, nothing from a network, no code, whatever a checkpoint calls itself."""

from __future__ import annotations

import base64
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from int8convert.errors import OutputError, SourceError
from int8convert.publish.verify_command import Gates
from int8convert.verification.checks import Finding, make_check
from int8convert.verification.exact.level import ExactReport
from int8convert.verification.fidelity.level import FidelityReport
from int8convert.verification.page import (
    draw_pictures,
    prepare,
    render,
    say_verdict,
    write_page,
    write_pictures,
)
from int8convert.verification.verify_report import TextUsed, VerifyReport, fidelity_rows
from tests.tools.tiny_models import save_checkpoint

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

FIDELITY = FidelityReport(
    mode="static+guard", threshold=6.0, n_sequences=8, n_tokens=2040, reference_perplexity=269.545,
    perplexity=269.652, delta_nll=0.000399, delta_nll_interval=(-0.000252, 0.00105), mean_kl=3.2e-5,
    mean_kl_interval=(2.9e-5, 3.6e-5), median_kl=2.4e-5, p99_kl=1.5e-4, p999_kl=2.7e-4, same_top1=0.997, delta_p=3.6e-4,
    layer_errors=(("model.layers.0", 0.0051), ("model.layers.1", 0.0074)), outlier_share=0.018, dtype="float16",
    reference_dtype="float32", device="cpu", streamed=False, peak_memory_bytes=638_000_000, seconds=1.1, convention="c",
)  # fmt: skip
HOSTILE = "<script>alert('x')</script>"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Any checkpoint: the page asks it for its coverage alone."""
    return save_checkpoint("llama", tmp_path / "out")


def make_report(out: Path, *findings: Finding, fidelity: tuple[FidelityReport, ...] = (FIDELITY,)) -> VerifyReport:
    checks = (make_check("weights", 3_145_728, findings), make_check("kept", 44, ()))
    exact = ExactReport(str(out), "source", "bitsandbytes", checks, n_int8_weights=24)
    text = TextUsed("kernels.md", "ab" * 32, "a text", False, 2125, 8, 256, "spread: 8 windows")
    return VerifyReport(
        "int8convert 1", str(out), "fidelity", Gates(), {"config.json": "cd" * 32}, exact, text, fidelity
    )


class Page(HTMLParser):
    """What a browser would make of it: text, tags, and addresses asked for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def read(report: VerifyReport) -> Page:
    return Page(render(report, draw_pictures(report)))


def test_every_number_is_on_the_page(out: Path) -> None:
    page = read(make_report(out))
    cells = {word.strip() for word in page.words}
    assert {value for _, values in fidelity_rows((FIDELITY,)) for value in values} <= cells
    assert {"0.5100 %", "0.7400 %", "3,145,728", "ab" * 32, "cd" * 32, "model.layers.1"} <= cells
    assert "passed" in " ".join(page.words) and page.tags.count("img") == 3


def test_verdict_comes_first_and_names_what_failed(out: Path) -> None:
    passed = say_verdict(make_report(out))
    assert passed.startswith("Passed. 24 int8 weights") and "-0.00040 nats" in passed and "99.70%" in passed
    finding = Finding("model.layers.0.fc1.weight", "code 12", "code 13", row=5, column=7)
    failed = make_report(out, finding, fidelity=())
    assert say_verdict(failed) == (
        "Failed. weights: model.layers.0.fc1.weight row 5 column 7: expected code 12, found code 13."
    )
    page = read(failed)
    assert "FAILED" in page.words and page.tags.count("img") == 1, "coverage alone"


def test_page_asks_for_nothing_and_runs_nothing(out: Path) -> None:
    text = render(make_report(out), draw_pictures(make_report(out)))
    page = Page(text)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert page.addresses and all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert "http" not in re.sub(r"base64,[^\"]+", "", text)
    pictures = [base64.b64decode(address.partition(",")[2]) for address in page.addresses]
    assert all(b"<svg" in picture and b"<script" not in picture for picture in pictures)


def test_names_of_a_checkpoint_stay_text(out: Path) -> None:
    finding = Finding(HOSTILE, HOSTILE, HOSTILE)
    report = replace(
        make_report(out, finding, fidelity=(replace(FIDELITY, layer_errors=((HOSTILE, 0.1),)),)), out=str(out)
    )
    page = read(report)
    assert "script" not in page.tags and sum(HOSTILE in word for word in page.words) >= 3


def test_same_report_gives_the_same_page(out: Path) -> None:
    report = make_report(out)
    assert render(report, draw_pictures(report)) == render(report, draw_pictures(report))


def test_one_sequence_has_no_interval_and_is_drawn(out: Path) -> None:
    infinite = (-float("inf"), float("inf"))
    read(make_report(out, fidelity=(replace(FIDELITY, delta_nll_interval=infinite, mean_kl_interval=infinite),)))


def test_divergence_of_nothing_is_drawn(out: Path) -> None:
    none = {name: 0.0 for name in ("mean_kl", "median_kl", "p99_kl", "p999_kl", "delta_nll")}
    read(make_report(out, fidelity=(replace(FIDELITY, **none, delta_nll_interval=(0.0, 0.0)),)))


def test_pictures_are_written_as_png_and_svg(out: Path, tmp_path: Path) -> None:
    paths = write_pictures(draw_pictures(make_report(out)), tmp_path / "new" / "figures")
    assert sorted(path.name for path in paths) == [
        f"{name}.{suffix}" for name in ("coverage", "fidelity", "layer-errors") for suffix in ("png", "svg")
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml") for path in paths)


def test_place_that_cannot_be_written_to_is_an_error(out: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for places in ((tmp_path / "file" / "page.html", None), (None, tmp_path / "file" / "figures")):
        with pytest.raises(OutputError, match="cannot be written"):
            prepare(*places)
    report = make_report(out)
    with pytest.raises(OutputError, match="cannot be written"):
        write_page(report, [], tmp_path / "file" / "page.html")
    with pytest.raises(OutputError, match="cannot be written"):
        write_pictures([], tmp_path / "file" / "figures")


@pytest.mark.parametrize("name", ["matplotlib", "jinja2"])
def test_missing_extra_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SourceError, match=f"needs {name}") as error:
        prepare(None, None)
    assert "int8convert[report]" in error.value.hint
