"""The service on Ray Serve, in one piece and split: the bytes of the job `query`; swaps and the end lose no request."""

from __future__ import annotations

import shutil
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import requests
from ray import serve

from pairvpr.config.compose import load
from pairvpr.config.schema import BuildConfig, BuildIndexConfig, IndexKind, QueryConfig
from pairvpr.config.serve_schema import ServeConfig, ServeSettings
from pairvpr.distributed.serve import APP, application, drain
from pairvpr.errors import IncompleteRunError, UserError
from pairvpr.index.generations import commit, read_manifest
from pairvpr.index.make import LocalRunner, next_generation
from pairvpr.index.update import without
from pairvpr.serving.opening import Opening
from ray_jobs.build_index import build_index
from ray_jobs.query import query
from ray_jobs.serve import app, check_is_alone, check_ports, started
from tests.support.runs import SMALL_NETWORK, wait_until
from tests.support.user_networks import SIDE_PX

pytestmark = pytest.mark.usefixtures("local_ray")

PORT = 8437
ONE_BY_ONE = (
    *SMALL_NETWORK,
    *("describe.batch_size=1", "describe.num_threads_per_actor=1", "index.num_threads_per_actor=1"),
    *("rerank.num_candidates=10", "rerank.batch_size=4", "rerank.queries_per_unit=1", "rerank.num_threads_per_actor=1"),
)
"""A folder described photo by photo and scored query by query: each photo as if it were alone."""
SPLIT = ("serve.split=true", "serve.num_replicas=2", "serve.num_shard_parts=2")
KINDS = (
    IndexKind.ivf_rabitq,
    *(pytest.param(kind, marks=pytest.mark.soak) for kind in IndexKind if kind not in ("auto", "ivf_rabitq")),
)


@pytest.fixture(scope="module")
def flat_index(city: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("flat")
    (folder / "photos").mkdir()
    for photo in (city / "database").iterdir():
        (folder / "photos" / photo.name).write_bytes(photo.read_bytes())
    line = [f"database={folder}/photos", f"output={folder}/index", "positions=names", "index.kind=flat"]
    return build_index(load(BuildIndexConfig, [*line, "index.num_shards=3", "describe.batch_size=4", *SMALL_NETWORK]))


@contextmanager
def serving(index: str, *more: str) -> Iterator[str]:
    """The address of the service, which is drained at the end."""
    line = [f"index.path={index}", *ONE_BY_ONE, "serve.max_waiting=64", "serve.timeout_s=60", *more]
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(application(Opening.of(load(ServeConfig, line))), name=APP, route_prefix="/")
    try:
        yield f"http://127.0.0.1:{PORT}"
    finally:
        serve.delete(APP)


def asked(url: str, photo: Path, **parameters: Any) -> dict[str, Any]:
    answer = requests.post(f"{url}/v1/locate", data=photo.read_bytes(), params={"k": 10, **parameters}, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.headers["X-Request-Id"] == answer.json()["request_id"]
    return answer.json()


def assert_same(found: dict[str, Any], row: dict[str, Any]) -> None:
    """Ids, squared distances and pair scores, bit by bit."""
    distance_of = dict(zip(row["candidates"], row["squared_distances"], strict=True))
    assert [each["photo_id"] for each in found["candidates"]] == row["reranked"]
    assert [each["pair_score"] for each in found["candidates"]] == row["pair_scores"]
    assert [each["squared_distance"] for each in found["candidates"]] == [distance_of[one] for one in row["reranked"]]


def of_kind(index: str, kind: IndexKind) -> None:
    """A new generation of another kind."""
    manifest = read_manifest(index)
    assert manifest is not None
    config = BuildConfig(kind=kind, num_lists=4 if kind.startswith("ivf") else None, num_build_threads=1)
    draft = replace(manifest, generation=manifest.generation + 1)
    commit(index, next_generation(index, draft, config, 1e12, LocalRunner()))


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_job(kind: IndexKind, flat_index: str, city: Path, tmp_path: Path) -> None:
    """Every query of the city, with and without conditions; in one piece, and with two networks and two parts."""
    of_kind(flat_index, kind)
    queries = [photo for photo in sorted((city / "queries").iterdir()) if "broken" not in photo.name]
    line = [f"index.path={flat_index}", f"queries={city}/queries", *ONE_BY_ONE]
    query(load(QueryConfig, [*line, f"output={tmp_path}/all"]))
    rows = {row["query_path"]: row for row in pq.read_table(tmp_path / "all" / "predictions.parquet").to_pylist()}
    turned = ("filter.heading_deg=90", "filter.within_deg=40")
    query(load(QueryConfig, [*line, f"output={tmp_path}/turned", *turned]))
    there = {row["query_path"]: row for row in pq.read_table(tmp_path / "turned" / "predictions.parquet").to_pylist()}
    assert len(queries) == 12
    for layout in ((), SPLIT):
        with serving(flat_index, *layout) as url, ThreadPoolExecutor(4) as threads:
            for photo, found in zip(queries, threads.map(lambda photo: asked(url, photo), queries), strict=True):
                assert_same(found, rows[photo.name])
            for photo in queries[:4]:
                assert_same(asked(url, photo, heading_deg=90, within_deg=40), there[photo.name])


@pytest.mark.soak
@pytest.mark.parametrize("layout", [(), SPLIT], ids=["one piece", "split"])
def test_a_network_of_the_users_describes(layout: tuple[str, ...], city: Path, tmp_path: Path) -> None:
    """Every query of the city has the answer of the job."""
    first = ("descriptor.module=tests.support.user_networks:wide", f"descriptor.image_size_px={SIDE_PX}")
    line = [f"database={city}/database", f"output={tmp_path}/index", "positions=names", "index.kind=flat", *first]
    build_index(load(BuildIndexConfig, [*line, "index.num_shards=3", "describe.batch_size=4", *SMALL_NETWORK]))
    asking = [f"index.path={tmp_path}/index", f"queries={city}/queries", f"output={tmp_path}/all", *ONE_BY_ONE, *first]
    query(load(QueryConfig, asking))
    rows = pq.read_table(tmp_path / "all" / "predictions.parquet").to_pylist()
    with serving(f"{tmp_path}/index", *first, *layout) as url:
        for row in rows:
            assert_same(asked(url, city / "queries" / row["query_path"]), row)
    assert len(rows) == 12


def test_swaps_and_draining_lose_no_request(flat_index: str, city: Path) -> None:
    """Split: photos go and come back under load; each answer is that of its generation; then the service is drained."""
    photo = sorted((city / "queries").iterdir())[0]
    seen: Counter[int] = Counter()
    answers: dict[int, set[str]] = {}
    wrong: list[str] = []
    done = threading.Event()

    def client(url: str) -> None:
        while not done.is_set():
            answer = requests.post(f"{url}/v1/locate?k=10", data=photo.read_bytes(), timeout=60)
            seen[answer.status_code] += 1
            if answer.status_code == 200:
                found = answer.json()
                answers.setdefault(found["generation"], set()).add(repr(found["candidates"]))
            elif answer.status_code != 503:
                wrong.append(answer.text)
                return
            elif "stopping" in answer.text:
                return

    with serving(flat_index, *SPLIT) as url:
        assert requests.get(f"{url}/readyz", timeout=60).text == "ready"
        with pytest.raises(UserError, match="Ray Serve already runs on this cluster, with pairvpr"):
            check_is_alone()
        whole = read_manifest(flat_index)
        assert whole is not None
        gone = asked(url, photo)["answer"]["photo_id"]
        clients = [threading.Thread(target=client, args=[url]) for _ in range(4)]
        for each in clients:
            each.start()
        for change in (1, 2):
            draft = replace(whole, generation=whole.generation + change)
            is_back = change % 2 == 0
            removed = without(flat_index, draft, f"updates/{draft.generation}/", np.array([gone]))
            commit(flat_index, draft if is_back else removed)
            refreshed = requests.post(f"{url}/v1/refresh", timeout=60).json()
            assert refreshed == {"generations": {"default": draft.generation}, "changed": ["default"]}
            ids = [each["photo_id"] for each in asked(url, photo)["candidates"]]
            assert (gone in ids) == is_back
            wait_until(partial(answers.__contains__, draft.generation), "an answer to a client")
        drain(30)
        done.set()
        for each in clients:
            each.join(60)
    assert wrong == []
    assert {1, 2} <= {generation - whole.generation for generation in answers}
    assert all(len(its) == 1 for its in answers.values()), answers
    assert seen[200] >= len(answers)


def test_an_address_that_this_machine_does_not_give_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        free = ServeSettings(port=port)
        with pytest.raises(UserError, match=rf"^serve\.port={port}, on 127\.0\.0\.1: Address already in use; expected"):
            check_ports(free)
    check_ports(free)
    check_ports(replace(free, host="::1"))
    check_ports(replace(free, host="localhost"))
    with pytest.raises(UserError, match=r"on 192\.0\.2\.77: Cannot assign requested address; expected"):
        check_ports(replace(free, host="192.0.2.77", allow_anonymous=True))
    behind = replace(free, haproxy=True)
    name = "RAY_SERVE_HAPROXY_METRICS_PORT"
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv(name, str(port))
        with pytest.raises(UserError, match=rf"^{name}={port}, on 0\.0\.0\.0: Address already in use"):
            check_ports(behind)
    for text in ("70000", "0", "many", ""):
        monkeypatch.setenv(name, text)
        with pytest.raises(UserError, match=rf"^{name}={text}: expected a port, 1 to 65535"):
            check_ports(behind)


def test_haproxy_is_not_the_services_choice_where_ray_serve_started_first() -> None:
    with pytest.raises(UserError, match=r"^serve\.haproxy=true: Ray Serve starts its proxies before this; expected"):
        app({"index.path": "x", "serve.allow_anonymous": "true", "serve.haproxy": "true"})


@pytest.mark.soak
def test_a_service_that_cannot_start_says_so(flat_index: str, tmp_path: Path) -> None:
    """Between the check and the start of a replica the index goes."""
    index = shutil.copytree(flat_index, tmp_path / "index")
    opening = Opening.of(load(ServeConfig, [f"index.path={index}", *ONE_BY_ONE]))
    shutil.rmtree(index)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    try:
        with pytest.raises(IncompleteRunError, match=r"^the service did not start: [^\n]+$"):
            started(application(opening))
    finally:
        serve.delete(APP)
