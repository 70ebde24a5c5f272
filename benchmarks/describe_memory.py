"""Resident memory of every kind of process while photos are described: it must not grow with their number.

    python -m benchmarks.describe_memory --images 1000 10000 --report

Run it by hand on an idle machine, from the root of the checkout. Photos of a toy city (640 x 480 JPEG) are drawn
into a temporary folder first. Each number of photos is described with the tiny network in a fresh process with a
fresh Ray; from outside, every 0.2 s, its resident memory and that of all its children is read, until the last
descriptor is on disk. Peaks are by role:

- driver: the process that calls `describe`
- network actor: Ray's workers that run the network
- decode and write workers: Ray's other workers (decode, write parts, commit a shard, idle)
- Ray's own: raylet, control store, agents, Ray Data's bookkeeping actors

Memory that a process shares with others, above all pages of Ray's object store that it has touched, is resident in
each of them, so a second table leaves it out. Expect differences of noise between the numbers of photos, a few tens
of MiB at most; more than `--allowance-mib` in the largest process of a role ends with status 1. Pages of the object
store fill up to `describe.memory_gib`, not further. Photos above take minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import ray

from benchmarks import shared
from pairvpr.config.schema import ClusterConfig
from pairvpr.distributed.describe import Description, describe
from pairvpr.distributed.progress import say
from pairvpr.distributed.runtime import ModelSource, ray_session
from pairvpr.models.weights import load_weights

WHAT = "describe_memory"
SECONDS_BETWEEN_SAMPLES = 0.2
NUM_THREADS = 2
ROLES = ("driver", "network actor", "decode and write workers", "Ray's own")
OWN_ACTORS = ("ray::_StatsActor", "ray::AutoscalingRequester", "ray::SplitCoordinator", "ray::DatasetStats")
MIB = 2**20


@dataclass
class Peaks:
    """The most of each role: bytes of its largest process, of all its processes at one time, and their number."""

    largest: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    together: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    num_processes: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, sample: list[tuple[str, int]]) -> None:
        """Roles and bytes of all processes at one time."""
        together: Counter[str] = Counter()
        for role, size in sample:
            self.largest[role] = max(self.largest[role], size)
            together[role] += size
        for role, count in Counter(role for role, _ in sample).items():
            self.together[role] = max(self.together[role], together[role])
            self.num_processes[role] = max(self.num_processes[role], count)


@dataclass
class Run:
    """What one number of photos measured."""

    num_photos: int
    resident: Peaks = field(default_factory=Peaks)
    unshared: Peaks = field(default_factory=Peaks)
    """Resident and not shared with another process; equal to `resident` where the system does not tell."""
    seconds: float = 0.0
    num_samples: int = 0


class Sampler:
    """Reads a driver and its children. A worker that has run the network stays a network actor."""

    def __init__(self, driver: psutil.Process) -> None:
        self.driver = driver
        self._actors: set[int] = set()

    def sample(self, run: Run) -> None:
        """One look at every process that is there."""
        resident: list[tuple[str, int]] = []
        unshared: list[tuple[str, int]] = []
        for process in self._processes():
            try:
                role, memory = self._role(process), process.memory_info()
            except psutil.Error:  # it has just ended
                continue
            resident.append((role, memory.rss))
            unshared.append((role, memory.rss - getattr(memory, "shared", 0)))
        run.resident.add(resident)
        run.unshared.add(unshared)
        run.num_samples += 1

    def _processes(self) -> list[psutil.Process]:
        try:
            return [self.driver, *self.driver.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _role(self, process: psutil.Process) -> str:
        if process.pid == self.driver.pid:
            return "driver"
        title = " ".join(process.cmdline())
        if "_Network" in title:
            self._actors.add(process.pid)
        if process.pid in self._actors:
            return "network actor"
        is_worker = title.startswith("ray::") and not title.startswith(OWN_ACTORS)
        return "decode and write workers" if is_worker else "Ray's own"


def describe_here(photos: Path, num_photos: int, batch_size: int, num_cpus: int) -> None:
    """The work of the fresh process. Says `start` and `end` on standard output around `describe`."""
    config = shared.job_config("tiny", batch_size, NUM_THREADS)
    weights = load_weights(config.model)
    with ray_session(ClusterConfig(num_cpus=num_cpus)), tempfile.TemporaryDirectory() as directory:
        source = ModelSource(config.model, ray.put(weights))
        manifest = shared.first_photos(photos, num_photos)
        print("start", flush=True)
        describe(Description(manifest, directory, 1, source, config.describe), f"{num_photos:,}")
        print("end", flush=True)


def measure(photos: Path, num_photos: int, batch_size: int, num_cpus: int) -> Run:
    """Describe in a fresh process, and sample it from the start of `describe` to its end."""
    command = [sys.executable, "-m", f"benchmarks.{WHAT}", "--child", str(photos)]
    command += ["--images", str(num_photos), "--batch", str(batch_size), "--cpus", str(num_cpus)]
    run = Run(num_photos)
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(command, stdout=said)
        sampler = Sampler(psutil.Process(child.pid))
        started_s = None
        while child.poll() is None:
            said_lines = Path(f"/proc/self/fd/{said.fileno()}").read_text().split()
            if started_s is None and "start" in said_lines:
                started_s = time.perf_counter()
            if started_s is not None and "end" not in said_lines:
                sampler.sample(run)
                run.seconds = time.perf_counter() - started_s
            time.sleep(SECONDS_BETWEEN_SAMPLES)
    if child.returncode:
        raise SystemExit(f"describing {num_photos:,} photos failed with status {child.returncode}")
    return run
