"""URLs that are their own permission for a while, as an object store's are."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Mapping
from urllib.parse import urlencode

from tests.tools.hub_server.http_messages import StorageRefusal


class SignedUrls:
    """Signs paths of the object store, and refuses those that are not signed or whose time is over."""

    def __init__(self) -> None:
        self.lifetime_s = 3600.0
        self._key = secrets.token_bytes(16)

    def sign(self, endpoint: str, path: str) -> str:
        expires = repr(time.time() + self.lifetime_s)
        query = urlencode({"Expires": expires, "Signature": self._signature(path, expires)})
        return f"{endpoint}{path}?{query}"

    def check(self, path: str, query: Mapping[str, str]) -> None:
        """Raises: StorageRefusal, status 403."""
        expires = query.get("Expires", "0")
        if not hmac.compare_digest(query.get("Signature", ""), self._signature(path, expires)):
            raise StorageRefusal(403, "SignatureDoesNotMatch", "The request signature does not match")
        if time.time() > float(expires):
            raise expired_url()

    def _signature(self, path: str, expires: str) -> str:
        return hmac.new(self._key, f"{path} {expires}".encode(), hashlib.sha256).hexdigest()


def expired_url() -> StorageRefusal:
    """What a request with an expired URL gets, by the clock or by a fault."""
    return StorageRefusal(403, "AccessDenied", "Request has expired")
