"""Which function answers which request."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from tests.tools.hub_server import read_routes, storage_routes, write_routes
from tests.tools.hub_server.http_messages import Origin, Refusal, Request, Response
from tests.tools.hub_server.server_state import ServerState


@dataclass(frozen=True)
class Route:
    """`answer` gets the groups of `pattern`, still quoted, as its last arguments."""

    origin: Origin
    method: str
    pattern: re.Pattern[str]
    answer: Callable[..., Response]


def _hub(method: str, pattern: str, answer: Callable[..., Response]) -> Route:
    expanded = pattern.replace("{model}", "/api/models/{id}").replace("{id}", "([^/]+/[^/]+?)")
    return Route(Origin.HUB, method, re.compile(expanded), answer)


def _storage(method: str, pattern: str, answer: Callable[..., Response]) -> Route:
    return Route(Origin.STORAGE, method, re.compile(pattern.replace("{sha256}", "([0-9a-f]{64})")), answer)


ROUTES = (
    _hub("GET", r"/api/whoami-v2", read_routes.whoami),
    _hub("GET", r"{model}", read_routes.model_info),
    _hub("GET", r"{model}/revision/([^/]+)", read_routes.model_info),
    _hub("GET", r"{model}/tree/([^/]+)/?(.+)?", read_routes.tree),
    _hub("GET", r"{model}/refs", read_routes.refs),
    _hub("GET", r"{model}/commits/([^/]+)", read_routes.commits),
    _hub("GET", r"{model}/xet-(read|write)-token/?([^/]*)", read_routes.xet_token),
    _hub("GET", r"/api/resolve-cache/models/{id}/([^/]+)/(.+)", read_routes.resolve_cache),
    _hub("GET", r"/{id}/resolve/([^/]+)/(.+)", read_routes.resolve),
    _hub("POST", r"{model}/paths-info/([^/]+)", read_routes.paths_info),
    _hub("POST", r"/api/repos/create", write_routes.create_repo),
    _hub("POST", r"/api/validate-yaml", write_routes.validate_yaml),
    _hub("POST", r"{model}/branch/([^/]+)", write_routes.create_branch),
    _hub("POST", r"{model}/discussions", write_routes.open_pull_request),
    _hub("GET", r"{model}/discussions/(\d+)", write_routes.pull_request),
    _hub("POST", r"{model}/preupload/([^/]+)", write_routes.preupload),
    _hub("POST", r"{model}/commit/([^/]+)", write_routes.commit),
    _hub("POST", r"/{id}\.git/info/lfs/objects/batch", write_routes.lfs_batch),
    _hub("POST", r"/{id}\.git/info/lfs/objects/verify", write_routes.lfs_verify),
    _hub("POST", r"/api/complete-multipart/([0-9a-f]{64})", storage_routes.complete_multipart),
    _storage("GET", r"/objects/{sha256}", storage_routes.get_object),
    _storage("PUT", r"/objects/{sha256}", storage_routes.put_object),
    _storage("PUT", r"/objects/{sha256}/parts/(\d+)", storage_routes.put_part),
)


def answer(state: ServerState, request: Request) -> Response:
    """The answer to a request, also where it is a refusal; HEAD is answered like GET."""
    method = "GET" if request.method == "HEAD" else request.method
    for route in ROUTES:
        if route.origin is request.origin and route.method == method:
            found = route.pattern.fullmatch(request.path)
            if found:
                try:
                    return route.answer(state, request, *(group for group in found.groups() if group is not None))
                except Refusal as refusal:
                    return refusal.response()
    return Refusal(404, None, f"No route for {request.method} {request.path} on {request.origin}").response()
