"""A small HTTP server whose replies a test writes byte by byte."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Reply = Callable[[BaseHTTPRequestHandler], None]


def content(body: bytes, code: int = 200, *headers: str) -> Reply:
    """A whole reply."""

    def reply(handler: BaseHTTPRequestHandler) -> None:
        head = [f"HTTP/1.1 {code} Reason", f"Content-Length: {len(body)}", *headers]
        handler.wfile.write("\r\n".join(head).encode() + b"\r\n\r\n" + body)

    return reply


def repeated(head: bytes, piece: bytes, pause: float = 0.0) -> Reply:
    """`head`, then `piece` again and again, for 20 seconds at most."""

    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(head)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            handler.wfile.write(piece)
            time.sleep(pause)

    return reply


class Hostile(ThreadingHTTPServer):
    """Answers each request by `reply`, or by that of its path in `replies`; `asked` holds (path, key or None)."""

    daemon_threads = True

    def __init__(self, reply: Reply, port: int = 0, reads: bool = True) -> None:
        """Listen on this machine, at a free port unless one is named; `reads` says whether bodies are read first."""
        super().__init__(("127.0.0.1", port), _Handler)
        self.reply, self.replies, self.reads = reply, dict[str, Reply](), reads
        self.asked: list[tuple[str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    @contextlib.contextmanager
    def running(self) -> Iterator[Hostile]:
        """Serve in the background."""
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        yield self
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        """Clients hang up here: nothing to tell."""


class _Handler(BaseHTTPRequestHandler):
    server: Hostile  # type: ignore[assignment]

    def do_GET(self) -> None:
        if self.server.reads:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        self.server.replies.get(self.path.partition("?")[0], self.server.reply)(self)

    do_POST = do_GET

    def log_message(self, *_) -> None:
        pass
