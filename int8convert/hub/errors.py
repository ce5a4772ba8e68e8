"""What goes wrong between here and the Hub: which of it passes by itself, and what the rest means to the user.

What passes - connections cut or silent, statuses 408, 429 and 5xx, signed addresses that have run out - is tried
again, after waits that double, for as long as `Patience` lasts. Everything else, and what did not pass, becomes a
HubError of two lines. These never hold an address with its query, which may be signed, nor a request's headers, which
hold the token; the client's own errors hold the former, so they are not chained to ours, and taken out of what it logs.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from int8convert.errors import HubAccessError, HubConnectionError, HubError, HubMissingError
from int8convert.hub.retry import PassingError, Patience
from int8convert.text import quoted

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

_PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_REFUSALS = frozenset({425, 429, 503})
"""With these nothing was done of what was asked; of the others, the answer may come from a gateway that gave up."""

_LOCAL_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES})
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_MOST_ADDRESSES = 4
_MAX_REASON = 160
_LOGS = ("huggingface_hub.file_download", "huggingface_hub.utils._http")
_QUERY = re.compile(r"(https?://[^\s?]+)\?\S+")
_REFUSED_FILES = "LFS batch API returned errors"
_NOT_AS_LISTED = "the answer was not whole, or not one of the Hub's"

T = TypeVar("T")


class _WithoutQueries(logging.Filter):
    """Takes from the addresses in a line of the log what may be a signature."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = _QUERY.sub(r"\1?...", record.getMessage()), ()
        return True


_without_queries = _WithoutQueries()


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
            with translating_client_errors(name):
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

    for name_of_log in _LOGS:
        logging.getLogger(name_of_log).addFilter(_without_queries)
    known = (
        errors.OfflineModeIsEnabled,
        errors.HfHubHTTPError,
        errors.LocalEntryNotFoundError,
        errors.HFValidationError,
        httpx2.RequestError,
        httpx2.StreamError,
    )
    try:
        yield
    except known as error:
        raise _translated(error, name) from None


@contextmanager
def translating_client_errors(name: str) -> Iterator[None]:
    """The same around one call of huggingface_hub and nothing of ours: what it does not expect has no type of its own.

    It is an OSError without a number where an answer is shorter than the Hub says or lacks its headers, a ValueError
    where it is no JSON, a RuntimeError or an OSError of hf_xet's where the faster protocol breaks off.
    """
    try:
        with translating_errors(name):
            yield
    except OSError as error:
        if error.errno is not None:  # this machine's: its disk is full, or not writable
            raise
        raise PassingError(_NOT_AS_LISTED) from None
    except ValueError as error:
        if _REFUSED_FILES in str(error):
            raise HubError(
                f"the Hub does not take it: {quoted(str(error).partition(chr(10))[2].strip(), _MAX_REASON)}",
                f"see the limits of your account, and {endpoint()}/{name}",
            ) from None
        raise (_translated(error.__cause__, name) if error.__cause__ else PassingError(_NOT_AS_LISTED)) from None
    except RuntimeError as error:
        found = _OS_ERROR.search(str(error))
        if found and int(found[1]) in _LOCAL_ERRORS:  # hf_xet's words for this machine's trouble
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from None
        raise PassingError("the connection broke off") from None


def _translated(error: BaseException, name: str) -> PassingError | HubError:
    import httpx2
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
    if isinstance(error, httpx2.UnsupportedProtocol):
        return HubConnectionError(
            f"HF_ENDPOINT is {quoted(endpoint())}, expected an address that begins with https:// or http://",
            "set it to one, or unset it for huggingface.co",
        )
    if isinstance(error, httpx2.ProxyError) and str(error).startswith("407"):  # its answer to CONNECT
        return _proxy_login()
    if isinstance(error, httpx2.TransportError | httpx2.StreamError):
        return PassingError(_connection_reason(error))
    return PassingError(_NOT_AS_LISTED)


def _offline(name: str) -> HubError:
    return HubConnectionError(
        f"HF_HUB_OFFLINE is set, and {quoted(name)} is not complete in the cache",
        "unset it, or name the --cache-dir or the directory that holds the checkpoint",
    )


def _proxy_login() -> HubError:
    return HubConnectionError(
        "the proxy before the Hub wants a login it was not given: status 407",
        "set HTTPS_PROXY to one with name and password that it accepts, as http://NAME:PASSWORD@HOST:PORT",
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
        asked_s = _retry_after_s(response.headers)
        return PassingError(f"status {status} of {response.url.host}", asked_s, is_refusal=status in _REFUSALS)
    if status == 407:
        return _proxy_login()
    if status == 412:
        return HubError(
            f"{quoted(name)} was changed by somebody else meanwhile",
            "see who and what; the same command goes on from what is there then",
        )
    if isinstance(error, errors.GatedRepoError):
        return HubAccessError(
            f"{quoted(name)} is gated: its owner lets in those who accept its terms",
            f"accept them at {endpoint()}/{name}, then log in by `hf auth login` or set HF_TOKEN",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubMissingError(
            f"{quoted(name)} has no branch, tag or commit of the name asked for",
            f"its branches and tags: {endpoint()}/{name}/tree/main",
        )
    if isinstance(error, errors.EntryNotFoundError):
        return HubError(f"{quoted(name)} has no longer a file it listed", "run the same command again")
    if isinstance(error, errors.DisabledRepoError):
        return HubError(f"{quoted(name)} is disabled", f"see why at {endpoint()}/{name}")
    if response.url.host != urlsplit(endpoint()).hostname and status in (400, 401, 403, 404, 410):
        # Of the store behind the Hub, which knows signed addresses only: a new one is had by asking the Hub again. If
        # new ones are no better, something between here and the store forbids it.
        reason = f"status {status} of {response.url.host}, as of an address that has run out"
        return PassingError(reason, most_times=_MOST_ADDRESSES)
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
        "check the name (ORGANIZATION/NAME); for a private one log in by `hf auth login` or set HF_TOKEN",
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
