"""An installation and a home that cannot be written to, as in a container, with cron, or on a shared cluster."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import int8convert
from tests.scenarios.strangers.makers import passes_exact

SITE = Path(int8convert.__file__).parents[1]
_RIGHTS = "-dac_override,-dac_read_search"
WITHOUT_RIGHTS = ["setpriv", f"--bounding-set={_RIGHTS}", f"--inh-caps={_RIGHTS}"] if os.getuid() == 0 else []
"""Root writes everywhere, unless it lays that down."""


@pytest.mark.usefixtures("map_in_process")
def test_conversion_needs_no_writable_installation_and_no_home(source: Path, tmp_path: Path) -> None:
    if WITHOUT_RIGHTS and subprocess.run([*WITHOUT_RIGHTS, "true"], capture_output=True).returncode:
        pytest.skip("setpriv cannot lay down root's rights here")
    site, home, temporary = tmp_path / "site", tmp_path / "home", tmp_path / "temporary"
    for package in ("int8convert", "cuda_kernels"):
        shutil.copytree(SITE / package, site / package, ignore=shutil.ignore_patterns("__pycache__"))
    home.mkdir()
    temporary.mkdir()
    locked = [site, *site.rglob("*"), home]
    for path in locked:
        path.chmod(path.stat().st_mode & ~0o222)
    left_out = ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "MPLCONFIGDIR")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment |= {"HOME": str(home), "TMPDIR": str(temporary), "PYTHONPATH": os.pathsep.join([str(site), *sys.path])}
    try:
        done = subprocess.run(
            [*WITHOUT_RIGHTS, sys.executable, "-m", "int8convert", "quantize", source, tmp_path / "out"],
            env=environment | {"PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            cwd=site,
        )
    finally:
        for path in locked:
            path.chmod(path.stat().st_mode | 0o200)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert not list(home.iterdir()) and not list(site.rglob("*.nbc"))
    assert [path.name for path in temporary.iterdir()] == [f"cuda_kernels-{os.getuid()}"]
    assert passes_exact(tmp_path / "out", source)
