"""The one HTTP client against servers that trickle, never end, lie about their content, or write to terminals."""

from __future__ import annotations

import time
import zlib

import pytest

from nemo_vopd.errors import RunError, printable
from nemo_vopd.http import JSONClient, RequestFailed
from nemo_vopd.tools.evaluation.chat_server import Endpoint
from nemo_vopd.tools.evaluation.evaluate_options import EndpointConfig
from tests.hostile import Hostile, content, repeated

OK = b"HTTP/1.1 200 OK\r\n"
SIZED = OK + b"Content-Length: 1000000\r\n\r\n"
ESCAPES = "\x1b]0;mine\x07\x1b[31m\x9b2J\u202egnp.exe\u2028\ud800"
"""Sets a terminal's title, changes its colour, clears it, turns text around, and cannot be encoded."""


def failure(reply, timeout: float = 10.0, **options) -> tuple[RequestFailed, float]:
    """How one request that gets `reply` fails, and after how many seconds."""
    with Hostile(reply).running() as server:
        begin = time.monotonic()
        with pytest.raises(RequestFailed) as error:
            JSONClient(server.url, timeout_seconds=timeout, retries=0).call("/x", **options)
        return error.value, time.monotonic() - begin


@pytest.mark.parametrize(
    "reply",
    [
        repeated(SIZED, b"1", 0.1),
        repeated(OK + b"\r\n", b"1", 0.1),  # without a length any part of it is a number in JSON
        repeated(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n1\r\n", 0.1),
        repeated(OK + b"X-Long: ", b"1", 0.1),
        repeated(b"", b"H", 0.1),
        repeated(SIZED, b"", 0.1),
    ],
    ids=["body", "body without length", "chunks", "header", "status line", "silence"],
)
def test_a_request_has_one_time_limit_from_the_first_to_the_last_byte(reply):
    error, seconds = failure(reply, timeout=0.6)
    assert error.may_pass and error.status is None
    assert error.message == "timed out" and seconds < 10


def test_a_server_that_reads_the_request_slowly_is_given_up():
    def read_slowly(handler):
        while handler.rfile.read(2**17):
            time.sleep(0.1)

    with Hostile(read_slowly, reads=False).running() as server:
        begin = time.monotonic()
        with pytest.raises(RequestFailed, match="timed out"):
            JSONClient(server.url, timeout_seconds=3, retries=0).call("/x", {"image": "x" * 2**25})
        assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    "head",
    [OK + b"\r\n", b"HTTP/1.1 500 Oops\r\n\r\n", b"HTTP/1.1 307 Go\r\nLocation: /\r\n\r\n"],
    ids=["200", "500", "307"],
)
def test_a_reply_without_end_is_cut_off(head):
    error, _ = failure(repeated(head, b" " * 2**16), largest_reply=2**20)
    assert error.message == "the reply has more than 1048576 bytes" and error.may_pass


def test_the_limit_of_a_reply_is_in_bytes_that_arrive_and_nothing_is_unpacked():
    error, _ = failure(content(zlib.compress(b"1" * 2**27), 200, "Content-Encoding: deflate"))
    assert error.message.startswith("no JSON: ")
    with Hostile(content(b'"' + b"x" * 2**20 + b'"')).running() as server:
        client = JSONClient(server.url, timeout_seconds=10, retries=0)
        assert client.call("/x", largest_reply=2**21) == "x" * 2**20
        with pytest.raises(RequestFailed, match="more than"):
            client.call("/x", largest_reply=2**20)


@pytest.mark.parametrize("body", [b"[" * 200_000, b"1" * 100_000, b"\xff\xfe", b'{"n": 1', b"<html>"])
def test_what_is_no_json_is_told_on_one_line(body):
    error, _ = failure(content(body))
    assert error.message.startswith("no JSON: ") and len(error.message) < 600
    assert error.may_pass == (body != b"<html>")


def test_an_empty_reply_is_none_and_a_redirection_is_told():
    with Hostile(content(b"")).running() as server:
        assert JSONClient(server.url, timeout_seconds=10, retries=0).call("/x") is None
    error, _ = failure(content(b"", 307, "Location: http://elsewhere/y"))
    assert error.message == "it has moved to http://elsewhere/y" and not error.may_pass


def test_texts_of_a_server_cannot_write_to_a_terminal():
    error, _ = failure(content(ESCAPES.encode(errors="surrogatepass"), 400))
    assert error.message.startswith("?]0;mine??[31m?2J?gnp.exe ") and error.message.isprintable()
    assert (
        printable("naïve 数字 \U0001f469\u200d\U0001f52c a  b\t\nc") == "naïve 数字 \U0001f469\u200d\U0001f52c a  b c"
    )
    assert printable(ESCAPES) == "?]0;mine??[31m?2J?gnp.exe ?"


@pytest.mark.parametrize(
    "reply,words",
    [
        (repeated(SIZED, b" ", 0.1), "does not answer .timed out"),
        (
            repeated(OK + b"\r\n", b" " * 2**16),
            "sent what is no chat completion .the reply has more than 16777216 bytes",
        ),
        (content(b"[" * 200_000), "sent what is no chat completion .no JSON"),
        (content(b""), "sent what is no chat completion"),
    ],
    ids=["slow", "endless", "nested", "empty"],
)
def test_a_hostile_server_under_evaluation_ends_it_with_one_line(reply, words):
    with Hostile(reply).running() as server:
        options = EndpointConfig(url=server.url, model="m", timeout_seconds=0.6 if "timed" in words else 20, retries=0)
        with pytest.raises(RunError, match=words):
            list(Endpoint(options, "server").ask_all([("how many ?", None)], 8))
