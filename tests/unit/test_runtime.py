"""Which cluster a run connects to, how a wrong address reads, and what a shard actor reserves."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest
import ray

from pairvpr.config.schema import ClusterConfig, DescribeConfig, IndexKind, SearchConfig
from pairvpr.distributed import retrieve, runtime
from pairvpr.distributed.runtime import ALONE, plan_actors, ray_session
from pairvpr.errors import UserError


@pytest.fixture(params=["cluster.address", "RAY_ADDRESS"])
def key(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the address came from; the other one names a third."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    return request.param


def connect(key: str, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if key == "RAY_ADDRESS":
        monkeypatch.setenv(key, address)
    with ray_session(ClusterConfig(address=address if key == "cluster.address" else None)):
        pytest.fail("connected")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://127.0.0.1:8265", "the dashboard's address, for `ray job submit`; expected HOST:6379"),
        ("https://head:8265", "the dashboard's address"),
        ("nonsense", "Invalid address format: nonsense; expected HOST:PORT of a running cluster, or auto"),
        ("auto", "Could not find any running Ray instance"),
        ("127.0.0.1:99999", "nothing answers there"),
    ],
)
def test_a_wrong_address_is_one_line_that_names_its_key(
    key: str, address: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(address: str, **_: object) -> None:
        """As Ray answers, without the seconds that takes."""
        if address == "auto":
            raise ConnectionError("Could not find any running Ray instance. Please specify the one to connect to")
        raise ValueError(f"Invalid address format: {address}")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(UserError) as caught:
        connect(key, address, monkeypatch)
    assert str(caught.value).startswith(f"{key}={address}: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_address_where_nobody_listens(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(UserError, match=f"^{key}={address}: nothing answers there"):
        connect(key, address, monkeypatch)


def test_an_index_that_is_searched_on_cpus_reserves_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in IndexKind:
        if kind is not IndexKind.flat:
            assert retrieve._gpus_per_actor(kind, SearchConfig(num_gpus_per_actor=1.0)) == 0
            assert f"an index of kind {kind} is searched on CPUs" in capsys.readouterr().err


def test_a_local_ray_says_before_it_searches_that_faiss_has_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(namespace=ALONE))
    monkeypatch.delattr("faiss.StandardGpuResources", raising=False)
    assert retrieve._gpus_per_actor(IndexKind.flat, SearchConfig()) == 0
    with pytest.raises(UserError, match=r"index\.num_gpus_per_actor: this faiss has no GPU part"):
        retrieve._gpus_per_actor(IndexKind.flat, SearchConfig(num_gpus_per_actor=0.5))


def test_actors_and_tasks_fit_into_a_jobs_share_of_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"Alive": True, "Resources": {"CPU": 16.0}}
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 64.0})
    monkeypatch.setattr(ray, "nodes", lambda: [node] * 4)
    assert plan_actors(DescribeConfig()).num_actors == 32
    for share in (1, 2, 3, 8):
        monkeypatch.setattr(runtime, "_share_cpus", float(share))
        plan = plan_actors(DescribeConfig())
        assert plan.num_actors == max(1, share // 2)
        assert plan.num_actors * plan.cpus_per_actor <= share / 2
        assert plan.cpus_per_task <= share / 4
        assert runtime.cpus_of_a_shard() <= share
