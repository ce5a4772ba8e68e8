"""The server as a test holds it in its hands."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from tests.tools.hub_server.bandwidth import Bandwidth
from tests.tools.hub_server.blobs import KnownFile
from tests.tools.hub_server.faults import Faults
from tests.tools.hub_server.http_messages import Origin
from tests.tools.hub_server.repositories import Repository, Visibility
from tests.tools.hub_server.request_log import RequestLog
from tests.tools.hub_server.server_state import ServerState
from tests.tools.hub_server.transport import HubServer, Surroundings


class Hub:
    """A Hub on loopback, from `with Hub(folder) as hub:` to the end of the block.

    Attributes:
        log: every request.
        faults: what is to go wrong.
        bandwidth: `bytes_per_s` of all connections together; None, the default, is no limit.
        state: settings a test may change (`part_bytes`, `page_entries`, `urls.lifetime_s`) and what lies on the server.
    """

    def __init__(self, folder: Path, *, xet: bool = False) -> None:
        """Args:
        folder: an empty folder for the bytes.
        xet: whether files are offered to hf_xet, and uploads of it taken; it must be installed then.
        """
        self.log, self.faults, self.bandwidth = RequestLog(), Faults(), Bandwidth()
        self.state = ServerState(folder, xet=xet)
        self._folder = folder
        self._bugs: list[str] = []
        self._starting: threading.Thread | None = None
        self._server: HubServer | None = None

    def __enter__(self) -> Hub:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.await_restart()
        self.stop()
        if error is None and self._bugs:
            raise AssertionError("the test server itself failed:\n" + "\n".join(self._bugs))

    @property
    def endpoint(self) -> str:
        """The value for HF_ENDPOINT."""
        return self.state.endpoint(Origin.HUB)

    @property
    def token(self) -> str:
        """A token that may do everything."""
        return self.state.accounts.owner_token

    @property
    def stranger_token(self) -> str:
        """A valid token, of a user who sees no private repository, is let into no gated one, and may write to none."""
        return self.state.accounts.stranger_token

    def add_repo(
        self, repo_id: str, files: Mapping[str, bytes | Path | KnownFile], visibility: Visibility = Visibility.PUBLIC
    ) -> Repository:
        """A repository with these files on main."""
        if (repository := self.state.create(repo_id, visibility)) is None:
            raise ValueError(f"{repo_id} exists")
        repository.add_files(files)
        return repository

    def repo(self, repo_id: str) -> Repository:
        """A repository, also one that a client has made.

        Raises:
            KeyError: there is none.
        """
        if (repository := self.state.repository(repo_id)) is None:
            raise KeyError(repo_id)
        return repository

    def client_environment(self, token: str | None = None, *, xet: bool = False) -> dict[str, str]:
        """Variables for a process with a client of this server, to be laid over os.environ: with a cache of its own."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HOME": str(self._folder / "client"),
            "HF_TOKEN": token or "",
            "HF_HUB_DISABLE_XET": "0" if xet else "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def start(self) -> None:
        """Listen, on the port of the last time if there was one."""
        around = Surroundings(self.state, self.log, self.faults, self.bandwidth, self._bugs, self.restart)
        self._server = HubServer(self.state.port, around)
        self.state.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> bool:
        """Listen no more and end all connections; repositories, log and orders of faults stay.

        Returns: whether it did listen.
        """
        server, self._server = self._server, None
        if server is None:
            return False
        server.shutdown()
        server.server_close()
        server.drop_connections()
        return True

    def restart(self, down_s: float) -> None:
        """Stop, and start again `down_s` later; returns as soon as nobody listens."""

        def start_later() -> None:
            time.sleep(down_s)
            self.start()

        if self.stop():
            self._starting = threading.Thread(target=start_later)
            self._starting.start()

    def await_restart(self) -> None:
        """Return when a restart, if there is one, is over."""
        if self._starting is not None:
            self._starting.join()
