"""`upload`: a finished output becomes a repository on the Hub, and is seen to have arrived.

1. The output must be finished, verified, and byte for byte what its manifest and verify.json say; the repository must
   hold no weights of something else, or be overwritten.
2. Its model card is written, unless there is one that somebody wrote, here or there.
3. Files that the branch does not have with the same bytes are sent, the large ones one by one; then one commit takes
   them over, and removes weights that are no part of the output, which loaders would mix with ours.
4. The Hub's list of the new commit is compared with the files, hash by hash.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from int8convert import __version__
from int8convert.checkpoint.atomic import write_text
from int8convert.checkpoint.lock import DirectoryLock
from int8convert.checkpoint.model_card import read_card
from int8convert.checkpoint.names import CARD_NAME, MANIFEST_NAME, OWN_FOLDER, is_loaded_as_weights
from int8convert.errors import HubError, OutputError, stating
from int8convert.events import EventSink, FileSent, ignore
from int8convert.hub.branch import CARD_MARK, MAIN, Target
from int8convert.hub.repository import Repository, RepositoryFile
from int8convert.inspection import inspect
from int8convert.progress_bar import sink_or_bar
from int8convert.publish.card import make_card
from int8convert.publish.finished import FinishedOutput, check_shards, check_verified, read_finished
from int8convert.text import quoted


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
        left: names of files in `out` that nobody vouches for, and that are not published.
        keeps_card: whose model card was left as it is: "" for none, "output" for one in `out`, which was sent,
            "repository" for one that was there.
        is_new: the repository or the branch was not there.
        is_private: the repository; None if it would be made as the account has it.
        has_token: without one the upload that was a dry run would be refused.
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
    left: tuple[str, ...]
    keeps_card: str
    is_new: bool
    is_private: bool | None
    has_token: bool
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
    overwrite: bool = False,
    on_event: EventSink | None = None,
) -> UploadReport:
    """Publish a finished output on the Hub. Interrupted, the same call goes on with the file it was at.

    Large files are sent by xet where hf_xet is installed, unless HF_HUB_DISABLE_XET is set before huggingface_hub is
    imported.

    Args:
        out: an output of `quantize` or `export`.
        repository: ORGANIZATION/NAME; made if it is not there.
        private: whether it is then, and must be if it is there.
        revision: the branch; made if it is not there.
        create_pr: propose the change in place of making it.
        message: of the commit.
        dry_run: tell what would be done.
        allow_unverified: publish what the conversion wrote though `verify` has not passed it; the model card says so.
        overwrite: replace weights of something else and a model card of somebody's own that the repository has.
        on_event: receives `FileSent`; None shows a tqdm bar.

    Raises:
        OutputError, CorruptFileError: the output is not finished, or not what its manifest says; or the repository
            holds weights of something else.
        UnverifiedError: it is not verified.
        HubError: the Hub does not take it, or has other bytes afterwards.
    """
    target = Target(repository, revision, private, create_pr)
    with stating("nothing was sent"), sink_or_bar(ignore if dry_run else on_event, "upload") as sink:
        job = _Upload(out, target, message, allow_unverified, overwrite, sink, is_dry_run=dry_run)
        if dry_run:
            target.check_online("a dry run asks the Hub what REPO holds")
            return job.run()
        target.check_access()
        return _upload_locked(job, out)


def _upload_locked(job: _Upload, out: str | os.PathLike[str]) -> UploadReport:
    try:
        with DirectoryLock(Path(out) / OWN_FOLDER / "lock"):
            return job.run()
    except FileNotFoundError:
        read_finished(out)  # says what is not there
        raise
    except PermissionError as error:
        raise OutputError(
            f"{quoted(os.fspath(out), 200)} cannot be written to, and its model card and a lock belong into it",
            "copy it where you may write",
        ) from error


@dataclass(frozen=True, slots=True)
class _Upload:
    """What `upload` was asked for."""

    out: str | os.PathLike[str]
    target: Target
    message: str | None
    allows_unverified: bool
    overwrites: bool
    on_event: EventSink
    is_dry_run: bool

    def run(self) -> UploadReport:
        output = read_finished(self.out)
        if not self.allows_unverified:
            check_verified(output)
        check_shards(output)
        found = self.target.find()
        there = dict(found.files) if found is not None else {}
        files = output.files()
        hashes = {name: output.hashes[name] for name in files}
        sizes = {name: path.stat().st_size for name, path in files.items()}
        changed = [name for name in sizes if not _is_same(files[name], hashes[name], there.get(name))]
        stale = sorted(name for name in there if is_loaded_as_weights(name) and name not in files)
        replaced = sorted(name for name in changed if is_loaded_as_weights(name) and name in there)
        if (stale or replaced) and not self.overwrites and MANIFEST_NAME not in there:
            raise _foreign_weights(self.target.name, stale + replaced)
        keeps_card = self._whose_card(output, found)
        card = self._card(output, keeps_card)
        if not self.is_dry_run:
            if card is not None and keeps_card != "output":
                write_text(output.path / CARD_NAME, card.decode())
            self.target.make()
        if card is not None:
            files[CARD_NAME] = output.path / CARD_NAME
            sizes[CARD_NAME] = len(card)
            hashes[CARD_NAME] = hashlib.sha256(card).hexdigest()
            if CARD_NAME not in there or not there[CARD_NAME].is_content(card):
                changed.append(CARD_NAME)
        commit, url = None, self.target.url
        is_private = found.is_private if found is not None else self.target.is_private
        if not self.is_dry_run:
            with stating("files that were sent are on the server, and the same command resumes after them"):
                commit, url = self._send(files, hashes, sizes, changed, stale)
                found_after = self.target.find(commit)
                _check_arrived(self.target, found_after, files, hashes)
            is_private = found_after.is_private if found_after is not None else is_private
        return UploadReport(
            out=os.fspath(self.out),
            repository=self.target.name,
            branch=self.target.branch,
            url=url,
            commit=commit,
            is_verified=not output.unverified,
            n_files=len(sizes),
            n_bytes=sum(sizes.values()),
            n_sent_bytes=sum(sizes[name] for name in changed),
            sent=tuple(sorted(changed)),
            deleted=tuple(stale),
            left=output.left(),
            keeps_card=keeps_card,
            is_new=found is None,
            is_private=is_private,
            has_token=self.target.has_token,
            is_dry_run=self.is_dry_run,
        )

    def _whose_card(self, output: FinishedOutput, found: Repository | None) -> str:
        """See `UploadReport.keeps_card`."""
        if _has_own_card(output.path / CARD_NAME):
            return "output"
        return "repository" if not self.overwrites and self.target.has_foreign_card(found) else ""

    def _card(self, output: FinishedOutput, keeps_card: str) -> bytes | None:
        """The model card to send; None if the repository's stays."""
        if keeps_card == "repository":
            return None
        if keeps_card == "output":
            return _own_card(output.path / CARD_NAME)
        return make_card(output, self.target.name, inspect(output.path)).encode()

    def _send(
        self,
        files: dict[str, Path],
        hashes: dict[str, str],
        sizes: dict[str, int],
        changed: list[str],
        stale: list[str],
    ) -> tuple[str | None, str]:
        """Send the files and commit them; the commit, None if nothing had to be changed, and where to look at it."""
        from huggingface_hub import CommitOperationDelete

        done, total = 0, sum(sizes.values())

        def tell(name: str, is_sent: bool) -> None:
            nonlocal done
            done += sizes[name]
            self.on_event(FileSent(name, sizes[name], is_sent, done, total))

        for name in sorted(set(sizes) - set(changed)):
            tell(name, False)
        if not changed and not stale:
            return None, self.target.url
        additions = []
        for name in sorted(changed, key=lambda name: sizes[name]):
            additions.append(self.target.send(name, files[name], hashes[name]))
            tell(name, True)
        deletions = [CommitOperationDelete(name) for name in stale]
        info = self.target.commit(additions, deletions, self.message or f"Upload by int8convert {__version__}")
        if info is None:
            return self.target.head(), self.target.url
        return info.oid, info.pr_url or self.target.url


def _foreign_weights(repository: str, names: list[str]) -> OutputError:
    more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
    return OutputError(
        f"{quoted(repository)} holds weights of something else: {quoted(names[0])}{more}",
        "name another repository, or pass --overwrite to replace them",
    )


def _has_own_card(card: Path) -> bool:
    """Whether somebody wrote a model card, who was not us."""
    return card.is_file() and CARD_MARK.encode() not in read_card(card)


def _own_card(path: Path) -> bytes:
    content = read_card(path)
    try:
        content.decode()
    except UnicodeDecodeError:
        raise OutputError(
            f"{quoted(str(path), 200)} is not in UTF-8, as the Hub wants model cards to be",
            "save it in UTF-8, or remove it to have one written",
        ) from None
    return content


def _is_same(path: Path, sha256: str, file: RepositoryFile | None) -> bool:
    """Whether the Hub has a file with this content; small ones it knows by another hash, taken here of the bytes."""
    if file is None or file.sha256 is not None:
        return file is not None and file.sha256 == sha256
    content = path.read_bytes() if file.n_bytes == path.stat().st_size else b""
    return hashlib.sha256(content).hexdigest() == sha256 and file.is_content(content)


def _check_arrived(target: Target, found: Repository | None, files: dict[str, Path], hashes: dict[str, str]) -> None:
    """Compare what the Hub lists with what was to be sent."""
    there = found.files if found is not None else {}
    different = [name for name, path in files.items() if not _is_same(path, hashes[name], there.get(name))]
    if different:
        raise HubError(
            f"{quoted(target.name)} has other bytes than were sent for {', '.join(map(quoted, different[:3]))}"
            f"{', ...' if len(different) > 3 else ''}",
            "somebody else may have changed it meanwhile; run the same command again, which sends what differs",
        )
