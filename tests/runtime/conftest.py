"""What tests of the runtime share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.tools.language_models import build_tokenizer


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On tiny tensors torch's threads do nothing but wait for each other: ten times as long on a busy machine."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def tokenizer() -> Any:
    return build_tokenizer()
