"""Shard actors: the answer of all shards, also when an actor dies; never that of some of them."""

from __future__ import annotations

import threading
import time

import numpy as np
import psutil
import pytest

from pairvpr.config.schema import BuildConfig, IndexKind, SearchConfig
from pairvpr.data import storage
from pairvpr.distributed.retrieve import SearchRequest, search_shards
from pairvpr.errors import IncompleteRunError
from pairvpr.index.generations import IndexManifest
from pairvpr.index.reader import groups_of_shards, search_index
from tests.support.index import opened, write_index

pytestmark = pytest.mark.usefixtures("local_ray")

NUM_SHARDS = 30
ROWS = np.random.default_rng(0).standard_normal((12_000, 64)).astype(np.float32)
QUERIES = np.random.default_rng(1).standard_normal((400, 64)).astype(np.float32)


@pytest.fixture(scope="module", params=[IndexKind.flat, IndexKind.ivf_rabitq])
def index(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, IndexManifest]:
    folder = str(tmp_path_factory.mktemp("index") / "index")
    cuts = [len(ROWS) // NUM_SHARDS * number for number in range(1, NUM_SHARDS)]
    num_lists = 16 if request.param is IndexKind.ivf_rabitq else None
    config = BuildConfig(kind=request.param, num_lists=num_lists, num_build_threads=1)
    return folder, write_index(folder, [f"{n:05d}.jpg" for n in range(len(ROWS))], ROWS, cuts, config=config)


def kill_one_actor(killed: list[int]) -> None:
    """The first shard actor that is seen at work."""
    deadline_s = time.monotonic() + 30
    while not killed and time.monotonic() < deadline_s:
        for process in psutil.Process().children(recursive=True):
            try:
                if "_ShardActor.work" in " ".join(process.cmdline()):
                    process.kill()
                    killed.append(process.pid)
                    return
            except psutil.NoSuchProcess:
                pass
        time.sleep(0.001)


def test_a_shard_actor_that_dies_is_replaced(index: tuple[str, IndexManifest]) -> None:
    folder, manifest = index
    killed: list[int] = []
    killer = threading.Thread(target=kill_one_actor, args=(killed,))
    killer.start()
    config = SearchConfig(num_actors=2, num_threads_per_actor=1, memory_map=True)
    found, _ = search_shards(SearchRequest(folder, manifest, QUERIES, 50), config)
    killer.join()
    assert killed
    assert len(groups_of_shards(manifest)) > 1
    expected = search_index(opened(folder, manifest), QUERIES, 50, num_threads=1)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])


def test_without_one_of_the_shards_there_is_no_answer(index: tuple[str, IndexManifest]) -> None:
    folder, manifest = index
    url = storage.join(folder, "shards/00007/ids.npy")
    data = storage.read_bytes(url)
    try:
        storage.write_bytes(url, data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(IncompleteRunError) as caught:
            search_shards(
                SearchRequest(folder, manifest, QUERIES, 5), SearchConfig(num_actors=1, num_threads_per_actor=1)
            )
    finally:
        storage.write_bytes(url, data)
    group = next(group for group in groups_of_shards(manifest) if 7 in group)
    named = "shard 00007" if len(group) == 1 else f"one of shards 00000 to {group[-1]:05d}"
    for part in (named, url, "is damaged"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
