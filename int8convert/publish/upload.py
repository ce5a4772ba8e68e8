"""Publishes a finished output as a repository on the Hub, and checks that it arrived.

1. The output must be finished, verified, and byte for byte what its manifest and verify.json say. The repository must
   hold no other weights, unless it is to be overwritten.
2. The model card is written, unless somebody else wrote one, here or there.
3. Files that the branch lacks are sent, one by one. One commit takes them over, and removes weights that are not part
   of the output, which loaders would mix with it.
4. The Hub's list of files at the new commit is compared with the files, hash by hash.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from int8convert.hub.branch import CARD_MARK, Branch
from int8convert.hub.remote_file import HubFile
from int8convert.hub.repository import MAIN, Repository
from int8convert.inspection import inspect
from int8convert.progress_bar import sink_or_bar
from int8convert.publish.card import make_card
from int8convert.publish.finished import FinishedOutput, check_shards, check_verified, read_finished
from int8convert.text import quoted


@dataclass(frozen=True, slots=True)
class UploadReport:
    """The outcome of `upload`.

    Attributes:
        url: the page of the branch, or of the pull request.
        commit: the new commit; None if nothing differed, and for dry runs.
        is_verified: `verify` passed the output, and the model card says so.
        n_sent_bytes: bytes of the files that the branch did not have.
        sent: names of these files.
        deleted: names of the files that were removed from the branch.
        skipped_files: names of files in `out` that are not published, since neither verify nor the conversion vouches
            for them.
        keeps_card: whose model card was kept: "output" for one in `out`, which was sent; "repository" for one that was
            there; "" if one was written.
        is_new: the repository or the branch did not exist.
        is_private: only the owners see the repository; None if it would be created with the account's default.
        has_token: a token is set; without one the upload itself would be refused.
        is_dry_run: nothing was changed, here or there.
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
    skipped_files: tuple[str, ...]
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
    """Publish a finished output on the Hub. After an interruption the same call resumes at the file in flight.

    Large files are sent by xet where hf_xet is installed, unless HF_HUB_DISABLE_XET is set before huggingface_hub is
    imported.

    Args:
        out: an output of `quantize` or `export`.
        repository: ORGANIZATION/NAME; created if missing.
        private: whether a new repository is private, and an existing one must be; None accepts either.
        revision: the branch; created if missing.
        create_pr: propose the change as a pull request.
        message: the commit's message.
        dry_run: report what would be sent, and change nothing.
        allow_unverified: publish what `verify` has not passed; the model card says so.
        overwrite: replace other weights, and a model card that int8convert did not write, in the repository.
        on_event: receives `FileSent`; None shows a tqdm bar.

    Raises:
        OutputError, CorruptFileError: the output is not finished, or differs from its manifest; or the repository holds
            other weights.
        UnverifiedError: the output is not verified.
        HubError: the Hub refuses the files, or has other bytes afterwards.
    """
    branch = Branch(repository, revision, private, create_pr)
    with stating("nothing was sent"), sink_or_bar(ignore if dry_run else on_event, "upload") as sink:
        job = _Upload(Path(out), branch, message, allow_unverified, overwrite, dry_run, sink)
        if dry_run:
            branch.check_online("a dry run asks the Hub what REPO holds")
            return job.run()
        branch.check_access()
        with _locking(Path(out)):
            return job.run()


@contextmanager
def _locking(out: Path) -> Iterator[None]:
    try:
        with DirectoryLock(out / OWN_FOLDER / "lock"):
            yield
    except FileNotFoundError:
        read_finished(out)  # raises a clear error
        raise
    except PermissionError as error:
        raise OutputError(
            f"{quoted(str(out), 200)} is not writable; an upload writes a model card and a lock into it",
            "copy it to a writable directory",
        ) from error


@dataclass(frozen=True, slots=True)
class _File:
    """A file to publish. `is_there`: the branch has it with the same bytes."""

    path: Path
    sha256: str
    n_bytes: int
    is_there: bool


@dataclass(frozen=True, slots=True)
class _Upload:
    """The arguments of `upload`."""

    out: Path
    branch: Branch
    message: str | None
    allow_unverified: bool
    overwrite: bool
    is_dry_run: bool
    on_event: EventSink

    def run(self) -> UploadReport:
        output = read_finished(self.out)
        if not self.allow_unverified:
            check_verified(output)
        check_shards(output)
        found = self.branch.find()
        there = found.files if found is not None else {}
        files = {name: _compared(path, output.hashes[name], there.get(name)) for name, path in output.files().items()}
        stale = sorted(name for name in there if is_loaded_as_weights(name) and name not in files)
        self._check_weights(stale, files, there)
        keeps_card = self._whose_card(output, found)
        card = self._card(output, keeps_card)
        if card is not None:
            is_there = CARD_NAME in there and there[CARD_NAME].is_content(card)
            files[CARD_NAME] = _File(
                output.path / CARD_NAME, hashlib.sha256(card).hexdigest(), len(card), is_there=is_there
            )
        commit, url, visible = None, self.branch.url, found
        if not self.is_dry_run:
            if card is not None and keeps_card != "output":
                write_text(output.path / CARD_NAME, card.decode())
            commit, url, visible = self._publish(files, stale)
        sent = tuple(sorted(name for name, file in files.items() if not file.is_there))
        return UploadReport(
            out=str(self.out),
            repository=self.branch.repository,
            branch=self.branch.name,
            url=url,
            commit=commit,
            is_verified=not output.unverified,
            n_files=len(files),
            n_bytes=sum(file.n_bytes for file in files.values()),
            n_sent_bytes=sum(files[name].n_bytes for name in sent),
            sent=sent,
            deleted=tuple(stale),
            skipped_files=output.skipped_files(),
            keeps_card=keeps_card,
            is_new=found is None,
            is_private=visible.is_private if visible is not None else self.branch.is_private,
            has_token=self.branch.has_token,
            is_dry_run=self.is_dry_run,
        )

    def _publish(self, files: Mapping[str, _File], stale: list[str]) -> tuple[str | None, str, Repository | None]:
        """Send, commit and compare. Return the commit, None if nothing differed, its page, and the repository."""
        self.branch.create()
        with stating("files that were sent are on the server, and the same command resumes after them"):
            commit, url = self._send(files, stale)
        with stating("the commit was made" if commit else "nothing was sent"):
            found = self.branch.find(commit)
            _check_arrived(self.branch, found, files)
        return commit, url, found

    def _check_weights(self, stale: list[str], files: Mapping[str, _File], there: Mapping[str, HubFile]) -> None:
        """Refuse to replace weights of a repository without our manifest, unless `overwrite` is given."""
        replaced = sorted(
            name for name, file in files.items() if is_loaded_as_weights(name) and name in there and not file.is_there
        )
        names = stale + replaced
        if names and not self.overwrite and MANIFEST_NAME not in there:
            more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            raise OutputError(
                f"{quoted(self.branch.repository)} holds weights of something else: {quoted(names[0])}{more}",
                "name another repository, or pass --overwrite to replace them",
            )

    def _whose_card(self, output: FinishedOutput, found: Repository | None) -> str:
        """Return `UploadReport.keeps_card`."""
        path = output.path / CARD_NAME
        if path.is_dir():
            raise OutputError(f"{quoted(str(path), 200)} is a directory, expected a model card", "remove it")
        if path.is_file() and CARD_MARK.encode() not in read_card(path):
            return "output"
        return "repository" if not self.overwrite and self.branch.has_foreign_card(found) else ""

    def _card(self, output: FinishedOutput, keeps_card: str) -> bytes | None:
        """Return the model card to send; None if the repository's stays."""
        if keeps_card == "repository":
            return None
        if keeps_card == "output":
            return _read_utf8_card(output.path / CARD_NAME)
        return make_card(output, self.branch.repository, inspect(output.path)).encode()

    def _send(self, files: Mapping[str, _File], stale: list[str]) -> tuple[str | None, str]:
        """Send files and commit them. Return the commit, None if nothing differed, and the page to look at."""
        from huggingface_hub import CommitOperationDelete

        n_done, n_total = 0, sum(file.n_bytes for file in files.values())
        additions = []
        for name, file in sorted(files.items(), key=lambda item: (not item[1].is_there, item[1].n_bytes)):
            if not file.is_there:
                additions.append(self.branch.send(name, file.path, file.sha256))
            n_done += file.n_bytes
            self.on_event(FileSent(name, file.n_bytes, not file.is_there, n_done, n_total))
        if not additions and not stale:
            return None, self.branch.url
        deletions = [CommitOperationDelete(name) for name in stale]
        info = self.branch.commit(additions, deletions, self.message or f"Upload by int8convert {__version__}")
        if info is None:
            return self.branch.head(), self.branch.url
        return info.oid, info.pr_url or self.branch.url


def _read_utf8_card(path: Path) -> bytes:
    content = read_card(path)
    try:
        content.decode()
    except UnicodeDecodeError:
        raise OutputError(
            f"{quoted(str(path), 200)} is not in UTF-8, as the Hub requires",
            "save it in UTF-8, or remove it to have one written",
        ) from None
    return content


def _compared(path: Path, sha256: str, there: HubFile | None) -> _File:
    return _File(path, sha256, path.stat().st_size, is_there=_is_same(path, sha256, there))


def _is_same(path: Path, sha256: str, file: HubFile | None) -> bool:
    """Return whether the Hub has a file with this content. For small files, which it knows by git's hash, read it."""
    if file is None or file.sha256 is not None:
        return file is not None and file.sha256 == sha256
    content = path.read_bytes() if file.n_bytes == path.stat().st_size else b""
    return hashlib.sha256(content).hexdigest() == sha256 and file.is_content(content)


def _check_arrived(branch: Branch, found: Repository | None, files: Mapping[str, _File]) -> None:
    """Compare the Hub's files with those that were sent."""
    there = found.files if found is not None else {}
    different = [name for name, file in files.items() if not _is_same(file.path, file.sha256, there.get(name))]
    if different:
        raise HubError(
            f"{quoted(branch.repository)} has other bytes than were sent for {', '.join(map(quoted, different[:3]))}"
            f"{', ...' if len(different) > 3 else ''}",
            "run the same command again; it sends what differs, which somebody else may have changed",
        )
