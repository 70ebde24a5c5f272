"""The storage verbs give right answers over a network that refuses, hangs and cuts connections."""

from __future__ import annotations

import hashlib
import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import urlsplit
from xml.etree import ElementTree

import fsspec.config
import pytest
import s3fs
import s3fs.core

from pairvpr.data import storage
from tests.support import flaky_proxy
from tests.support.flaky_proxy import KINDS, FlakyProxy, running_flaky_proxy
from tests.support.swift_server import SwiftServer, running_swift

NUM_CLIENTS = 8
ROUNDS_OF_A_CLIENT = 2
PART_BYTES = 5 * 2**20

Connect = Callable[[float, int], AbstractContextManager[FlakyProxy]]


@pytest.fixture(scope="module")
def swift(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SwiftServer]:
    """The server, with an empty bucket `flaky`."""
    with running_swift(tmp_path_factory.mktemp("swift") / "root") as server:
        store = s3fs.S3FileSystem(
            key=server.access_key,
            secret=server.secret_key,
            endpoint_url=server.endpoint_url,
            skip_instance_cache=True,
        )
        store.mkdir("flaky")
        yield server


@pytest.fixture
def connect(swift: SwiftServer, monkeypatch: pytest.MonkeyPatch) -> Connect:
    """Leads `s3://` through a flaky proxy. botocore, which would hide most failures, tries once."""
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(flaky_proxy, "HANG_S", 0.5)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")

    @contextmanager
    def connected(share: float, seed: int) -> Iterator[FlakyProxy]:
        with running_flaky_proxy(swift.endpoint_url, share, seed) as proxy:
            settings = {"key": swift.access_key, "secret": swift.secret_key, "endpoint_url": proxy.endpoint_url}
            monkeypatch.setitem(fsspec.config.conf, "s3", {**settings, "default_block_size": PART_BYTES})
            yield proxy

    return connected


def _use_every_verb(folder: str, tmp_path: Path) -> None:
    """One client's work in a folder of its own; every answer is checked."""
    data = hashlib.sha256(folder.encode()).digest() * 5000
    first, second, third = (storage.join(folder, name) for name in ("first", "second", "a/third"))
    assert not storage.exists(first)
    storage.write_bytes(first, b"old")
    storage.write_bytes(first, data)
    with storage.written_locally(second) as path:
        path.write_bytes(data[1:])
    assert storage.create_exclusively(third, data[2:])
    assert storage.create_exclusively(third, data[2:])
    assert not storage.create_exclusively(third, data[3:])
    assert storage.list_files(folder) == ["a/third", "first", "second"]
    for url, expected in ((first, data), (second, data[1:]), (third, data[2:])):
        assert storage.exists(url)
        assert storage.size_bytes(url) == len(expected)
        assert storage.read_bytes(url) == expected
        assert storage.read_head(url, 100) == expected[:100]
        assert storage.sha256(url) == hashlib.sha256(expected).hexdigest()
        with storage.open_input(url) as file:
            file.seek(-50, 2)
            assert file.read() == expected[-50:]
    storage.remove_file(first)
    storage.remove_file(first)
    assert not storage.exists(first)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(first)
    assert storage.list_files(folder) == ["a/third", "second"]
    storage.remove_tree(folder)
    assert storage.list_files(folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("share", [pytest.param(0.1, marks=pytest.mark.soak), 0.3])
def test_every_verb_is_right_whatever_fails(connect: Connect, tmp_path: Path, share: float) -> None:
    with connect(share, 7) as proxy, ThreadPoolExecutor(NUM_CLIENTS) as clients:
        folders = [f"s3://flaky/{share}/{number}" for number in range(NUM_CLIENTS * ROUNDS_OF_A_CLIENT)]
        for done in [clients.submit(_use_every_verb, folder, tmp_path) for folder in folders]:
            done.result()
    assert proxy.num_requests > 300
    assert all(proxy.failures[kind] > 3 for kind in KINDS)
    assert abs(proxy.failures.total() / proxy.num_requests - share) < 0.05


@pytest.mark.slow
def test_files_of_many_parts_are_right_whatever_fails(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3fs.core, "calculate_chunksize", lambda *_args, **_kwargs: PART_BYTES)
    data = bytes(range(256)) * (12 * 2**20 // 256) + b"the last part"

    def round_trip(url: str) -> None:
        with storage.written_locally(url) as path:
            path.write_bytes(data)
        assert storage.size_bytes(url) == len(data)
        assert storage.read_bytes(url) == data
        assert storage.sha256(url) == hashlib.sha256(data).hexdigest()

    with connect(0.1, 11) as proxy, ThreadPoolExecutor(2) as clients:
        for done in [clients.submit(round_trip, f"s3://flaky/large/{number}") for number in range(24)]:
            done.result()
    assert all(proxy.failures[kind] > 3 for kind in KINDS)


class _Echo(BaseHTTPRequestHandler):
    """Answers with the method, the `Host` and the body of a request."""

    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = f"{self.command} {self.headers['Host']} ".encode() + body
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def echo() -> Iterator[str]:
    """The URL of a server that tells what arrived."""
    with HTTPServer(("127.0.0.1", 0), _Echo) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def _connection(proxy: FlakyProxy) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(proxy.endpoint_url).netloc, timeout=10)


def test_a_body_in_chunks_arrives_whole_under_the_same_host(echo: str) -> None:
    with running_flaky_proxy(echo, 0.0, 0) as proxy:
        connection = _connection(proxy)
        for _ in range(2):  # the connection stays open
            headers = {"Host": "bucket.example", "Transfer-Encoding": "chunked"}
            connection.request("PUT", "/x", iter([b"first ", b"", b"second"]), headers, encode_chunked=True)
            assert connection.getresponse().read() == b"PUT bucket.example first second"
        connection.close()
    assert (proxy.num_requests, proxy.failures.total()) == (2, 0)


def test_a_client_that_waits_for_100_continue_gets_it(echo: str) -> None:
    head = b"PUT /x HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n"
    with running_flaky_proxy(echo, 0.0, 0) as proxy:
        address = urlsplit(proxy.endpoint_url)
        with socket.create_connection((address.hostname, address.port), timeout=10) as client:
            client.sendall(head)
            assert client.recv(1000).startswith(b"HTTP/1.1 100 ")
            client.sendall(b"body")
            answer = http.client.HTTPResponse(client)
            answer.begin()
            assert answer.read() == b"PUT h body"


def _outcome(proxy: FlakyProxy) -> str:
    """What a client sees of one request that fails."""
    connection = _connection(proxy)
    try:
        connection.request("PUT", "/x", b"12345678")
        response = connection.getresponse()
        return f"{response.status} {ElementTree.fromstring(response.read()).findtext('Code')}"
    except (http.client.HTTPException, ConnectionError) as error:
        return type(error).__name__
    finally:
        connection.close()


def test_the_ways_to_fail_take_turns(echo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flaky_proxy, "HANG_S", 0.1)
    with running_flaky_proxy(echo, 1.0, 0) as proxy:
        seen = [_outcome(proxy) for _ in range(2 * len(KINDS))]
    refusals = ["503 SlowDown", "500 InternalError"]
    cuts = ["RemoteDisconnected", "RemoteDisconnected", "IncompleteRead"]
    assert seen == 2 * (refusals + cuts)
    assert proxy.failures == dict.fromkeys(KINDS, 2)


def test_the_seed_decides_which_requests_fail(echo: str) -> None:
    def failures(seed: int) -> list[bool]:
        with running_flaky_proxy(echo, 0.5, seed) as proxy:
            return [proxy.next_failure() is not None for _ in range(30)]

    assert failures(1) == failures(1) != failures(2)
