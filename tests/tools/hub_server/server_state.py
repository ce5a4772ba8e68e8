"""Everything the routes work on."""

from __future__ import annotations

import threading
from pathlib import Path
from urllib.parse import unquote

from tests.tools.hub_server.access import Account, Accounts, check_seeing
from tests.tools.hub_server.blobs import Blobs
from tests.tools.hub_server.http_messages import Origin, Request
from tests.tools.hub_server.repositories import Repository, Visibility
from tests.tools.hub_server.signed_urls import SignedUrls
from tests.tools.hub_server.xet_storage import XetStorage


class ServerState:
    """What outlives a restart of the server: repositories, bytes, accounts, and the settings of a test."""

    def __init__(self, folder: Path, *, xet: bool) -> None:
        self.port = 0
        self.part_bytes: int | None = None
        """Uploads larger than this are asked for in parts of this size; None: never."""
        self.page_entries = 1000
        """Entries in one page of a tree."""
        self.page_origin = Origin.HUB
        """Where the address of the next page leads."""
        self.xet = XetStorage(folder / "xet") if xet else None
        self.blobs = Blobs(folder / "blobs", self.xet)
        self.urls = SignedUrls()
        self.accounts = Accounts()
        self._repositories: dict[str, Repository] = {}
        self._lock = threading.Lock()

    def endpoint(self, origin: Origin) -> str:
        return f"http://{origin}:{self.port}"

    def create(self, repo_id: str, visibility: Visibility) -> Repository | None:
        """A new repository, or None where there is one of that name."""
        with self._lock:
            if repo_id in self._repositories:
                return None
            self._repositories[repo_id] = Repository(repo_id, visibility, self.blobs)
            return self._repositories[repo_id]

    def repository(self, repo_id: str) -> Repository | None:
        with self._lock:
            return self._repositories.get(repo_id)

    def seen_by(self, request: Request, repo_id: str) -> tuple[Repository, Account | None]:
        """The repository a request names, quoted, and who asks.

        Raises:
            Refusal: as `access` says.
        """
        account = self.accounts.of(request)
        name = unquote(repo_id)
        return check_seeing(account, name, self.repository(name)), account
