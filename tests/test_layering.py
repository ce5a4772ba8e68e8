"""Imports go one way, and importing a module does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ALLOWED = {
    "errors": set(),
    "checkpoint": {"errors"},
    "conversion": {"runtime", "checkpoint", "cuda_kernels", "errors", "version"},
    "runtime": {"checkpoint", "cuda_kernels", "errors"},
    "evaluation": {"conversion", "runtime", "checkpoint", "cuda_kernels", "errors", "version"},
    "publish": {"checkpoint", "errors", "version"},
    "cli": {"publish", "conversion", "evaluation", "runtime", "checkpoint", "errors", "version"},
    "cuda_kernels": set(),
}
"""Package -> what it may import of ours, beside itself."""

ONLY_IN = {"typer": "int8convert/cli", "rich": "int8convert/cli", "click": "nowhere"}


def package_of(module: str) -> str:
    if module == "int8convert":
        return "version"  # the top level exports nothing else a layer may want
    return module.split(".")[1] if module.startswith("int8convert.") else module.split(".")[0]


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append(node.module or "")
    return found


def sources() -> list[Path]:
    return sorted([*(ROOT / "int8convert").rglob("*.py"), *(ROOT / "cuda_kernels").rglob("*.py")])


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path) -> None:
    relative = path.relative_to(ROOT)
    in_top_level = len(relative.parts) == 2 and relative.parts[0] == "int8convert" and relative.stem != "errors"
    own = relative.parts[0] if relative.parts[0] == "cuda_kernels" else relative.with_suffix("").parts[1]
    for module in imports(path):
        top = module.split(".")[0]
        if top in ONLY_IN:
            assert str(relative).startswith(ONLY_IN[top]), f"{relative} imports {module}"
        if top in ("int8convert", "cuda_kernels") and not in_top_level:
            assert package_of(module) in ALLOWED[own] | {own}, f"{relative} imports {module}"


def test_every_arrow_checked_exists() -> None:
    """The table above names real packages, so that a renamed one does not go unchecked."""
    for name in ALLOWED:
        assert (ROOT / name).is_dir() or (ROOT / "int8convert" / name).is_dir() or name == "errors"


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return result.stdout.strip()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["--help"],
        *([name, "--help"] for name in ("quantize", "inspect", "export", "verify", "outliers", "upload", "generate")),
    ],
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['int8convert', *{arguments!r}]\n"
        "from int8convert.cli.app import main\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "print(sorted({'torch', 'numba', 'numpy', 'transformers', 'tqdm', 'huggingface_hub'} & set(sys.modules)))"
    )
    assert run_python(code).splitlines()[-1] == "[]"


@pytest.mark.parametrize("module", ["quantize", "export"])
def test_conversion_of_safetensors_loads_no_torch(module: str) -> None:
    """What keeps the main process small and quick to start; torch is for `.bin` files and the child."""
    assert run_python(f"import sys, int8convert.conversion.{module}; print('torch' in sys.modules)") == "False"


def test_public_names_exist_and_are_listed() -> None:
    import int8convert

    assert dir(int8convert) == sorted(int8convert.__all__)
    for name in int8convert.__all__:
        assert getattr(int8convert, name) is not None
    with pytest.raises(AttributeError):
        int8convert.no_such_name  # noqa: B018
