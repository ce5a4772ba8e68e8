"""Errors of the Hub, its client and the network: the transient ones, and a HubError of two lines for every other.

Transient: connections cut or silent, statuses 408, 425, 429 and 5xx, expired signed URLs, truncated or malformed
answers. `int8convert.hub.retry` retries these.

No message holds a URL with its query, which may be signed, or a request's headers, which hold the token. The client's
own errors hold the former: they are not chained to ours, and queries are removed from the client's log.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from int8convert.errors import HubAccessError, HubConnectionError, HubError, HubMissingError, Int8ConvertError
from int8convert.text import quoted

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_REFUSAL_STATUS = frozenset({425, 429, 503})
"""Transient statuses of a request that was not executed. The others may come from a gateway after execution."""

_LOCAL_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES})
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_MAX_EXPIRED_URLS = 4
_MAX_REASON = 160
_CLIENT_LOGS = ("huggingface_hub.file_download", "huggingface_hub.utils._http")
_QUERY = re.compile(r"(https?://[^\s?]+)\?\S+")
_FILES_REJECTED = "LFS batch API returned errors"
_MALFORMED = "the answer is incomplete, or not one of the Hub's"


class TransientError(Exception):
    """A failure that may be over at the next attempt. Only `int8convert.hub.retry` catches it.

    Attributes:
        retry_after_s: seconds to wait, as the server asks; None if it does not ask.
        max_failures: failures in a row of this kind before giving up; None if only time counts.
        is_refusal: the server did not execute the request. Otherwise it may have, and the answer was lost.
        final: the error to raise when the retries end; None for a HubConnectionError with this reason.
    """

    def __init__(
        self,
        reason: str,
        retry_after_s: float | None = None,
        *,
        max_failures: int | None = None,
        is_refusal: bool = False,
        final: Int8ConvertError | None = None,
    ) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s
        self.max_failures = max_failures
        self.is_refusal = is_refusal
        self.final = final


class _QueryFilter(logging.Filter):
    """Removes the queries of URLs, which may be signatures, from log lines."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = _QUERY.sub(r"\1?...", record.getMessage()), ()
        return True


_query_filter = _QueryFilter()


@contextmanager
def translating_errors(repository: str) -> Iterator[None]:
    """Translate the typed errors of huggingface_hub and its HTTP client into a TransientError or a HubError."""
    import httpx2
    from huggingface_hub import errors

    for name in _CLIENT_LOGS:
        logging.getLogger(name).addFilter(_query_filter)
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
        raise _translated(error, repository) from None


@contextmanager
def translating_client_errors(repository: str) -> Iterator[None]:
    """Translate also the untyped errors of one call of huggingface_hub. The block must hold nothing else.

    The client raises an OSError without a number for an answer that is too short or lacks its headers, a ValueError
    for one that is not JSON, and hf_xet raises a RuntimeError or an OSError for a broken connection.
    """
    try:
        with translating_errors(repository):
            yield
    except OSError as error:
        if error.errno is not None:  # this machine's: its disk is full, or not writable
            raise
        raise TransientError(_MALFORMED) from None
    except ValueError as error:
        if _FILES_REJECTED in str(error):
            reason = quoted(str(error).partition(chr(10))[2].strip(), _MAX_REASON)
            raise HubError(
                f"the Hub rejects the files: {reason}",
                f"see the limits of your account, and {endpoint()}/{repository}",
            ) from None
        raise (_translated(error.__cause__, repository) if error.__cause__ else TransientError(_MALFORMED)) from None
    except RuntimeError as error:
        found = _OS_ERROR.search(str(error))
        if found and int(found[1]) in _LOCAL_ERRORS:  # hf_xet names errors of this machine so
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from None
        raise TransientError("the connection broke off") from None


def _translated(error: BaseException, repository: str) -> TransientError | HubError:
    import httpx2
    from huggingface_hub import constants, errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return _offline(repository)
    if isinstance(error, errors.HfHubHTTPError):
        return _status_error(error, repository)
    if isinstance(error, errors.LocalEntryNotFoundError):
        # The client reports a failed download as a file that is missing in the cache.
        if constants.HF_HUB_OFFLINE:
            return _offline(repository)
        cause = error.__cause__
        return _translated(cause, repository) if cause else TransientError("the connection broke off")
    if isinstance(error, errors.HFValidationError):
        return HubError(
            f"{quoted(repository)} cannot be the name of a repository: {_first_line(error)}",
            "give the name as ORGANIZATION/NAME",
        )
    if isinstance(error, httpx2.UnsupportedProtocol):
        return HubConnectionError(
            f"HF_ENDPOINT is {quoted(endpoint())}, expected an address that begins with https:// or http://",
            "correct it, or unset it for huggingface.co",
        )
    if isinstance(error, httpx2.ProxyError) and str(error).startswith("407"):  # its answer to CONNECT
        return _proxy_login()
    if isinstance(error, httpx2.TransportError | httpx2.StreamError):
        return TransientError(_connection_reason(error))
    return TransientError(_MALFORMED)


def _offline(repository: str) -> HubError:
    return HubConnectionError(
        f"HF_HUB_OFFLINE is set, and {quoted(repository)} is not complete in the cache",
        "unset it, or name the --cache-dir or the directory that holds the checkpoint",
    )


def _proxy_login() -> HubError:
    return HubConnectionError(
        "the proxy in front of the Hub demands a login: status 407",
        "set HTTPS_PROXY with name and password: http://NAME:PASSWORD@HOST:PORT",
    )


def _connection_reason(error: BaseException) -> str:
    import httpx2

    if isinstance(error, httpx2.ConnectTimeout | httpx2.PoolTimeout):
        return "no connection within the time limit"
    if isinstance(error, httpx2.TimeoutException):
        return "no answer within the time limit"
    if isinstance(error, httpx2.ProxyError):
        return f"the proxy refused: {_first_line(error)}"
    if isinstance(error, httpx2.ConnectError):
        return f"no connection to {_host_of(error)}: {_first_line(error)}"
    return "the connection broke off"


def _status_error(error: HfHubHTTPError, repository: str) -> TransientError | HubError:
    """Return what an answer with an error status means."""
    from huggingface_hub import errors

    response = error.response
    status = int(response.status_code)
    name, page = quoted(repository), f"{endpoint()}/{repository}"
    if status in _TRANSIENT_STATUS:
        reason = f"status {status} of {response.url.host}"
        return TransientError(reason, _retry_after_s(response.headers), is_refusal=status in _REFUSAL_STATUS)
    if status == 407:
        return _proxy_login()
    if status == 412:
        return HubError(
            f"somebody else changed {name} in the meantime",
            "see who and what; the same command resumes from the new state",
        )
    if isinstance(error, errors.GatedRepoError):
        return HubAccessError(
            f"{name} is gated: its owner admits those who accept its terms",
            f"accept them at {page}, then log in by `hf auth login` or set HF_TOKEN",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubMissingError(
            f"{name} has no branch, tag or commit of the given name", f"see its branches and tags at {page}/tree/main"
        )
    if isinstance(error, errors.EntryNotFoundError):
        return HubError(f"{name} no longer has a file that it listed", "run the same command again")
    if isinstance(error, errors.DisabledRepoError):
        return HubError(f"{name} is disabled", f"see why at {page}")
    if response.url.host != urlsplit(endpoint()).hostname and status in (400, 401, 403, 404, 410):
        # The store behind the Hub refuses signed URLs when they expire; the next request to the Hub gives a new one.
        # If new ones fail as well, a proxy in front of the store forbids them.
        reason = f"status {status} of {response.url.host}, as for an expired address"
        return TransientError(reason, max_failures=_MAX_EXPIRED_URLS)
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return _not_found(response, repository)
    if status == 403:
        return HubAccessError(
            f"the Hub forbids the request: {_reason(response)}",
            f"use a token with the right to it for {name}: `hf auth login`, or HF_TOKEN",
        )
    return HubError(f"the Hub answered with status {status}: {_reason(response)}", f"see {page}")


def _not_found(response: object, repository: str) -> HubError:
    from huggingface_hub import get_token

    if "invalid credentials" in _reason(response).lower():
        return HubAccessError(
            "the Hub rejects the token: it is invalid or has expired",
            "log in by `hf auth login`, or set HF_TOKEN to a valid one",
        )
    visible = "visible to this token" if get_token() else "that is public, and no token is set"
    return HubMissingError(
        f"{endpoint()} has no repository {quoted(repository)} {visible}",
        "check the name (ORGANIZATION/NAME); for a private one log in by `hf auth login` or set HF_TOKEN",
    )


def _reason(response: object) -> str:
    """Return the server's own words, or the status's."""
    headers = getattr(response, "headers", {})
    message = headers.get("X-Error-Message") or getattr(response, "reason_phrase", "") or "no reason given"
    return quoted(message, _MAX_REASON)


def _first_line(error: BaseException) -> str:
    return quoted(str(error).split("\n", 1)[0], _MAX_REASON)


def _host_of(error: httpx2.RequestError) -> str:
    try:
        return str(error.request.url.host)
    except RuntimeError:  # the error has no request
        return urlsplit(endpoint()).hostname or endpoint()


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    from huggingface_hub.utils import parse_ratelimit_headers

    value = headers.get("Retry-After")
    if value is not None and value.isdigit():
        return float(value)
    limit = parse_ratelimit_headers(headers)
    return float(limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else None


def endpoint() -> str:
    """Return the Hub's address: HF_ENDPOINT."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)
