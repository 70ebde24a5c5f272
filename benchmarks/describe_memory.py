"""Resident memory of every kind of process while photos are described: it must not grow with their number.

    python -m benchmarks.describe_memory --images 1000 10000 --report

Run it by hand on an idle machine, from the root of the checkout. Photos of a toy city (640 x 480 JPEG) are drawn
into a temporary folder first. Each number of photos is described with the tiny network in a fresh process with a
fresh Ray; from outside, every 0.2 s, its resident memory and that of all its children is read, until the last
descriptor is on disk. Peaks are by role:

- driver: the process that calls `describe`
- network actor: Ray's workers that run the network
- decode workers: Ray's other workers (decode, commit a shard, idle)
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
from pairvpr.distributed.network import ModelSource
from pairvpr.distributed.progress import say
from pairvpr.distributed.runtime import ray_session
from pairvpr.models.weights import load_weights

WHAT = "describe_memory"
SECONDS_BETWEEN_SAMPLES = 0.2
NUM_THREADS = 2
ROLES = ("driver", "network actor", "decode workers", "Ray's own")
RAYS_OWN = tuple(
    f"ray::{name}"
    for name in (
        "_StatsActor",
        "_AutoscalingCoordinatorActor",
        "ActorLocationTracker",
        "RuntimeEnvAgent",
        "DashboardAgent",
    )
)
"""Titles of Ray's processes that look like workers and do none of our work."""
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
        is_worker = title.startswith("ray::") and not title.startswith(RAYS_OWN)
        return "decode workers" if is_worker else "Ray's own"


def describe_here(photos: Path, marks: Path, num_photos: int, batch_size: int, num_cpus: int) -> None:
    """The work of the fresh process. The files `start` and `end` appear in `marks` around `describe`."""
    config = shared.job_config("tiny", batch_size, NUM_THREADS)
    weights = load_weights(config.model)
    with ray_session(ClusterConfig(num_cpus=num_cpus)), tempfile.TemporaryDirectory() as directory:
        source = ModelSource(config.model, ray.put(weights))
        manifest = shared.first_photos(photos, num_photos)
        (marks / "start").touch()
        describe(
            Description(manifest, directory, 1, source, config.describe), f"{num_photos:,}", needs_a_readable_photo=True
        )
        (marks / "end").touch()


def measure(photos: Path, num_photos: int, batch_size: int, num_cpus: int) -> Run:
    """Describe in a fresh process, and sample it from the start of `describe` to its end."""
    run = Run(num_photos)
    with tempfile.TemporaryDirectory() as folder:
        marks = Path(folder)
        command = [sys.executable, "-m", f"benchmarks.{WHAT}", "--child", str(photos), str(marks)]
        command += ["--images", str(num_photos), "--batch", str(batch_size), "--cpus", str(num_cpus)]
        child = subprocess.Popen(command, stdout=sys.stderr)
        sampler = Sampler(psutil.Process(child.pid))
        started_s = None
        while child.poll() is None:
            if started_s is None and (marks / "start").exists():
                started_s = time.perf_counter()
            if started_s is not None and not (marks / "end").exists():
                sampler.sample(run)
                run.seconds = time.perf_counter() - started_s
            time.sleep(SECONDS_BETWEEN_SAMPLES)
    if child.returncode:
        raise SystemExit(f"describing {num_photos:,} photos failed with status {child.returncode}")
    return run


def peaks_table(runs: list[Run], name: str) -> str:
    """Peaks of `resident` or `unshared` by role, MiB, and the last run less the first."""
    header = ["role", *(f"processes, {run.num_photos:,}" for run in runs)]
    header += [f"largest, {run.num_photos:,}" for run in runs] + ["difference"]
    header += [f"together, {run.num_photos:,}" for run in runs] + ["difference"]
    rows = []
    for role in ROLES:
        peaks: list[Peaks] = [getattr(run, name) for run in runs]
        largest = [peak.largest[role] / MIB for peak in peaks]
        together = [peak.together[role] / MIB for peak in peaks]
        row = [role, *(f"{peak.num_processes[role]}" for peak in peaks)]
        for sizes in (largest, together):
            row += [f"{size:,.0f}" for size in sizes] + [f"{sizes[-1] - sizes[0]:+,.0f}"]
        rows.append(row)
    return shared.markdown_table(header, rows)


def growth_mib(runs: list[Run]) -> float:
    """How much more the last run's largest process of a role took than the first's, not counting shared pages."""
    return max((runs[-1].unshared.largest[role] - runs[0].unshared.largest[role]) / MIB for role in ROLES)


def report(runs: list[Run], batch_size: int, allowance_mib: float, load_at_start: float) -> str:
    """All tables as Markdown."""
    growth = growth_mib(runs)
    lengths = ", ".join(f"{run.num_photos:,} in {run.seconds:.0f} s ({run.num_samples} samples)" for run in runs)
    return f"""# Describe: memory and the number of photos

Peaks of resident memory in MiB by role while photos are described (tiny network, batches of {batch_size}, JPEG photos
of {shared.WIDTH_PX} x {shared.HEIGHT_PX}), read every {SECONDS_BETWEEN_SAMPLES} s. `largest`: the largest process of
the role. `together`: all its processes at one time, shared pages counted in each of them.

Photos: {lengths}.

{peaks_table(runs, "resident")}

The same without pages that are shared with other processes:

{peaks_table(runs, "unshared")}

Largest growth of a role's largest process, without shared pages: {growth:+,.0f} MiB, which is
{"within" if growth <= allowance_mib else "MORE THAN"} the {allowance_mib:,.0f} MiB allowed for noise.

{shared.circumstances(WHAT, load_at_start)}"""


def main() -> int:
    """Each number of photos, one report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10000], help="numbers of photos (1000 10000)")
    parser.add_argument("--batch", type=int, default=32, help="photos of a batch (32)")
    parser.add_argument("--distinct", type=int, default=300, help="photos drawn; more are hard links to them (300)")
    parser.add_argument("--cpus", type=int, default=2, help="CPUs that Ray may plan with (2)")
    parser.add_argument("--allowance-mib", type=float, default=64.0, help="growth of a process that is noise (64)")
    parser.add_argument("--child", type=Path, nargs=2, metavar=("PHOTOS", "MARKS"), help=argparse.SUPPRESS)
    shared.add_report_option(parser, WHAT)
    options = parser.parse_args()
    if options.child:
        photos, marks = options.child
        describe_here(photos, marks, options.images[0], options.batch, options.cpus)
        return 0
    if min(options.images) < 1:
        parser.error("expected numbers of photos above 0")
    load_at_start = os.getloadavg()[0]
    os.environ.pop("RAY_ADDRESS", None)  # only processes of this machine can be sampled
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder)
        say("drawing the photos")
        shared.draw_photos(photos, max(options.images), options.distinct)
        runs = [measure(photos, number, options.batch, options.cpus) for number in sorted(options.images)]
    shared.publish(WHAT, report(runs, options.batch, options.allowance_mib, load_at_start), options.report)
    return int(growth_mib(runs) > options.allowance_mib)


if __name__ == "__main__":
    sys.exit(main())
