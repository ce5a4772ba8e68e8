"""`int8convert inspect`: lists the tensors of a checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer

from int8convert.cli.console import print_json, print_line, print_table, quieting_hub, reporting_errors
from int8convert.cli.options import Revision, check_named, check_remote
from int8convert.text import counted, format_bytes, format_count, format_percent

HELP = """Show the tensors of a checkpoint, their dtypes, and how much of it is int8.

inspect reads only headers and config, also on the Hub. It takes a moment for a checkpoint of any size.

\b
Examples:
  int8convert inspect ./opt-66b
  int8convert inspect facebook/opt-66b --json

Exit codes: 0 done; 1 failed; 2 wrong usage; 130 interrupted, 143 terminated.
"""


def inspect(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH", callback=check_named, help="A checkpoint directory, or ORGANIZATION/NAME on the Hub."
        ),
    ],
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, errors included.")] = False,
) -> None:
    if revision is not None:
        check_remote("--revision", path, "checkpoints")
    with reporting_errors(as_json, "nothing is changed by inspect"), quieting_hub():
        from int8convert.inspection import inspect as run

        found = run(path, revision)
        if as_json:
            print_json(found.to_json())
            return
        at = f" at {found.commit[:12]}" if found.commit is not None else ""
        print_line(
            f"{at}: {', '.join(found.architectures) or 'no architecture named'}, "
            f"{format_count(found.n_parameters)} parameters in {found.n_tensors} tensors, "
            f"{format_bytes(found.n_bytes)} in {counted(found.n_shards, 'shard')}",
            head=str(found.path),
        )
        print_line(
            f"int8: {format_percent(found.coverage)} of the parameters; quant_method: {found.quant_method or 'none'}"
            + (f", threshold {found.threshold}" if found.threshold is not None else "")
            + (f", left 16-bit: {', '.join(found.skip_modules)}" if found.skip_modules else "")
        )
        for name, n_parameters in found.n_parameters_by_format.items():
            share = format_percent(n_parameters / max(1, found.n_parameters))
            print_line(f"{name}: {share} of the parameters; {found.bits_per_parameter:.1f} bits a parameter in all")
        why = ("why not int8",) if any(group.reason for group in found.groups) else ()
        print_table(
            "",
            ("tensors", "dtype", "shape", "number", "bytes", *why),
            [
                (
                    *(g.pattern, g.dtype, "x".join(map(str, g.shape)) or "scalar"),
                    *(f"{g.n_tensors}", format_bytes(g.n_bytes)),
                    *((g.reason,) if why else ()),
                )
                for g in found.groups
            ],
        )
