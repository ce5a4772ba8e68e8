"""Reads answers of the Hub, or of a mirror, up to a bound. An endless answer would fill memory."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from int8convert.errors import HubError

if TYPE_CHECKING:
    import httpx2

MAX_ANSWER_BYTES = 32_000_000
"""Bytes of JSON in one answer. A page of a list has 1,000 files and takes 0.4 MB."""

_MAX_ERROR_BYTES = 1 << 16
"""Bytes read of an error answer, for its message."""


def get_json(url: str, subject: str) -> tuple[Any, str | None]:
    """Return the JSON value of an answer, and the query of the next page, or None.

    Only the query of the next page's address is used: a mirror may pass on the Hub's own address, and the token must
    not be sent there.

    Raises:
        HubError: the answer is larger than any of the Hub's.
        ValueError: the answer is not JSON.
    """
    from huggingface_hub.utils import build_hf_headers, get_session

    with get_session().stream("GET", url, headers=build_hf_headers(), timeout=answer_s()) as response:
        raise_for_status(response)
        content = _read(response, MAX_ANSWER_BYTES + 1)
        following = response.links.get("next", {}).get("url")
    if len(content) > MAX_ANSWER_BYTES:
        raise HubError(
            f"{subject}: the server's answer has more than {MAX_ANSWER_BYTES:,} bytes",
            "name another repository; if HF_ENDPOINT names a mirror, unset it",
        )
    return json.loads(content), urlsplit(following).query if following else None


def answer_s() -> float:
    """Return the seconds to wait for an answer. Without it the client waits forever."""
    from huggingface_hub import constants

    return float(constants.HF_HUB_DOWNLOAD_TIMEOUT)


def raise_for_status(response: httpx2.Response) -> None:
    """Raise for an HTTP error, like `hf_raise_for_status`, but read only the start of an unread body."""
    import httpx2
    from huggingface_hub.utils import hf_raise_for_status

    if response.is_success or response.is_redirect:
        return
    headers = {
        name: value for name, value in response.headers.items() if name not in ("content-encoding", "content-length")
    }
    hf_raise_for_status(
        httpx2.Response(
            response.status_code,
            headers=headers,
            content=_read(response, _MAX_ERROR_BYTES),
            request=response.request,
            extensions={"reason_phrase": response.reason_phrase.encode()},
        )
    )


def _read(response: httpx2.Response, most: int) -> bytes:
    content = bytearray()
    for piece in response.iter_bytes():
        content += piece[: most - len(content)]
        if len(content) == most:
            break
    return bytes(content)
