"""Fixtures that tests of calibration share with those of verification."""

from __future__ import annotations

from tests.verification.conftest import one_thread, text, tokenizer

__all__ = ["one_thread", "text", "tokenizer"]
