"""Imports go one way, and importing a module does nothing."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ORDER = (
    *("cli", "verification", "outliers", "conversion", "publish", "planning", "calibration", "runtime"),
    *("inspection", "sources", "hub", "decoding", "formats", "checkpoint", "transformers_internals", "patterns"),
    *("progress_bar", "events", "trace", "errors", "text"),
)
"""The packages and modules of int8convert: each imports only itself and what follows it."""

DOCUMENTED = {"transformers.quantizers", "transformers.utils.quantization_config", "transformers.generation.streamers"}
"""The modules of transformers that its documentation names and any of ours may import."""

ONLY_IN = {"typer": "int8convert/cli", "rich": "int8convert/cli", "click": "nowhere"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def package_of(module: str) -> str:
    """Return the package that a module of ours is in; "" is the top level, which exports the public names."""
    return module.removeprefix("int8convert").strip(".").split(".")[0]


def imports(tree: ast.Module, names: set[str]) -> Iterator[str]:
    """Yield the modules that a file imports anywhere; where it imports from a package, the module in it.

    Args:
        names: all modules of ours.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in names else node.module or ""


def sources() -> list[Path]:
    return sorted([*(ROOT / "int8convert").rglob("*.py"), *(ROOT / "cuda_kernels").rglob("*.py")])


NAMES = {module_name(path) for path in sources()}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path) -> None:
    own = module_name(path)
    in_kernels = own.startswith("cuda_kernels")
    is_top = not in_kernels and package_of(own) in ("", "__main__")
    for module in imports(ast.parse(path.read_text()), NAMES):
        top = module.split(".")[0]
        if top in ONLY_IN:
            assert str(path.relative_to(ROOT)).startswith(ONLY_IN[top]), f"{own} imports {module}"
        if top != "int8convert" or is_top or module == "int8convert":
            continue
        assert not in_kernels, f"{own} imports {module}"
        to_right = ORDER[ORDER.index(package_of(own)) :]
        assert package_of(module) in to_right, f"{own} imports {module}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_undocumented_names_of_transformers_are_in_one_file(path: Path) -> None:
    if module_name(path) == "int8convert.transformers_internals":
        return
    text = path.read_text()
    found = {name for name in imports(ast.parse(text), NAMES) if name.startswith("transformers.")}
    found |= {name for name in re.findall(r"from (transformers) import .*_utils", text)}
    private = re.findall(r"\.(_is_hf_initialized|all_tied_weights_keys|_keep_in_fp32_modules|_get_dtype_plan)\b", text)
    assert not found - DOCUMENTED and not private


def test_no_circle_of_imports() -> None:
    """Imports of every kind count, but for those that only type checkers follow."""
    graph = {module_name(path): {*imports(without_types(path), NAMES)} & NAMES for path in sources()}
    TopologicalSorter({name: found - {name, "int8convert"} for name, found in graph.items()}).prepare()


FORMAT_NAMES = frozenset({"bitsandbytes", "compressed-tensors", "torchao"})
MAY_KNOW_FORMATS = ("int8convert/formats/", "int8convert/cli/options.py")


def names_format(node: ast.AST) -> bool:
    """Return whether an expression or a pattern holds a format's name or a member of their enum."""
    return any(
        (isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value in FORMAT_NAMES)
        or (isinstance(part, ast.Attribute) and ast.unparse(part.value) == "Format" and part.attr.isupper())
        for part in ast.walk(node)
    )


def format_comparisons(tree: ast.Module) -> list[int]:
    """Return the lines that compare something with a format by its name."""
    compared = [node for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    matched = [node.pattern for node in ast.walk(tree) if isinstance(node, ast.match_case)]
    return [node.lineno for node in (*compared, *matched) if names_format(node)]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_format_is_known_by_name_outside_formats(path: Path) -> None:
    """What depends on the format is asked of its module, so that a new one is one new module."""
    if not str(path.relative_to(ROOT)).startswith(MAY_KNOW_FORMATS):
        assert format_comparisons(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    "code",
    [
        'x == "torchao"',
        'x != "bitsandbytes"',
        "x is Format.TORCHAO",
        "x is not Format.TORCHAO",
        'x in ("a", "torchao")',
        "x not in {Format.BITSANDBYTES}",
        "match x:\n    case Format.TORCHAO | 1:\n        pass",
        'match x:\n    case {"quant_method": "torchao"}:\n        pass',
    ],
)
def test_comparison_with_a_format_is_found(code: str) -> None:
    assert format_comparisons(ast.parse(code)) != []


def test_names_of_formats_may_be_passed_on() -> None:
    assert format_comparisons(ast.parse('f(Format.TORCHAO, "torchao"); x == y')) == []


def without_types(path: Path) -> ast.Module:
    """Parse a file, without what it imports for type checkers alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    return tree


def test_every_package_has_its_place() -> None:
    """A package that is not in the order would go unchecked."""
    assert {package_of(name) for name in NAMES if name.startswith("int8convert")} == {"", "__main__", *ORDER}


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return result.stdout.strip()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["--help"],
        *(
            [name, "--help"]
            for name in ("quantize", "calibrate", "inspect", "export", "verify", "outliers", "upload", "generate")
        ),
    ],
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['int8convert', *{arguments!r}]\n"
        "from int8convert.cli.app import main\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "heavy = {'torch', 'numba', 'numpy', 'transformers', 'tqdm', 'huggingface_hub', 're2'}\n"
        "print(sorted(heavy & set(sys.modules)))"
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


def test_public_functions_take_at_most_twelve_parameters() -> None:
    import int8convert

    functions = [getattr(int8convert, name) for name in int8convert.__all__]
    counts = {f.__name__: len(inspect.signature(f).parameters) for f in functions if inspect.isfunction(f)}
    assert "quantize" in counts
    assert {name: n for name, n in counts.items() if n > 12} == {}
