"""A branch of a repository on the Hub that is written to.

Large files are sent first, one by one, each of which the server keeps once it has it; a commit then names them. So what
is interrupted begins again at the file in flight, and the branch is never seen half-written. `upload_folder` of the
client does the same, but tells nothing on the way and sends everything once more after an answer that was lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from int8convert.checkpoint.hub.failures import call_hub, endpoint, translating_client_errors, translating_errors
from int8convert.checkpoint.hub.patience import PassingError, Patience, transfer_patience_s
from int8convert.checkpoint.hub.repository import RepositoryFile, find_repository
from int8convert.checkpoint.layout import quoted
from int8convert.errors import HubError, HubMissingError

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete

MAIN = "main"


class Target:
    """Where to write.

    Args:
        name: the repository, ORGANIZATION/NAME.
        branch: of it.
        is_private: whether a repository that has to be made is; None is as the account has it.
        as_pull_request: propose the change to the branch in place of making it.
    """

    def __init__(
        self, name: str, branch: str = MAIN, is_private: bool | None = None, as_pull_request: bool = False
    ) -> None:
        self.name = name
        self.branch = branch
        self._is_private = is_private
        self._as_pull_request = as_pull_request

    @property
    def url(self) -> str:
        """Where people look at it."""
        return f"{endpoint()}/{self.name}" + (f"/tree/{self.branch}" if self.branch != MAIN else "")

    def files(self, revision: str | None = None) -> dict[str, RepositoryFile] | None:
        """The files by name; None if the repository or the branch is not there.

        Args:
            revision: another one than the branch.
        """
        try:
            return dict(find_repository(self.name, revision or self.branch).files)
        except HubMissingError:
            return None

    def head(self) -> str:
        """The branch's newest commit."""
        return find_repository(self.name, self.branch).commit

    def make(self) -> None:
        """Make the repository and the branch, if they are not there.

        Raises:
            HubError: the token may not.
        """
        from huggingface_hub import HfApi

        api = HfApi()
        subject = f"making {quoted(self.name)}"
        call_hub(lambda: api.create_repo(self.name, private=self._is_private, exist_ok=True), subject, self.name)
        if self.branch != MAIN:
            call_hub(lambda: api.create_branch(self.name, branch=self.branch, exist_ok=True), subject, self.name)

    def send(self, name: str, path: Path) -> CommitOperationAdd:
        """Have the server keep a file's bytes, if it is a large one; what it keeps already is not sent.

        Returns: what a commit needs to name them.

        Raises:
            HubError: it does not arrive.
        """
        from huggingface_hub import CommitOperationAdd, HfApi

        patience = Patience(f"sending {quoted(name)} to {quoted(self.name)}", transfer_patience_s())
        while True:
            addition = CommitOperationAdd(name, str(path))
            try:
                with translating_client_errors(self.name), _translating_transfer(self.name):
                    HfApi().preupload_lfs_files(
                        self.name, [addition], revision=self.branch, create_pr=self._as_pull_request
                    )
                return addition
            except PassingError as trouble:
                patience.wait(trouble)

    def commit(
        self, additions: Sequence[CommitOperationAdd], deletions: Sequence[CommitOperationDelete], message: str,
        parent: str | None = None,
    ) -> CommitInfo | None:
        """Make all of it the branch's new state, at once.

        Returns: what the Hub says of the commit; None if it was made, and the answer got lost.

        Raises:
            HubError: it was not made.
        """
        from huggingface_hub import HfApi

        patience = Patience(f"the commit to {quoted(self.name)}", transfer_patience_s())
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
                patience.wait(trouble)
                if not self._as_pull_request and self._is_there(additions, deletions):
                    return None

    def _is_there(self, additions: Sequence[CommitOperationAdd], deletions: Sequence[CommitOperationDelete]) -> bool:
        there = self.files() or {}
        return all(
            addition.path_in_repo in there and _holds(there[addition.path_in_repo], addition) for addition in additions
        ) and not any(deletion.path_in_repo in there for deletion in deletions)


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


SentSink = Callable[[str, int, bool], None]
"""Told of each file that is on the Hub: its name, its bytes, whether it was sent now."""
