"""`int8convert upload`: publishes a finished output on the Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from int8convert.cli.console import note, print_json, print_line, quieting_hub, reporting_errors, wants_live_display
from int8convert.cli.options import EXIT_CODES, AsJson, NoXet, Quiet, check_named, turn_off_xet
from int8convert.text import format_bytes

if TYPE_CHECKING:
    from int8convert.publish.upload import UploadReport

_MAX_SKIPPED = 20
"""Number of unpublished files that are named."""

HELP = f"""Publish a finished and verified checkpoint on the Hub, with a model card.

Files that REPO already has are not sent again. After an interruption, run the same command again. At the end, the files
in REPO are compared with those in OUT.

Other weights in REPO are removed: those of an earlier conversion always, foreign ones only with --overwrite. README.md
becomes a model card, unless OUT or REPO has a README.md that int8convert did not write. The token comes from
`hf auth login` or HF_TOKEN.

\b
Examples:
  int8convert upload ./opt-66b-int8 me/opt-66b-int8 --private
  int8convert upload ./opt-66b-int8 me/opt-66b-int8 --dry-run

{EXIT_CODES}
"""

INTERRUPTED = "REPO is unchanged; files that were sent stay on the server, and the same command resumes after them"


def upload(
    out: Annotated[str, typer.Argument(metavar="OUT", callback=check_named, help="An output of quantize or export.")],
    repository: Annotated[
        str,
        typer.Argument(metavar="REPO", callback=check_named, help="ORGANIZATION/NAME on the Hub. Created if missing."),
    ],
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public",
            help="Visibility of a new REPO; fail if an existing REPO differs.  [default: the account's setting]",
        ),
    ] = None,
    revision: Annotated[str, typer.Option(metavar="BRANCH", help="Branch to write to. Created if missing.")] = "main",
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose the change as a pull request.")] = False,
    message: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Commit message.  [default: Upload by int8convert VERSION]")
    ] = None,
    no_xet: NoXet = False,
    allow_unverified: Annotated[
        bool, typer.Option("--allow-unverified", help="Publish without a passed verify. The model card says so.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace foreign weights and a foreign model card in REPO.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files that would be sent, and change nothing.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    turn_off_xet(no_xet)
    if dry_run and message is not None and not as_json:
        note("no effect in a dry run: --message")
    with reporting_errors(as_json, INTERRUPTED), quieting_hub(wants_live_display(quiet, as_json)):
        from int8convert.cli.progress import showing_progress
        from int8convert.publish.upload import upload as run

        with showing_progress(quiet, as_json) as on_event:
            report = run(
                out,
                repository,
                private=private,
                revision=revision,
                create_pr=create_pr,
                message=message,
                dry_run=dry_run,
                allow_unverified=allow_unverified,
                overwrite=overwrite,
                on_event=on_event,
            )
        if as_json:
            print_json(report.to_json())
        else:
            _print_report(report)


def _print_report(report: UploadReport) -> None:
    if report.keeps_card == "output":
        note(f"'{report.out}/README.md' was not written by int8convert; it is sent unchanged")
    if report.keeps_card == "repository":
        note(f"{report.repository} has a README.md not written by int8convert: it is kept; --overwrite replaces it")
    if not report.is_verified:
        note("not verified, as the model card says")
    vouches = "verify does not vouch for it" if report.is_verified else "the conversion did not write it"
    for name in report.skipped_files[:_MAX_SKIPPED]:
        note(f"{name} is not sent: {vouches}")
    if len(report.skipped_files) > _MAX_SKIPPED:
        note(f"and {len(report.skipped_files) - _MAX_SKIPPED:,} more files are not sent; --json names them")
    for name in report.deleted:
        note(f"{name} {'would be' if report.is_dry_run else 'was'} removed: it does not belong to this checkpoint")
    if report.is_dry_run:
        if not report.has_token:
            note("no token is set: the upload itself would be refused")
        print_line(
            f", branch {report.branch}, {_state(report)}: {len(report.sent)} of {report.n_files} files would be sent, "
            f"{format_bytes(report.n_sent_bytes)} of {format_bytes(report.n_bytes)}; nothing was changed",
            head=report.repository,
        )
        for name in report.sent:
            print_line(f"  {name}")
        return
    print_line(
        f", {_state(report)}: {report.n_files} files, {format_bytes(report.n_bytes)}, "
        f"{format_bytes(report.n_sent_bytes)} of them sent now; all compared by hash",
        head=report.url,
    )
    print_line(f"commit: {report.commit}" if report.commit else "commit: none, everything was there")


def _state(report: UploadReport) -> str:
    """Return whether the repository is new, and who can see it."""
    seen = {True: "private", False: "public", None: "as private as the account's others"}[report.is_private]
    return f"new, {seen}" if report.is_new else seen
