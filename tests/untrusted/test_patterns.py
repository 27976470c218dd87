"""Expressions of others are matched as `re` matches them, and without its exponential time."""

import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.untrusted import json_text, patterns, sets
from weft.untrusted.printable import one_line, printable

REAL = [
    (
        r"(?:.*?(?:vision|image|language|text).*?(?:self_attn|attn|mlp).*?(?:k_proj|v_proj|q_proj|fc1).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj)))"
    ),
    r"(?!.*vision).*(q|v)_proj",
    r"(?:(?!vision).)*_proj",
    r".*(?<!gate)_proj",
    r"[^.]+(\.[^.]+){3}\.\w+",
    r"(model|\w+\.)*q_proj",
    r"model\.q_proj|lm_head",
]
NAMES = [
    "model.language_model.layers.12.self_attn.q_proj",
    "vision_tower.encoder.layers.3.mlp.fc1",
    "model.layers.1.mlp.gate_proj",
    "lm_head",
    "model.q_proj",
    "modelxq_proj",
]


@pytest.mark.parametrize("pattern", REAL)
def test_expressions_in_use(pattern):
    for name in NAMES:
        wanted = re.fullmatch(pattern, name) is not None
        assert patterns.fullmatch(pattern, name) == wanted
        assert sets.matches(patterns.parser.parse(pattern), name) == wanted


atoms = st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"\d", r"\w", r"\b", "^", "$", "(?<=a)"])
expressions = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"({two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "*?"])).map(
            lambda two: f"(?:{two[0]}){two[1]}"
        ),
        inner.map(lambda one: f"(?={one})"),
        inner.map(lambda one: f"(?!{one})"),
    ),
    max_leaves=6,
)


@given(expressions, st.text("ab1.\n", min_size=1, max_size=6))
def test_any_expression_is_matched_as_re_does(pattern, name):
    wanted = re.fullmatch(pattern, name) is not None
    assert sets.matches(patterns.parser.parse(pattern), name) == wanted
    assert patterns.fullmatch(pattern, name) == wanted


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b",
        "(a|a)*b",
        "(.*){30}b",
        "((a*)*)*b",
        "a?" * 40 + "a" * 40 + "b",
        r"(?:(?:a|b|ab)*)*c",
    ],
)
def test_expressions_that_backtrack(pattern):
    assert not patterns.fullmatch(pattern, "a" * 60)
    assert patterns.fullmatch(f"{pattern}|a+", "a" * 60)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (r"((a+)+)\1b", "groupref"),
        ("(?i)(a+)+b", "flags"),
        ("(" * 3000 + ")" * 3000, "recursion"),
        ("a{99999999999999}", "too large"),
        ("(x|.)*" * 10_000, "60,000 characters"),
        ("(", "missing"),
    ],
)
def test_what_cannot_be_matched_is_refused(pattern, said):
    with pytest.raises(ValueError, match=said):
        patterns.fullmatch(pattern, "a" * 60)


def test_many_plain_names_are_a_set():
    names = [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(60) for j in range(64)]
    pattern = "|".join(map(re.escape, names))
    assert patterns.fullmatch(pattern, names[-1]) and not patterns.fullmatch(
        pattern, names[-1][:-1]
    )
    assert len(pattern) > patterns.LONGEST


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "'c' is given twice"),
        ("[" * 70 + "]" * 70, "nested"),
        ("[" * 200_000, "nested"),
        ("9" * 400, "400 digits"),
        ("1e999", "too large"),
        ("NaN", "NaN"),
        ("[-Infinity]", "Infinity"),
        ('"\\ud800"', "surrogate"),
        (b"\xff", "utf-8"),
    ],
)
def test_json_that_would_be_taken_in_silence(text, said):
    with pytest.raises(ValueError, match=said):
        json_text.loads(text)


def test_json_as_usual():
    text = '{"a": [1, 2.5, null, true, "\\ud83d\\ude00 [[{"], "b": {}}'
    assert json_text.loads(text) == {"a": [1, 2.5, None, True, "\U0001f600 [[{"], "b": {}}
    assert json_text.loads("[" + "[]," * 5000 + "[]]") == [[]] * 5001


def test_text_for_a_terminal():
    assert printable("a\tb\n\x1b[2J\x9b\u202e\ud800é") == "a\tb\n\\x1b[2J\\x9b\\u202e\\ud800é"
    assert one_line("  a\r\n b\x1b\x07 ", 99) == "a b\\x1b\\x07"
    assert one_line("abc" * 99, 5) == "abcab"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="this Python has no atomic groups")
def test_atomic_groups_are_left_to_re_or_refused():
    assert not patterns.fullmatch("(?>a+)a", "aaa")
    with pytest.raises(ValueError, match="atomic"):
        patterns.fullmatch("((?>a+)b?)+c", "a" * 30)
