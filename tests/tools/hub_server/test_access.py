"""Who may not, gets the client's own exception for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from tests.tools.hub_server.fixtures import Connect
from tests.tools.hub_server.hub import Hub
from tests.tools.hub_server.repositories import Visibility

FILES = {"config.json": b"{}", "model.safetensors": b"weights"}


def status(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return error.value.response.status_code


def test_private_repository_does_not_exist_without_its_owner(hub: Hub, connect: Connect) -> None:
    hub.add_repo("org/model", FILES, Visibility.PRIVATE)

    for token, expected in ((None, 401), (hub.stranger_token, 404)):
        api = connect(hub, token)
        with pytest.raises(RepositoryNotFoundError) as error:
            api.model_info("org/model")
        assert status(error) == expected and not isinstance(error.value, GatedRepoError)
        with pytest.raises(RepositoryNotFoundError):
            api.hf_hub_download("org/model", "config.json")
        with pytest.raises(RepositoryNotFoundError):
            api.snapshot_download("org/model")
    assert hub.log.sent_bytes("objects") == 0


def test_gated_repository_can_be_listed_but_not_downloaded(hub: Hub, connect: Connect) -> None:
    hub.add_repo("org/model", FILES, Visibility.GATED)

    for token, expected in ((None, 401), (hub.stranger_token, 403)):
        api = connect(hub, token)
        assert api.model_info("org/model").gated == "auto"
        assert len(list(api.list_repo_tree("org/model"))) == 2
        with pytest.raises(GatedRepoError, match="Access to model org/model is restricted") as error:
            api.hf_hub_download("org/model", "model.safetensors")
        assert status(error) == expected


def test_owner_reads_private_and_gated_repositories(hub: Hub, connect: Connect) -> None:
    api = connect(hub, hub.token)
    for visibility in (Visibility.PRIVATE, Visibility.GATED):
        hub.add_repo(f"org/{visibility}", FILES, visibility)
        downloaded = api.hf_hub_download(f"org/{visibility}", "model.safetensors")
        assert Path(downloaded).read_bytes() == FILES["model.safetensors"]
    assert api.model_info("org/private").private


def test_unknown_token_is_refused_even_where_none_is_needed(hub: Hub, connect: Connect) -> None:
    hub.add_repo("org/model", FILES)

    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as error:
        connect(hub, "hf_unknown").model_info("org/model")
    assert status(error) == 401 and not isinstance(error.value, RepositoryNotFoundError)


def test_whoami_knows_the_token(hub: Hub, connect: Connect) -> None:
    assert connect(hub, hub.token).whoami()["name"] == "owner"
    assert connect(hub, hub.stranger_token).whoami()["name"] == "stranger"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        connect(hub, "hf_unknown").whoami()


def test_only_the_owner_of_a_namespace_writes_there(hub: Hub, connect: Connect) -> None:
    hub.add_repo("org/model", FILES)
    api = connect(hub, hub.stranger_token)

    with pytest.raises(HfHubHTTPError, match="don't have the rights") as error:
        api.create_repo("org/other")
    assert status(error) == 403
    with pytest.raises(HfHubHTTPError, match="don't have the rights") as error:
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="org/model")
    assert status(error) == 403
    api.create_repo("stranger/model")
    api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="stranger/model")

    assert hub.repo("org/model").files == FILES
    assert hub.repo("stranger/model").files == {"x.txt": b"x"}


def test_nobody_writes_without_a_token(hub: Hub, connect: Connect) -> None:
    hub.add_repo("org/model", FILES)
    api = connect(hub)

    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo("org/other")
    assert status(error) == 401
    with pytest.raises(HfHubHTTPError) as error:
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x.bin", repo_id="org/model", create_pr=True)
    assert status(error) == 401
    assert hub.repo("org/model").files == FILES
