"""Attacks by the header of a safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from int8convert.errors import CorruptFileError
from tests.tools.attacks.registry import attack, write_header, write_sparse


def entry(shape: list[Any], begin: Any, end: Any, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@attack(CorruptFileError, "no safetensors file, or truncated")
def header_longer_than_the_file(folder: Path) -> None:
    write_header(folder, b"{}", length=1000)


@attack(CorruptFileError, "no safetensors file, or truncated", is_heavy=True)
def header_of_all_the_bytes_there_are(folder: Path) -> None:
    write_header(folder, b"{}", length=2**64 - 1)


@attack(CorruptFileError, "no safetensors file, or truncated")
def header_shorter_than_an_object(folder: Path) -> None:
    write_header(folder, b"{}", length=1)


@attack(CorruptFileError, "takes 4,000,000,000 bytes, expected at most", is_heavy=True)
def header_of_gigabytes(folder: Path) -> None:
    write_sparse(folder / "checkpoint" / "model.safetensors", 5_000_000_000, (4_000_000_000).to_bytes(8, "little"))


@attack(CorruptFileError, "not valid JSON")
def header_no_json(folder: Path) -> None:
    write_header(folder, b"\x80\x02}q\x00.")


@attack(CorruptFileError, "not an object")
def header_a_list(folder: Path) -> None:
    write_header(folder, [])


@attack(CorruptFileError, "does not begin with")
def header_behind_a_space(folder: Path) -> None:
    write_header(folder, b" {}")


@attack(CorruptFileError, "not valid JSON: .*BOM")
def header_behind_a_byte_order_mark(folder: Path) -> None:
    write_header(folder, b"\xef\xbb\xbf{}")


@attack(CorruptFileError, "not valid JSON: 'utf-8' codec")
def header_not_utf8(folder: Path) -> None:
    write_header(folder, b'{"\xff":{}}')


@attack(CorruptFileError, "the key 'a' occurs twice")
def header_same_tensor_twice(folder: Path) -> None:
    write_header(folder, b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{}}', b"x")


@attack(CorruptFileError, "the key 'shape' occurs twice")
def header_same_field_twice(folder: Path) -> None:
    write_header(folder, b'{"a":{"dtype":"U8","shape":[1],"shape":[2],"data_offsets":[0,1]}}', b"x")


@attack(CorruptFileError, r"the key '(\\n)+\\?\.\.\.' occurs twice")
def header_key_twice_with_newlines(folder: Path) -> None:
    key = b'"' + b"\\n" * 2000 + b'"'
    write_header(folder, b"{" + key + b":1," + key + b":2}")


@attack(CorruptFileError, "overlap or leave a hole")
def header_overlapping_tensors(folder: Path) -> None:
    write_header(folder, {"a": entry([4], 0, 4), "b": entry([4], 2, 6)}, bytes(6))


@attack(CorruptFileError, "overlap or leave a hole")
def header_two_names_for_the_same_bytes(folder: Path) -> None:
    write_header(folder, {f"t{i}": entry([4], 0, 4) for i in range(100)}, bytes(4))


@attack(CorruptFileError, "overlap or leave a hole")
def header_hole_between_tensors(folder: Path) -> None:
    write_header(folder, {"a": entry([2], 0, 2), "b": entry([2], 4, 6)}, bytes(6))


@attack(CorruptFileError, "overlap or leave a hole")
def header_hole_before_the_first_tensor(folder: Path) -> None:
    write_header(folder, {"a": entry([2], 4, 6)}, bytes(6))


@attack(CorruptFileError, "does not fill its bytes")
def header_reversed_offsets(folder: Path) -> None:
    write_header(folder, {"a": entry([2], 4, 2)}, bytes(4))


@attack(CorruptFileError, "does not fill its bytes")
def header_negative_offsets(folder: Path) -> None:
    write_header(folder, {"a": entry([8], -8, 0)})


@attack(CorruptFileError, "is truncated: its header promises")
def header_data_behind_the_end(folder: Path) -> None:
    write_header(folder, {"a": entry([1 << 40], 0, 1 << 40)})


@attack(CorruptFileError, "is too long")
def header_data_no_tensor_claims(folder: Path) -> None:
    write_header(folder, {"a": entry([1], 0, 1)}, b"x" + b"hidden payload")


@attack(CorruptFileError, "does not fill its bytes")
def header_shape_smaller_than_its_bytes(folder: Path) -> None:
    write_header(folder, {"a": entry([1], 0, 4)}, bytes(4))


@attack(CorruptFileError, "does not fill its bytes")
def header_negative_dimensions(folder: Path) -> None:
    write_header(folder, {"a": entry([-2, -2], 0, 4)}, bytes(4))


@attack(CorruptFileError, "does not fill its bytes")
def header_product_that_wraps_to_its_bytes(folder: Path) -> None:
    write_header(folder, {"a": entry([2**32, 2**32], 0, 0)})


@attack(CorruptFileError, "does not fill its bytes")
def header_gigantic_dimensions_times_none(folder: Path) -> None:
    write_header(folder, {"a": entry([0, 2**62, 2**62], 0, 0)})


@attack(CorruptFileError, r"shape \[1, 1, 1, 1, 1, 1, \.\.\. 65 in all\]")
def header_one_dimension_more_than_numpy_holds(folder: Path) -> None:
    write_header(folder, {"a": entry([1] * 65, 0, 1)}, b"x")


@attack(None)
def header_as_many_dimensions_as_numpy_holds(folder: Path) -> None:
    write_header(folder, {"a": entry([1] * 64, 0, 1)}, b"x")


@attack(CorruptFileError, "has 501 characters, expected at most 500")
def header_name_one_character_too_long(folder: Path) -> None:
    write_header(folder, {"a" * 501: entry([1], 0, 1)}, b"x")


@attack(CorruptFileError, r"shape \[2, 2, 2, 2, 2, 2, \.\.\. 100,000 in all\]", is_heavy=True)
def header_hundred_thousand_dimensions(folder: Path) -> None:
    write_header(folder, {"a": entry([2] * 100_000, 0, 1)}, b"x")


@attack(CorruptFileError, "1,000,000 in all", is_heavy=True)
def header_million_gigantic_dimensions(folder: Path) -> None:
    write_header(folder, {"a": entry([2**62] * 1_000_000, 0, 1)}, b"x")


@attack(CorruptFileError, "not valid JSON: Exceeds the limit", is_heavy=True)
def header_number_of_a_million_digits(folder: Path) -> None:
    write_header(folder, b'{"a":{"dtype":"U8","shape":[' + b"9" * 1_000_000 + b'],"data_offsets":[0,1]}}', b"x")


@attack(CorruptFileError, r"bytes \[0, 9{20}\]")
def header_number_of_four_thousand_digits(folder: Path) -> None:
    write_header(folder, b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,' + b"9" * 4000 + b"]}}", b"x")


@attack(CorruptFileError, "does not fill its bytes")
def header_fractions_as_sizes(folder: Path) -> None:
    write_header(folder, {"a": entry([4.0], 0.0, 4.0)}, bytes(4))


@attack(CorruptFileError, "does not fill its bytes")
def header_end_that_is_a_fraction(folder: Path) -> None:
    write_header(folder, {"a": entry([4], 0, 4.0)}, bytes(4))


@attack(CorruptFileError, "does not fill its bytes")
def header_dimension_that_is_a_fraction(folder: Path) -> None:
    write_header(folder, {"a": entry([4.0], 0, 4)}, bytes(4))


@attack(CorruptFileError, "does not fill its bytes")
def header_truth_as_size(folder: Path) -> None:
    write_header(folder, {"a": entry([True], False, True)}, b"x")


@attack(CorruptFileError, r"shape \[a str, a list, a dict, a NoneType\]")
def header_no_numbers_as_sizes(folder: Path) -> None:
    write_header(folder, {"a": entry(["\n" * 1000, [], {}, None], 0, 1)}, b"x")


@attack(CorruptFileError, "NaN is no number of JSON")
def header_nan(folder: Path) -> None:
    write_header(folder, b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', b"x")


@attack(CorruptFileError, "Infinity is no number of JSON")
def header_infinity(folder: Path) -> None:
    write_header(folder, b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,Infinity]}}', b"x")


@attack(CorruptFileError, r"has dtype 'F\\n+")
def header_unknown_dtype(folder: Path) -> None:
    write_header(folder, {"a": entry([1], 0, 1, "F" + "\n" * 5000)}, b"x")


@attack(CorruptFileError, "without dtype, shape and data_offsets")
def header_dtype_that_cannot_be_a_key(folder: Path) -> None:
    write_header(folder, {"a": {"dtype": [], "shape": [1], "data_offsets": [0, 1]}}, b"x")


@attack(CorruptFileError, "without dtype, shape and data_offsets")
def header_three_offsets(folder: Path) -> None:
    write_header(folder, {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, b"x")


@attack(CorruptFileError, "without dtype, shape and data_offsets")
def header_entry_that_is_a_list(folder: Path) -> None:
    write_header(folder, {"a": ["U8", [1], [0, 1]]}, b"x")


@attack(CorruptFileError, r"gives 'a' a field 'str\\nides', which the format does not have")
def header_field_the_format_has_not(folder: Path) -> None:
    write_header(folder, {"a": {**entry([2, 2], 0, 4), "str\nides": [1, 2]}}, bytes(4))


@attack(CorruptFileError, "a field 'extra'")
def header_extra_field_nested_deeper_than_the_library_reads(folder: Path) -> None:
    nested = "[" * 200 + "]" * 200
    write_header(folder, b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"extra":%s}}' % nested.encode(), b"x")


@attack(CorruptFileError, r"name 'a\\x00b' .* cannot be printed")
def header_name_with_a_null_byte(folder: Path) -> None:
    write_header(folder, {"a\x00b": entry([1], 0, 1)}, b"x")


@attack(CorruptFileError, r"name 'a\\nerror: all is well' .* cannot be printed")
def header_name_with_a_newline(folder: Path) -> None:
    write_header(folder, {"a\nerror: all is well": entry([1], 0, 1)}, b"x")


@attack(CorruptFileError, r"\\x1b\]0;owned\\x07.* cannot be printed")
def header_name_that_drives_the_terminal(folder: Path) -> None:
    write_header(folder, {"\x1b]0;owned\x07\x1b[2J": entry([1], 0, 1)}, b"x")


@attack(CorruptFileError, r"\\u202e.* cannot be printed")
def header_name_written_backwards(folder: Path) -> None:
    write_header(folder, {"a\u202egnp.exe": entry([1], 0, 1)}, b"x")


@attack(CorruptFileError, "surrogates not allowed")
def header_name_of_half_a_character(folder: Path) -> None:
    write_header(folder, {"a\ud800": entry([1], 0, 1)}, b"x")


@attack(CorruptFileError, "is a path that leaves its folder")
def header_name_that_climbs(folder: Path) -> None:
    write_header(folder, {"../../../../tmp/owned": entry([1], 0, 1)}, b"x")


@attack(CorruptFileError, "is a path that leaves its folder")
def header_name_that_is_absolute(folder: Path) -> None:
    write_header(folder, {"/etc/owned": entry([1], 0, 1)}, b"x")


@attack(CorruptFileError, "has 1,000,000 characters", is_heavy=True)
def header_name_of_a_million_characters(folder: Path) -> None:
    write_header(folder, {"a" * 1_000_000: entry([1], 0, 1)}, b"x")


@attack(CorruptFileError, "is empty")
def header_empty_name(folder: Path) -> None:
    write_header(folder, {"": entry([1], 0, 1)}, b"x")


@attack(CorruptFileError, "nested too deeply", is_heavy=True)
def header_nested_deep(folder: Path) -> None:
    write_header(folder, b'{"a":' * 900_000)


@attack(CorruptFileError, "__metadata__ that does not map")
def header_metadata_that_is_a_list(folder: Path) -> None:
    write_header(folder, {"__metadata__": [1], "a": entry([1], 0, 1)}, b"x")


@attack(CorruptFileError, "__metadata__ that does not map")
def header_metadata_with_numbers(folder: Path) -> None:
    write_header(folder, {"__metadata__": {"format": 1}, "a": entry([1], 0, 1)}, b"x")


@attack(CorruptFileError, "surrogates not allowed")
def header_metadata_of_half_a_character(folder: Path) -> None:
    write_header(folder, {"__metadata__": {"format": "\ud800"}, "a": entry([1], 0, 1)}, b"x")


@attack(CorruptFileError, "holds 10,000,002 lists and objects, expected at most 1,000,000", is_heavy=True)
def header_of_ten_million_empty_lists(folder: Path) -> None:
    write_header(folder, b'{"a":[' + b"[]," * 10_000_000 + b"0]}")


@attack(CorruptFileError, "holds 4,400,002 lists and objects, expected at most 1,000,000", is_heavy=True)
def header_of_millions_of_small_objects(folder: Path) -> None:
    write_header(folder, b'{"a":[' + b'{"":0},' * 4_400_000 + b"0]}")


@attack(CorruptFileError, "without dtype, shape and data_offsets", is_heavy=True)
def header_of_millions_of_keys(folder: Path) -> None:
    write_header(folder, b"{" + b",".join(b'"%x":0' % i for i in range(1 << 20, (1 << 20) + 2_800_000)) + b"}")


@attack(None, is_heavy=True)
def header_of_a_hundred_thousand_tensors(folder: Path) -> None:
    write_header(folder, {f"layers.{i}.weight": entry([2], 2 * i, 2 * i + 2) for i in range(100_000)}, bytes(200_000))


@attack(None)
def header_of_empty_tensors_and_scalars(folder: Path) -> None:
    write_header(folder, {"a": entry([0, 3], 0, 0), "b": entry([], 0, 1), "c": entry([0], 1, 1)}, b"x")
