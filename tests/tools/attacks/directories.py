"""Attacks by what lies in the directory: the index, links, pipes, and files that go along."""

from __future__ import annotations

import os
from pathlib import Path

from int8convert.checkpoint.safetensors_file import encode_safetensors_header
from int8convert.errors import CorruptFileError, Int8ConvertError, SourceError
from tests.tools.attacks.registry import INDEX, attack, write_index, write_safetensors, write_sparse


def two_shards(**changes: object) -> dict[str, object]:
    return {"metadata": {}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors", **changes}}


def replace_by_link(folder: Path, name: str, target: str) -> None:
    path = folder / "checkpoint" / name
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def replace_by_pipe(folder: Path, name: str) -> None:
    path = folder / "checkpoint" / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)


@attack(CorruptFileError, "not a plain file name")
def index_that_climbs(folder: Path) -> None:
    write_index(folder, two_shards(b="../secret.safetensors"))


@attack(CorruptFileError, "not a plain file name")
def index_with_an_absolute_path(folder: Path) -> None:
    write_index(folder, two_shards(b="/etc/passwd"))


@attack(CorruptFileError, "not a plain file name")
def index_into_a_subfolder(folder: Path) -> None:
    write_index(folder, two_shards(b="a/../b.safetensors"))


@attack(CorruptFileError, "not a plain file name")
def index_to_the_directory_itself(folder: Path) -> None:
    write_index(folder, two_shards(b="."))


@attack(CorruptFileError, r"\\n|\\x1b")
def index_with_control_characters(folder: Path) -> None:
    write_index(folder, two_shards(b="b\nerror: done\x1b[2J.safetensors"))


@attack(Int8ConvertError, r"\\x00")
def index_with_a_null_byte(folder: Path) -> None:
    write_index(folder, two_shards(b="b\x00.safetensors"))


@attack(Int8ConvertError)
def index_with_half_a_character(folder: Path) -> None:
    write_index(folder, two_shards(b="\ud800.safetensors"))


@attack(Int8ConvertError, "xxxx")
def index_with_an_endless_name(folder: Path) -> None:
    write_index(folder, two_shards(b="x" * 100_000))


@attack(CorruptFileError, "has no weight_map")
def index_with_a_list(folder: Path) -> None:
    write_index(folder, {"weight_map": ["a", "a.safetensors"]})


@attack(CorruptFileError, "has no weight_map")
def index_with_an_empty_map(folder: Path) -> None:
    write_index(folder, {"weight_map": {}})


@attack(CorruptFileError, "has no weight_map")
def index_without_a_map(folder: Path) -> None:
    write_index(folder, {"metadata": {}})


@attack(CorruptFileError, "has no weight_map")
def index_with_names_that_are_numbers(folder: Path) -> None:
    write_index(folder, two_shards(b=7))


@attack(CorruptFileError, "has no weight_map")
def index_with_names_that_are_lists(folder: Path) -> None:
    write_index(folder, two_shards(b=["b.safetensors"]))


@attack(CorruptFileError, "the key 'a' occurs twice")
def index_with_a_key_twice(folder: Path) -> None:
    write_index(folder, b'{"weight_map":{"a":"a.safetensors","a":"b.safetensors"}}')


@attack(CorruptFileError, "JSON list, not an object")
def index_that_is_a_list(folder: Path) -> None:
    write_index(folder, [])


@attack(CorruptFileError, "nested too deeply", is_heavy=True)
def index_nested_deep(folder: Path) -> None:
    write_index(folder, b'{"weight_map":' * 900_000)


@attack(CorruptFileError, "expected at most", is_heavy=True)
def index_of_gigabytes(folder: Path) -> None:
    write_index(folder, b"")
    write_sparse(folder / "checkpoint" / INDEX, 4_000_000_000, b"{")


@attack(None)  # loaders go by the files, see `shard_index`; whether a tensor lacks is for the plan to say
def index_with_a_tensor_too_many(folder: Path) -> None:
    write_index(folder, two_shards(c="b.safetensors"))


@attack(None)
def index_with_tensors_exchanged(folder: Path) -> None:
    write_index(folder, {"weight_map": {"a": "b.safetensors", "b": "a.safetensors"}})


@attack(None)
def index_of_shards_with_the_same_tensor(folder: Path) -> None:
    write_index(folder, two_shards())
    write_safetensors(folder / "checkpoint" / "b.safetensors", "a")


@attack(CorruptFileError, "names shard .* which is not there")
def index_naming_a_missing_shard(folder: Path) -> None:
    write_index(folder, two_shards(c="c.safetensors"))


@attack(CorruptFileError, "which are one file", is_heavy=True)
def index_of_many_links_to_one_shard(folder: Path) -> None:
    """Links cost nothing; a header read through each of them costs its memory every time."""
    names = [f"s{i:04}.safetensors" for i in range(2000)]
    write_index(folder, {"weight_map": {name: name for name in names}})
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {f"t{i}": ("U8", (0,)) for i in range(20_000)}
    (folder / "checkpoint" / "a.safetensors").write_bytes(encode_safetensors_header(shapes))
    for name in names:
        (folder / "checkpoint" / name).symlink_to("a.safetensors")


@attack(CorruptFileError, "which are one file")
def index_of_two_hard_links_to_one_shard(folder: Path) -> None:
    write_index(folder, two_shards(c="c.safetensors"))
    (folder / "checkpoint" / "c.safetensors").hardlink_to(folder / "checkpoint" / "b.safetensors")


@attack(CorruptFileError, "is a Git LFS pointer")
def shard_that_was_never_fetched(folder: Path) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4294967296\n"
    (folder / "checkpoint" / "model.safetensors").write_text(pointer)


@attack(CorruptFileError, "not a plain file name ending in .safetensors")
def index_of_safetensors_that_names_a_pickle(folder: Path) -> None:
    write_index(folder, two_shards(c="c.bin"))
    (folder / "checkpoint" / "c.bin").write_bytes(b"\x80\x02}.")


@attack(SourceError, "is a pipe, socket or device, expected a file")
def index_that_is_a_pipe(folder: Path) -> None:
    write_index(folder, two_shards())
    replace_by_pipe(folder, INDEX)


@attack(SourceError, "outside the checkpoint")
def index_that_is_a_link_outside(folder: Path) -> None:
    write_index(folder, two_shards())
    replace_by_link(folder, INDEX, "../secret.json")


@attack(SourceError, "is a pipe, socket or device, expected a file")
def shard_that_is_a_pipe(folder: Path) -> None:
    replace_by_pipe(folder, "model.safetensors")


@attack(SourceError, "is a pipe, socket or device, expected a file")
def shard_of_an_index_that_is_a_pipe(folder: Path) -> None:
    write_index(folder, two_shards())
    replace_by_pipe(folder, "b.safetensors")


@attack(SourceError, "is a pipe, socket or device, expected a file")
def pickle_that_is_a_pipe(folder: Path) -> None:
    (folder / "checkpoint" / "model.safetensors").unlink()
    replace_by_pipe(folder, "pytorch_model.bin")


@attack(SourceError, "is a directory, expected a file")
def shard_that_is_a_directory(folder: Path) -> None:
    path = folder / "checkpoint" / "model.safetensors"
    path.unlink()
    path.mkdir()


@attack(SourceError, "is a directory, expected a file")
def shard_of_an_index_that_is_a_directory(folder: Path) -> None:
    write_index(folder, two_shards(c="c.safetensors"))
    (folder / "checkpoint" / "c.safetensors").mkdir()


@attack(SourceError, "'model.safetensors' is a link to '/dev/zero', outside the checkpoint", is_heavy=True)
def shard_that_is_a_device(folder: Path) -> None:
    replace_by_link(folder, "model.safetensors", "/dev/zero")


@attack(SourceError, "outside the checkpoint")
def shard_that_is_a_link_outside(folder: Path) -> None:
    replace_by_link(folder, "model.safetensors", "../secret.safetensors")


@attack(SourceError, "outside the checkpoint")
def shard_that_is_a_link_to_a_link_outside(folder: Path) -> None:
    replace_by_link(folder, "hop", "../secret.safetensors")
    replace_by_link(folder, "model.safetensors", "hop")


@attack(SourceError, "is a link")
def shard_that_is_a_link_to_itself(folder: Path) -> None:
    replace_by_link(folder, "model.safetensors", "model.safetensors")


@attack(SourceError, "leads nowhere")
def shard_that_is_a_dangling_link(folder: Path) -> None:
    replace_by_link(folder, "model.safetensors", "gone.safetensors")


@attack(SourceError, "outside the checkpoint")
def shard_behind_a_linked_folder(folder: Path) -> None:
    replace_by_link(folder, "door", "..")
    replace_by_link(folder, "model.safetensors", "door/secret.safetensors")


@attack(SourceError, "outside the checkpoint")
def config_that_is_a_link_outside(folder: Path) -> None:
    replace_by_link(folder, "config.json", "../secret.json")


@attack(SourceError, "is a pipe, socket or device, expected a file")
def config_that_is_a_pipe(folder: Path) -> None:
    replace_by_pipe(folder, "config.json")


@attack(SourceError, "is a directory, expected a file")
def config_that_is_a_directory(folder: Path) -> None:
    (folder / "checkpoint" / "config.json").unlink()
    (folder / "checkpoint" / "config.json").mkdir()


@attack(SourceError, "'tokenizer.json' is a link to '/etc/passwd', outside the checkpoint")
def carried_link_to_the_password_file(folder: Path) -> None:
    replace_by_link(folder, "tokenizer.json", "/etc/passwd")


@attack(SourceError, "outside the checkpoint")
def carried_link_that_climbs(folder: Path) -> None:
    replace_by_link(folder, "tokenizer.json", "../secret.txt")


@attack(None)  # hidden files are not carried, so nobody follows it
def carried_link_named_like_a_hidden_file(folder: Path) -> None:
    replace_by_link(folder, ".hidden", "../secret.txt")


@attack(SourceError, "leads nowhere")
def carried_dangling_link(folder: Path) -> None:
    replace_by_link(folder, "vocab.txt", "gone.txt")


@attack(SourceError, "is a pipe, socket or device, expected a file")
def carried_pipe(folder: Path) -> None:
    replace_by_pipe(folder, "tokenizer.json")


@attack(SourceError, "outside the checkpoint")
def carried_templates_from_elsewhere(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "key.pem").write_text("private")
    replace_by_link(folder, "additional_chat_templates", "../elsewhere")


@attack(SourceError, "outside the checkpoint")
def carried_template_that_is_a_link_outside(folder: Path) -> None:
    (folder / "checkpoint" / "additional_chat_templates").mkdir()
    replace_by_link(folder, "additional_chat_templates/tool.jinja", "../../secret.txt")


@attack(SourceError, r"\\n|\\x1b")
def carried_link_with_control_characters(folder: Path) -> None:
    replace_by_link(folder, "a\nerror: done\x1b[2J", "../secret.txt")


@attack(SourceError, r"'a\\nerror: done\\x1b\[2J' holds characters that cannot be printed")
def carried_file_with_control_characters(folder: Path) -> None:
    (folder / "checkpoint" / "a\nerror: done\x1b[2J").write_text("{}")


@attack(SourceError, r"'\\udcff\.txt' holds characters that cannot be printed")
def carried_file_whose_name_is_not_utf8(folder: Path) -> None:
    (folder / "checkpoint" / os.fsdecode(b"\xff.txt")).write_text("{}")


@attack(CorruptFileError, r"points to 'c\\n\\x1b\[2J.safetensors', which is not a plain file name")
def shard_whose_name_drives_the_terminal(folder: Path) -> None:
    write_index(folder, two_shards(c="c\n\x1b[2J.safetensors"))
    write_safetensors(folder / "checkpoint" / "c\n\x1b[2J.safetensors", "c")


def make_snapshot(folder: Path, blobs: Path, target: str) -> None:
    """The layout of the Hugging Face cache: `checkpoint` is a snapshot whose shard is a link."""
    snapshot = folder / "cache" / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    blobs.mkdir()
    write_safetensors(blobs / "feed")
    (folder / "checkpoint").rename(snapshot)
    (folder / "checkpoint").symlink_to("cache/snapshots/0123abcd")
    replace_by_link(folder, "model.safetensors", target)


@attack(None)
def cache_of_the_hub(folder: Path) -> None:
    make_snapshot(folder, folder / "cache" / "blobs", "../../blobs/feed")
    (folder / "cache" / "blobs" / "beef").write_text("{}")
    replace_by_link(folder, "tokenizer.json", "../../blobs/beef")


def make_shared_blob(folder: Path, repository: str, name: str) -> None:
    """The newer layout: the repository's blob is a link to one that all repositories of the cache share."""
    snapshot = folder / "hub" / repository / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    blob = folder / "hub" / "blobs" / name
    blob.parent.mkdir(parents=True)
    write_safetensors(blob)
    (snapshot.parent.parent / "blobs").mkdir()
    (snapshot.parent.parent / "blobs" / "feed").symlink_to(f"../../blobs/{name}")
    (folder / "checkpoint").rename(snapshot)
    (folder / "checkpoint").symlink_to(f"hub/{repository}/snapshots/0123abcd")
    replace_by_link(folder, "model.safetensors", "../../blobs/feed")


@attack(None)
def cache_of_the_hub_with_shared_blobs(folder: Path) -> None:
    make_shared_blob(folder, "models--org--name", f"fe/{'fe' * 32}")


@attack(SourceError, "outside the checkpoint")
def shared_blob_of_another_name(folder: Path) -> None:
    make_shared_blob(folder, "models--org--name", "fe/secret.safetensors")


@attack(SourceError, "outside the checkpoint")
def shared_blob_of_what_is_no_cache(folder: Path) -> None:
    make_shared_blob(folder, "documents", f"fe/{'fe' * 32}")


@attack(SourceError, "outside the checkpoint")
def cache_link_that_climbs_through_the_blobs(folder: Path) -> None:
    make_snapshot(folder, folder / "cache" / "blobs", "../../blobs/../../secret.safetensors")


@attack(SourceError, "outside the checkpoint")
def cache_blobs_that_are_a_link(folder: Path) -> None:
    make_snapshot(folder, folder / "elsewhere", "../../blobs/feed")
    (folder / "cache" / "blobs").symlink_to("../elsewhere")


@attack(SourceError, "outside the checkpoint")
def cache_blob_that_is_a_link_outside(folder: Path) -> None:
    make_snapshot(folder, folder / "cache" / "blobs", "../../blobs/feed")
    (folder / "cache" / "blobs" / "feed").unlink()
    (folder / "cache" / "blobs" / "feed").symlink_to("../../secret.safetensors")


@attack(SourceError, "outside the checkpoint")
def cache_of_another_repository(folder: Path) -> None:
    make_snapshot(folder, folder / "cache" / "blobs", "../../../other/blobs/feed")
    (folder / "other").mkdir()
    (folder / "cache" / "blobs").rename(folder / "other" / "blobs")


@attack(None)
def link_inside_the_checkpoint(folder: Path) -> None:
    write_safetensors(folder / "checkpoint" / "weights-v2.safetensors")
    replace_by_link(folder, "model.safetensors", "weights-v2.safetensors")
