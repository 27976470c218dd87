"""A judge on this machine that answers, or fails, as a script says: an OpenAI-compatible endpoint
for the tests.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GRADED = ("text", "Good. \nGrade: [[7]]")


class Seen:
    """What came in: the requests' bodies and headers, in order."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.lock = threading.Lock()
        self.url = ""

    def questions(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.bodies]


@contextmanager
def judge(  # noqa: C901 - a way to fail is three lines
    script: Callable[[int, dict[str, Any]], tuple],
) -> Iterator[Seen]:
    """Serve until the block ends. script: number of the request (from 0) and its body to what
    happens:

    ("text", TEXT), ("status", CODE, HEADERS, TEXT), ("raw", BYTES), ("wire", BYTES, PAUSE),
    ("die",), ("cut",), ("drip", SECONDS), ("hang", SECONDS)
    """
    seen = Seen()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._note({"messages": [{"content": "GET"}]})
            self._send(200, b"{}")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            kind, *more = script(self._note(body), body)
            getattr(self, f"_{kind}")(*more)

        def _note(self, body: dict[str, Any]) -> int:
            with seen.lock:
                seen.bodies.append(body)
                seen.headers.append(dict(self.headers))
                seen.paths.append(self.path)
                return len(seen.bodies) - 1

        def _send(
            self,
            status: int,
            data: bytes,
            headers: dict[str, str] | None = None,
            length: int | None = None,
        ) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data) if length is None else length))
            self.end_headers()
            self.wfile.write(data)

        def _text(self, text: str) -> None:
            self._send(
                200,
                json.dumps(
                    {"choices": [{"message": {"role": "assistant", "content": text}}]}
                ).encode(),
            )

        def _status(self, code: int, headers: dict[str, str], text: str) -> None:
            self._send(code, text.encode(), headers)

        def _raw(self, data: bytes) -> None:
            self._send(200, data)

        def _die(self) -> None:
            self.close_connection = True

        def _cut(self) -> None:
            self._send(200, b'{"choices": [{"mess', length=1000)

        def _wire(self, data: bytes, pause: float = 0.0) -> None:
            """Bytes without any form, all at once or one after the other."""
            self.close_connection = True
            with suppress(OSError):
                for piece in [data] if not pause else [data[i : i + 1] for i in range(len(data))]:
                    self.wfile.write(piece)
                    self.wfile.flush()
                    time.sleep(pause)

        def _hang(self, seconds: float) -> None:
            time.sleep(seconds)

        def _drip(self, seconds: float) -> None:
            self._send(200, b"", length=1000)
            end = time.monotonic() + seconds
            try:
                while time.monotonic() < end:
                    self.wfile.write(b" ")
                    time.sleep(0.02)
            except OSError:
                return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    server.handle_error = lambda *_: None  # a client that went away is what the tests are about
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    )
    thread.start()
    seen.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
