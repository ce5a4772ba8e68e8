"""Mutations of bytes and of JSON, seeded: the same `random.Random` gives the same mutants.

Bytes are flipped, inserted, deleted, repeated and spliced; JSON is changed in its structure, so that most mutants get
past the parser and reach the checks behind it. Needs the standard library alone: `scripts/fuzz_header.py` uses it too.
"""

from __future__ import annotations

import json
import random
from typing import Any

ODD_SIZES: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 255, 256, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**50),
    *(0.0, 1.5, 1e300, float("nan"), float("inf"), True, False, None),
)
ODD_TEXT = (
    *("", ".", "..", "../x", "/etc/passwd", "a/b", "a\x00b", "a\nb", "\x1b[2J", "\ud800", "\u202e", "x" * 5000),
    *("__metadata__", "dtype", "shape", "data_offsets", "weight_map", "F16", "F4", "I64", "BOOL", "__proto__"),
)


def mutate_bytes(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """The data with one to four changes; `other` is what is spliced in."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(changed) + 1)
        end = min(len(changed), at + rng.choice((1, 2, 4, 8, 32, 500)))
        match rng.randrange(7):
            case 0 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(changed):
                changed[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 2:
                changed[at:at] = rng.randbytes(rng.choice((1, 2, 4, 8, 64)))
            case 3:
                del changed[at:end]
            case 4:
                changed[at:at] = changed[at:end] * rng.choice((1, 2, 20))
            case 5 if other:
                start = rng.randrange(len(other))
                changed[at:end] = other[start : start + rng.choice((1, 4, 16, 256))]
            case _:
                del changed[rng.randrange(len(changed) + 1) :]
    return bytes(changed)


def mutate_json(value: Any, rng: random.Random) -> Any:
    """A JSON value with one change somewhere inside; shares what it did not change with the original."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        return _mutate_entry(value, rng)
    if isinstance(value, list) and value and rng.random() < 0.9:
        changed = list(value)
        at = rng.randrange(len(changed))
        match rng.randrange(6):
            case 0:
                del changed[at]
            case 1:
                changed.insert(at, rng.choice(ODD_SIZES))
            case 2:
                changed.insert(at, changed[rng.randrange(len(changed))])
            case 3:
                changed.extend([rng.choice(ODD_SIZES)] * rng.choice((1, 3, 100)))
            case _:
                changed[at] = mutate_json(changed[at], rng)
        return changed
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice((-8, -4, -2, -1, 1, 2, 4, 8))
    if isinstance(value, str) and value and rng.random() < 0.3:
        return value[: rng.randrange(len(value))] + rng.choice(ODD_TEXT)
    return odd_value(rng)


def _mutate_entry(value: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    changed = dict(value)
    key = rng.choice(list(changed))
    match rng.randrange(10):
        case 0:
            del changed[key]
        case 1:
            changed[rng.choice(ODD_TEXT)] = changed.pop(key)
        case 2:
            changed[rng.choice(ODD_TEXT)] = odd_value(rng)
        case 3:
            changed[key] = changed[rng.choice(list(changed))]
        case _:
            changed[key] = mutate_json(changed[key], rng)
    return changed


def odd_value(rng: random.Random) -> Any:
    """Some JSON value that is seldom what is expected."""
    return rng.choice(
        (
            rng.choice(ODD_SIZES),
            rng.choice(ODD_TEXT),
            [],
            {},
            [rng.choice(ODD_SIZES), rng.choice(ODD_SIZES)],
            {rng.choice(ODD_TEXT): rng.choice(ODD_SIZES)},
            _nest(rng.choice((2, 70, 900))),
        )
    )


def _nest(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def mutate_json_text(text: bytes, rng: random.Random) -> bytes:
    """JSON text with one to three changes of its structure; of text that is no JSON, changes of its bytes."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return mutate_bytes(text, rng)
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = mutate_json(value, rng)
    encoded = json.dumps(value).encode()
    if rng.random() < 0.05:  # a key twice, which no dictionary can express
        encoded = encoded.replace(b"}", b', "shape": [1], "shape": [2]}', 1)
    return encoded
