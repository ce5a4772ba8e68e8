"""What a client changes on the Hub. Each route: (state, request, the quoted parts of the path) -> answer."""

from __future__ import annotations

import base64
import json
from typing import Any
from urllib.parse import unquote

from tests.tools.hub_server.access import check_writing
from tests.tools.hub_server.file_entries import FileEntry, is_for_lfs, lfs_entry, regular_entry
from tests.tools.hub_server.http_messages import Origin, Refusal, Request, Response, json_response
from tests.tools.hub_server.repositories import Repository, Visibility
from tests.tools.hub_server.server_state import ServerState
from tests.tools.hub_server.storage_routes import completion_path, object_path, part_path


def create_repo(state: ServerState, request: Request) -> Response:
    asked = request.read_json()
    account = state.accounts.required(request)
    repo_id = f"{asked.get('organization') or account.name}/{asked['name']}"
    check_writing(account, repo_id)
    is_private = asked.get("visibility") == "private" or asked.get("private") is True
    created = state.create(repo_id, Visibility.PRIVATE if is_private else Visibility.PUBLIC)
    shown = {"url": f"{state.endpoint(Origin.HUB)}/{repo_id}", "name": repo_id, "id": "0"}
    if created is None:
        # The client reads the URL of an existing repository from the refusal, where that is no error to it.
        return json_response(shown | {"error": "You already created this model repo"}, 409)
    return json_response(shown)


def create_branch(state: ServerState, request: Request, repo_id: str, branch: str) -> Response:
    repository, _ = _writable(state, request, repo_id)
    name = unquote(branch)
    if name in repository.refs:
        raise Refusal(409, None, f"Reference already exists: {name}")
    repository.branch(name, repository.find(request.read_json().get("startingPoint", "main")).oid)
    return json_response({}, 201)


def open_pull_request(state: ServerState, request: Request, repo_id: str) -> Response:
    repository, _ = state.seen_by(request, repo_id)
    state.accounts.required(request)
    asked = request.read_json()
    if not asked.get("pullRequest"):
        raise Refusal(400, None, "Only discussions that are pull requests can be opened here")
    number = repository.open_pull_request(asked["title"], repository.refs["main"])
    return json_response({"num": number, "url": _pull_request_url(state, repository, number)})


def pull_request(state: ServerState, request: Request, repo_id: str, number: str) -> Response:
    repository, _ = state.seen_by(request, repo_id)
    if not 1 <= int(number) <= len(repository.pull_request_titles):
        raise Refusal(404, None, "Discussion not found")
    shown: dict[str, Any] = {"num": int(number), "title": repository.pull_request_titles[int(number) - 1]}
    shown |= {"status": "draft", "isPullRequest": True, "author": {"name": "owner"}, "events": []}
    shown |= {"createdAt": repository.commits[repository.refs["main"]].date, "filesWithConflicts": []}
    shown |= {"repo": {"name": repository.id, "type": "model"}, "changes": {"base": "refs/heads/main"}, "diff": ""}
    return json_response(shown)


def validate_yaml(state: ServerState, request: Request) -> Response:
    """Every model card is found right: the rules are not known here."""
    return json_response({"errors": [], "warnings": []})


def preupload(state: ServerState, request: Request, repo_id: str, revision: str) -> Response:
    """Which files go to LFS, and what is there under their names: the sha256 for LFS, git's id else."""
    repository, _ = _writable(state, request, repo_id, unquote(revision))
    there = repository.find(unquote(revision)).tree
    found = []
    for file in request.read_json()["files"]:
        mode = "lfs" if is_for_lfs(file["path"], file["size"]) else "regular"
        answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
        found.append(answer | ({"oid": there[file["path"]].etag} if file["path"] in there else {}))
    return json_response({"files": found})


def lfs_batch(state: ServerState, request: Request, repo_id: str) -> Response:
    """Signed URLs for the bytes the server has not got yet."""
    repository, _ = state.seen_by(request, repo_id)
    state.accounts.required(request)
    asked = request.read_json()
    objects = [
        _lfs_object(state, repository, file, "multipart" in asked.get("transfers", [])) for file in asked["objects"]
    ]
    is_multipart = any("header" in item.get("actions", {}).get("upload", {}) for item in objects)
    return json_response({"transfer": "multipart" if is_multipart else "basic", "objects": objects})


def lfs_verify(state: ServerState, request: Request, repo_id: str) -> Response:
    state.seen_by(request, repo_id)
    asked = request.read_json()
    if not state.blobs.has(asked["oid"]) or state.blobs.path(asked["oid"]).stat().st_size != asked["size"]:
        raise Refusal(404, None, f"The object {asked['oid']} is not there, or has another size")
    return json_response({})


def commit(state: ServerState, request: Request, repo_id: str, revision: str) -> Response:
    """A commit, one JSON object per line: first the header, then a file, an LFS file or a deletion each."""
    lines = [json.loads(line) for line in request.read().splitlines() if line.strip()]
    header, operations = lines[0]["value"], lines[1:]
    repository, is_pull_request = _writable(state, request, repo_id, unquote(revision))
    base = repository.find(unquote(revision))
    files = {
        item["value"]["path"]: _committed(state, item["key"], item["value"])
        for item in operations
        if item["key"] in ("file", "lfsFile")
    }
    deleted = [item["value"]["path"] for item in operations if item["key"] in ("deletedFile", "deletedFolder")]
    ref, shown = unquote(revision), {}
    if is_pull_request and request.query.get("create_pr") == "1":
        number = repository.open_pull_request(header["summary"], base.oid)
        ref, shown = f"refs/pr/{number}", {"pullRequestUrl": _pull_request_url(state, repository, number)}
    oid = repository.commit(ref, header["summary"], files, deleted, header.get("parentCommit"))
    url = f"{state.endpoint(Origin.HUB)}/{repository.id}/commit/{oid}"
    return json_response(shown | {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})


def _writable(state: ServerState, request: Request, repo_id: str, revision: str = "main") -> tuple[Repository, bool]:
    """The repository, if the one who asks may change that ref; and whether it is that of a pull request.

    Pull requests are open to everybody who can see the repository.
    """
    repository, _ = state.seen_by(request, repo_id)
    account = state.accounts.required(request)
    is_pull_request = request.query.get("create_pr") == "1" or revision.startswith("refs/pr/")
    if not is_pull_request:
        check_writing(account, repository.id)
    return repository, is_pull_request


def _committed(state: ServerState, kind: str, value: dict[str, Any]) -> FileEntry:
    if kind == "file":
        return regular_entry(state.blobs, base64.b64decode(value["content"]))
    try:
        n_bytes = value["size"] if "size" in value else state.blobs.path(value["oid"]).stat().st_size
        return lfs_entry(state.blobs, value["oid"], n_bytes)
    except KeyError:
        raise Refusal(400, None, f"LFS pointer pointed to a file that does not exist: {value['oid']}") from None


def _lfs_object(state: ServerState, repository: Repository, file: dict[str, Any], may_split: bool) -> dict[str, Any]:
    sha256, size = file["oid"], file["size"]
    answer: dict[str, Any] = {"oid": sha256, "size": size, "authenticated": True}
    if state.blobs.has(sha256):
        return answer
    storage = state.endpoint(Origin.STORAGE)
    if may_split and state.part_bytes is not None and size > state.part_bytes:
        header = {
            str(number): state.urls.sign(storage, part_path(sha256, number))
            for number in range(1, -(-size // state.part_bytes) + 1)
        }
        href = state.urls.sign(state.endpoint(Origin.HUB), completion_path(sha256))
        upload: dict[str, Any] = {"href": href, "header": header | {"chunk_size": str(state.part_bytes)}}
    else:
        upload = {"href": state.urls.sign(storage, object_path(sha256))}
    verify = {"href": f"{state.endpoint(Origin.HUB)}/{repository.id}.git/info/lfs/objects/verify"}
    return answer | {"actions": {"upload": upload, "verify": verify}}


def _pull_request_url(state: ServerState, repository: Repository, number: int) -> str:
    return f"{state.endpoint(Origin.HUB)}/{repository.id}/discussions/{number}"
