"""Compiled code is kept where Numba keeps it, or where nobody else can write, or nowhere."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from numba import config
from numba.core.caching import FunctionCache

from cuda_kernels.cpu import compiled as module
from cuda_kernels.cpu.compiled import compiled, private_folder


def double(x):  # type: ignore[no-untyped-def]
    return x + x


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The temporary directory of this test; no folder of Numba's own can be written to."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(module, "private_folder", private_folder.__wrapped__)
    monkeypatch.setattr(config, "CACHE_DIR", "")
    refuse = classmethod(lambda cls, function, file: None)
    for locator in ("InTreeCacheLocator", "UserWideCacheLocator"):
        monkeypatch.setattr(f"numba.core.caching.{locator}.from_function", refuse)
    yield tmp_path


def cached_in(kernel: Any) -> list[Path]:
    return list(Path(kernel._cache.cache_path).glob("*.nbc"))


def test_folder_of_this_user_takes_the_place_of_numbas(temporary: Path) -> None:
    kernel = compiled()(double)
    assert kernel(2) == 4
    assert cached_in(kernel) and cached_in(kernel)[0].is_relative_to(temporary)
    again = compiled()(double)
    assert again(2) == 4 and again.stats.cache_hits and config.CACHE_DIR == ""


@pytest.mark.parametrize("kind", ["open to others", "link", "file"])
def test_folder_that_others_could_write_to_is_not_used(temporary: Path, kind: str) -> None:
    planted = temporary / f"cuda_kernels-{os.getuid()}"
    (temporary / "elsewhere").mkdir(mode=0o700)
    if kind == "open to others":
        planted.mkdir()
        planted.chmod(0o770)
    elif kind == "link":
        planted.symlink_to(temporary / "elsewhere")
    else:
        planted.write_text("")
    kernel = compiled()(double)
    assert kernel(2) == 4
    folder = Path(kernel._cache.cache_path).parent
    assert folder.name.startswith("cuda_kernels-") and folder != planted
    assert folder.stat().st_mode & 0o777 == 0o700
    assert not list((temporary / "elsewhere").iterdir())


def test_nothing_is_kept_without_a_place(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "missing"))
    assert compiled()(double)(2) == 4


def test_folder_the_user_names_comes_first(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "CACHE_DIR", str(temporary / "mine"))
    kernel = compiled()(double)
    assert kernel(2) == 4 and cached_in(kernel)[0].is_relative_to(temporary / "mine")


def test_full_disk_only_costs_the_cache(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(FunctionCache, "save_overload", fail)
    kernel = compiled()(double)
    assert kernel(2) == 4 and not cached_in(kernel)


def test_user_without_a_home_gets_no_folder_in_the_working_directory(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(module, "private_folder", private_folder.__wrapped__)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert Path(compiled()(double)._cache.cache_path).is_relative_to(temporary)


def test_every_kernel_is_compiled_alike() -> None:
    """Numba's own decorator would keep code where it likes, and raise where it cannot."""
    sources = Path(module.__file__).parent.glob("*.py")
    assert [path.name for path in sources if "njit" in path.read_text()] == ["compiled.py"]
