"""What a client reads from the Hub. Each route: (state, request, the quoted parts of the path) -> answer."""

from __future__ import annotations

import hashlib
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode

from tests.tools.hub_server.access import check_reading
from tests.tools.hub_server.file_entries import FileEntry
from tests.tools.hub_server.http_messages import Origin, Refusal, Request, Response, json_response
from tests.tools.hub_server.repositories import Commit, Visibility, folders_of
from tests.tools.hub_server.server_state import ServerState
from tests.tools.hub_server.storage_routes import object_path, serve_file


def whoami(state: ServerState, request: Request) -> Response:
    account = state.accounts.required(request)
    token = {"displayName": "test", "role": "write", "createdAt": "2024-01-01T00:00:00.000Z"}
    auth = {"type": "access_token", "accessToken": token}
    shown = {"type": "user", "name": account.name, "fullname": account.name, "orgs": [], "auth": auth}
    return json_response(shown | {"email": None, "isPro": False, "avatarUrl": "/avatar.svg"})


def model_info(state: ServerState, request: Request, repo_id: str, revision: str = "main") -> Response:
    repository, _ = state.seen_by(request, repo_id)
    commit = repository.find(unquote(revision))
    with_blobs = request.query.get("blobs", "").lower() == "true"
    siblings = [
        entry.sibling(path) if with_blobs else {"rfilename": path} for path, entry in sorted(commit.tree.items())
    ]
    info: dict[str, Any] = {"_id": "0", "id": repository.id, "modelId": repository.id, "sha": commit.oid}
    info |= {"author": repository.id.split("/")[0], "private": repository.visibility is Visibility.PRIVATE}
    info |= {"gated": "auto" if repository.visibility is Visibility.GATED else False, "disabled": False}
    info |= {"downloads": 0, "likes": 0, "tags": [], "siblings": siblings}
    return json_response(info | {"createdAt": commit.date, "lastModified": commit.date})


def tree(state: ServerState, request: Request, repo_id: str, revision: str, folder: str = "") -> Response:
    repository, _ = state.seen_by(request, repo_id)
    listed = _listed(repository.find(unquote(revision)), unquote(folder), request.query.get("recursive") == "true")
    page = min(int(request.query.get("limit", state.page_entries)), state.page_entries)
    start = int(request.query.get("cursor", 0))
    headers = {}
    if start + page < len(listed):
        query = urlencode({**request.query, "cursor": start + page})
        headers["Link"] = f'<{state.endpoint(state.page_origin)}{request.path}?{query}>; rel="next"'
    return json_response(listed[start : start + page], headers=headers)


def paths_info(state: ServerState, request: Request, repo_id: str, revision: str) -> Response:
    repository, _ = state.seen_by(request, repo_id)
    if "json" in request.headers.get("Content-Type", ""):
        paths = request.read_json()["paths"]
    else:
        paths = parse_qs(request.read().decode()).get("paths", [])
    files = repository.find(unquote(revision)).tree
    shown = {path: _folder(path) for path in folders_of(files)}
    shown |= {path: entry.described(path) for path, entry in files.items()}
    return json_response([shown[path] for path in paths if path in shown])


def refs(state: ServerState, request: Request, repo_id: str) -> Response:
    repository, _ = state.seen_by(request, repo_id)

    def shown(names: list[str], prefix: str) -> list[dict[str, str]]:
        return [{"name": name, "ref": prefix + name, "targetCommit": repository.refs[name]} for name in names]

    pulls = [name for name in repository.refs if name.startswith("refs/pr/")]
    branches = [name for name in repository.refs if name not in pulls]
    found: dict[str, Any] = {"branches": shown(branches, "refs/heads/"), "converts": [], "tags": []}
    if request.query.get("include_prs"):
        found["pullRequests"] = shown(pulls, "")
    return json_response(found)


def commits(state: ServerState, request: Request, repo_id: str, revision: str) -> Response:
    repository, _ = state.seen_by(request, repo_id)
    history = repository.history(unquote(revision))
    return json_response(
        [{"id": c.oid, "title": c.title, "message": "", "date": c.date, "authors": []} for c in history]
    )


def resolve(state: ServerState, request: Request, repo_id: str, revision: str, path: str) -> Response:
    """A file: one in LFS from the object store, one of git from a place on the Hub itself, each by a redirect."""
    repository, account = state.seen_by(request, repo_id)
    check_reading(account, repository)
    commit = repository.find(unquote(revision))
    entry = _entry(commit, path)
    headers = {
        "X-Repo-Commit": commit.oid,
        "X-Linked-ETag": f'"{entry.etag}"',
        "X-Linked-Size": str(entry.n_bytes),
        "ETag": f'"{entry.blob_oid}"',
        "Accept-Ranges": "bytes",
    }
    if not entry.is_lfs:
        there = f"/api/resolve-cache/models/{quote(repository.id)}/{commit.oid}/{path}"
        return Response(307, headers=headers | {"Location": there})
    if state.xet is not None and entry.xet_hash:
        route = f"{state.endpoint(Origin.HUB)}/api/models/{quote(repository.id)}/xet-read-token/{commit.oid}"
        headers |= {"X-Xet-Hash": entry.xet_hash, "Link": f'<{route}>; rel="xet-auth"'}
    signed = state.urls.sign(state.endpoint(Origin.STORAGE), object_path(entry.sha256))
    return Response(302, headers=headers | {"Location": signed})


def resolve_cache(state: ServerState, request: Request, repo_id: str, revision: str, path: str) -> Response:
    repository, account = state.seen_by(request, repo_id)
    check_reading(account, repository)
    commit = repository.find(revision)
    entry = _entry(commit, path)
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{entry.blob_oid}"'}
    return serve_file(state.blobs.path(entry.sha256), request, headers)


def xet_token(state: ServerState, request: Request, repo_id: str, kind: str, revision: str = "") -> Response:
    """Where the bytes are for hf_xet, in the headers for the Python client and in the body for hf_xet itself."""
    repository, account = state.seen_by(request, repo_id)
    if state.xet is None:
        raise Refusal(404, None, "xet is not enabled for this repository")
    if kind == "read":
        check_reading(account, repository)
    else:
        state.accounts.required(request)
    headers = state.xet.token_headers()
    body = {
        "casUrl": headers["X-Xet-Cas-Url"],
        "accessToken": headers["X-Xet-Access-Token"],
        "exp": int(headers["X-Xet-Token-Expiration"]),
    }
    return json_response(body, headers=headers)


def _entry(commit: Commit, quoted_path: str) -> FileEntry:
    if (entry := commit.tree.get(unquote(quoted_path))) is None:
        raise Refusal(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit.oid})
    return entry


def _listed(commit: Commit, folder: str, recursive: bool) -> list[dict[str, Any]]:
    prefix = folder.strip("/") + "/" if folder else ""
    shown = {path: _folder(path) for path in folders_of(commit.tree)}
    shown |= {path: entry.described(path) for path, entry in commit.tree.items()}
    inside = [
        entry
        for path, entry in sorted(shown.items())
        if path.startswith(prefix) and (recursive or "/" not in path[len(prefix) :])
    ]
    if prefix and not inside:
        raise Refusal(404, "EntryNotFound", f"{folder} does not exist on revision {commit.oid}")
    return inside


def _folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}
