"""Attacks by the zip archive around a pickle."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from int8convert.errors import CorruptFileError
from tests.tools.attacks.assembler import (
    Record,
    legacy_file,
    legacy_storage,
    pickled,
    storage,
    tensor,
    torch_file,
    torch_records,
    zip_archive,
)
from tests.tools.attacks.pickles import write_bin
from tests.tools.attacks.registry import attack

GOOD = pickled({"a.weight": tensor()})


def records(change: Callable[[list[Record]], object]) -> bytes:
    """A good file with its records changed."""
    found = torch_records(GOOD)
    change(found)
    return zip_archive(found)


def change_record(name: str, **claims: object) -> bytes:
    found = [replace(r, **claims) if r.name == name else r for r in torch_records(GOOD)]  # type: ignore[arg-type]
    return zip_archive(found)


@attack(CorruptFileError, "is encrypted, compressed or truncated", is_heavy=True)
def zip_bomb_in_the_pickle(folder: Path) -> None:
    bomb = b"\x80\x02" + b"N0" * 200_000_000 + b"."
    write_bin(folder, zip_archive([Record("archive/data.pkl", bomb, method=8), Record("archive/version", b"3\n")]))


@attack(CorruptFileError, "is encrypted, compressed or truncated", is_heavy=True)
def zip_bomb_in_a_storage(folder: Path) -> None:
    found = torch_records(GOOD, {"0": bytes(500_000_000)})
    write_bin(folder, zip_archive([replace(r, method=8 if "data/0" in r.name else 0) for r in found]))


@attack(CorruptFileError, is_heavy=True)
def zip_bomb_in_the_byte_order(folder: Path) -> None:
    found = [replace(r, data=bytes(300_000_000), method=8) if "byteorder" in r.name else r for r in torch_records(GOOD)]
    write_bin(folder, zip_archive(found))


@attack(CorruptFileError)
def zip_encrypted(folder: Path) -> None:
    write_bin(folder, change_record("archive/data.pkl", flags=1))


@attack(CorruptFileError)
def zip_encrypted_storage(folder: Path) -> None:
    write_bin(folder, change_record("archive/data/0", flags=1))


@attack(CorruptFileError)
def zip_of_a_method_nobody_knows(folder: Path) -> None:
    write_bin(folder, change_record("archive/data/0", method=99))


@attack(CorruptFileError, is_heavy=True)
def zip_record_that_claims_gigabytes(folder: Path) -> None:
    write_bin(folder, change_record("archive/data/0", size=3_000_000_000))


@attack(CorruptFileError, is_heavy=True)
def zip_record_that_claims_exabytes(folder: Path) -> None:
    write_bin(folder, change_record("archive/data/0", size=2**62))


@attack(CorruptFileError, is_heavy=True)
def zip_pickle_that_claims_gigabytes(folder: Path) -> None:
    write_bin(folder, change_record("archive/data.pkl", size=3_000_000_000))


@attack(CorruptFileError)
def zip_with_two_pickles(folder: Path) -> None:
    write_bin(folder, records(lambda found: found.insert(1, Record("archive/data.pkl", pickled({"b": tensor()})))))


@attack(CorruptFileError)
def zip_with_a_storage_twice(folder: Path) -> None:
    write_bin(folder, records(lambda found: found.append(Record("archive/data/0", b"\xff" * 32))))


@attack(CorruptFileError)
def zip_with_records_on_top_of_each_other(folder: Path) -> None:
    """The second storage claims the bytes of the first: its local header lies inside that one's data."""
    inner = Record("archive/data/1", bytes(32))
    hidden = zip_archive([inner])[: -22 - 46 - len(inner.name)]
    found = torch_records(pickled({"a": tensor(of=storage("0", 4 * len(hidden) // 8)), "b": tensor(of=storage("1"))}))
    data = hidden + bytes(-len(hidden) % 2)
    found[2] = Record("archive/data/0", data)
    at = zip_archive(found).index(hidden)
    write_bin(folder, zip_archive([*found, replace(inner, local_offset=at)]))


@attack(CorruptFileError)
def zip_whose_local_header_is_elsewhere(folder: Path) -> None:
    write_bin(folder, change_record("archive/data/0", local_offset=2**31))


@attack(CorruptFileError)
def zip_whose_local_header_is_none(folder: Path) -> None:
    write_bin(folder, change_record("archive/data/0", local_signature=b"XXXX"))


@attack(CorruptFileError)
def zip_whose_local_header_has_another_name(folder: Path) -> None:
    write_bin(folder, change_record("archive/data/0", local_name="archive/data/1"))


@attack(CorruptFileError)
def zip_whose_local_header_reaches_beyond_the_file(folder: Path) -> None:
    content = bytearray(torch_file({"a.weight": tensor()}))
    at = content.index(b"archive/data/0") - 2
    content[at : at + 2] = b"\xff\xff"
    write_bin(folder, bytes(content))


@attack(CorruptFileError)
def zip_without_a_pickle(folder: Path) -> None:
    write_bin(folder, zip_archive([Record("archive/version", b"3\n")]))


@attack(CorruptFileError)
def zip_without_records(folder: Path) -> None:
    write_bin(folder, zip_archive([]))


@attack(CorruptFileError)
def zip_with_its_directory_nowhere(folder: Path) -> None:
    write_bin(folder, zip_archive(torch_records(GOOD), claimed_directory_offset=2**32 - 2))


@attack(CorruptFileError)
def zip_of_a_torchscript_program(folder: Path) -> None:
    write_bin(folder, records(lambda found: found.append(Record("archive/constants.pkl", pickled(())))))


@attack(CorruptFileError)
def zip_of_the_other_byte_order(folder: Path) -> None:
    write_bin(folder, change_record("archive/byteorder", data=b"big"))


@attack(CorruptFileError)
def zip_of_no_known_byte_order(folder: Path) -> None:
    write_bin(folder, change_record("archive/byteorder", data=b"\xff\n\x1b[2J"))


@attack(CorruptFileError, is_heavy=True)
def zip_of_sixty_thousand_records_without_names(folder: Path) -> None:
    write_bin(folder, zip_archive([Record("", b"", local_extra=b"")] * 60_000))


@attack(CorruptFileError)
def zip_with_names_that_drive_the_terminal(folder: Path) -> None:
    write_bin(folder, records(lambda found: found.append(Record("archive/\x1b[2J\n" * 500, b"x" * 9, method=8))))


@attack(CorruptFileError)
def zip_truncated(folder: Path) -> None:
    write_bin(folder, torch_file({"a.weight": tensor()})[:-30])


@attack(None)
def zip_behind_a_legacy_file(folder: Path) -> None:
    """A reader may take the zip at the end or the pickle at the start. torch goes by the start, and so must we."""
    legacy = legacy_file({"legacy": tensor(of=legacy_storage())})
    write_bin(folder, legacy + torch_file({"zip": tensor()}))


@attack(CorruptFileError, "its zip directory takes 4,000,000,000 bytes, expected at most", is_heavy=True)
def zip_with_a_directory_of_gigabytes(folder: Path) -> None:
    write_bin(folder, b"PK\x03\x04")
    with (folder / "checkpoint" / "pytorch_model.bin").open("r+b") as file:
        file.seek(4_000_000_000)
        file.write(b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, 4_000_000_000, 0, 0))


def write_sparse_zip(folder: Path, pickle_bytes: int, storage_bytes: int) -> None:
    """A padded pickle and a storage of empty room, with the 64-bit numbers torch writes beyond 4 GB."""
    n_elements = storage_bytes // 2
    pickle = pickled({"a.weight": tensor((n_elements,), (1,), of=storage(n_elements=n_elements))})
    write_bin(folder, b"")
    names = {"archive/data.pkl": (pickle, max(pickle_bytes, len(pickle))), "archive/data/0": (b"", storage_bytes)}
    directory = b""
    with (folder / "checkpoint" / "pytorch_model.bin").open("r+b") as file:
        for name, (content, n_bytes) in {**names, "archive/version": (b"3\n", 2)}.items():
            begin = file.tell()
            wide = struct.pack("<HHQQQ", 1, 24, n_bytes, n_bytes, begin)
            head = struct.pack("<HHHHHIII", 45, 0, 0, 0, 0x21, zlib.crc32(content), 2**32 - 1, 2**32 - 1)
            file.write(b"PK\x03\x04" + head + struct.pack("<HH", len(name), 20) + name.encode())
            file.write(struct.pack("<HHQQ", 1, 16, n_bytes, n_bytes) + content)
            file.seek(n_bytes - len(content), os.SEEK_CUR)
            lengths = struct.pack("<HHHHHII", len(name), len(wide), 0, 0, 0, 0, 2**32 - 1)
            directory += b"PK\x01\x02" + struct.pack("<H", 45) + head + lengths + name.encode() + wide
        at = file.tell()
        file.write(directory)
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 3, 3, len(directory), at))
        file.write(struct.pack("<4sLQL", b"PK\x06\x07", 0, at + len(directory), 1))
        file.write(b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 3, 3, len(directory), 2**32 - 1, 0))


@attack(CorruptFileError, "'data.pkl' takes 4,000,000,000 bytes, expected at most", is_heavy=True)
def zip_with_a_pickle_of_gigabytes(folder: Path) -> None:
    write_sparse_zip(folder, 4_000_000_000, 32)


@attack(None, is_heavy=True)
def zip_of_a_tensor_of_five_gigabytes(folder: Path) -> None:
    """Shards beyond 4 GB are what people have; all their numbers stand in 64-bit fields."""
    write_sparse_zip(folder, 0, 5_000_000_000)
