"""Nothing that the interpreter is tested with is made up: ptxas has to take it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.tools.ptx.snippets import EXECUTED, HEADER
from tests.tools.ptx.toolchain import require_valid


@pytest.fixture(autouse=True, scope="module")
def ptxas_takes_what_was_executed() -> Iterator[None]:
    """All snippets that a module's tests ran, as one text, each with names of its own."""
    EXECUTED.clear()
    yield
    kernels = []
    for i, text in enumerate(dict.fromkeys(EXECUTED)):
        body = text.removeprefix(HEADER)
        names = re.findall(r"\.(?:entry|func)(?:\s*\([^)]*\))?\s+(\w+)", body)
        names += re.findall(r"\.(?:shared|const|global)\s+\.align \d+ \.\w+ (\w+)", body)
        for name in names:
            body = re.sub(rf"(?<![\w.%]){name}\b", f"{name}_{i}", body)
        kernels.append(body)
    if kernels:
        require_valid(HEADER + "\n".join(kernels), (9, 0))
