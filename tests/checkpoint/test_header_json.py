"""Headers in odd spellings of JSON: nothing is accepted that the safetensors library refuses, or reads otherwise."""

from __future__ import annotations

import io
import random
import re

import pytest
from safetensors import SafetensorError, deserialize

from int8convert.checkpoint.safetensors_file import find_safetensors_tensors
from int8convert.errors import CorruptFileError

HEADER = (
    '{"__metadata__":{"format":"pt"},"a":{"dtype":"F16","shape":[4,8],"data_offsets":[0,64]},'
    '"b.weight":{"dtype":"I8","shape":[],"data_offsets":[64,65]},'
    '"c":{"dtype":"F32","shape":[0,7],"data_offsets":[65,65]},'
    '"d":{"dtype":"BOOL","shape":[10],"data_offsets":[65,75]}}'
)
N_DATA = 75

NUMBERS = (
    *(
        "-0",
        "0.0",
        "-0.0",
        "0e0",
        "64.0",
        "6.4e1",
        "64e0",
        "+64",
        "064",
        "64.",
        ".5",
        "0x40",
        "1e400",
        "-1",
        "1E1",
        "NaN",
    ),
    *(
        "Infinity",
        "-Infinity",
        "null",
        "true",
        "false",
        '"64"',
        "[64]",
        "{}",
        "18446744073709551616",
        "1_0",
        "64 ",
        " 64",
    ),
    *("18446744073709551615", "9223372036854775808", "٣", "--0", "-00", "0-0", "64,", ""),
)
STRINGS = (
    *(
        r'"\u0061"',
        r'"\ud800"',
        r'"\udc00\ud800"',
        r'"\ud83d\ude00"',
        r'"\x61"',
        r'"\/a"',
        '"a\tb"',
        '"a\x00"',
        "'a'",
        "a",
    ),
    *(r'"\u0000"', r'"\b"', '"é"', '"\u2028"', '"\ufeff"', '""', r'"\uD83D"', r'"\u00e9"', '"F16"', r'"\u0046\u00316"'),
    *('"f16"', '"F64"', '"shape"', '"dtype"', '"a"', '"__metadata__"', '"__metadat\\u0061__"', "null", "3"),
)
INSERTED = (
    ",",
    " ",
    "\n",
    "\t",
    "\r",
    "\x0b",
    "\xa0",
    "\ufeff",
    "//x\n",
    "/**/",
    "{",
    "}",
    "[",
    "]",
    ":",
    '"',
    "\0",
    "#",
    "\\",
)
ENTRIES = (
    *(
        '"a":{"dtype":"I8","shape":[],"data_offsets":[64,65]},',
        '"x":[],',
        '"x":null,',
        '"__metadata__":null,',
        '"x":{},',
    ),
    *(
        '"__metadata__":{"a":1},',
        '"__metadata__":{"a":"b","a":"b"},',
        '"__metadata__":[],',
        '"":{},',
        '"__metadata__":{},',
    ),
)


def mutant(draw: random.Random) -> bytes:
    """The header with one or two changes, each in the spelling of a value or of what is between them."""
    text = HEADER
    for _ in range(draw.choice((1, 1, 2))):
        kind = draw.randrange(6)
        if kind == 0:
            text = replace(draw, text, r"\d+", NUMBERS)
        elif kind == 1:
            text = replace(draw, text, r'"[^"]*"', STRINGS)
        elif kind == 2:
            at = draw.randrange(len(text) + 1)
            text = text[:at] + draw.choice(INSERTED) + text[at:]
        elif kind == 3:
            text = replace(draw, text, r"(?<=\{)", ENTRIES)
        elif kind == 4:
            text = replace(
                draw, text, r'"(?:dtype|shape|data_offsets)":', ('"shape":[4],"shape":', '"more":1,"dtype":')
            )
        else:
            begin, end = sorted(draw.randrange(len(text) + 1) for _ in range(2))
            text = text[:begin] + text[min(end, begin + 3) :]
    return text.encode("utf-8", "surrogatepass")


def replace(draw: random.Random, text: str, pattern: str, choices: tuple[str, ...]) -> str:
    places = list(re.finditer(pattern, text))
    if not places:
        return text
    place = draw.choice(places)
    return text[: place.start()] + draw.choice(choices) + text[place.end() :]


def ours(header: bytes) -> dict[str, tuple[str, tuple[int, ...], int]] | None:
    content = len(header).to_bytes(8, "little") + header + bytes(N_DATA)
    try:
        tensors = find_safetensors_tensors(io.BytesIO(content), len(content), "x")
    except CorruptFileError:
        return None
    return {t.name: (t.dtype, t.shape, t.n_bytes) for t in tensors}


def theirs(header: bytes) -> dict[str, tuple[str, tuple[int, ...], int]] | None:
    try:
        found = deserialize(len(header).to_bytes(8, "little") + header + bytes(N_DATA))
    except SafetensorError:
        return None
    return {name: (entry["dtype"], tuple(entry["shape"]), len(entry["data"])) for name, entry in found}


def test_header_is_read_alike() -> None:
    assert ours(HEADER.encode()) == theirs(HEADER.encode()) != None  # noqa: E711


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("place", ["[0,64]", "[4,8]", "[0,7]"])
def test_no_number_is_read_that_is_none_to_safetensors(number: str, place: str) -> None:
    first, _ = place[1:-1].split(",")
    header = HEADER.replace(place, place.replace(f"[{first}", f"[{number}")).encode()
    if theirs(header) is None:
        assert ours(header) is None


@pytest.mark.parametrize("seed", range(8))
def test_mutants_are_refused_where_safetensors_refuses_them(seed: int) -> None:
    draw = random.Random(seed)
    n_accepted = 0
    for _ in range(1500):
        header = mutant(draw)
        mine = ours(header)
        if mine is not None:
            n_accepted += 1
            assert mine == theirs(header), header
    assert n_accepted > 30, "mutants that nobody accepts show nothing"
