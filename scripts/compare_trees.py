"""Compare what two trees of this project write: the bytes of every output, and how every refusal ends.

1. Sources are made once, by the tests of the newer tree: a tiny model of every text family, small models in each dtype,
   sharded and as pickles, FP8 checkpoints, the corpus of attacks; the demo's model where it has been trained.
2. Each tree, in a process of its own, converts all of them to both formats, exports the small ones, and notes the
   sha256 of each file outside of the folder int8convert/, or the class and the exit code of the error.
3. Every difference is printed. Exit code 1 if there is one.

    .venv/bin/python -m scripts.compare_trees OLD [NEW] [--only tiny]

OLD and NEW are directories that hold a checkout each; NEW is by default this one. About two minutes a tree.
"""

import argparse
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

KINDS = ("tiny", "fp8", "attacks", "demo", "families")
PLAN_MODULES = ("int8convert.planning.pending_plan", "int8convert.conversion.coming_plan")
"""Where a tree starts the process that maps a model; the tests' stand-in does the same without a process."""

EXPORTS = (
    {"format": "compressed-tensors"},
    {"format": "torchao"},
    {"dequantize": "bfloat16"},
    {"max_shard_size": "50KB"},
)
Answer = dict[str, Any]


def make_sources(root: Path, kinds: list[str]) -> None:
    """Write the sources of some kinds, each into a folder of its own."""
    import torch
    import transformers

    from tests.tools import family_models
    from tests.tools.attacks.make_attacks import make_attack
    from tests.tools.attacks.registry import ATTACKS
    from tests.tools.fp8_checkpoints import save_fp8
    from tests.tools.tiny_models import MODELS, save_as_pickles, save_checkpoint

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for kind in kinds:
        (root / kind).mkdir(parents=True)
    if "tiny" in kinds:
        for name in MODELS:
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                save_checkpoint(name, root / "tiny" / f"{name}-{str(dtype).removeprefix('torch.')}", dtype)
            save_checkpoint(name, root / "tiny" / f"{name}-sharded", torch.float16, "60KB")
        for name in ("opt", "llama"):
            for n_shards in (1, 2):
                save_as_pickles(
                    root / "tiny" / f"{name}-float16", root / "tiny" / f"{name}-pickle-{n_shards}", n_shards
                )
    if "fp8" in kinds:
        plain = save_checkpoint("llama", root / "plain", torch.bfloat16)
        for scale in ("block", "row", "tensor"):
            save_fp8(plain, root / "fp8" / scale, scale)
    if "attacks" in kinds:
        for attack in ATTACKS.values():
            make_attack(attack, root / "attacks" / attack.name)
    if "demo" in kinds:
        for source in Path(".cache/small_model").glob("*/source-*"):
            shutil.copytree(source, root / "demo" / source.name, dirs_exist_ok=True)
    if "families" in kinds:
        for family in family_models.families():
            try:
                built = family_models.build_family(family)
                model = built[0] if isinstance(built, tuple) else built
                model.to(torch.float16).save_pretrained(root / "families" / family.name.replace("/", "--"))
            except Exception as error:  # what cannot be built or saved is no source, in either tree
                print(f"{family.name}: not built: {type(error).__name__}", file=sys.stderr)


def digests(out: Path) -> dict[str, str]:
    """Return file name -> sha256 of an output, without the folder int8convert/."""
    names = (path.relative_to(out).as_posix() for path in sorted(out.rglob("*")) if path.is_file())
    return {
        name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in names if not name.startswith("int8")
    }


def convert_all(root: Path) -> dict[str, Answer]:
    """Convert every source with the tree that is imported: what to -> what came of it."""
    import int8convert
    from tests.conftest import InProcessMap

    for name in PLAN_MODULES:
        # An editable installation would find modules of its own tree in place of those that this one lacks.
        if Path(int8convert.__file__).parents[1].joinpath(f"{name.replace('.', '/')}.py").exists():
            importlib.import_module(name).ModelMapProcess = InProcessMap  # type: ignore[attr-defined]
    found: dict[str, Answer] = {}

    def note(key: str, function: Any, source: Path, out: Path, **options: Any) -> bool:
        try:
            function(source, out, **options)
        except Exception as error:  # what is no error of ours is a fault, and has to be the same fault or none
            found[key] = {"error": type(error).__name__, "exit code": str(getattr(error, "exit_code", "traceback"))}
            return False
        found[key] = digests(out)
        return True

    for kind in KINDS:
        for folder in sorted((root / kind).glob("*")):
            source = folder / "checkpoint" if kind == "attacks" else folder
            for output_format in ("bitsandbytes", "compressed-tensors"):
                with tempfile.TemporaryDirectory() as work:
                    out, key = Path(work, "out"), f"{kind}/{folder.name} {output_format}"
                    options: dict[str, Any] = {"format": output_format, "min_coverage": 0.0}
                    if hasattr(int8convert, "PlanOptions"):  # older trees take the options one by one
                        options = {"options": int8convert.PlanOptions(**options)}
                    options["on_event"] = lambda event: None
                    if note(key, int8convert.quantize, source, out, **options) and kind in ("tiny", "fp8", "demo"):
                        for i, export in enumerate(EXPORTS):
                            note(f"{key} {export}", int8convert.export, out, Path(work, f"export-{i}"), **export)
    return found


def run_tree(tree: Path, root: Path) -> dict[str, Answer]:
    """Run `convert_all` with the code of a tree."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, __file__, str(tree), "--convert", str(root)]
    result = subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Answer] = json.loads(result.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW", nargs="?", default=Path(__file__).parents[1])
    parser.add_argument("--only", choices=KINDS, action="append", help="sources of this kind; may be repeated")
    parser.add_argument("--convert", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.convert:
        print(json.dumps(convert_all(arguments.convert)))
        return 0
    with tempfile.TemporaryDirectory() as work:
        root = Path(work)
        make_sources(root, arguments.only or list(KINDS))
        old, new = (run_tree(tree.resolve(), root) for tree in (arguments.old, arguments.new))
    different = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    for key in different:
        before, after = old.get(key, {}), new.get(key, {})
        print(
            key,
            {
                name: (before.get(name), after.get(name))
                for name in {*before, *after}
                if before.get(name) != after.get(name)
            },
        )
    n_files = sum(len(answer) for answer in old.values() if "error" not in answer)
    n_errors = sum("error" in answer for answer in old.values())
    print(f"{len(old)} conversions and exports, {n_files} files, {n_errors} refusals: {len(different)} differ")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
