"""Hosts of a network that fails: namespaces with own addresses, disks and raylets; S3 is their only common store."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pairvpr.training.metrics_log import read_metrics
from tests.support import training
from tests.support.hosts import Host, Network, Store, running_network
from tests.support.runs import arguments

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1500)]

CUT_S = 60.0
SLOW_S, LOST = 0.1, 0.05
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
Fault = Callable[[Network, Host], None]


@pytest.fixture
def network(city: Path, tmp_path: Path) -> Iterator[tuple[Network, Store]]:
    """An empty network, and the city in its store."""
    with running_network(tmp_path) as (network, store):
        store.put(city, "city")
        yield network, store


def _cut_and_back(network: Network, host: Host) -> None:
    """Ray has given the host up when it is back, so its raylet ends; what started that starts another."""
    network.cut(host)
    time.sleep(CUT_S)
    network.join(host)
    assert host.raylet is not None
    host.raylet.wait(120)
    network.start_ray(host, num_cpus=2)


def _gone(_: Network, host: Host) -> None:
    host.kill()


def _full(network: Network, host: Host) -> None:
    filling = host.start("sh", "-c", "cat /dev/zero > /tmp/full", log=network.log("filling"))
    assert filling.wait(120) != 0  # no space is left


FAULTS: dict[str, Fault] = {"cut": Network.cut, "cut and back": _cut_and_back, "gone": _gone, "full": _full}


def _evaluate(network: Network, store: Store, found: Path, moment: str | None = None, fault: Fault = _gone) -> bytes:
    """The predictions of the city, of a run whose second host has a fault when a file is there; up to three starts."""
    line = arguments("s3://city", "s3://city/out", "index.num_shards=3", "describe.num_actors=2", "rerank.num_actors=2")
    head, other = network.hosts
    for start in range(3):
        log = network.log(f"driver {start}")
        driver = head.start_job("evaluate", line, log)
        if moment is not None and not start:
            store.wait_for(f"city/out/{moment}")
            fault(network, other)
        if driver.wait(500) == 0:
            return store.get("city/out/predictions.parquet", found).read_bytes()
        last = log.read_text().strip().splitlines()[-1]
        print(f"start {start} ended with {driver.returncode}: {last}")
        assert driver.returncode == 1, log.read_text()  # a line for people; the same line goes on
    pytest.fail("three starts were not enough")


@pytest.mark.parametrize("moment", ["index/parts/*.npz", "reranked/*.parquet"])
@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_evaluate(network: tuple[Network, Store], expected: bytes, tmp_path: Path, fault: str, moment: str) -> None:
    """The other host, or the next start, ends the evaluation, with the bytes of a single machine."""
    hosts, store = network
    hosts.start_ray(hosts.add_host(1), num_cpus=2)
    hosts.start_ray(hosts.add_host(2, disk_mib=300 if fault == "full" else 2048), num_cpus=2)
    assert _evaluate(hosts, store, tmp_path / "found", moment, FAULTS[fault]) == expected


def test_evaluate_over_a_slow_link(network: tuple[Network, Store], expected: bytes, tmp_path: Path) -> None:
    """200 ms there and back, 5 % of frames lost each way."""
    hosts, store = network
    hosts.start_ray(hosts.add_host(1), num_cpus=2)
    hosts.slow_down(hosts.add_host(2), SLOW_S, LOST)
    hosts.start_ray(hosts.hosts[1], num_cpus=2)
    assert _evaluate(hosts, store, tmp_path / "found") == expected


def test_evaluate_with_a_clock_an_hour_off(network: tuple[Network, Store], expected: bytes, tmp_path: Path) -> None:
    if not FAKETIME.exists():
        pytest.skip(f"there is no {FAKETIME} to put a clock an hour off (apt-get install faketime)")
    hosts, store = network
    hosts.start_ray(hosts.add_host(1), num_cpus=2)
    wrong = {"LD_PRELOAD": str(FAKETIME), "FAKETIME": "+1h", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    hosts.start_ray(hosts.add_host(2, more=wrong), num_cpus=2)
    assert _evaluate(hosts, store, tmp_path / "found") == expected


@pytest.mark.parametrize("stage", training.STAGES)
@pytest.mark.parametrize("fault", ["cut and back", "gone", "slow"])
def test_train(network: tuple[Network, Store], tmp_path: Path, stage: int, fault: str) -> None:
    """A worker on each host; another host takes the place of one that is gone."""
    hosts, store = network
    training.draw_training_set(tmp_path / "photos")
    more = ("train.num_workers=2", "train.checkpoint_every_steps=1")
    line = training.arguments(stage, tmp_path / "photos", tmp_path / "undisturbed", *more)
    training.train_on_ranks(stage, line, 2, tmp_path)
    store.put(tmp_path / "photos", "training")

    hosts.start_ray(hosts.add_host(1), num_cpus=1)
    other = hosts.add_host(2)
    if fault == "slow":
        hosts.slow_down(other, SLOW_S, LOST)
    hosts.start_ray(other, num_cpus=1)
    line = training.arguments(stage, Path("s3://training"), Path("s3://trained"), *more)
    line = [word.replace("s3:/t", "s3://t") for word in line]
    store.run("s3.mkdir('trained')")
    driver = hosts.hosts[0].start_job(training.JOBS[stage], line, hosts.log("driver"))
    if fault != "slow":
        store.wait_for("trained/checkpoints/*")
        FAULTS[fault](hosts, other)
    if fault == "gone":
        hosts.start_ray(hosts.add_host(3), num_cpus=1)
    assert driver.wait(900) == 0, hosts.log("driver").read_text()
    store.get("trained", tmp_path / "found")
    expected = read_metrics(str(tmp_path / "undisturbed"))
    assert training.losses(read_metrics(str(tmp_path / "found"))) == training.losses(expected)
