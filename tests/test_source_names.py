"""What is said of a source that is named wrongly, or is not finished."""

from __future__ import annotations

from pathlib import Path

import pytest

from int8convert.errors import HubMissingError, SourceError
from int8convert.hub import retry
from int8convert.sources import open_source
from tests.tools.hub_server.fixtures import Connect, connect, hub
from tests.tools.hub_server.hub import Hub
from tests.tools.tiny_models import save_checkpoint

__all__ = ["connect", "hub"]


@pytest.mark.parametrize(
    ("pasted", "name"),
    [
        ("https://huggingface.co/facebook/opt-66b", "facebook/opt-66b"),
        ("https://huggingface.co/facebook/opt-66b/", "facebook/opt-66b"),
        ("https://huggingface.co/facebook/opt-66b/tree/v1.0", "facebook/opt-66b, with --revision v1.0"),
        ("https://huggingface.co/facebook/opt-66b/blob/main/config.json", "facebook/opt-66b, with --revision main"),
        ("https://huggingface.co/a/b/tree/refs%2Fpr%2F1?x=y", "a/b, with --revision refs/pr/1"),
        ("https://hf-mirror.example/models/facebook/opt-66b", "facebook/opt-66b"),
        ("huggingface.co/facebook/opt-66b", "facebook/opt-66b"),
        ("hf://facebook/opt-66b@main", "facebook/opt-66b, with --revision main"),
        ("hf://models/facebook/opt-66b", "facebook/opt-66b"),
        ("facebook/opt-66b@main", "facebook/opt-66b, with --revision main"),
    ],
)
def test_pasted_address_of_a_repository_is_told_by_its_name(pasted: str, name: str) -> None:
    with pytest.raises(SourceError) as caught:
        open_source(pasted)
    assert caught.value.hint == f"name it {name}"


@pytest.mark.parametrize("path", ["a/b/c", "/models/opt@2", "x/y/z@main", "https://huggingface.co/datasets/a/b"])
def test_what_names_no_model_is_not_taken_for_one(path: str) -> None:
    with pytest.raises(SourceError) as caught:
        open_source(path)
    assert caught.value.hint.startswith("give a checkpoint directory, or")


def test_name_of_one_part_is_told_that_the_hub_has_two() -> None:
    with pytest.raises(SourceError) as caught:
        open_source("gpt2")
    assert "ORGANIZATION/NAME on the Hub, such as openai-community/gpt2" in caught.value.hint


def test_misspelt_directory_is_told_to_be_neither_there_nor_here(hub: Hub, connect: Connect) -> None:
    connect(hub, None)
    with pytest.raises(HubMissingError) as caught:
        open_source("models/opt-66b")
    assert caught.value.hint.endswith("; no directory 'models/opt-66b' is here either")
    with pytest.raises(HubMissingError) as caught:
        open_source("models/opt-66b", "v1")
    assert "directory" not in caught.value.hint


def unfinished(folder: Path) -> Path:
    """As a run leaves it that was killed behind its first shard; what of it matters."""
    directory = save_checkpoint("opt", folder, max_shard_size="60KB")
    (directory / "model.safetensors.index.json").unlink()
    (directory / "config.json").unlink()
    (directory / "int8convert").mkdir()
    (directory / "int8convert" / "conversion.json").write_text("{}")
    return directory


def test_unfinished_conversion_is_told_as_one_here_and_on_the_hub(
    hub: Hub, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "CALL_RETRY_S", 1.0)
    directory = unfinished(tmp_path / "out")
    files = {str(path.relative_to(directory)): path for path in directory.rglob("*.*")}
    hub.add_repo("me/half", files)
    connect(hub, hub.token)
    for name in (str(directory), "me/half"):
        with pytest.raises(SourceError) as caught:
            open_source(name)
        assert caught.value.message == f"'{name}' is an unfinished conversion"
        assert caught.value.hint.startswith("the quantize command that began it finishes it")


def test_conversion_killed_at_its_last_step_is_a_checkpoint(tmp_path: Path) -> None:
    """Between config.json, the last to come, and the removal of what only an unfinished one needs."""
    directory = save_checkpoint("opt", tmp_path / "out")
    (directory / "int8convert").mkdir()
    (directory / "int8convert" / "conversion.json").write_text("{}")
    assert len(open_source(directory).shards) == 1
