"""Answers read out of replies: a table of written cases, what must not change the reading, and hostile input."""

from __future__ import annotations

import random
import re
import time

import pytest

from nemo_vopd.tools.evaluation.chosen_option import extract_option
from nemo_vopd.tools.evaluation.extraction import extract_yes_no, final_answer, same_text
from tests.tools.evaluation.replies import (
    COLOURS,
    FINAL_CASES,
    LETTERS,
    OPTION_CASES,
    SAME_CASES,
    WEAK_OPTION_CASES,
    YES_NO_CASES,
)

FUNCTIONS = {
    "option": lambda reply: extract_option(reply, COLOURS),
    "yes_no": extract_yes_no,
    "same_text": lambda reply: same_text(reply, "red"),
    "final_answer": final_answer,
}
BARE = [
    "B",
    "b",
    "(C)",
    "D.",
    "The answer is (B).",
    "The answer is A.",
    "Answer: C",
    "\\boxed{D}",
    "<answer>A</answer>",
]


def cases(table):
    """The rows of every style, with ids such as `pope_word-03-yes`."""
    return [
        pytest.param(*row, id=f"{style}-{i:02}-{re.sub(r'[^A-Za-z0-9]+', '_', row[0])[:30]}")
        for style, rows in table.items()
        for i, row in enumerate(rows)
    ]


@pytest.mark.parametrize("reply,options,expected", cases(OPTION_CASES))
def test_option(reply, options, expected):
    assert extract_option(reply, options) == expected


@pytest.mark.parametrize("reply,options,expected", cases({"weak": WEAK_OPTION_CASES}))
def test_a_reply_too_hard_to_read_is_left_undecided(reply, options, expected):
    assert extract_option(reply, options) in (None, expected)


@pytest.mark.parametrize("reply,expected", cases(YES_NO_CASES))
def test_yes_no(reply, expected):
    assert extract_yes_no(reply) == expected


@pytest.mark.parametrize("reply,answer,expected", cases(SAME_CASES))
def test_same_text(reply, answer, expected):
    assert same_text(reply, answer) is expected


@pytest.mark.parametrize("reply,expected", cases(FINAL_CASES))
def test_final_answer(reply, expected):
    assert final_answer(reply) == expected


def test_the_table_is_large_and_has_no_case_twice():
    tables = {"option": OPTION_CASES, "yes_no": YES_NO_CASES, "same_text": SAME_CASES, "final_answer": FINAL_CASES}
    rows = {name: [str(row[:-1]) for group in table.values() for row in group] for name, table in tables.items()}
    assert all(len(set(keys)) == len(keys) for keys in rows.values())
    sizes = {name: len(keys) for name, keys in rows.items()}
    assert sizes["option"] >= 120 and sizes["yes_no"] >= 40 and sizes["same_text"] >= 50 and sizes["final_answer"] >= 15
    assert sum(sizes.values()) >= 220


@pytest.mark.parametrize("reply,options,expected", cases(OPTION_CASES))
def test_white_space_around_a_reply_does_not_change_the_option(reply, options, expected):
    assert extract_option(f"\n\t {reply} \r\n\n", options) == expected


@pytest.mark.parametrize("mark", ["*", "**", "***", "__", "`"])
@pytest.mark.parametrize("reply", BARE)
def test_emphasis_does_not_change_the_option(reply, mark):
    assert extract_option(f"{mark}{reply}{mark}", COLOURS) == extract_option(reply, COLOURS) is not None


@pytest.mark.parametrize("frame", ["{}", "({})", "{}.", "The answer is ({}).", "Answer: {}", "\\boxed{{{}}}", "选{}"])
@pytest.mark.parametrize("options", [COLOURS, LETTERS])
def test_relabelled_options_give_the_relabelled_letter(frame, options):
    for shift in range(26):
        name = {letter: chr((ord(letter) - ord("A") + shift) % 26 + ord("A")) for letter in options}
        relabelled = {name[letter]: text for letter, text in options.items()}
        for letter in options:
            assert extract_option(frame.format(name[letter]), relabelled) == name[letter]


def test_the_letter_comes_back_as_the_options_write_it():
    assert extract_option("(B)", {"a": "red", "b": "blue"}) == "b"


def test_letters_that_only_look_alike_do_not_raise():
    assert extract_option("sk\u0131ing and \u0130ce \u017fki", {"A": "skiing", "B": "ice  ski"}) in (None, "A", "B")


def test_no_options_no_letter():
    assert extract_option("A", {}) is None


SIZE = 100_000
SNIPPETS = [
    "(",
    ")",
    "A",
    "A ",
    "a b ",
    "<answer>",
    "</answer>",
    "<think>",
    "</think>",
    "\\boxed{",
    "}",
    "\\text{",
    "*",
]
SNIPPETS += [
    "_",
    "**A",
    "`",
    "\n",
    " ",
    "\t\n",
    "not ",
    "no, ",
    "wait, ",
    "so ",
    "The answer is ",
    "the ",
    "final ",
    "0",
]
SNIPPETS += ["1,000", "1.0", "'", '"', "$", "&", "&#9", "<|", "red ", "red or ", "A or B ", "A. red ", "yes no ", "是"]
SNIPPETS += [
    "不",
    "there is no ",
    "it is ",
    "\u0315\u0300",
    "\ufdfa",
    "\ud800",
    "twenty-",
    "answer to ",
    "?",
    "- ",
    "\x00",
]


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("snippet", SNIPPETS, ids=ascii)
def test_hostile_repetition_is_read_quickly(function, snippet):
    for reply in (snippet * (SIZE // len(snippet)), snippet * (SIZE // len(snippet)) + "x", "B" + snippet * 5_000):
        start = time.process_time()
        function(reply)
        assert time.process_time() - start < 1


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_random_text_is_read_quickly(function):
    rng = random.Random(0)
    for alphabet in (range(32, 127), range(0x3000), range(0x110000), None):
        if alphabet is None:
            reply = "".join(rng.choices(SNIPPETS, k=SIZE // 5))
        else:
            reply = "".join(map(chr, rng.choices(alphabet, k=SIZE)))
        start = time.process_time()
        function(reply)
        assert time.process_time() - start < 1
    for _ in range(300):
        function("".join(rng.choices([*SNIPPETS, "B", "blue", " "], k=rng.randrange(12))))
