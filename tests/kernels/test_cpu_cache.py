"""Compiled kernels are kept where nobody else can write, or nowhere, and run only as they were written."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cuda_kernels import cache_folder as module
from cuda_kernels.cpu import objects
from cuda_kernels.cpu.objects import Kernel

ROTATE = ("rotate", "rotate_columns")


def quarters() -> None:
    """A new `Kernel`, as of a new process, finds its code or compiles it, and rotates a row of four."""
    objects._ADDRESSES.clear()
    values = np.array([[2, 0, 0, 0]], np.float32)
    Kernel(*ROTATE)(values, 4)
    np.testing.assert_array_equal(values, [[1, 1, 1, -1]])


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were compiled."""
    from cuda_kernels.cpu.kernels import build as builder

    names: list[str] = []
    build = builder.build
    monkeypatch.setattr(builder, "build", lambda module, name, kinds: names.append(name) or build(module, name, kinds))
    return names


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary directory of this test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(objects, "temporary_folder", module.temporary_folder.__wrapped__)
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "cuda_kernels" / "cpu"


def test_second_process_compiles_nothing_and_imports_no_numba(home: Path, built: list[str]) -> None:
    quarters()
    quarters()
    assert built == [ROTATE[1]]
    (kept,) = home.iterdir()
    assert home.stat().st_mode & 0o777 == 0o700 and not kept.stat().st_mode & 0o077
    program = """
import sys, numpy as np
from cuda_kernels import cpu
values = np.array([[2, 0, 0, 0]], np.float32)
cpu.rotate(values, 4)
print(values.tolist(), "numba" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[[1.0, 1.0, 1.0, -1.0]] False\n"


@pytest.mark.parametrize("damage", ["code", "header", "symbol", "empty", "cut"])
def test_damaged_code_is_compiled_again(home: Path, built: list[str], damage: str) -> None:
    quarters()
    (path,) = home.iterdir()
    whole = path.read_bytes()
    changed = bytes([whole[-1] ^ 1])
    symbol = whole.replace(b"rotate_columns", b"rotate_column5", 1)
    assert symbol != whole
    path.write_bytes(
        {"symbol": symbol, "code": whole[:-1] + changed, "header": b"{}\n" + whole, "empty": b"", "cut": whole[:-9]}[
            damage
        ]
    )
    for _ in range(2):
        quarters()
    assert built == [ROTATE[1]] * 2


@pytest.mark.parametrize("kind", ["writable by others", "link"])
def test_code_that_others_could_have_written_is_not_run(home: Path, built: list[str], kind: str) -> None:
    quarters()
    (path,) = home.iterdir()
    if kind == "link":
        path.rename(home.parent / "elsewhere.o")
        path.symlink_to(home.parent / "elsewhere.o")
    else:
        path.chmod(0o666)
    quarters()
    assert built == [ROTATE[1]] * 2 and not path.is_symlink() and not path.stat().st_mode & 0o022


@pytest.mark.parametrize("place", ["home", "temporary"])
@pytest.mark.parametrize("kind", ["open to others", "link", "file"])
def test_folder_that_others_could_write_to_is_not_used(
    home: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, place: str, kind: str, tmp_path: Path
) -> None:
    own = temporary / f"cuda_kernels-{os.getuid()}"
    if place == "temporary":
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        monkeypatch.setattr(os.path, "isabs", lambda path: False)
    planted = home if place == "home" else own
    planted.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    if kind == "open to others":
        planted.mkdir()
        planted.chmod(0o770)
    elif kind == "link":
        planted.symlink_to(tmp_path / "elsewhere")
    else:
        planted.write_text("")
    quarters()
    folders = [path.parent for path in temporary.glob("*/*.o")]
    assert len(folders) == 1 and folders[0].stat().st_mode & 0o777 == 0o700
    assert (folders[0] == own) == (place == "home") and not list((tmp_path / "elsewhere").iterdir())


def test_nothing_is_kept_without_a_place(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, built: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    quarters()
    quarters()
    assert built == [ROTATE[1]] * 2


def test_full_disk_only_costs_the_cache(home: Path, monkeypatch: pytest.MonkeyPatch, built: list[str]) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(os, "replace", fail)
    quarters()
    assert not list(home.iterdir())
    quarters()
    assert built == [ROTATE[1]] * 2


def test_oldest_code_goes_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home.mkdir(parents=True, mode=0o700)
    for i in range(4):
        (home / f"{i}.o").write_text("")
        os.utime(home / f"{i}.o", (i, i))
    monkeypatch.setattr(objects, "MAX_FILES", 3)
    quarters()
    names = {path.name for path in home.iterdir()}
    assert len(names) == 3 and names > {"2.o", "3.o"}


def test_a_change_of_the_source_or_the_processor_is_other_code(
    home: Path, monkeypatch: pytest.MonkeyPatch, built: list[str]
) -> None:
    quarters()
    for name in ("NUMBA_CPU_NAME", "NUMBA_OPT"):
        monkeypatch.setenv(name, {"NUMBA_CPU_NAME": "generic", "NUMBA_OPT": "2"}[name])
        objects._digest.cache_clear()
        quarters()
    objects._digest.cache_clear()
    assert len(list(home.iterdir())) == len(built) == 3


def test_source_that_changes_while_a_process_runs_is_not_compiled(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    quarters()  # the digest is taken
    folder = tmp_path / "package" / "cpu" / "kernels"
    folder.mkdir(parents=True)
    (tmp_path / "package" / "reference.py").write_text("N_STEPS = 126")
    monkeypatch.setattr(objects, "_KERNELS", folder)
    monkeypatch.setattr(objects, "_read", lambda *_: None)
    with pytest.raises(RuntimeError, match="the source of cuda_kernels changed while this process ran"):
        quarters()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_child_that_is_forked_while_a_thread_compiles_compiles_too(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda_kernels.cpu.kernels import build as builder

    begun, build = threading.Event(), builder.build

    def slow(*args: Any) -> Any:
        begun.set()
        time.sleep(0.5)
        return build(*args)

    monkeypatch.setattr(builder, "build", slow)
    compiling = threading.Thread(target=quarters)
    compiling.start()
    begun.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            quarters()
            os._exit(0)
        finally:
            os._exit(1)
    compiling.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_kernel_that_needs_numba_at_run_time_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda_kernels.cpu.kernels import rotate
    from cuda_kernels.cpu.kernels.build import build
    from cuda_kernels.cpu.kernels.compiled import compiled

    @compiled()
    def clear(a):  # type: ignore[no-untyped-def]
        a.reshape(2, 2)[0] = 0

    monkeypatch.setattr(rotate, "clear", clear, raising=False)
    with pytest.raises(RuntimeError, match=r"the kernel rotate\.clear calls numba_attempt_nocopy_reshape"):
        build("rotate", "clear", ("<f4:1C",))


def test_numba_is_imported_only_where_kernels_are_compiled() -> None:
    folder = Path(objects.__file__).parent
    assert not [path.name for path in folder.glob("*.py") if re.search("^(import|from) numba", path.read_text(), re.M)]
    assert [path.name for path in (folder / "kernels").glob("*.py") if "njit" in path.read_text()] == ["compiled.py"]
