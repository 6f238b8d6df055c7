"""A real S3 server on the loopback, and a proxy before it that spoils what it is told to.

The server is moto's, a process of its own. It checks a condition and then puts, in two steps, so the proxy lets one
change through at a time: what is before it is a server whose conditional writes are atomic. `make test-s3` sets
SOFTSHARD_TEST_LOCALSTACK to the interpreter of an environment with LocalStack, which is atomic of itself: then that
server is started, and changes go through as they come.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

ACCESS_KEY = "AKIAVISIBLEACCESSKEY"
SECRET_KEY = "visibleSecretKey/0123456789abcdef"
_LOCALSTACK = os.environ.get("SOFTSHARD_TEST_LOCALSTACK")
_REFUSAL = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'


@dataclass
class Request:
    """What came, before it goes on."""

    method: str
    path: str
    headers: dict[str, str]
    damaged: bool = False
    """Pass on another body than came."""

    def is_for(self, *methods: str, having: str = "") -> bool:
        return self.method in methods and having in self.path


@dataclass
class Spoiler:
    """Does something to requests that match, `times` of them; an action that returns True has dealt with it."""

    matches: Callable[[Request], bool]
    action: Callable[[_Handler, Request], bool]
    times: int


@dataclass
class Proxy:
    """Forwards to a server; `spoilers` are asked in turn, `chaos` is asked for every request they leave alone."""

    server_port: int
    spoilers: list[Spoiler] = field(default_factory=list)
    chaos: Callable[[Request], Callable[[_Handler, Request], bool] | None] | None = None
    seen: list[Request] = field(default_factory=list)
    spoiled: int = 0
    port: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    """For `spoilers`, `seen` and `spoiled`."""
    changes: contextlib.AbstractContextManager = field(default_factory=threading.Lock)
    """One change of the server at a time, where the server needs that."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def spoil(self, action, *methods: str, having: str = "", times: int = 1) -> None:
        """Spoil the next requests with one of the methods and this in their path."""
        self.spoilers.append(Spoiler(lambda request: request.is_for(*methods, having=having), action, times))

    def count(self, *methods: str, having: str = "") -> int:
        return sum(request.is_for(*methods, having=having) for request in self.seen)

    def choose(self, request: Request):
        with self.lock:
            self.seen.append(request)
            for spoiler in self.spoilers:
                if spoiler.times and spoiler.matches(request):
                    spoiler.times -= 1
                    self.spoiled += 1
                    return spoiler.action
            action = self.chaos(request) if self.chaos else None
            self.spoiled += action is not None
            return action


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def handle_any(self) -> None:
        request = Request(self.command, self.path, {name.lower(): value for name, value in self.headers.items()})
        action = self.proxy.choose(request)
        if action is None or not action(self, request):
            self.answer(*self.forward(request))

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def forward(self, request: Request) -> tuple[int, list[tuple[str, str]], bytes]:
        body = self.body()
        if request.damaged:
            body = bytes([body[0] ^ 1]) + body[1:]
        changes = request.method in {"PUT", "POST", "DELETE"}
        with self.proxy.changes if changes else contextlib.nullcontext():
            connection = http.client.HTTPConnection("127.0.0.1", self.proxy.server_port, timeout=60)
            connection.request(request.method, request.path, body=body, headers=request.headers)
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
        return answer.status, answer.getheaders(), content

    def answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response_only(status)
        sized = any(name.lower() == "content-length" for name, _ in headers)
        for name, value in headers:
            if name.lower() not in {"connection", "transfer-encoding"}:
                self.send_header(name, value)
        if not sized:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def cut(self) -> bool:
        """Close the connection as a machine that vanishes does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
        return True

    def finish(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().finish()

    def log_message(self, *arguments) -> None:
        pass


def refuse(code: str, status: int):
    """Answer with an error of S3's; what it says quotes the request, as servers do."""

    def action(handler: _Handler, request: Request) -> bool:
        handler.body()
        message = f"{request.headers.get('authorization')} {SECRET_KEY}"
        content = _REFUSAL.format(code=code, message=message).encode()
        handler.answer(status, [("Content-Type", "application/xml")], b"" if request.method == "HEAD" else content)
        return True

    return action


slow_down = refuse("SlowDown", 503)


def cut_upload(handler: _Handler, request: Request) -> bool:
    """Take half of the body, and vanish."""
    handler.rfile.read(int(request.headers.get("content-length") or 0) // 2)
    return handler.cut()


def lose_reply(handler: _Handler, request: Request) -> bool:
    """Do what is asked, and vanish before saying so."""
    handler.forward(request)
    return handler.cut()


def cut_reply(handler: _Handler, request: Request) -> bool:
    """Answer with the first half of the content, and vanish."""
    status, headers, content = handler.forward(request)
    handler.answer(status, [*headers], content[: len(content) // 2])
    handler.wfile.flush()
    time.sleep(0.05)
    return handler.cut()


def damage_reply(handler: _Handler, request: Request) -> bool:
    """Answer with one bit of the content flipped."""
    status, headers, content = handler.forward(request)
    handler.answer(status, headers, bytes([content[0] ^ 1]) + content[1:])
    return True


def damage_upload(handler: _Handler, request: Request) -> bool:
    """Pass on another content than came."""
    request.damaged = True
    return False


def ignore_condition(handler: _Handler, request: Request) -> bool:
    """Pass the request on without its condition, as a server does that does not know it."""
    request.headers.pop("if-none-match", None)
    return False


def wait(seconds: float):
    """Be silent for a while, and then do what is asked."""

    def action(handler: _Handler, request: Request) -> bool:
        time.sleep(seconds)
        return False

    return action


def chaos(share: float, *, seed: int):
    """Spoil a share of all requests, with all there is."""
    draw = random.Random(seed)
    always = (slow_down, refuse("InternalError", 500), wait(0.1), lose_reply, cut_reply)
    uploads = (*always, cut_upload, refuse("ConditionalRequestConflict", 409), damage_upload)

    def choose(request: Request):
        if draw.random() >= share:
            return None
        return draw.choice(uploads if int(request.headers.get("content-length") or 0) > 1 else always)

    return choose


@contextlib.contextmanager
def running_server() -> Iterator[int]:
    """Port of a server process that has just started and holds nothing."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command, changes = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], {}
    with tempfile.TemporaryDirectory() as scratch:
        if _LOCALSTACK:
            command = [_LOCALSTACK, "-m", "localstack.runtime.main"]
            changes = {
                "GATEWAY_LISTEN": f"127.0.0.1:{port}",
                "SERVICES": "s3",
                "DISABLE_EVENTS": "1",
                "SKIP_SSL_CERT_DOWNLOAD": "1",
                "FILESYSTEM_ROOT": scratch,
                "TMPDIR": scratch,
            }
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, env={**os.environ, **changes}, **quiet)
        try:
            _wait_for(process, port)
            yield port
        finally:
            process.terminate()
            process.wait()


def _wait_for(process: subprocess.Popen, port: int) -> None:
    deadline = time.monotonic() + 90
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        assert process.poll() is None, "the server has ended"
        assert time.monotonic() < deadline, "the server has not started"
        time.sleep(0.05)


@contextlib.contextmanager
def running_proxy(server_port: int) -> Iterator[Proxy]:
    """A proxy before a server on the loopback."""
    proxy = Proxy(server_port=server_port)
    if _LOCALSTACK:
        proxy.changes = contextlib.nullcontext()
    methods = {f"do_{method}": _Handler.handle_any for method in ("GET", "HEAD", "PUT", "POST", "DELETE")}
    handler = type("Handler", (_Handler,), {"proxy": proxy, **methods})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # connections end here in every way there is
    proxy.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def moto() -> Iterator[int]:
    """Port of a server that has just started and holds nothing."""
    with running_server() as port:
        yield port


@pytest.fixture(scope="module")
def spoiled_server(moto) -> Iterator[Proxy]:
    """A proxy before the server; there is one bucket, `box`."""
    with pytest.MonkeyPatch.context() as patch, running_proxy(moto) as running:
        use_server(patch, running.url)
        make_bucket("box")
        yield running


@pytest.fixture
def proxy(spoiled_server, monkeypatch, tmp_path) -> Proxy:
    """The proxy with nothing to spoil yet, and the environment of a process that is to use it."""
    use_server(monkeypatch, spoiled_server.url)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    spoiled_server.spoilers, spoiled_server.seen, spoiled_server.spoiled = [], [], 0
    return spoiled_server


def use_server(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """The environment of a process that is to use a server."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_CA_BUNDLE", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")


def make_bucket(name: str) -> None:
    """Make a bucket, or see that it is there, by botocore alone."""
    import botocore.session

    client = botocore.session.get_session().create_client("s3")
    with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
        client.create_bucket(Bucket=name)
