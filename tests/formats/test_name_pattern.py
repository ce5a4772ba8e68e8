"""Patterns of strangers match what `re` says, and never take for ever."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from int8convert.formats.name_pattern import PatternRefusedError, TailPatterns, matches_start

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.10.mlp.down_proj",
    "transformer.h.3.attn.c_attn",
    "model.embed_tokens",
    "lm_head",
    "q_proj",
    "xq_proj",
    "",
]
PATTERNS = [
    "q_proj",
    "self_attn.q_proj",
    "^q_proj",
    r"^model\.layers\.\d+\.mlp\.down_proj",
    r"model.layers.(0|1|2)\..*",
    r".*\.c_attn",
    r"layers\.[0-9]{2}\.(?:self_attn|mlp)\..*_proj",
    r"layers\.\d{1,2}.*?proj$",
    r"[^.]+_proj",
    r"(q|down)_?proj",
    r"(a|)*q_proj",
    "",
    "x?q_proj",
    "(o|m)*proj",
    r"\w+\.\w+",
    r"la{0}yers.0.*",
    r"[\w.]*head",
]


def peft_says(pattern: str, name: str) -> bool:
    """The rule of `peft.utils.other.get_pattern_key`."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


@pytest.mark.parametrize("pattern", PATTERNS)
def test_answers_are_those_of_peft(pattern: str) -> None:
    patterns = TailPatterns([pattern])
    assert [patterns.first_match(name) == pattern for name in NAMES] == [peft_says(pattern, name) for name in NAMES]


_atoms = st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", "^", "$"])
_patterns = st.recursive(
    _atoms,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{1,}", "*?"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=5,
)


@given(_patterns, st.text("ab.", max_size=7))
def test_any_pattern_is_answered_as_re_does(pattern: str, name: str) -> None:
    assert (TailPatterns([pattern]).first_match(name) is not None) == peft_says(pattern, name)


def test_first_pattern_counts() -> None:
    assert TailPatterns(["v_proj", ".*_proj", "q_proj"]).first_match("a.q_proj") == ".*_proj"


@pytest.mark.parametrize("pattern", ["(a|a)*b", "(a*)*b", "(a|a)(a|a)" * 12 + "b", "(((a+)+)+)+b"])
def test_patterns_that_stop_re_are_answered(pattern: str) -> None:
    assert TailPatterns([pattern]).first_match("a" * 500) is None


def test_patterns_of_strangers_are_matched_in_linear_time() -> None:
    patterns = TailPatterns(["(" + "a*" * 200 + ")*b", "(.|a)*(..|a){100}x"])
    began = time.perf_counter()
    for i in range(200):
        assert patterns.first_match("a." * 240 + str(i)) is None
    assert time.perf_counter() - began < 20


@pytest.mark.parametrize("pattern", ["((a{100}){100}){100}", "(((((((a{9}){9}){9}){9}){9}){9}){9}){9}"])
def test_patterns_that_take_memory_are_refused(pattern: str) -> None:
    with pytest.raises(PatternRefusedError):
        TailPatterns([pattern])


@pytest.mark.parametrize("pattern", [*PATTERNS, "(?i)Model", r"model\.layers\.1", ".*proj", r".*\bmlp\b"])
def test_answers_are_those_of_compressed_tensors(pattern: str) -> None:
    assert [matches_start(pattern, name) for name in NAMES] == [re.match(pattern, name) is not None for name in NAMES]


NOT_READ = [
    "(?!vision).*",
    "(?i)Q",
    r"(a)\1",
    "(",
    "a)",
    "[",
    "*",
    "a**",
    "a++",
    "a{,3}",
    r"\Z",
    "\\",
    "[z-a]",
    "a{99999999999}",
    "\ud800",
]


@pytest.mark.parametrize("pattern", [*NOT_READ, "[a--b]", "[[:alpha:]]", "a" * 501])
def test_what_is_left_out_is_refused(pattern: str) -> None:
    with pytest.raises(PatternRefusedError):
        TailPatterns([pattern])


def test_patterns_without_end_are_refused() -> None:
    with pytest.raises(PatternRefusedError, match="4,001 patterns, expected at most 4,000"):
        TailPatterns(["a"] * 4001)
