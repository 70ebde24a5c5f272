"""A reverse HTTP proxy on loopback that makes a share of all requests fail, in each way that a network knows."""

from __future__ import annotations

import http.client
import random
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

# Refused, or hung up on, before the server behind heard of the request; the other two lose the answer to one it did.
KINDS = ("slow_down", "internal_error", "hang", "cut_before_answer", "cut_in_answer")
HANG_S = 2.0
UPSTREAM_TIMEOUT_S = 60.0
# Of one connection, not of the message; a body is passed on whole, so its length is known.
HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "expect", "content-length"}
REFUSALS = {
    "slow_down": (503, "Slow Down", "SlowDown", "Please reduce your request rate."),
    "internal_error": (500, "Internal Server Error", "InternalError", "We encountered an internal error."),
}


@dataclass
class FlakyProxy:
    """Where the proxy listens, and what it did so far."""

    endpoint_url: str
    share: float
    random: random.Random
    num_requests: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next_failure(self) -> str | None:
        """How the next request fails; None if it does not. The kinds take turns."""
        with self.lock:
            self.num_requests += 1
            if self.random.random() >= self.share:
                return None
            kind = KINDS[self.failures.total() % len(KINDS)]
            self.failures[kind] += 1
            return kind


@contextmanager
def running_flaky_proxy(upstream_url: str, share: float, seed: int) -> Iterator[FlakyProxy]:
    """Pass requests on to `upstream_url`, a given share of them in vain; which ones, `seed` and their order decide.

    The `Host` header is passed on as it came, because signatures cover it.
    """
    upstream = urlsplit(upstream_url)
    assert upstream.hostname is not None
    server = _Server(("127.0.0.1", 0), _Handler)
    server.upstream = (upstream.hostname, upstream.port or 80)
    server.proxy = FlakyProxy(f"http://127.0.0.1:{server.server_address[1]}", share, random.Random(seed))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.proxy
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    """A thread for each connection; none is waited for at the end."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    upstream: tuple[str, int]
    proxy: FlakyProxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is none of our errors."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """One connection. The base class answers `Expect: 100-continue`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def _relay(self) -> None:
        body = self._body()
        failure = self.server.proxy.next_failure()
        if failure == "hang":
            time.sleep(HANG_S)
            self._cut()
        elif failure in REFUSALS:
            self.wfile.write(b"".join(self._refusal(*REFUSALS[failure])))
        else:
            head, answer = self._answer_of_upstream(body)
            if failure is None:
                self.wfile.write(head + answer)
                return
            if failure == "cut_in_answer":
                self.wfile.write(head + answer[: len(answer) // 2] if answer else head[: len(head) // 2])
            self._cut()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _relay  # noqa: N815

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            return b"".join(self._chunks())
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass

    def _answer_of_upstream(self, body: bytes) -> tuple[bytes, bytes]:
        """Head and body of what the server behind answers."""
        connection = http.client.HTTPConnection(*self.server.upstream, timeout=UPSTREAM_TIMEOUT_S)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in HOP_HEADERS:
                    connection.putheader(name, value)
            if body or self.command in {"PUT", "POST"}:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            return self._passed_on(response, response.read())
        finally:
            connection.close()

    def _passed_on(self, response: http.client.HTTPResponse, body: bytes) -> tuple[bytes, bytes]:
        headers = [(name, value) for name, value in response.getheaders() if name.lower() not in HOP_HEADERS]
        # The length in an answer to HEAD is that of a body which does not follow.
        length = response.getheader("Content-Length") if self.command == "HEAD" else str(len(body))
        if length is not None and response.status not in {204, 304}:
            headers.append(("Content-Length", length))
        return _head(response.status, response.reason, headers), body

    def _refusal(self, status: int, reason: str, code: str, message: str) -> tuple[bytes, bytes]:
        xml = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(xml)))]
        return _head(status, reason, headers), b"" if self.command == "HEAD" else xml.encode()

    def _cut(self) -> None:
        self.close_connection = True
        with suppress(OSError):  # the client may have hung up first
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def _head(status: int, reason: str, headers: list[tuple[str, str]]) -> bytes:
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in headers), "", ""]
    return "\r\n".join(lines).encode("latin-1")
