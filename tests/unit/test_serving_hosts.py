"""Which hosts a service may be asked by: this machine's own, where neither a token nor a setting says otherwise."""

from __future__ import annotations

import json
import socket
from http.client import HTTPConnection
from typing import Any

import pytest
import requests

from pairvpr import Localizer
from pairvpr.config.serve_schema import ServeSettings
from tests.support.served import Served, served
from tests.unit.test_localizer import folder, localizer, queries

__all__ = ["folder", "localizer", "queries"]
OWN = ["127.0.0.1", "127.0.0.1:8000", "localhost", "LocalHost:9000", "[::1]", "[::1]:8000", "localhost:"]
FOREIGN = [
    "evil.example", "evil.example:8000", "127.0.0.1.evil.example", "evil.example:127.0.0.1", "localhost.evil.example",
    "xlocalhost", "127.0.0.1:8000:80", "127.0.0.1@evil.example", "127x0y0z1", "::1", "[::1", "0.0.0.0:8000",
    "192.168.1.7:8000", "machine", "", "localhost:80a", "127.0.0.1, evil.example",
]  # fmt: skip


def said(at: Served, method: str, path: str, *headers: tuple[str, str]) -> tuple[int, Any]:
    """Status and body of a request with these headers alone, which may come twice."""
    connection = HTTPConnection("127.0.0.1", at.port, timeout=30)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in headers:
        connection.putheader(name, value)
    connection.putheader("Content-Length", "0")
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    is_json = (answer.headers["Content-Type"] or "").startswith("application/json")
    return answer.status, json.loads(body) if is_json else body


def is_refused(status: int, body: Any, header: str) -> bool:
    if status != 403:
        return False
    message = body["error"]["message"]
    assert (body["error"]["code"], "\n" in message) == ("foreign_host", False)
    assert message.startswith(f"the header {header} names another host")
    return True


def test_pages_of_other_hosts_are_refused(localizer: Localizer) -> None:
    """By a name that leads to 127.0.0.1 (Host), and by a form of another page (Origin)."""
    with served({"one": localizer}) as at:
        for host in OWN:
            assert said(at, "GET", "/v1/index", ("Host", host))[0] == 200, host
            for scheme in ("http", "https"):
                both = ("Host", host), ("Origin", f"{scheme}://{host}")
                assert said(at, "POST", "/v1/refresh", *both)[0] == 200, host
        for host in FOREIGN:
            assert is_refused(*said(at, "GET", "/v1/index", ("Host", host)), "Host"), host
        for origin in [*(f"http://{host}" for host in FOREIGN), "null", "", "file://", "x://localhost", "localhost"]:
            headers = ("Host", f"127.0.0.1:{at.port}"), ("Origin", origin)
            assert is_refused(*said(at, "POST", "/v1/refresh", *headers), "Origin"), origin


def test_every_route_but_healthz_refuses_other_hosts(localizer: Localizer) -> None:
    with served({"one": localizer}) as at:
        described = requests.get(f"{at.url}/openapi.json").json()["paths"]
        routes = [(method.upper(), path.format(photo_id=0)) for path, its in described.items() for method in its]
        others = [("GET", path) for path in ("/", "/docs", "/openapi.json", "/favicon.ico", "/nothing")]
        assert ("POST", "/v1/locate") in routes
        for method, path in [*routes, *others]:
            if path == "/healthz":
                assert said(at, method, path, ("Host", "machine"))[0] == 200
            else:
                assert is_refused(*said(at, method, path, ("Host", "evil.example")), "Host"), path
        for path, its in described.items():
            assert all(("403" in route["responses"]) == (path != "/healthz") for route in its.values()), path


@pytest.mark.parametrize(
    ("limits", "token"),
    [(ServeSettings(), "a-token-of-16-chars"), (ServeSettings(allow_anonymous=True), None)],
)
def test_where_others_may_ask_any_host_is_taken(localizer: Localizer, limits: ServeSettings, token: str | None) -> None:
    right = [] if token is None else [("Authorization", f"Bearer {token}")]
    headers = [("Host", "pairvpr.example"), ("Origin", "https://map.example"), *right]
    with served({"one": localizer}, limits, token) as at:
        assert said(at, "GET", "/v1/index", *headers)[0] == 200
        assert requests.get(f"{at.url}/v1/index", headers={"Host": "x"}).status_code == (401 if token else 200)


def test_an_old_request_without_a_host(localizer: Localizer) -> None:
    with served({"one": localizer}) as at, socket.create_connection(("127.0.0.1", at.port)) as client:
        client.sendall(b"GET /v1/index HTTP/1.0\r\n\r\n")
        assert client.recv(4096).split(b" ")[1] == b"200"
