"""Who may do what, and how the Hub says no: the client's exception follows from the status and X-Error-Code."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from tests.tools.hub_server.http_messages import Refusal, Request
from tests.tools.hub_server.repositories import Repository, Visibility


@dataclass(frozen=True)
class Account:
    """A user. The owner owns every namespace and is let into every gated repository; others own that of their name."""

    name: str
    is_owner: bool

    def owns(self, repo_id: str) -> bool:
        return self.is_owner or repo_id.split("/")[0] == self.name


class Accounts:
    """The users by their tokens: `owner_token` and `stranger_token` are valid, all others are not."""

    def __init__(self) -> None:
        self.owner_token = f"hf_{secrets.token_hex(17)}"
        self.stranger_token = f"hf_{secrets.token_hex(17)}"
        self._by_token = {
            self.owner_token: Account("owner", is_owner=True),
            self.stranger_token: Account("stranger", is_owner=False),
        }

    @property
    def tokens(self) -> tuple[str, ...]:
        return tuple(self._by_token)

    def of(self, request: Request) -> Account | None:
        """The user a request comes from, None without a token.

        Raises:
            Refusal: 401, the token is unknown; even a public repository is refused then.
        """
        if request.token is None:
            return None
        if (account := self._by_token.get(request.token)) is None:
            raise Refusal(401, None, "Invalid credentials in Authorization header")
        return account

    def required(self, request: Request) -> Account:
        """Like `of`, for what nobody may do without a token."""
        if (account := self.of(request)) is None:
            raise Refusal(401, None, "Invalid username or password.")
        return account


def check_seeing(account: Account | None, repo_id: str, repository: Repository | None) -> Repository:
    """The repository, if this user may know that it exists.

    Raises:
        Refusal: RepoNotFound, whether it is private or not there: 401 without a token, 404 with one.
    """
    if repository is None or (
        repository.visibility is Visibility.PRIVATE and not (account and account.owns(repository.id))
    ):
        if account is None:
            raise Refusal(401, "RepoNotFound", "Invalid username or password.")
        raise Refusal(404, "RepoNotFound", f"Repository {repo_id} not found")
    return repository


def check_reading(account: Account | None, repository: Repository) -> None:
    """Raises: Refusal, GatedRepo: 401 without a token, 403 when the user is not among those let in."""
    if repository.visibility is not Visibility.GATED or (account and account.owns(repository.id)):
        return
    restricted = f"Access to model {repository.id} is restricted"
    if account is None:
        raise Refusal(401, "GatedRepo", f"{restricted}. You must have access to it and be authenticated to access it.")
    raise Refusal(403, "GatedRepo", f"{restricted} and you are not in the authorized list. Ask for access on its page.")


def check_writing(account: Account, repo_id: str) -> None:
    """Raises: Refusal, 403: the user does not own the namespace."""
    if not account.owns(repo_id):
        raise Refusal(403, None, f"You don't have the rights to write under the namespace {repo_id.split('/')[0]}")
