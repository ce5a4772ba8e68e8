"""What goes wrong between here and the Hub: which of it passes by itself, and what the rest means to the user.

What passes - connections cut or silent, statuses 408, 429 and 5xx, signed addresses that have run out - is tried
again, after waits that double, for as long as `Patience` lasts. Everything else, and what did not pass, becomes a
HubError of two lines. These never hold an address with its query, which may be signed, nor a request's headers, which
hold the token; the client's own errors hold the former, so they are not chained to ours.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from int8convert.checkpoint.layout import quoted
from int8convert.errors import HubAccessError, HubConnectionError, HubError, HubMissingError

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

CALL_PATIENCE_S = 20.0
"""For a small request, behind which a user waits."""

TRANSFER_PATIENCE_S = 300.0
"""For weights, behind which nobody waits: without a byte for so long. INT8CONVERT_HUB_PATIENCE changes it."""

FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 30.0
_LONGEST_RETRY_AFTER_S = 600.0
_PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_MAX_REASON = 160

T = TypeVar("T")


class PassingError(Exception):
    """Trouble that may be over at the next try. Never reaches the user.

    Attributes:
        retry_after_s: what the server asked for; None if it did not.
    """

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class Patience:
    """How long to go on trying without getting anywhere, and how long to wait in between.

    Args:
        subject: what is being done, for the error: "reading 'model.safetensors' of 'a/b'".
        seconds: from the last progress to giving up; None is `CALL_PATIENCE_S`.
    """

    def __init__(self, subject: str, seconds: float | None = None) -> None:
        self._subject = subject
        self._seconds = CALL_PATIENCE_S if seconds is None else seconds
        self._wait_s = FIRST_WAIT_S
        self._since = time.monotonic()
        self.n_waits = 0

    def progressed(self) -> None:
        """Bytes have come: begin anew."""
        self._wait_s = FIRST_WAIT_S
        self._since = time.monotonic()

    def wait(self, trouble: PassingError, sleep: Callable[[float], object] = time.sleep) -> None:
        """Sleep before the next try.

        Raises:
            HubConnectionError: patience has run out.
        """
        if trouble.retry_after_s is not None:  # as long as it is asked for: to come earlier would prolong it
            wait_s = min(trouble.retry_after_s, _LONGEST_RETRY_AFTER_S)
        else:
            wait_s = self._wait_s * random.uniform(0.7, 1.3)  # many clients must not come back at one moment
        passed_s = time.monotonic() - self._since
        if passed_s + wait_s > self._seconds:
            raise HubConnectionError(
                f"{self._subject} got no further in {passed_s:.0f} s: {trouble}",
                "see that the network and the Hub are well, and run the same command again",
            )
        self.n_waits += 1
        sleep(wait_s)
        self._wait_s = min(2 * self._wait_s, _LONGEST_WAIT_S)


def transfer_patience_s() -> float:
    """Seconds without a byte of the weights before giving up."""
    try:
        return float(os.environ.get("INT8CONVERT_HUB_PATIENCE", ""))
    except ValueError:
        return TRANSFER_PATIENCE_S


def call_hub(call: Callable[[], T], subject: str, name: str) -> T:
    """The result of a small request, tried again while its trouble may pass.

    Args:
        call: makes the request, by huggingface_hub or its HTTP client; run again after trouble, so it must bear that.
        subject: what it does: "looking for 'a/b'".
        name: the repository, as the user knows it.

    Raises:
        HubError: what did not pass.
    """
    patience = Patience(subject)
    while True:
        try:
            with translating_errors(name):
                return call()
        except PassingError as trouble:
            patience.wait(trouble)


@contextmanager
def translating_errors(name: str) -> Iterator[None]:
    """Turns what huggingface_hub and its HTTP client raise into a PassingError or a HubError, without their text.

    Args:
        name: the repository.
    """
    import httpx2
    from huggingface_hub import errors

    known = (
        errors.OfflineModeIsEnabled,
        errors.HfHubHTTPError,
        errors.LocalEntryNotFoundError,
        errors.HFValidationError,
        httpx2.TransportError,
        httpx2.StreamError,
        json.JSONDecodeError,  # an answer that came damaged
        UnicodeDecodeError,
    )
    try:
        yield
    except known as error:
        raise _translated(error, name) from None
    except OSError as error:
        if "Consistency check failed" in str(error):  # all that tells the client's finding from trouble with the disk
            raise PassingError("the answer was too short") from None
        raise


def _translated(error: BaseException, name: str) -> PassingError | HubError:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return _offline(name)
    if isinstance(error, errors.HfHubHTTPError):
        return _of_answer(error, name)
    if isinstance(error, errors.LocalEntryNotFoundError):
        # The client hides why it did not get a file behind the fact that the cache has none either.
        if constants.HF_HUB_OFFLINE:
            return _offline(name)
        return _translated(error.__cause__, name) if error.__cause__ else PassingError("the connection broke off")
    if isinstance(error, errors.HFValidationError):
        return HubError(f"no repository can be named {quoted(name)}: {_short(error)}", "names are ORGANIZATION/NAME")
    if isinstance(error, ValueError):
        return PassingError("the answer makes no sense")
    return PassingError(_connection_reason(error))


def _offline(name: str) -> HubError:
    return HubConnectionError(
        f"HF_HUB_OFFLINE is set, and {quoted(name)} is not complete in the cache",
        "unset it, or name the --cache-dir or the directory that holds the checkpoint",
    )


def _connection_reason(error: BaseException) -> str:
    import httpx2

    if isinstance(error, httpx2.ConnectTimeout | httpx2.PoolTimeout):
        return "no connection within the time limit"
    if isinstance(error, httpx2.TimeoutException):
        return "nothing came within the time limit"
    if isinstance(error, httpx2.ProxyError):
        return f"the proxy refused: {_short(error)}"
    if isinstance(error, httpx2.ConnectError):
        return f"no connection to {_host_of(error)}: {_short(error)}"
    return "the connection broke off"


def _of_answer(error: HfHubHTTPError, name: str) -> PassingError | HubError:
    """What an answer with an error status comes to."""
    from huggingface_hub import errors

    response = error.response
    status = int(response.status_code)
    if status in _PASSING_STATUS:
        return PassingError(f"status {status} of {response.url.host}", _retry_after_s(response.headers))
    if response.url.host != urlsplit(endpoint()).hostname and status in (400, 401, 403, 404, 410):
        # Of the store behind the Hub, which knows signed addresses only: a new one is had by asking the Hub again.
        return PassingError(f"status {status} of {response.url.host}, as of an address that has run out")
    if isinstance(error, errors.GatedRepoError):
        return HubAccessError(
            f"{quoted(name)} is gated: its owner lets in those who accept its terms",
            f"accept them at {endpoint()}/{name}, then log in by `hf auth login` or set HF_TOKEN",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubMissingError(
            f"{quoted(name)} has no such revision", f"its branches and tags: {endpoint()}/{name}/tree/main"
        )
    if isinstance(error, errors.EntryNotFoundError):
        return HubError(f"{quoted(name)} has no longer a file it listed", "run the same command again")
    if isinstance(error, errors.DisabledRepoError):
        return HubError(f"{quoted(name)} is disabled", f"see why at {endpoint()}/{name}")
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return _not_found(response, name)
    if status == 403:
        return HubAccessError(
            f"the Hub forbids it: {_reason(response)}",
            f"use a token with the right to it for {quoted(name)}: `hf auth login`, or HF_TOKEN",
        )
    return HubError(f"the Hub answered with status {status}: {_reason(response)}", f"see {endpoint()}/{name}")


def _not_found(response: object, name: str) -> HubError:
    from huggingface_hub import get_token

    if "invalid credentials" in _reason(response).lower():
        return HubAccessError(
            "the Hub does not accept the token: it is invalid or has run out",
            "log in by `hf auth login`, or set HF_TOKEN to a valid one",
        )
    who = "that this token may see" if get_token() else "that is public, and no token is set"
    return HubMissingError(
        f"{endpoint()} has no repository {quoted(name)} {who}",
        "mind the name, ORGANIZATION/NAME; for a private one log in by `hf auth login` or set HF_TOKEN",
    )


def _reason(response: object) -> str:
    """The server's own words, or the status's."""
    headers = getattr(response, "headers", {})
    said = headers.get("X-Error-Message") or getattr(response, "reason_phrase", "") or "no reason given"
    return quoted(said, _MAX_REASON)


def _short(error: BaseException) -> str:
    return quoted(str(error).split("\n", 1)[0], _MAX_REASON)


def _host_of(error: httpx2.RequestError) -> str:
    try:
        return str(error.request.url.host)
    except RuntimeError:  # the error came to be without a request
        return urlsplit(endpoint()).hostname or endpoint()


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    from huggingface_hub.utils import parse_ratelimit_headers

    value = headers.get("Retry-After")
    if value is not None and value.isdigit():
        return float(value)
    limit = parse_ratelimit_headers(headers)
    return float(limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else None


def endpoint() -> str:
    """The Hub's address: HF_ENDPOINT."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)
