"""A Ray of its own answers nobody from the network who has no token."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster

JOB = """
import json, os, sys
import psutil, ray
from pairvpr.config.schema import ClusterConfig
from pairvpr.distributed.runtime import ray_session

@ray.remote
def work():
    return 1

set_before = {name for name in os.environ if "metric" in name.lower()}
with ray_session(ClusterConfig(num_cpus=1)):
    assert {name for name in os.environ if "metric" in name.lower()} == set_before, "other clusters keep their metrics"
    assert ray.get(work.remote()) == 1
    me = psutil.Process()
    found = [
        (process.name(), connection.laddr.port)
        for process in [me, *me.children(recursive=True)]
        for connection in process.net_connections("inet")
        if connection.status == "LISTEN"
    ]
    commands = [" ".join(child.cmdline()) for child in me.children(recursive=True)]
    print(json.dumps({"ports": found, "commands": commands}), flush=True)
    sys.stdin.read()
"""
STRANGER = """
import http.client, json, sys
import grpc

METHODS = [
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo", "/ray.rpc.InternalKVGcsService/InternalKVKeys",
    "/ray.rpc.JobInfoGcsService/GetAllJobInfo", "/ray.rpc.ActorInfoGcsService/RegisterActor",
    "/ray.rpc.NodeManagerService/GetNodeStats", "/ray.rpc.NodeManagerService/RequestWorkerLease",
    "/ray.rpc.ObjectManagerService/Pull", "/ray.rpc.CoreWorkerService/PushTask",
    "/ray.rpc.ReporterService/GetTraceback",
]
refusals, answers = 0, []
for name, port in json.loads(sys.argv[2]):
    for method in METHODS:
        with grpc.insecure_channel(f"{sys.argv[1]}:{port}") as channel:
            try:
                channel.unary_unary(method)(b"", timeout=5)
                answers.append([name, port, method])
            except grpc.RpcError as error:
                refusals += error.code() is grpc.StatusCode.UNAUTHENTICATED
    for request in ("GET /", "GET /metrics", "POST /get_or_create_runtime_env", "POST /api/jobs/"):
        verb, path = request.split()
        connection = http.client.HTTPConnection(sys.argv[1], port, timeout=5)
        try:
            connection.request(verb, path, body=b"{}")
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException):
            continue
        refusals += status in (401, 403)
        if status not in (401, 403):
            answers.append([name, port, f"{verb} {path}: {status}"])
print(json.dumps({"refusals": refusals, "answers": answers}))
"""


@pytest.fixture
def other_network() -> Iterator[tuple[list[str], str]]:
    """How a command is run in a network namespace of its own, and this machine's address as it is seen from there."""
    name, here, there = (f"pv{uuid.uuid4().hex[:6]}{end}" for end in "nab")
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` to make a second network namespace")
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no second network namespace is allowed here: {made.stderr.strip()}")
    try:
        for command in (
            f"ip link add {here} type veth peer name {there} netns {name}",
            f"ip addr add 10.213.77.1/30 dev {here}",
            f"ip link set {here} up",
            f"ip -n {name} addr add 10.213.77.2/30 dev {there}",
            f"ip -n {name} link set {there} up",
        ):
            subprocess.run(command.split(), check=True)
        yield ["ip", "netns", "exec", name], "10.213.77.1"
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False)


def closed_to(prefix: list[str], host: str, environment: dict[str, str]) -> None:
    """Start a job and try all of its ports from elsewhere."""
    job = subprocess.Popen(
        [sys.executable, "-c", JOB], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert job.stdin is not None
    assert job.stdout is not None
    try:
        found = json.loads(job.stdout.readline())
        assert len(found["ports"]) >= 5
        asked = [*prefix, sys.executable, "-c", STRANGER, host, json.dumps(found["ports"])]
        answer = json.loads(subprocess.run(asked, capture_output=True, text=True, check=True, timeout=300).stdout)
        assert answer["answers"] == []
        assert answer["refusals"] >= 5
        assert not any("RAY_AUTH" in command for command in found["commands"])
    finally:
        job.stdin.close()
        job.wait(60)


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """That of a user who has set nothing of Ray's."""
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray keeps the token
    return dict(os.environ) | {"PYTHONPATH": str(Path(__file__).parents[2])}


def test_no_port_answers_in_this_network(environment: dict[str, str]) -> None:
    closed_to([], "127.0.0.1", environment)


def test_no_port_answers_to_another_network(other_network: tuple[list[str], str], environment: dict[str, str]) -> None:
    closed_to(*other_network, environment)
