"""A branch of a repository on the Hub that is written to.

Large files are sent first, one by one, each of which the server keeps once it has it; a commit then names them. So what
is interrupted begins again at the file in flight, and the branch is never seen half-written. `upload_folder` of the
client does the same, but tells nothing on the way and sends everything once more after an answer that was lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from int8convert.checkpoint.model_card import read_card
from int8convert.checkpoint.names import CARD_NAME
from int8convert.errors import CorruptFileError, HubAccessError, HubConnectionError, HubError, HubMissingError
from int8convert.hub.errors import call_hub, endpoint, translating_client_errors, translating_errors
from int8convert.hub.repository import Repository, RepositoryFile, fetch_small_files, find_repository
from int8convert.hub.repository_name import looks_like_repository
from int8convert.hub.retry import PassingError, Patience, transfer_patience_s
from int8convert.text import quoted

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete

MAIN = "main"
CARD_MARK = "<!-- written by int8convert upload -->"
"""In a model card that may be written anew."""

_ANSWER_S = 120.0
"""For an answer of the Hub, or a piece of a file to be taken; a large commit takes it a minute."""

_CONNECT_S = 10.0
_MOST_ASKED_S = 3600.0
"""That the Hub may ask a commit to wait: it counts them by the hour."""


class Target:
    """Where to write.

    Args:
        name: the repository, ORGANIZATION/NAME.
        branch: of it.
        is_private: whether a repository that has to be made is, and one that is there must be; None is as it comes.
        as_pull_request: propose the change to the branch in place of making it.

    Raises:
        HubError: no repository can have that name.
    """

    def __init__(
        self, name: str, branch: str = MAIN, is_private: bool | None = None, as_pull_request: bool = False
    ) -> None:
        if not looks_like_repository(name):
            raise HubError(
                f"no repository to write to can be named {quoted(name)}",
                "give it as ORGANIZATION/NAME, such as me/opt-66b-int8",
            )
        self.name = name
        self.branch = branch
        self.is_private = is_private
        self._as_pull_request = as_pull_request

    @property
    def url(self) -> str:
        """Where people look at it."""
        return f"{endpoint()}/{self.name}" + (f"/tree/{self.branch}" if self.branch != MAIN else "")

    def find(self, revision: str | None = None) -> Repository | None:
        """The repository at the branch; None if the one or the other is not there.

        Args:
            revision: another one than the branch.

        Raises:
            HubAccessError: it is there, and more or less private than it is to be.
        """
        try:
            found = find_repository(self.name, revision or self.branch)
        except HubMissingError:
            return None
        if self.is_private is not None and found.is_private != self.is_private:
            asked, there = ("--private", "public") if self.is_private else ("--public", "private")
            raise HubAccessError(
                f"{quoted(self.name)} exists and is {there}, but {asked} was given",
                f"change that at {endpoint()}/{self.name}/settings, or leave the option out",
            )
        return found

    def files(self, revision: str | None = None) -> dict[str, RepositoryFile]:
        """The files by name; none if there is no such repository or branch."""
        found = self.find(revision)
        return dict(found.files) if found is not None else {}

    def head(self) -> str:
        """The branch's newest commit."""
        return find_repository(self.name, self.branch).commit

    def has_foreign_card(self, found: Repository | None) -> bool:
        """Whether the repository has a model card of somebody's own."""
        if found is None or CARD_NAME not in found.files:
            return False
        card = fetch_small_files(found, [CARD_NAME]) / CARD_NAME
        return CARD_MARK.encode() not in read_card(card)

    @property
    def has_token(self) -> bool:
        """Whether there is a token, of whatever rights."""
        from huggingface_hub import get_token

        return get_token() is not None

    def check_online(self, why: str) -> None:
        """See that the user allows the network.

        Args:
            why: what it is needed for, as a clause.

        Raises:
            HubConnectionError: HF_HUB_OFFLINE is set.
        """
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            raise HubConnectionError(f"HF_HUB_OFFLINE is set; {why}", "unset HF_HUB_OFFLINE")

    def check_access(self) -> None:
        """See, without asking the Hub, that there is a network and a token.

        Raises:
            HubError: there is not.
        """
        self.check_online("what is sent goes over the network")
        if not self.has_token:
            owner = self.name.partition("/")[0]
            raise HubAccessError(
                f"no token is set; writing to {quoted(self.name)} needs one",
                f"log in by `hf auth login`, or set HF_TOKEN to one that may write to {quoted(owner)}",
            )

    def make(self) -> None:
        """Make the repository and the branch, if they are not there.

        Raises:
            HubError: the token may not.
        """
        from huggingface_hub import HfApi

        _limit_waits()
        api = HfApi()
        subject = f"making {quoted(self.name)}"
        call_hub(lambda: api.create_repo(self.name, private=self.is_private, exist_ok=True), subject, self.name)
        if self.branch != MAIN:
            call_hub(lambda: api.create_branch(self.name, branch=self.branch, exist_ok=True), subject, self.name)

    def send(self, name: str, path: Path, sha256: str | None = None) -> CommitOperationAdd:
        """Have the server keep a file's bytes, if it is a large one; what it keeps already is not sent.

        Args:
            sha256: what the file must hold; None takes what is there.

        Returns: what a commit needs to name them.

        Raises:
            CorruptFileError: it holds something else.
            HubError: it does not arrive.
        """
        from huggingface_hub import CommitOperationAdd, HfApi

        _limit_waits()
        patience = Patience(f"sending {quoted(name)} to {quoted(self.name)}", transfer_patience_s())
        while True:
            addition = CommitOperationAdd(name, str(path))
            if sha256 is not None and addition.upload_info.sha256.hex() != sha256:
                raise CorruptFileError(
                    f"{quoted(name)} was changed after it was compared", "run the same command again"
                )
            try:
                with translating_client_errors(self.name), _translating_transfer(self.name):
                    HfApi().preupload_lfs_files(
                        self.name, [addition], revision=self.branch, create_pr=self._as_pull_request
                    )
                return addition
            except PassingError as trouble:
                patience.wait(trouble)

    def commit(
        self,
        additions: Sequence[CommitOperationAdd],
        deletions: Sequence[CommitOperationDelete],
        message: str,
        parent: str | None = None,
    ) -> CommitInfo | None:
        """Make all of it the branch's new state, at once.

        Args:
            parent: the commit that the branch must be at.

        Returns: what the Hub says of the commit; None if it was made, and the answer got lost.

        Raises:
            HubError: it was not made.
        """
        from huggingface_hub import HfApi

        _limit_waits()
        patience = Patience(f"the commit to {quoted(self.name)}", transfer_patience_s(), _MOST_ASKED_S)
        while True:
            try:
                with translating_client_errors(self.name), _translating_transfer(self.name):
                    return HfApi().create_commit(
                        self.name,
                        [*additions, *deletions],
                        commit_message=message,
                        revision=self.branch,
                        create_pr=self._as_pull_request,
                        parent_commit=parent,
                    )
            except PassingError as trouble:
                if self._as_pull_request and not trouble.is_refusal:
                    raise HubConnectionError(
                        f"the pull request to {quoted(self.name)} may have been made, its answer got lost: {trouble}",
                        f"see whether it is at {endpoint()}/{self.name}/discussions before you run the command again",
                    ) from None
                patience.wait(trouble)
                if not self._as_pull_request and self._is_there(additions, deletions):
                    return None

    def _is_there(self, additions: Sequence[CommitOperationAdd], deletions: Sequence[CommitOperationDelete]) -> bool:
        there = self.files()
        return all(
            addition.path_in_repo in there and _holds(there[addition.path_in_repo], addition) for addition in additions
        ) and not any(deletion.path_in_repo in there for deletion in deletions)


def _limit_waits() -> None:
    """Have the client's session, which waits for ever for an answer, wait for minutes: a connection that a router on
    the way forgot would hold a night's work."""
    import httpx2
    from huggingface_hub.utils import get_session

    session = get_session()
    if session.timeout == httpx2.Timeout(None):
        session.timeout = httpx2.Timeout(_ANSWER_S, connect=_CONNECT_S)


def _holds(file: RepositoryFile, addition: CommitOperationAdd) -> bool:
    if file.sha256 is not None:
        return file.sha256 == addition.upload_info.sha256.hex()
    content = addition.path_or_fileobj
    if isinstance(content, str | Path):
        content = Path(content).read_bytes()
    return isinstance(content, bytes) and file.is_content(content)


@contextmanager
def _translating_transfer(name: str) -> Iterator[None]:
    """Turns what the transfer of large files raises beside the client's own errors into a PassingError or HubError."""
    try:
        yield
    except ConnectionError as error:  # of hf_xet; the client's own do not come as this
        if "xet-write-token" in str(error):
            raise HubError(
                f"the server of {quoted(name)} does not know the xet protocol, by which the client sends large files",
                "pass --no-xet to send them by HTTP",
            ) from None
        raise PassingError("the connection broke off") from None
    except RuntimeError as error:
        cause = error.__cause__
        if not isinstance(cause, Exception):
            raise PassingError("the transfer broke off") from None
        with translating_errors(name):
            raise cause from None
