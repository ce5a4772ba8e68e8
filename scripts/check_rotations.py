"""Every text family transformers knows: whether its weights can be rotated, and whether it then computes the same.

`tests/tools/rotation_check.py` says how one family is checked. Costs a second or two for a family.

Exit code 1 if a rotated model computes something else, or a rotation is refused without a reason.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import transformers

from tests.tools.family_models import families
from tests.tools.rotation_check import RotationResult, check_rotation


def line(result: RotationResult) -> str:
    """A result as a row of the table."""
    what = "stream" if result.rotates_stream else "values" if result.n_folds else "nothing"
    return f"| {result.family} | {what} | {result.difference:.0e} | {'; '.join(result.refusals)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="families such as causal/llama; all by default")
    parser.add_argument("--write", type=Path, help="write the table to this file")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    results, rows, n_unbuilt = [], [], 0
    for family in families():
        if arguments.names and family.name not in arguments.names:
            continue
        try:
            results.append(check_rotation(family))
            rows.append(line(results[-1]))
        except Exception as error:  # a family that cannot be built small is no failure of a rotation
            rows.append(f"| {family.name} | not tried | | {type(error).__name__} |")
            n_unbuilt += 1
        print(rows[-1], flush=True)
    wrong = [result.family for result in results if not result.is_right]
    counts = {
        "with a rotated residual stream": sum(result.rotates_stream for result in results),
        "with rotated values alone": sum(bool(result.n_folds) and not result.rotates_stream for result in results),
        "refused with a reason": sum(not result.n_folds for result in results),
        "that cannot be built small": n_unbuilt,
        "that compute something else": len(wrong),
    }
    summary = "\n".join(f"- {n} {what}" for what, n in counts.items())
    print(summary)
    if arguments.write is not None:
        head = "| family | rotated | difference | not rotated, and why |\n|---|---|---|---|"
        text = f"# Rotations by family\n\ntransformers {transformers.__version__}, float32, families:\n\n{summary}\n\n"
        arguments.write.write_text(f"{text}{head}\n" + "\n".join(rows) + "\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
