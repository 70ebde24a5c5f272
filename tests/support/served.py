"""The service around Localizers, on a free port of this machine, in a thread of the test."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn

from pairvpr import Localizer
from pairvpr.config.serve_schema import ServeSettings
from pairvpr.serving.app import create_app
from pairvpr.serving.metrics import Metrics
from pairvpr.serving.service import Service


@dataclass(frozen=True)
class Served:
    """Where it is, and what it is."""

    url: str
    port: int
    service: Service
    server: uvicorn.Server


@contextmanager
def served(
    localizers: Mapping[str, Localizer], settings: ServeSettings | None = None, token: str | None = None
) -> Iterator[Served]:
    """It answers inside the block; at its end, what was accepted is answered first."""
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    service = Service(localizers, settings or ServeSettings(), Metrics())
    config = uvicorn.Config(create_app(service, token), log_config=None, access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield Served(f"http://127.0.0.1:{port}", port, service, server)
    finally:
        server.should_exit = True
        thread.join(60)
        listening.close()
