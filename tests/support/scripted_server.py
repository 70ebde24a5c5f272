"""A server on a socket that answers as a test says: whole, late, in pieces, or not at all."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

Reply = Callable[[socket.socket], None]
"""Answers one request on its connection; an `OSError` closes that."""


@dataclass
class Scripted:
    """Its address, and what it was asked: request lines with headers, and bodies."""

    url: str
    heads: list[str] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    num_connections: int = 0


def reply(status: int, content: Any, **headers: str) -> Reply:
    """A whole answer; `content` is JSON, or bytes. Underscores in names of headers are dashes."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    sent = "\r\n".join(lines).encode() + b"\r\n\r\n" + body
    return lambda connection: connection.sendall(sent)


def error(status: int, code: str, message: str = "no", **headers: str) -> Reply:
    """An error as the service writes it."""
    return reply(status, {"error": {"code": code, "message": message, "request_id": f"id-{code}"}}, **headers)


def hang_up(connection: socket.socket) -> None:
    """Close without a further word, whatever is still to be read."""
    raise ConnectionAbortedError


@contextmanager
def scripted(script: Sequence[Reply], *, reads_body: bool = True) -> Iterator[Scripted]:
    """Answers the first request by the script's first reply, and so on; the last one answers all that follow."""
    listener = socket.create_server(("127.0.0.1", 0))
    its = Scripted(f"http://127.0.0.1:{listener.getsockname()[1]}")
    replies, lock, connections = list(script), threading.Lock(), []

    def serve(connection: socket.socket) -> None:
        with suppress(OSError), connection, connection.makefile("rb") as stream:
            while head := _head(stream):
                lengths = re.findall(r"(?im)^content-length: *(\d+)", head)
                body = stream.read(int(lengths[0])) if lengths and reads_body else b""
                with lock:
                    its.heads.append(head)
                    its.bodies.append(body)
                    answer = replies.pop(0) if len(replies) > 1 else replies[0]
                answer(connection)

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                its.num_connections += 1
                connections.append(connection)
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

    accepting = threading.Thread(target=accept, daemon=True)
    accepting.start()
    try:
        yield its
    finally:
        for each in (listener, *connections):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        accepting.join(5)


@contextmanager
def deaf() -> Iterator[str]:
    """The URL of a port of this machine at which connecting neither succeeds nor fails: its queue is full."""
    with ExitStack() as opened:
        listener = opened.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            waiting = opened.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        time.sleep(0.05)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def _head(stream: Any) -> str:
    lines = []
    while (line := stream.readline()) not in (b"\r\n", b""):
        lines.append(line.decode("latin-1").rstrip())
    return "\r\n".join(lines)
