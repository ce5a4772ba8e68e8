"""Fixtures that tests of the runtime share with those of verification."""

from __future__ import annotations

from tests.verification.conftest import one_thread, tokenizer

__all__ = ["one_thread", "tokenizer"]
