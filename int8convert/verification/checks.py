"""The checks of a verification, each with its findings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MAX_FINDINGS = 20
"""Findings of one check that are kept. The others are only counted: a million of them would bury the defect."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A defect in one tensor or one file.

    Attributes:
        tensor: name of the tensor in the int8 checkpoint, or of the file.
        expected, found: phrases, such as "code 12" and "code 13".
        row, column: the first place; None if the whole is wrong.
        n_places: number of such places in the tensor.
    """

    tensor: str
    expected: str
    found: str
    row: int | None = None
    column: int | None = None
    n_places: int = 1

    def __str__(self) -> str:
        place = f" row {self.row:,}" if self.row is not None else ""
        place += f" column {self.column:,}" if self.column is not None else ""
        more = f" (one of {self.n_places:,} places in it)" if self.n_places > 1 else ""
        return f"{self.tensor}{place}: expected {self.expected}, found {self.found}{more}"


@dataclass(frozen=True, slots=True)
class Check:
    """One property that was checked everywhere.

    Attributes:
        is_passed: whether there is no finding.
        n_checked: number of files, tensors, rows or codes that were checked; 0 if there was nothing to compare with.
        findings: the first `MAX_FINDINGS`, in the order of the files.
        n_findings: number of all findings; a tensor counts once.
    """

    name: str
    is_passed: bool
    n_checked: int
    findings: tuple[Finding, ...] = ()
    n_findings: int = 0


def make_check(name: str, n_checked: int, findings: Iterable[Finding]) -> Check:
    """Return a check that fails if there is any finding."""
    found = tuple(findings)
    return Check(name, not found, n_checked, found[:MAX_FINDINGS], len(found))
