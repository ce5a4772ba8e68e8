"""The command line: all commands, and what happens around them."""

from __future__ import annotations

import gc
import os
import signal
import sys

import typer

from int8convert import __version__
from int8convert.cli import calibrate, export, generate, inspect, outliers, quantize, upload, verify
from int8convert.cli.console import interrupt, print_json_error, tell_interruption, terminate
from int8convert.cli.terminal import open_missing_streams
from int8convert.hub.retry import interrupted

app = typer.Typer(
    name="int8convert",
    help="Turn any Hugging Face checkpoint into an LLM.int8() checkpoint, offline, shard by shard.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,  # locals can hold a token
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, command, help_text, line in (
    ("quantize", quantize.quantize, quantize.HELP, "Turn a checkpoint into an LLM.int8() checkpoint."),
    ("calibrate", calibrate.calibrate, calibrate.HELP, "Gather statistics of what a model's layers read."),
    ("inspect", inspect.inspect, inspect.HELP, "Show what is in a checkpoint."),
    ("export", export.export, export.HELP, "Rewrite an int8 checkpoint for another loader."),
    ("verify", verify.verify, verify.HELP, "Compare an int8 checkpoint with its source."),
    ("outliers", outliers.outliers, outliers.HELP, "Find outlier features, and store their columns."),
    ("upload", upload.upload, upload.HELP, "Publish an int8 checkpoint on the Hub."),
    ("generate", generate.generate, generate.HELP, "Continue a prompt with an int8 checkpoint."),
):
    app.command(name, help=help_text, short_help=line)(command)


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
    """Run the console script.

    Two things end a command before its own boundary, `reporting_errors`: wrong usage, which typer prints, and a signal,
    which is printed here.
    """
    # A plan of a hundred thousand tensors has no cycles; looking for them takes a sixth of its time.
    gc.set_threshold(100_000, 50, 50)
    open_missing_streams()
    signal.signal(signal.SIGTERM, terminate)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as a shell starts what runs in the background
        signal.signal(signal.SIGINT, interrupt)
    as_json = "--json" in sys.argv
    try:
        app()
    except SystemExit as end:
        why = end.__context__
        if isinstance(why, typer.Exit) and isinstance(why.__cause__, KeyboardInterrupt):
            end.code = tell_interruption(why.__cause__, as_json, "nothing was started")
        elif isinstance(why, typer.TyperException) and as_json:
            print_json_error("usage", why.format_message(), f"see {_command_line(why)} --help; nothing was started")
        if interrupted.is_set():
            # Everything is cleaned up. Python would wait for threads that send a file or wait for the network.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code if isinstance(end.code, int) else 1)
        raise


def _command_line(error: typer.TyperException) -> str:
    """Return the command that was used wrongly, as far as it is known."""
    context = getattr(error, "ctx", None)
    return str(context.command_path) if context is not None else "int8convert"
