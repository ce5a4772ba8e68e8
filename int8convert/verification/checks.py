"""What a verification found: named checks, each with the places where something is not as it should be."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MAX_FINDINGS = 20
"""Of one check. The first few name the defect; a million more would bury it, so they are only counted."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be, in one tensor or one file.

    Attributes:
        tensor: its name in the int8 checkpoint, or the name of the file.
        expected, found: phrases, such as "code 12" and "code 13".
        row, column: the first place; None where it is the whole that is wrong.
        n_places: how many such places the tensor has.
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
    """One thing that was looked at everywhere.

    Attributes:
        is_passed: nothing was found that counts against the checkpoint.
        n_checked: how many files, tensors, rows or codes were looked at; 0 where there was nothing to compare with.
        findings: the first `MAX_FINDINGS` of them, in the order of the files.
        n_findings: of all, a tensor counted once.
    """

    name: str
    is_passed: bool
    n_checked: int
    findings: tuple[Finding, ...] = ()
    n_findings: int = 0


def make_check(name: str, n_checked: int, findings: Iterable[Finding], is_gate: bool = True) -> Check:
    """A check that fails if there is any finding.

    Args:
        is_gate: whether it may fail; one that may not tells what it found all the same.
    """
    found = tuple(findings)
    return Check(name, not (found and is_gate), n_checked, found[:MAX_FINDINGS], len(found))
