"""The commands, put together."""

from __future__ import annotations

import os
import signal
import sys

import typer

from int8convert import __version__
from int8convert.checkpoint.hub.patience import interrupted
from int8convert.cli import export, generate, inspect, outliers, quantize, upload, verify
from int8convert.cli.console import interrupt, terminate

app = typer.Typer(
    name="int8convert",
    help="Turn any Hugging Face checkpoint into an LLM.int8() checkpoint, offline, shard by shard.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,  # locals can hold a token
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("quantize", help=quantize.HELP)(quantize.quantize)
app.command("inspect", help=inspect.HELP)(inspect.inspect)
app.command("export", help=export.HELP)(export.export)
app.command("verify", help=verify.HELP)(verify.verify)
app.command("outliers", help=outliers.HELP)(outliers.outliers)
app.command("upload", help=upload.HELP)(upload.upload)
app.command("generate", help=generate.HELP)(generate.generate)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"int8convert {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """The console script."""
    signal.signal(signal.SIGTERM, terminate)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as a shell starts what runs in the background
        signal.signal(signal.SIGINT, interrupt)
    try:
        app()
    except SystemExit as stop:
        if interrupted.is_set():
            # All is tidied up. Threads may be sending a file or waiting for the network; Python would wait for them.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(stop.code if isinstance(stop.code, int) else 1)
        raise
