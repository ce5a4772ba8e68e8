"""Attacks against which one check alone stands: found by taking the checks of the pickle reader out one by one."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

from int8convert.errors import CorruptFileError
from tests.tools.attacks.assembler import (
    Record,
    call,
    global_,
    legacy_file,
    legacy_storage,
    pickled,
    push,
    storage,
    tensor,
    torch_file,
    torch_records,
    zip_archive,
)
from tests.tools.attacks.pickles import write_bin
from tests.tools.attacks.registry import attack

GOOD = pickled({"a.weight": tensor()})
END = struct.Struct("<4s4H2LH")
"""End of a zip directory: signature, disks and counts, size and offset of the directory, length of the comment."""


def define(name: str, content: Callable[[], bytes], match: str | None) -> None:
    """An attack by a `.bin` file; a match of None: it must work."""

    def make(folder: Path) -> None:
        write_bin(folder, content())

    make.__name__ = name
    attack(CorruptFileError if match is not None else None, match or "")(make)


def define_pickle(name: str, pickle: bytes, match: str | None) -> None:
    define(name, lambda: zip_archive(torch_records(pickle)), match)


def rebuild(version: str, *rest: object, place: bytes | None = None) -> bytes:
    """A call of a function that makes a tensor, with whatever comes behind the strides."""
    return call("torch._utils", f"_rebuild_tensor{version}", place or storage(), 0, (4, 4), (4, 1), *rest)


def wide(
    locator: bytes = b"PK\x06\x07",
    signature: bytes = b"PK\x06\x06",
    locator_offset: int | None = None,
    directory_offset: int | None = None,
    directory_bytes: int | None = None,
    n_records: int = 4,
    entry_extra: Callable[[int], bytes] = lambda offset: struct.pack("<HHQ", 1, 8, offset),
) -> bytes:
    """A good archive with a 64-bit directory, or one that lies in it; the offset of its last record is 64-bit too."""
    plain = zip_archive(torch_records(GOOD))
    *_, n_bytes, at, _ = END.unpack(plain[-22:])
    entry = plain.rindex(b"PK\x01\x02")
    record_offset = int.from_bytes(plain[entry + 42 : entry + 46], "little")
    extra = entry_extra(record_offset)
    name = plain[entry + 46 : len(plain) - 22]
    last = bytearray(plain[entry : entry + 46])
    last[30:32] = len(extra).to_bytes(2, "little")
    last[42:46] = b"\xff" * 4
    content = plain[:entry] + bytes(last) + name + extra
    n_bytes = len(content) - at
    size = n_bytes if directory_bytes is None else directory_bytes
    offset = at if directory_offset is None else directory_offset
    end = struct.pack("<4sQ2H2L4Q", signature, 44, 45, 45, 0, 0, n_records, n_records, size, offset)
    where = len(content) if locator_offset is None else locator_offset
    return (
        content
        + end
        + struct.pack("<4sLQL", locator, 0, where, 1)
        + END.pack(b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    )


def changed(at: int, replacement: bytes) -> bytes:
    """A good file with some bytes replaced, counted from its end."""
    content = bytearray(zip_archive(torch_records(GOOD)))
    content[len(content) + at : len(content) + at + len(replacement)] = replacement
    return bytes(content)


def entry_changed(offset: int, replacement: bytes) -> bytes:
    """A good file with some bytes of a storage's entry in the directory replaced; its local header stays true."""
    content = bytearray(zip_archive(torch_records(GOOD)))
    at = content.rindex(b"archive/data/0") - 46 + offset
    content[at : at + len(replacement)] = replacement
    return bytes(content)


def last_entry_with_comment() -> bytes:
    """A good file whose last record promises a comment that would lie behind the directory."""
    content = bytearray(zip_archive(torch_records(GOOD)))
    content[content.rindex(b"PK\x01\x02") + 32] = 5
    return bytes(content)


def local_changed(offset: int, replacement: bytes) -> bytes:
    """A good file with some bytes of a storage's local header replaced; its entry in the directory stays true."""
    content = bytearray(zip_archive(torch_records(GOOD)))
    at = content.index(b"archive/data/0") - 30 + offset
    content[at : at + len(replacement)] = replacement
    return bytes(content)


# The end of the archive and its directory.
define("corner_wide_directory", lambda: wide(), None)
define("corner_wide_directory_without_locator", lambda: wide(locator=b"PKxx"), "nowhere to be found")
define("corner_wide_directory_of_another_kind", lambda: wide(signature=b"PKxx"), "nowhere to be found")
define("corner_wide_directory_behind_the_file", lambda: wide(locator_offset=2**62), "nowhere to be found")
define("corner_wide_directory_at_a_gigantic_offset", lambda: wide(directory_offset=2**63), "beyond its end")
define("corner_wide_directory_of_gigantic_size", lambda: wide(directory_bytes=2**63), "beyond its end")
define("corner_wide_number_that_is_not_there", lambda: wide(entry_extra=lambda offset: b""), "lacks a 64-bit number")
define(
    "corner_wide_number_cut_short",
    lambda: wide(entry_extra=lambda offset: struct.pack("<HHL", 1, 4, offset)),
    "lacks a 64-bit number",
)
define(
    "corner_wide_number_behind_another_field",
    lambda: wide(entry_extra=lambda offset: b"zz\x01\x00x" + struct.pack("<HHQ", 1, 8, offset)),
    None,
)
define("corner_zip_comment", lambda: changed(-2, b"\x05\x00") + b"hello", "does not end with a zip directory")
define("corner_zip_comment_that_is_not_there", lambda: changed(-2, b"\x05\x00"), "does not end with a zip directory")
define("corner_zip_of_another_ending", lambda: changed(-22, b"PKxx"), "does not end with a zip directory")
define("corner_zip_directory_reaches_beyond_itself", lambda: changed(-10, b"\xff\xff\xff\x7f"), "beyond its end")
define("corner_zip_directory_cut_inside_an_entry", lambda: changed(-10, b"\x30\x00\x00\x00"), "directory is damaged")
define("corner_zip_directory_of_more_records_than_it_counts", lambda: changed(-12, b"\x03\x00"), "directory is damaged")
define("corner_wide_directory_of_fewer_records_than_it_counts", lambda: wide(n_records=5), "directory is damaged")
define("corner_zip_entry_of_another_kind", lambda: entry_changed(0, b"PKxx"), "its zip directory is damaged")
define("corner_zip_too_short_to_hold_anything", lambda: b"PK\x03\x04", "truncated")

define("corner_zip_directory_that_ends_in_a_comment_that_is_not_there", lambda: last_entry_with_comment(), "is damaged")

# A storage's two headers, each lying alone.
define("corner_entry_encrypted", lambda: entry_changed(8, b"\x01\x00"), "encrypted, compressed or truncated")
define("corner_entry_compressed", lambda: entry_changed(10, b"\x08\x00"), "encrypted, compressed or truncated")
define("corner_entry_of_two_sizes", lambda: entry_changed(20, b"\x10\x00"), "encrypted, compressed or truncated")
define("corner_entry_behind_the_end", lambda: entry_changed(42, b"\x00\x00\x00\x10"), "compressed or truncated")
define("corner_local_header_encrypted", lambda: local_changed(6, b"\x01\x00"), "not what the zip directory says")
define("corner_local_header_compressed", lambda: local_changed(8, b"\x08\x00"), "not what the zip directory says")
define("corner_local_header_of_a_longer_name", lambda: local_changed(26, b"\x0f\x00"), "not what the zip directory")
define("corner_local_header_that_moves_the_data", lambda: local_changed(28, b"\xff\xff"), "is truncated")
define("corner_no_byte_order", lambda: zip_archive([r for r in torch_records(GOOD) if "order" not in r.name]), None)
define(
    "corner_byte_order_of_megabytes",
    lambda: zip_archive([*torch_records(GOOD)[:1], Record("archive/byteorder", b"little" * 200_000)]),
    "takes 1,200,000 bytes, expected at most 16",
)

# The pickle machine.
define_pickle("corner_protocol_4", b"\x80\x04" + GOOD[2:], "written in pickle protocol 4")
define_pickle("corner_mark_left_open", b"\x80\x02" + push({"a": tensor()}) + b"(N.", "more or less than one value")
define_pickle("corner_value_left_over", b"\x80\x02N" + GOOD[2:], "more or less than one value")
define_pickle("corner_no_value", b"\x80\x02.", "more or less than one value")
define_pickle("corner_append_to_a_tuple", b"\x80\x02)Na.", "appends to a tuple")
define_pickle("corner_append_to_text", b"\x80\x02" + push("a") + b"(NNe.", "appends to a string")
define_pickle("corner_entries_of_a_list", b"\x80\x02](NNu.", "sets entries of a list")
define_pickle("corner_key_without_a_value", b"\x80\x02}(NNNu.", "sets entries of a dict")
define_pickle("corner_state_of_a_tuple", b"\x80\x02)}b.", "sets the state of a tuple")
define_pickle("corner_class_asked_for", b"\x80\x02" + push({"a": global_("os", "PathLike")}) + b".", "'os.PathLike'")
define_pickle("corner_call_of_text", b"\x80\x02" + push("a") + b")R.", "calls a string")
define_pickle("corner_call_of_a_dtype", b"\x80\x02" + global_("torch", "uint16") + b")R.", "that is no function")
define_pickle(
    "corner_call_with_a_list", b"\x80\x02" + global_("torch._utils", "_rebuild_tensor_v2") + b"]R.", "no function"
)
define_pickle(
    "corner_call_with_nothing", pickled({"a": call("torch._utils", "_rebuild_tensor_v2")}), "describe no tensor"
)
define_pickle("corner_global_without_an_end", b"\x80\x02ctorch", "truncated, or names something absurdly long")
define_pickle("corner_global_not_in_utf8", b"\x80\x02c\xff\n\xff\n.", "not UTF-8")
define_pickle("corner_memo_that_is_empty", b"\x80\x02h\x05.", "uses a value that it has not stored before")
define_pickle("corner_empty_stack", b"\x80\x02\x86.", "uses a value that it has not stored before")
define_pickle("corner_mark_that_is_not_there", b"\x80\x02t.", "uses a value that it has not stored before")

# The functions that make tensors.
HOOKS = call("collections", "OrderedDict")
UNTYPED = storage(n_elements=32, kind="x").replace(b"ctorch\nx\n", b"ctorch.storage\nUntypedStorage\n")
define_pickle("corner_tensor_of_the_first_version", pickled({"a": rebuild("")}), None)
define_pickle("corner_tensor_with_empty_metadata", pickled({"a": rebuild("_v2", False, HOOKS, {})}), None)
define_pickle(
    "corner_tensor_marked_conjugate", pickled({"a": rebuild("_v2", False, HOOKS, {"conj": True})}), "conjugate"
)
define_pickle("corner_tensor_with_odd_metadata", pickled({"a": rebuild("_v2", False, HOOKS, 7)}), "conjugate or")
define_pickle("corner_tensor_without_hooks", pickled({"a": rebuild("_v2", False)}), "describe no tensor")
define_pickle(
    "corner_tensor_of_an_untyped_storage",
    pickled({"a": rebuild("_v3", False, HOOKS, global_("torch", "uint16"), place=UNTYPED)}),
    None,
)
define_pickle(
    "corner_tensor_of_a_dtype_that_is_none",
    pickled({"a": rebuild("_v3", False, HOOKS, global_("torch", "Tensor"), place=UNTYPED)}),
    "describe no tensor",
)
define_pickle(
    "corner_parameter_of_a_number", pickled({"a": call("torch._utils", "_rebuild_parameter", 7, 0, 0)}), "no tensor"
)
define_pickle("corner_size_of_a_number", pickled({"a": call("torch", "Size", 7)}), "describe no tensor")
define_pickle(
    "corner_size_of_a_tuple", pickled({"a": rebuild("").replace(push((4, 4)), call("torch", "Size", (4, 4)))}), None
)
define_pickle("corner_dictionary_of_a_number", pickled(call("collections", "OrderedDict", 7)), "describe no tensor")
define_pickle(
    "corner_dictionary_as_python_2_wrote_it", pickled(call("collections", "OrderedDict", [["a", tensor()]])), None
)
define_pickle("corner_dictionary_of_texts", pickled(call("collections", "OrderedDict", ["ab"])), "a dictionary made of")
define_pickle(
    "corner_tensor_with_attributes",
    pickled(
        {
            "a": call(
                "torch._tensor",
                "_rebuild_from_type_v2",
                global_("torch._utils", "_rebuild_tensor_v2"),
                global_("torch.nn.parameter", "Parameter"),
                (storage(), 0, (4, 4), (4, 1), False, HOOKS),
                {"note": "mine"},
            )
        }
    ),
    None,
)
define_pickle(
    "corner_attributes_of_attributes",
    b"\x80\x02"
    + push(
        {
            "a": call(
                "torch._tensor",
                "_rebuild_from_type_v2",
                global_("torch._tensor", "_rebuild_from_type_v2"),
                global_("torch", "Tensor"),
                (),
                None,
            )
        }
    )
    + b".",
    "describe no tensor",
)
define(
    "corner_storage_of_two_dtypes",
    lambda: torch_file(
        {"a": tensor(), "b": tensor((1, 4), (4, 1), of=storage(n_elements=8, kind="FloatStorage"))},
    ),
    "refers to the storage '0' in two ways",
)
define("corner_tensor_that_repeats_itself", lambda: torch_file({"a": tensor((10_000,), (0,))}), "repeats its elements")
define("corner_tensor_that_repeats_itself_a_little", lambda: torch_file({"a": tensor((10, 4), (0, 1))}), None)

# The list of storages in the old format.
PLACE = {"a": tensor(of=legacy_storage())}
define("corner_legacy_key_that_is_a_list", lambda: legacy_file(PLACE, keys=[[], {}]), "does not match its tensors")
define("corner_legacy_key_twice", lambda: legacy_file(PLACE, keys=["0", "0"]), "does not match its tensors")
define(
    "corner_legacy_of_another_version", lambda: legacy_file(PLACE).replace(push(1001), push(1002), 1), "unknown version"
)
define(
    "corner_legacy_web_page", lambda: b"<!DOCTYPE html><title>404</title>", "neither a zip archive nor a file of torch"
)
