"""`upload`: a finished output becomes a repository on the Hub, and is seen to have arrived.

1. The output must be finished, verified, and byte for byte what its manifest says.
2. Its model card is written.
3. Files that the branch does not have with the same bytes are sent, the large ones one by one; then one commit takes
   them over, and removes weight files of something else, which loaders would mix with ours.
4. The Hub's list of the new commit is compared with the files, hash by hash.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from int8convert import __version__
from int8convert.checkpoint.atomic import write_text
from int8convert.checkpoint.hashing import file_sha256
from int8convert.checkpoint.hub.repository import RepositoryFile
from int8convert.checkpoint.inspection import inspect
from int8convert.checkpoint.layout import OWN_FOLDER, is_weight_file, quoted
from int8convert.checkpoint.lock import DirectoryLock
from int8convert.checkpoint.source import CARD_NAME
from int8convert.errors import HubError, OutputError
from int8convert.publish.card import CARD_MARK, make_card
from int8convert.publish.finished import check_shards, check_verified, read_finished
from int8convert.publish.target import MAIN, SentSink, Target


@dataclass(frozen=True, slots=True)
class UploadReport:
    """The outcome of `upload`.

    Attributes:
        repository, branch: as asked for.
        url: where to look at it; of a pull request, its own.
        commit: the new one; None if nothing had to be changed, or it was a dry run.
        is_verified: as the model card says.
        n_files, n_bytes: of the whole.
        n_sent_bytes: of the files that the branch did not have, or would be sent by what was a dry run.
        sent, deleted: names of files.
        keeps_card: the output had a model card of somebody's own, which was sent as it is.
        is_dry_run: nothing was changed, neither here nor there.
    """

    out: str
    repository: str
    branch: str
    url: str
    commit: str | None
    is_verified: bool
    n_files: int
    n_bytes: int
    n_sent_bytes: int
    sent: tuple[str, ...]
    deleted: tuple[str, ...]
    keeps_card: bool
    is_dry_run: bool

    def to_json(self) -> dict[str, Any]:
        return {"schema": 1, **asdict(self)}


def upload(
    out: str | os.PathLike[str],
    repository: str,
    *,
    private: bool | None = None,
    revision: str = MAIN,
    create_pr: bool = False,
    message: str | None = None,
    dry_run: bool = False,
    allow_unverified: bool = False,
    on_file: SentSink = lambda name, n_bytes, is_sent: None,
) -> UploadReport:
    """Publish a finished output on the Hub. Interrupted, the same call goes on with the file it was at.

    Large files are sent by xet where hf_xet is installed, unless HF_HUB_DISABLE_XET is set before huggingface_hub is
    imported.

    Args:
        out: an output of `quantize` or `export`.
        repository: ORGANIZATION/NAME; made if it is not there.
        private: whether it is then.
        revision: the branch; made if it is not there.
        create_pr: propose the change in place of making it.
        message: of the commit.
        dry_run: tell what would be done.
        allow_unverified: publish what `verify` has not passed; the model card says so.
        on_file: told of each file that is on the Hub.

    Raises:
        OutputError, CorruptFileError: the output is not finished, or not what its manifest says.
        UnverifiedError: it is not verified.
        HubError: the Hub does not take it, or has other bytes afterwards.
    """
    target = Target(repository, revision, private, create_pr)
    if dry_run:
        return _upload(out, target, message, allow_unverified, on_file, is_dry_run=True)
    try:
        with DirectoryLock(Path(out) / OWN_FOLDER / "lock"):
            return _upload(out, target, message, allow_unverified, on_file, is_dry_run=False)
    except FileNotFoundError:
        read_finished(out)  # says what is not there
        raise
    except PermissionError as error:
        raise OutputError(
            f"{quoted(os.fspath(out), 200)} cannot be written to, and its model card and a lock belong into it",
            "copy it where you may write; nothing was sent",
        ) from error


def _upload(
    out: str | os.PathLike[str],
    target: Target,
    message: str | None,
    allow_unverified: bool,
    on_file: SentSink,
    *,
    is_dry_run: bool,
) -> UploadReport:
    output = read_finished(out)
    if not allow_unverified:
        check_verified(output)
    check_shards(output)
    own_card = output.path / CARD_NAME
    keeps_card = _has_own_card(own_card)
    card = own_card.read_bytes() if keeps_card else make_card(output, target.name, inspect(output.path)).encode()
    files = output.files()
    if not is_dry_run:
        write_text(own_card, card.decode())
        files[CARD_NAME] = own_card
        target.make()
    there = target.files() or {}
    sizes = {name: path.stat().st_size for name, path in files.items()} | {CARD_NAME: len(card)}
    changed = [name for name in files if name != CARD_NAME and not _is_same(files[name], there.get(name))]
    if CARD_NAME not in there or not there[CARD_NAME].is_content(card):
        changed.append(CARD_NAME)
    stale = sorted(name for name in there if is_weight_file(name) and name not in files)
    commit, url = None, target.url
    if not is_dry_run:
        if changed or stale:
            commit, url = _send(target, files, sizes, changed, stale, message, on_file)
        for name in sorted(set(files) - set(changed)):
            on_file(name, sizes[name], False)
        _check_arrived(target, commit, files)
    return UploadReport(
        out=os.fspath(out),
        repository=target.name,
        branch=target.branch,
        url=url,
        commit=commit,
        is_verified=not output.unverified,
        n_files=len(sizes),
        n_bytes=sum(sizes.values()),
        n_sent_bytes=sum(sizes[name] for name in changed),
        sent=tuple(sorted(changed)),
        deleted=tuple(stale),
        keeps_card=keeps_card,
        is_dry_run=is_dry_run,
    )


def _has_own_card(card: Path) -> bool:
    """Whether somebody wrote a model card, who was not us."""
    return card.is_file() and CARD_MARK not in card.read_text(encoding="utf-8", errors="replace")


def _is_same(path: Path, file: RepositoryFile | None) -> bool:
    if file is None or file.n_bytes != path.stat().st_size:
        return False
    return file_sha256(path) == file.sha256 if file.sha256 is not None else file.is_content(path.read_bytes())


def _send(
    target: Target,
    files: dict[str, Path],
    sizes: dict[str, int],
    changed: list[str],
    stale: list[str],
    message: str | None,
    on_file: SentSink,
) -> tuple[str, str]:
    """Send the files and commit them; the commit, and where to look at it."""
    from huggingface_hub import CommitOperationDelete

    additions = []
    for name in sorted(changed, key=lambda name: sizes[name]):
        additions.append(target.send(name, files[name]))
        on_file(name, sizes[name], True)
    deletions = [CommitOperationDelete(name) for name in stale]
    info = target.commit(additions, deletions, message or f"Upload by int8convert {__version__}")
    if info is None:
        return target.head(), target.url
    return info.oid, info.pr_url or target.url


def _check_arrived(target: Target, commit: str | None, files: dict[str, Path]) -> None:
    """Compare what the Hub lists with what is here."""
    there = target.files(commit) or {}
    different = [name for name, path in files.items() if not _is_same(path, there.get(name))]
    if different:
        raise HubError(
            f"{quoted(target.name)} has other bytes than were sent for {', '.join(map(quoted, different[:3]))}"
            f"{', ...' if len(different) > 3 else ''}",
            "somebody else may have changed it meanwhile; run the same command again, which sends what differs",
        )
