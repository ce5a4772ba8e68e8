"""A branch of a repository on the Hub to write to.

Large files are sent first, one by one, and the server keeps each; a commit then names them. So an interrupted upload
resumes at the file in flight, and the branch is never in a half-written state. The client's `upload_folder` does the
same, but reports no progress and sends everything again after a lost answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from int8convert.checkpoint.model_card import read_card
from int8convert.checkpoint.names import CARD_NAME
from int8convert.errors import CorruptFileError, HubAccessError, HubConnectionError, HubError, HubMissingError
from int8convert.hub.errors import TransientError, endpoint, translating_client_errors, translating_errors
from int8convert.hub.remote_file import HubFile
from int8convert.hub.repository import MAIN, Repository, find_repository, looks_like_repository
from int8convert.hub.retry import RetryBudget, call_hub, retrying, transfer_budget
from int8convert.hub.small_files import fetch_small_files
from int8convert.text import quoted

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete


CARD_MARK = "<!-- written by int8convert upload -->"
"""Marks model cards that `upload` may overwrite."""

_ANSWER_S = 120.0
"""Seconds to wait for an answer, or for a piece of a file to be taken. The Hub needs a minute for a large commit."""

_CONNECT_S = 10.0
_MAX_ASKED_S = 3600.0
"""Seconds that the Hub may ask a commit to wait. It limits commits per hour."""


class Branch:
    """A branch to write to.

    Args:
        is_private: whether a new repository is private, and an existing one must be; None accepts either.
        as_pull_request: propose the change instead of making it.

    Raises:
        HubError: no repository can have that name.
    """

    def __init__(
        self, repository: str, name: str = MAIN, is_private: bool | None = None, as_pull_request: bool = False
    ) -> None:
        if not looks_like_repository(repository):
            raise HubError(
                f"{quoted(repository)} is not a valid name of a repository",
                "give it as ORGANIZATION/NAME, such as me/opt-66b-int8",
            )
        self.repository = repository
        self.name = name
        self.is_private = is_private
        self._as_pull_request = as_pull_request

    @property
    def url(self) -> str:
        return f"{endpoint()}/{self.repository}" + (f"/tree/{self.name}" if self.name != MAIN else "")

    def find(self, revision: str | None = None) -> Repository | None:
        """Look the repository up at the branch; None if either does not exist.

        Raises:
            HubAccessError: the repository's visibility is not the one asked for.
        """
        try:
            found = find_repository(self.repository, revision or self.name)
        except HubMissingError:
            return None
        if self.is_private is not None and found.is_private != self.is_private:
            option, visibility = ("--private", "public") if self.is_private else ("--public", "private")
            raise HubAccessError(
                f"{quoted(self.repository)} exists and is {visibility}, but {option} was given",
                f"change that at {endpoint()}/{self.repository}/settings, or leave the option out",
            )
        return found

    def head(self) -> str:
        return find_repository(self.repository, self.name).commit

    def has_foreign_card(self, found: Repository | None) -> bool:
        """Return whether the repository has a model card that int8convert did not write."""
        if found is None or CARD_NAME not in found.files:
            return False
        card = fetch_small_files(found, [CARD_NAME]) / CARD_NAME
        return CARD_MARK.encode() not in read_card(card)

    @property
    def has_token(self) -> bool:
        """A token is set, of whatever rights."""
        from huggingface_hub import get_token

        return get_token() is not None

    def check_online(self, why: str) -> None:
        """Check that HF_HUB_OFFLINE allows the network.

        Raises:
            HubConnectionError: HF_HUB_OFFLINE is set.
        """
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            raise HubConnectionError(f"HF_HUB_OFFLINE is set; {why}", "unset HF_HUB_OFFLINE")

    def check_access(self) -> None:
        """Check, without a request, that the network is allowed and a token is set."""
        self.check_online("files are sent over the network")
        if not self.has_token:
            owner = self.repository.partition("/")[0]
            raise HubAccessError(
                f"no token is set; writing to {quoted(self.repository)} needs one",
                f"log in by `hf auth login`, or set HF_TOKEN to one that may write to {quoted(owner)}",
            )

    def create(self) -> None:
        """Create the repository and the branch, if they do not exist."""
        from huggingface_hub import HfApi

        _limit_waits()
        api = HfApi()
        subject = f"creating {quoted(self.repository)}"

        def call(request: Callable[[], object]) -> None:
            call_hub(request, RetryBudget(subject), self.repository)

        call(lambda: api.create_repo(self.repository, private=self.is_private, exist_ok=True))
        if self.name != MAIN:
            call(lambda: api.create_branch(self.repository, branch=self.name, exist_ok=True))

    def send(self, name: str, path: Path, sha256: str | None = None) -> CommitOperationAdd:
        """Send a file's bytes if it is a large one that the server does not have; return its addition to a commit.

        Args:
            sha256: the hash that the file must have; None accepts any.

        Raises:
            CorruptFileError: the file has another hash.
            HubError: it does not arrive.
        """
        from huggingface_hub import CommitOperationAdd, HfApi

        _limit_waits()

        def send() -> CommitOperationAdd:
            addition = CommitOperationAdd(name, str(path))
            if sha256 is not None and addition.upload_info.sha256.hex() != sha256:
                raise CorruptFileError(
                    f"{quoted(name)} was changed after it was compared", "run the same command again"
                )
            with _translating_transfer(self.repository):
                HfApi().preupload_lfs_files(
                    self.repository, [addition], revision=self.name, create_pr=self._as_pull_request
                )
            return addition

        subject = f"sending {quoted(name)} to {quoted(self.repository)}"
        return call_hub(send, transfer_budget(subject), self.repository)

    def commit(
        self,
        additions: Sequence[CommitOperationAdd],
        deletions: Sequence[CommitOperationDelete],
        message: str,
        parent: str | None = None,
    ) -> CommitInfo | None:
        """Commit additions and deletions at once.

        Args:
            parent: the commit that the branch must be at.

        Returns:
            the Hub's answer; None if the commit was made and the answer was lost.

        Raises:
            HubError: the commit was not made.
        """
        from huggingface_hub import HfApi

        _limit_waits()
        is_retry = False

        def commit() -> CommitInfo | None:
            nonlocal is_retry
            if is_retry and not self._as_pull_request and self._is_committed(additions, deletions):
                return None
            is_retry = True
            try:
                with translating_client_errors(self.repository), _translating_transfer(self.repository):
                    return HfApi().create_commit(
                        self.repository,
                        [*additions, *deletions],
                        commit_message=message,
                        revision=self.name,
                        create_pr=self._as_pull_request,
                        parent_commit=parent,
                    )
            except TransientError as error:
                if error.is_refusal or not self._as_pull_request:
                    raise
                raise HubConnectionError(
                    f"the pull request to {quoted(self.repository)} may exist; the answer was lost: {error}",
                    f"see {endpoint()}/{self.repository}/discussions before you run the command again",
                ) from None

        subject = f"the commit to {quoted(self.repository)}"
        return retrying(commit, transfer_budget(subject, _MAX_ASKED_S))

    def _is_committed(
        self, additions: Sequence[CommitOperationAdd], deletions: Sequence[CommitOperationDelete]
    ) -> bool:
        found = self.find()
        files = found.files if found is not None else {}
        return all(
            addition.path_in_repo in files and _holds(files[addition.path_in_repo], addition) for addition in additions
        ) and not any(deletion.path_in_repo in files for deletion in deletions)


def _limit_waits() -> None:
    """Limit how long the client's session waits for an answer. By default it waits forever."""
    import httpx2
    from huggingface_hub.utils import get_session

    session = get_session()
    if session.timeout == httpx2.Timeout(None):
        session.timeout = httpx2.Timeout(_ANSWER_S, connect=_CONNECT_S)


def _holds(file: HubFile, addition: CommitOperationAdd) -> bool:
    if file.sha256 is not None:
        return file.sha256 == addition.upload_info.sha256.hex()
    content = addition.path_or_fileobj
    if isinstance(content, str | Path):
        content = Path(content).read_bytes()
    return isinstance(content, bytes) and file.is_content(content)


@contextmanager
def _translating_transfer(name: str) -> Iterator[None]:
    """Translate what the transfer of large files raises besides the client's own errors."""
    try:
        yield
    except ConnectionError as error:  # of hf_xet; the client's own do not come as this
        if "xet-write-token" in str(error):
            raise HubError(
                f"the server of {quoted(name)} does not support xet, by which the client sends large files",
                "pass --no-xet to send them by HTTP",
            ) from None
        raise TransientError("the connection broke off") from None
    except RuntimeError as error:
        cause = error.__cause__
        if not isinstance(cause, Exception):
            raise TransientError("the transfer broke off") from None
        with translating_errors(name):
            raise cause from None
