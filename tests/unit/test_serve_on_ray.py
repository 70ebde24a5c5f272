"""The service on Ray Serve, as far as it needs no Ray: HAProxy's settings, and a network in another process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pairvpr.config.serve_schema import ServeSettings
from pairvpr.distributed.serve import HAPROXY, RemoteNetwork, haproxy_variables

BEHIND = ServeSettings(haproxy=True)


@pytest.mark.parametrize(("body_timeout_s", "limit"), [(2.5, "2500ms"), (1e-6, "1ms"), (1e9, "2147483647ms")])
def test_haproxy_holds_a_request_before_it_passes_it_on(body_timeout_s: float, limit: str) -> None:
    """Within the limit of the body, in numbers that HAProxy takes: 0 would be none."""
    with haproxy_variables(replace(BEHIND, body_timeout_s=body_timeout_s)) as variables:
        lines = variables["RAY_SERVE_HAPROXY_RETRY_ON"].splitlines()
    assert [line.split() for line in lines] == [
        ["conn-failure", "empty-response"],
        ["option", "http-buffer-request"],
        ["timeout", "http-request", limit],
    ]


def test_variables_are_those_of_haproxy_alone_and_what_the_environment_says_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with haproxy_variables(ServeSettings()) as variables:
        assert variables == {}
    given = "RAY_SERVE_HAPROXY_MAXCONN"
    assert given in HAPROXY
    monkeypatch.setenv(given, "7")
    with haproxy_variables(BEHIND) as variables:
        assert variables["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
        assert given not in variables
        folder = Path(variables["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent
        assert folder.stat().st_mode & 0o077 == 0
    assert not folder.exists()


@pytest.mark.parametrize("user_network", [None, "of the user's"])
def test_a_door_knows_which_network_describes(user_network: str | None) -> None:
    opening = SimpleNamespace(
        config=SimpleNamespace(model="network"),
        weights_sha256="ab",
        first_stage=SimpleNamespace(user_network=user_network),
    )
    network = RemoteNetwork(cast(Any, None), cast(Any, opening))
    assert (network.config, network.weights_sha256) == ("network", "ab")
    assert network.describes_what_it_scores == (user_network is None)
