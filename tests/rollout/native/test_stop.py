"""Stop strings: the token that completes one ends the response, wherever tokens and characters begin."""

from __future__ import annotations

import random

import pytest
import torch

from nemo_vopd.rollout.native.stop import StopStrings
from tests.rollout.native.test_requests import answer, decoder  # noqa: F401


def end_of(tokens: list[int], stop: StopStrings) -> int | None:
    """Number of tokens up to the first that completes a stop string."""
    return next((k for k in range(1, len(tokens) + 1) if stop(tokens[:k])), None)


def read_bytes(tokens: list[int]) -> str:
    """Tokens 0 .. 255 are bytes; others are special and no text."""
    return bytes(t for t in tokens if t < 256).decode("utf-8", errors="replace")


def test_multi_token_and_split_characters():
    tokens = list("α said: fin\n\n".encode())
    assert end_of(tokens, StopStrings(("fin", "\n\n"), read_bytes)) == len(tokens) - 2
    assert end_of(tokens, StopStrings(("α",), read_bytes)) == 2, "not before its second byte"
    assert end_of(tokens, StopStrings(("β",), read_bytes)) is None, "β has the first byte of α"
    assert end_of(tokens, StopStrings(("\n\n",), read_bytes)) == len(tokens)


def test_special_tokens_in_between_are_no_text():
    tokens = [*b"the e", *[300] * 40, *b"nd of it"]
    assert end_of(tokens, StopStrings(("end",), read_bytes)) == 47


def test_a_stop_string_may_begin_and_end_inside_a_token():
    words = ["so </an", "swer> and", "swer", " ", ">"]

    def decode(tokens: list[int]) -> str:
        return "".join(words[t] for t in tokens).removeprefix(" ")  # as sentencepiece

    stop = StopStrings(("</answer>",), decode)
    assert end_of([3, 0, 1, 2], stop) == 3
    assert end_of([0, 2, 3, 4], stop) is None
    assert end_of([0, 2, 4, 0], stop) == 3
    assert end_of([2, 3, 2], StopStrings((" ",), decode)) == 2


@pytest.mark.parametrize("seed", range(3))
def test_the_tail_decides_as_the_whole_text_would(seed):
    """Random responses over a small alphabet, with characters of one to four bytes and special tokens."""
    draw = random.Random(seed)
    pieces = [bytes([b]) for b in "ab🙂é".encode()] + [b"ab", b"ba", "é🙂".encode(), b"\xc3", b""]

    def decode(tokens: list[int]) -> str:
        return b"".join(pieces[t] for t in tokens).decode("utf-8", errors="replace")

    found = 0
    for _ in range(400):
        stop = tuple("".join(draw.choices("abé🙂", k=draw.randint(1, 3))) for _ in range(draw.randint(1, 2)))
        tokens = draw.choices(range(len(pieces)), k=24)
        whole = next((k for k in range(1, 25) if any(s in decode(tokens[:k]) for s in stop)), None)
        assert end_of(tokens, StopStrings(stop, decode)) == whole, (stop, tokens)
        found += whole is not None
    assert 100 < found < 400


def test_what_is_missing_is_said():
    with pytest.raises(ValueError, match="decodes"):
        StopStrings(("a",), None)
    with pytest.raises(ValueError, match="empty"):
        StopStrings(("a", ""), read_bytes)


def test_responses_end_with_the_token_that_completes_a_stop_string(decoder):  # noqa: F811
    decode, samples, processor = decoder
    whole = answer(*decoder, max_response_length=24)
    words = [processor.decode(t).split() for pairs in whole for t, _ in pairs]
    stop = (" ".join(next(w[1:3] for w in words if len(w) > 4)),)  # two tokens
    decode.decode = processor.decode
    cut = answer(*decoder, max_response_length=24, stop=stop)
    shorter = 0
    for long_pairs, pairs in zip(whole, cut, strict=True):
        for (long, _), (tokens, _) in zip(long_pairs, pairs, strict=True):
            hits = [k for k in range(1, len(long) + 1) if stop[0] in processor.decode(long[:k])]
            assert tokens.tolist() == long[: hits[0] if hits else None].tolist()
            shorter += bool(hits)
    assert shorter


def test_without_stop_strings_nothing_is_decoded(decoder):  # noqa: F811
    decode = decoder[0]

    def refuse(tokens: list[int]) -> str:
        raise AssertionError("decoded")

    plain = answer(*decoder)
    decode.decode = refuse
    again = answer(*decoder)
    assert all(torch.equal(a[0], b[0]) for p, q in zip(plain, again, strict=True) for a, b in zip(p, q, strict=True))
