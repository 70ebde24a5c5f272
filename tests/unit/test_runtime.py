"""Which cluster a run connects to, and how a wrong address reads."""

from __future__ import annotations

import socket

import pytest
import ray

from pairvpr.config.schema import ClusterConfig
from pairvpr.distributed.runtime import ray_session
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
