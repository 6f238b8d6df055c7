"""A web server on the loopback that serves files from memory, and fails as it is told to."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


@dataclass
class WebServer:
    """Files by path; `failures` by path take the place of an answer."""

    files: dict[str, bytes] = field(default_factory=dict)
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    """Headers of a file, beside its length."""
    failures: dict[str, Callable[[_Handler], None]] = field(default_factory=dict)
    whole_only: set[str] = field(default_factory=set)
    """Files of which requests for a part are answered with the whole, without a word of it."""
    port: int = 0
    seen: list[str] = field(default_factory=list)

    listed_only: dict[str, Callable[[_Handler], None]] = field(default_factory=dict)
    """What fails a request for the content of a file that was described before."""

    def fail_after_listing(self, path: str, failure: Callable[[_Handler], None]) -> None:
        """Describe a file as it is, and fail as soon as its content is asked for."""
        self.listed_only[path] = failure

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class _Handler(BaseHTTPRequestHandler):
    server_of: WebServer

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        served = self.server_of
        path = self.path.partition("?")[0]
        served.seen.append(f"{self.command} {path}")
        if "Range" in self.headers and path in served.listed_only:
            served.failures[path] = served.listed_only.pop(path)
        failure = served.failures.get(path)
        if failure is not None:
            failure(self)
            return
        content = served.files.get(path)
        if content is None:
            self.send_error(404)
            return
        headers = served.headers.get(path, {})
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and path not in served.whole_only and headers.get("Accept-Ranges") != "none":
            start, stop = int(wanted[1]), min(int(wanted[2] or len(content)) + 1, len(content))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
            content = content[start:stop]
        else:
            self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        if headers.get("Transfer") != "unknown length":
            self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            # A client that has seen enough goes away.
            with contextlib.suppress(ConnectionError):
                self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def status(code: int) -> Callable[[_Handler], None]:
    """Answers every request with a status."""
    return lambda handler: handler.send_error(code)


def cut(handler: _Handler) -> None:
    """Closes the connection in the middle of the body."""
    content = handler.server_of.files[handler.path]
    handler.send_response(206)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(content[: len(content) // 2])
        handler.wfile.flush()
        handler.connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def serving() -> Iterator[WebServer]:
    served = WebServer()
    handler = type("Handler", (_Handler,), {"server_of": served})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    served.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def web() -> Iterator[WebServer]:
    with serving() as server:
        yield server
