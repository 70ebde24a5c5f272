"""Ray for the tests of this folder: each starts its own and shuts it down."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pairvpr.config.schema import ClusterConfig
from pairvpr.distributed.runtime import ray_session
from tests.support.runs import arguments, draw_city, single_machine_predictions, wait_for_agents


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here starts processes."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session", autouse=True)
def no_agent_is_left() -> Iterator[None]:
    """Of the runs that tests killed."""
    yield
    wait_for_agents()


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray in this process with four logical CPUs."""
    with ray_session(ClusterConfig(num_cpus=4)):
        yield


@pytest.fixture(scope="session")
def city(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn city with copies and broken photos."""
    folder = tmp_path_factory.mktemp("city")
    draw_city(folder)
    return folder


@pytest.fixture(scope="session")
def expected(city: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """predictions.parquet of the city from the pipeline without Ray."""
    folder = tmp_path_factory.mktemp("expected")
    return single_machine_predictions(arguments(city, folder / "unused"), folder / "predictions.parquet")


@pytest.fixture(scope="session")
def expected_one_by_one(city: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The same with a unit for each query, whose pairs then share other forward passes."""
    folder = tmp_path_factory.mktemp("expected")
    line = arguments(city, folder / "unused", "rerank.queries_per_unit=1")
    return single_machine_predictions(line, folder / "predictions.parquet")
