"""Replicas, proxy and nodes of a service are killed under load: no wrong answer, clean refusals, full rate again.

Ten times each in the soak. The clients repeat what `pairvpr.client` repeats.
"""

from __future__ import annotations

import csv
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import Any

import psutil
import pytest
import requests
import s3fs
from ray.cluster_utils import Cluster

from pairvpr import DescribeConfig, Localizer, RerankConfig, SearchConfig
from pairvpr.config.compose import load
from pairvpr.config.schema import QueryConfig
from tests.ray.test_nodes import _three_nodes
from tests.support.flaky_proxy import running_flaky_proxy
from tests.support.runs import SMALL_NETWORK, run_job, start_job, wait_until
from tests.support.swift_server import running_swift

pytestmark = pytest.mark.timeout(1800)

NUM_CLIENTS, NUM_KILLS = 8, 10
BACK_WITHIN_S, WINDOW_S, SETTLED = 30.0, 3.0, 0.7
PORT = 8521
CLEAN = (503, 504)
LINE = (
    *SMALL_NETWORK,
    *("describe.num_threads_per_actor=1", "index.num_threads_per_actor=1", "rerank.num_threads_per_actor=1"),
    *("rerank.num_candidates=10", "serve.max_waiting=64", f"serve.port={PORT}"),
)
SPLIT = ("serve.split=true", "serve.num_replicas=2", "serve.num_shard_parts=2", "serve.num_shard_replicas=2")
HAPROXY = ("serve.haproxy=true", "serve.num_replicas=2", "serve.num_at_once=1", "cluster.num_cpus=2")
BODY_TIMEOUT_S = 2.0
OF_HAPROXY = {
    "RAY_SERVE_HAPROXY_STATS_PORT": str(PORT + 1),
    "RAY_SERVE_HAPROXY_METRICS_PORT": str(PORT + 2),
}
PIECE = "ray::ServeReplica:pairvpr:whole"
VICTIMS = ("ray::ServeReplica:pairvpr:network", "ray::ServeReplica:pairvpr:shards-0", "ray::ProxyActor")


@dataclass
class Load:
    """Clients that ask again and again; what they got."""

    url: str
    photos: list[bytes]
    expected: list[Any]
    times_s: list[float] = field(default_factory=list)
    """When an answer came."""
    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def client(self, number: int) -> None:
        """Asks until it is stopped; a refusal or a lost connection is repeated, as the Python client does."""
        session = requests.Session()
        while not self.stop.is_set():
            which = number % len(self.photos)
            number += 1
            try:
                answer = session.post(f"{self.url}/v1/locate?k=10", data=self.photos[which], timeout=60)
            except requests.RequestException as error:
                self.statuses[type(error).__name__] += 1
                time.sleep(0.2)
                continue
            self.statuses[str(answer.status_code)] += 1
            if answer.status_code == 200:
                self.times_s.append(time.monotonic())
                if pairs(answer.json()) != self.expected[which]:
                    self.wrong.append(answer.text)
            elif answer.status_code in CLEAN and "error" in answer.text:
                time.sleep(0.2)
            else:
                self.wrong.append(f"{answer.status_code} {answer.text}")
                time.sleep(0.2)

    def rate(self, since_s: float, until_s: float) -> float:
        """Answers per second."""
        return sum(since_s <= at_s < until_s for at_s in list(self.times_s)) / (until_s - since_s)


def pairs(found: dict[str, Any]) -> list[tuple[int, float]]:
    return [(each["photo_id"], each["pair_score"]) for each in found["candidates"]]


@pytest.fixture(scope="module")
def index(city: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("served") / "index"
    line = [f"database={city}/database", f"output={directory}", "positions=names", "index.num_shards=3", *SMALL_NETWORK]
    done = run_job("build_index", [*line, "index.kind=flat", "cluster.num_cpus=2"])
    assert done.returncode == 0, done.stderr
    return str(directory)


@pytest.fixture(scope="module")
def photos(city: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((city / "queries").iterdir()) if "broken" not in path.name]


@pytest.fixture(scope="module")
def expected(index: str, photos: list[bytes]) -> list[Any]:
    """The answers of one process without Ray."""
    network = load(QueryConfig, ["index.path=x", "queries=x", "output=x", *SMALL_NETWORK]).model
    localizer = Localizer.open(
        index,
        model=network,
        device="cpu",
        describe=DescribeConfig(num_threads_per_actor=1),
        search=SearchConfig(num_threads_per_actor=1),
        rerank=RerankConfig(num_candidates=10, num_threads_per_actor=1),
    )
    return [
        [(match.database_id, match.pair_score) for match in localizer.answer(photo, k=10).matches] for photo in photos
    ]


@contextmanager
def service(line: list[str], **environment: str) -> Iterator[Popen[str]]:
    process = start_job("serve", line, **environment)
    try:
        wait_until(is_ready, "a ready service", job=process)
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=120)


def is_ready() -> bool:
    try:
        return requests.get(f"http://127.0.0.1:{PORT}/readyz", timeout=5).status_code == 200
    except requests.RequestException:
        return False


@contextmanager
def under_load(photos: list[bytes], expected: list[Any]) -> Iterator[Load]:
    """Clients run inside the block; at its end, no answer was wrong."""
    asked = Load(f"http://127.0.0.1:{PORT}", photos, expected)
    clients = [threading.Thread(target=asked.client, args=[number]) for number in range(NUM_CLIENTS)]
    for each in clients:
        each.start()
    try:
        wait_until(lambda: len(asked.times_s) > 100, "a hundred answers")
        yield asked
    finally:
        asked.stop.set()
        for each in clients:
            each.join(90)
    print(dict(asked.statuses))
    assert not asked.wrong, asked.wrong[:3]


def again_and_again(asked: Load, strike: Callable[[], object], number: int) -> list[float]:
    """The seconds from each strike to the first window at `SETTLED` of the rate before it; that is the noise here."""
    took_s = []
    for _ in range(number):
        now_s = time.monotonic()
        wait_until(lambda since_s=now_s: time.monotonic() > since_s + 5, "five calm seconds")
        before = asked.rate(now_s, now_s + 5)
        strike()
        struck_s = time.monotonic()

        def is_back(before: float = before, struck_s: float = struck_s) -> bool:
            now_s = time.monotonic()
            return now_s - WINDOW_S > struck_s and asked.rate(now_s - WINDOW_S, now_s) >= SETTLED * before

        wait_until(is_back, "the full rate", 120)
        took_s.append(time.monotonic() - struck_s)
    print("seconds to full rate:", [round(each, 1) for each in took_s])
    return took_s


@pytest.mark.soak
@pytest.mark.parametrize("victim", VICTIMS)
def test_processes_die(index: str, photos: list[bytes], expected: list[Any], victim: str) -> None:
    line = [f"index.path={index}", *LINE, *SPLIT, "cluster.num_cpus=8"]
    with service(line) as process, under_load(photos, expected) as asked:

        def strike() -> None:
            found = [each for each in psutil.Process(process.pid).children(recursive=True) if is_named(each, victim)]
            found[0].kill()

        took_s = again_and_again(asked, strike, NUM_KILLS)
    assert max(took_s) < BACK_WITHIN_S


def num_up() -> int:
    """Pieces to which HAProxy sends requests, by its statistics; the reserve is none."""
    text = requests.get(f"http://127.0.0.1:{PORT + 1}/stats;csv", timeout=5).text
    servers = [row for row in csv.DictReader(text.removeprefix("# ").splitlines()) if row["svname"] != "BACKEND"]
    return sum(row["status"].startswith("UP") and row["act"] == "1" for row in servers)


def trickled(start: bytes) -> bytes:
    """What a client gets that sends `start`, then a byte from time to time."""
    with socket.create_connection(("127.0.0.1", PORT), timeout=BODY_TIMEOUT_S / 10) as client:
        client.sendall(start)
        for _ in range(50):
            with suppress(TimeoutError):
                return client.recv(100)
            client.sendall(b"x")
    return b"nothing"


@pytest.mark.parametrize("num_kills", [1, pytest.param(NUM_KILLS, marks=pytest.mark.soak)])
def test_pieces_die_behind_haproxy(index: str, photos: list[bytes], expected: list[Any], num_kills: int) -> None:
    """It sends a request whose replica died to the other one, so that its client sees nothing of it."""

    def below(name: str) -> list[psutil.Process]:
        return [each for each in psutil.Process(process.pid).children(recursive=True) if is_named(each, name)]

    with service(
        [f"index.path={index}", *LINE, *HAPROXY, f"serve.body_timeout_s={BODY_TIMEOUT_S}"], **OF_HAPROXY
    ) as process:
        answer = requests.post(f"http://127.0.0.1:{PORT}/v1/locate", data=photos[0], timeout=60)
        assert answer.headers["X-Request-Id"] == answer.json()["request_id"]
        found = [each for each in psutil.Process(process.pid).children(recursive=True) if each.name() == "haproxy"]
        haproxy = max(found, key=psutil.Process.create_time)  # each reload starts a new one
        folder = Path(haproxy.cmdline()[haproxy.cmdline().index("-f") + 1]).parents[1]
        assert folder.stat().st_mode & 0o077 == 0, "its socket takes commands of everybody who can reach it"
        listening = {(each.laddr.ip, each.laddr.port) for each in haproxy.net_connections() if each.status == "LISTEN"}
        assert listening == {("127.0.0.1", PORT), ("0.0.0.0", PORT + 1), ("0.0.0.0", PORT + 2)}
        assert trickled(b"POST /v1/locate HTTP/1.1\r\nHost: ").startswith(b"HTTP/1.1 408"), "within a header"
        assert trickled(b"POST /v1/locate HTTP/1.1\r\nContent-Length: 999\r\n\r\n").startswith(b"HTTP/1.1 408")
        with under_load(photos, expected) as asked:
            for _ in range(num_kills):
                wait_until(lambda: num_up() == 2, "two pieces that get requests")
                below(PIECE)[0].kill()
                num_before = len(asked.times_s)
                wait_until(lambda before=num_before: len(asked.times_s) > before + 50, "fifty more answers")
    assert asked.statuses.keys() == {"200"}
    assert not folder.exists()


def is_named(process: psutil.Process, name: str) -> bool:
    try:
        return " ".join(process.cmdline()).startswith(name)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.soak
def test_nodes_die(index: str, photos: list[bytes], expected: list[Any]) -> None:
    with _three_nodes(4) as (cluster, workers):
        line = [f"index.path={index}", *LINE, *SPLIT, f"cluster.address={cluster.address}"]
        refused = run_job("serve", [*line, "serve.haproxy=true"])
        assert refused.returncode == 2
        assert "serve.host=127.0.0.1: HAProxy can't reach replicas on other nodes there" in refused.stderr
        with service(line), under_load(photos, expected) as asked:
            took_s = again_and_again(asked, lambda: replaced(cluster, workers), NUM_KILLS)
    assert max(took_s) < BACK_WITHIN_S


def replaced(cluster: Cluster, workers: list[Any]) -> None:
    """One node goes without a word, and another one comes."""
    cluster.remove_node(workers.pop(0), allow_graceful=False)
    workers.append(cluster.add_node(num_cpus=4, object_store_memory=200 << 20))


@pytest.mark.soak
def test_a_store_that_fails_and_one_that_is_gone(
    city: Path, photos: list[bytes], expected: list[Any], tmp_path: Path
) -> None:
    """One request in ten fails: the same answers. Then the store is gone: clean refusals, or answers from memory."""
    with running_swift(tmp_path / "swift") as swift:
        store = s3fs.S3FileSystem(
            key=swift.access_key, secret=swift.secret_key, endpoint_url=swift.endpoint_url, skip_instance_cache=True
        )
        store.mkdir("served")
        store.put(str(city / "database"), "served/database", recursive=True)
        line = ["database=s3://served/database", "output=s3://served/index", "positions=names", "index.num_shards=3"]
        done = run_job("build_index", [*line, "index.kind=flat", *SMALL_NETWORK], **swift.environment)
        assert done.returncode == 0, done.stderr
        with running_flaky_proxy(swift.endpoint_url, 0.1, seed=0) as proxy:
            environment = swift.environment | {"AWS_ENDPOINT_URL": proxy.endpoint_url}
            line = ["index.path=s3://served/index", *LINE, f"index.cache_dir={tmp_path}/cache", "rerank.cache_gib=0"]
            with service([*line, "serve.timeout_s=20"], **environment):
                with under_load(photos, expected) as asked:
                    wait_until(lambda: len(asked.times_s) > 200, "two hundred answers")
                assert sum(proxy.failures.values()) > 0
                for each in [*psutil.Process(swift.pid).children(recursive=True), psutil.Process(swift.pid)]:
                    each.kill()
                answers = [
                    requests.post(f"http://127.0.0.1:{PORT}/v1/locate?k=10", data=photo, timeout=60)
                    for photo in photos[:4]
                ]
                assert {answer.status_code for answer in answers} <= set(CLEAN)
                assert requests.get(f"http://127.0.0.1:{PORT}/healthz", timeout=5).status_code == 200
