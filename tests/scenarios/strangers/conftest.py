"""Fixtures of all tests of this folder: one source and one output, made once, and copies to spoil."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import run  # noqa: F401, a fixture
from tests.conftest import in_this_process
from tests.scenarios.strangers.makers import convert, make_model
from tests.verification.conftest import one_thread  # noqa: F401, a fixture

Copy = Callable[[Path], Path]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source and its conversion. Nobody writes to them; see `copy`."""
    folder = tmp_path_factory.mktemp("strangers")
    source = make_model(folder / "source")
    with in_this_process():
        return source, convert(source, folder / "out")


@pytest.fixture
def source(made: tuple[Path, Path], copy: Copy) -> Path:
    """A copy of the source that the test may change."""
    return copy(made[0])


@pytest.fixture
def out(made: tuple[Path, Path], copy: Copy) -> Path:
    """A copy of the output that the test may change; its manifest names the source that nobody changes."""
    return copy(made[1])


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    """Copies a checkpoint to a directory of its own."""

    def copy(directory: Path) -> Path:
        n = len(list(tmp_path.iterdir()))
        return Path(shutil.copytree(directory, tmp_path / f"{directory.name}-{n}", symlinks=True))

    return copy
