"""Several hosts on this machine that share nothing but a network: each has its own address, disk, memory and processes.

A host is a network, mount, process and name namespace. The machine's files are there, but read-only (the software is
"installed"); what is written goes to memory of the host's own. The hosts' cables end in a bridge, in a namespace of its
own, so that none of this touches the machine's network.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.support.runs import ROOT, wait_until
from tests.support.swift_server import SwiftServer, running_swift

PREFIX = "10.214.91"
RAY_PORT = 6379
STARTED = "Ray runtime started"
STARTS = 3
SLOW_LINK = str(Path(__file__).with_name("slow_link.py"))
OBJECT_STORE_BYTES = 100 << 20
DISK_MIB = 2048
# A host that does not answer for 5 s or so is dead: Ray's own patience is over a minute.
IMPATIENT = (
    '{"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000,'
    ' "health_check_timeout_ms": 1500, "health_check_failure_threshold": 4}'
)
# Everything is read-only but what is in memory. A host ends when this process does, by its end of the pipe.
INIT = """
set -e
mount --make-rprivate /
mount -o remount,bind,ro /
mount -t tmpfs -o size={disk_mib}m tmpfs /tmp
mount -t tmpfs -o size=512m tmpfs /dev/shm
ip link set lo up
hostname {name}
printf '127.0.0.1 localhost\n{address} {name}\n' > /tmp/hosts
mount --bind /tmp/hosts /etc/hosts
mount --bind /dev/null /etc/resolv.conf
echo up
exec cat
"""


@dataclass
class Host:
    """A host with an address; `init` is its process 1, with which everything on it ends."""

    name: str
    address: str
    namespace: str
    init: subprocess.Popen[str]
    environment: dict[str, str]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    raylet: subprocess.Popen[bytes] | None = None

    def start(self, *words: str, log: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Start a program on the host; what it prints goes to `log`, which lies on the machine's own disk."""
        child = psutil.Process(self.init.pid).children()[0]  # process 1; its parent, `unshare`, is outside
        inside = ["nsenter", f"--target={child.pid}", "--mount", "--pid", "--uts", f"--net=/run/netns/{self.namespace}"]
        with log.open("ab") as file:
            process = subprocess.Popen(
                [*inside, f"--wd={ROOT}", *words],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | self.environment | environment,
            )
        self.processes.append(process)
        return process

    def start_job(self, job: str, line: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """`python -m ray_jobs.<job> ...` on the host."""
        return self.start(sys.executable, "-m", f"ray_jobs.{job}", *line, log=log)

    def kill(self) -> None:
        """As without power: every process on it is gone."""
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.init.pid).children():
                child.kill()
        for process in (self.init, *self.processes):
            process.kill()
            process.wait()


@dataclass
class Network:
    """A bridge, the hosts at it, and an S3 server at one more address."""

    tag: str
    folder: Path
    hosts: list[Host] = field(default_factory=list)
    cables: list[subprocess.Popen[str]] = field(default_factory=list)
    namespaces: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def switch(self) -> str:
        """The namespace of the bridge."""
        return f"{self.tag}s"

    def add_namespace(self, name: str) -> None:
        """A network namespace, deleted at the end."""
        _do(f"ip netns add {name}")
        self.namespaces.append(name)

    def plug(self, namespace: str, number: int) -> str:
        """A cable from a namespace to the bridge; the address at its end."""
        address = f"{PREFIX}.{number}"
        _do(f"ip -n {self.switch} link add p{number} type veth peer name eth0 netns {namespace}")
        _do(f"ip -n {self.switch} link set p{number} master hub up")
        _do(f"ip -n {namespace} addr add {address}/24 dev eth0")
        _do(f"ip -n {namespace} link set eth0 up")
        _do(f"ip -n {namespace} link set lo up")
        return address

    def add_host(self, number: int, *, disk_mib: int = DISK_MIB, more: Mapping[str, str] | None = None) -> Host:
        """A host that is up, at the address `number` of the bridge's network; `more` variables for its programs."""
        name, namespace, address = f"host{number}", f"{self.tag}{number}", f"{PREFIX}.{number}"
        if namespace not in self.namespaces:
            self.add_namespace(namespace)
            self.plug(namespace, number)
        apart = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--uts", "--kill-child"]
        init = subprocess.Popen(
            [
                "ip",
                "netns",
                "exec",
                namespace,
                *apart,
                "sh",
                "-c",
                INIT.format(disk_mib=disk_mib, name=name, address=address),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert init.stdout is not None
        said = init.stdout.readline()
        host = Host(name, address, namespace, init, self.environment | dict(more or {}))
        self.hosts.append(host)
        assert said == "up\n", said
        return host

    def cut(self, host: Host) -> None:
        """Nothing gets through to or from the host, and nobody is told."""
        _do(f"ip -n {self.switch} link set {self._port(host)} nomaster")

    def join(self, host: Host) -> None:
        """The host is back."""
        _do(f"ip -n {self.switch} link set {self._port(host)} master hub")

    def slow_down(self, host: Host, delay_s: float, loss: float) -> None:
        """Another cable for the host, at the same address: frames take `delay_s` each way, and a share is lost."""
        number = host.address.rsplit(".", 1)[1]
        inner, outer = f"in{number}", f"out{number}"
        cable = subprocess.Popen(
            ["ip", "netns", "exec", self.switch, sys.executable, SLOW_LINK, inner, outer, str(delay_s), str(loss)],
            stdout=subprocess.PIPE,
            text=True,
        )
        self.cables.append(cable)
        assert cable.stdout is not None
        assert cable.stdout.readline() == "ready\n"
        _do(f"ip -n {self.switch} link del {self._port(host)}")
        _do(f"ip -n {self.switch} link set {inner} netns {host.namespace} name eth0")
        _do(f"ip -n {host.namespace} addr add {host.address}/24 dev eth0")
        _do(f"ip -n {host.namespace} link set eth0 up")
        _do(f"ip -n {self.switch} link set {outer} name {self._port(host)}")
        _do(f"ip -n {self.switch} link set {self._port(host)} master hub up")

    @staticmethod
    def _port(host: Host) -> str:
        return f"p{host.address.rsplit('.', 1)[1]}"

    def log(self, name: str) -> Path:
        """Where the output of a program goes."""
        return self.folder / f"{name}.log"

    def start_ray(self, host: Host, num_cpus: int) -> None:
        """A raylet on the host: the first host's starts the cluster. It is up when it has joined."""
        for _ in range(STARTS):  # Ray gives up on itself after 30 s, which a busy machine takes
            if self._is_up(host, num_cpus):
                return
        pytest.fail(f"no Ray on {host.name}: {self.log(f'ray on {host.name}').read_text()[-2000:]}")

    def _is_up(self, host: Host, num_cpus: int) -> bool:
        is_head = host is self.hosts[0]
        to_head = [f"--address={self.hosts[0].address}:{RAY_PORT}"]
        own = [f"--port={RAY_PORT}", f"--system-config={IMPATIENT}", "--no-monitor", "--temp-dir=/tmp/ray"]
        log = self.log(f"ray on {host.name}")
        before = len(log.read_text()) if log.exists() else 0
        host.raylet = host.start(
            *(
                sys.executable,
                "-m",
                "ray.scripts.scripts",
                "start",
                "--block",
                "--disable-usage-stats",
                "--include-log-monitor=false",
            ),
            *(f"--node-ip-address={host.address}", f"--num-cpus={num_cpus}"),
            *(["--head", "--include-dashboard=false", *own] if is_head else to_head),
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            log=log,
        )
        raylet = host.raylet
        wait_until(lambda: STARTED in log.read_text()[before:] or raylet.poll() is not None, f"Ray on {host.name}")
        return raylet.poll() is None


@dataclass(frozen=True)
class Store:
    """The S3 server as the test sees it: with programs that run at the store's own address."""

    server: SwiftServer
    namespace: str

    def run(self, code: str, *words: str, timeout_s: float = 300.0) -> str:
        """What a piece of Python prints, to which `s3` is the store."""
        code = f"import sys, time, s3fs\ns3 = s3fs.S3FileSystem(use_listings_cache=False)\n{code}"
        done = subprocess.run(
            ["ip", "netns", "exec", self.namespace, sys.executable, "-c", code, *words],
            env=os.environ | self.server.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    def put(self, folder: Path, key: str) -> None:
        """Copy a folder into a bucket, which is made."""
        self.run(
            "s3.makedirs(sys.argv[2].split('/')[0], exist_ok=True)\ns3.put(*sys.argv[1:3], recursive=True)",
            f"{folder}/",
            f"{key}/",
        )

    def get(self, key: str, to: Path) -> Path:
        """A file or folder of the store, copied."""
        self.run("s3.get(*sys.argv[1:3], recursive=True)", key, str(to))
        return to

    def wait_for(self, pattern: str, timeout_s: float = 300.0) -> None:
        """Until a file of that name is there."""
        self.run("while not s3.glob(sys.argv[1]): time.sleep(0.05)", pattern, timeout_s=timeout_s)


def skip_unless_allowed() -> None:
    """Skip the test, saying why, where this process can't make hosts."""
    for tool in ("ip", "nsenter", "unshare"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no `{tool}` to make hosts of")
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "--uts", "mount", "--make-rprivate", "/"],
        capture_output=True,
        text=True,
        check=False,
    )
    if tried.returncode or os.geteuid():
        pytest.skip(f"no hosts of namespaces are allowed here: {tried.stderr.strip() or 'not root'}")


@contextmanager
def running_network(folder: Path) -> Iterator[tuple[Network, Store]]:
    """An empty network with a store in it; all of it is gone at the end."""
    skip_unless_allowed()
    network = Network(f"pv{uuid.uuid4().hex[:5]}", folder)
    try:
        network.add_namespace(network.switch)
        _do(f"ip -n {network.switch} link add name hub type bridge")
        _do(f"ip -n {network.switch} link set hub up")
        at = f"{network.tag}store"
        network.add_namespace(at)
        address = network.plug(at, 250)
        with running_swift(folder / "swift", address, ("ip", "netns", "exec", at)) as server:
            network.environment = server.environment | {
                "RAY_AUTH_MODE": "disabled",
                "RAY_ADDRESS": f"{PREFIX}.1:{RAY_PORT}",
                "RAY_TMPDIR": "/tmp",
                "TMPDIR": "/tmp",
                "HOME": "/tmp/home",
                "XDG_CACHE_HOME": "/tmp/cache",
            }
            yield network, Store(server, at)
    finally:
        for host in network.hosts:
            host.kill()
        for cable in network.cables:
            cable.kill()
            cable.wait()
        for namespace in network.namespaces:
            subprocess.run(["ip", "netns", "del", namespace], check=False)


def _do(command: str) -> None:
    subprocess.run(command.split(), check=True)
