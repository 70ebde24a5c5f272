"""How fast the Ray description pipeline is, next to a bare loop in one process over the same photos.

    python -m benchmarks.describe_throughput --rounds 3 --images-tiny 4000 --images-vits 96 --report

Run it by hand on an idle machine, from the root of the checkout. Photos of a toy city (640 x 480 JPEG) are drawn
into a temporary folder first. Then, for each network, rounds alternate: baseline, ours, baseline, ours, ...

- baseline: decode and resize a batch with Pillow, `PairVPR.describe`, next batch; nothing is written. The network
  is built and has seen one batch before the clock starts.
- ours: `pairvpr.distributed.describe.describe` until all descriptors are on disk. Ray runs already and holds the
  weights; starting the workers and building the network count. Ray gets `--cpus` CPUs: with 2 it plans one actor.

Both have the same batches and the same number of network threads. `whole` is photos over wall time, `steady` leaves
out what comes before the first finished batch. It flatters ours when photos are few: what was decoded while the
actor started is not decoded again on the clock. `last half` counts the second half of the photos alone, by when that
stock is mostly used up. With `tiny` decoding dominates, with `vits` the network (untrained weights: the time is the
same).

Goal: ours / baseline of the medians at least 0.9. Expect that of `steady` and `last half`; `whole` pays some seconds
of start whatever the number of photos, so it nears them as photos get more. The rounds and photos above take minutes
on two cores. Ends with status 1 if the two ways gave different descriptors.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from PIL import Image

import pairvpr.distributed.describe as pipeline
from benchmarks import shared
from pairvpr.config.schema import BuildIndexConfig, ClusterConfig
from pairvpr.data.manifest import Manifest
from pairvpr.distributed.network import ModelSource
from pairvpr.distributed.progress import Progress, say
from pairvpr.distributed.runtime import ray_session
from pairvpr.index import descriptor_shards
from pairvpr.models.pair_vpr import PairVPR, normalise
from pairvpr.models.weights import Weights, build_model, load_weights

WHAT = "describe_throughput"
GOAL = 0.9
NUM_THREADS = 2
SECONDS_TO_SETTLE = 2.0
"""Pause before each clock starts: actors of the round before are still ending."""
SAME_ARRIVAL_S = 0.01
"""Batches of one Ray Data block are reported one after another, and count as one event."""
MAX_DIFFERENCE = 1e-5
RATES = {"whole": 0.0, "steady": 0.0, "last half": 0.5}
"""Ways to count, and the share of the photos that is finished when the clock of the last two starts."""


@dataclass
class Timing:
    """When photos were finished, in seconds since the start."""

    started_s: float = field(default_factory=time.perf_counter)
    finished: list[tuple[float, int]] = field(default_factory=list)
    wall_s: float = 0.0

    def add(self, num_photos: int) -> None:
        """So many are finished now."""
        self.finished.append((time.perf_counter() - self.started_s, num_photos))

    def stop(self) -> Timing:
        """All is done, and where anything is written, on disk."""
        self.wall_s = time.perf_counter() - self.started_s
        return self

    def rate(self, name: str) -> float:
        """Photos/s by one of the ways `RATES` explains; NaN where nothing came after the start of that stretch."""
        total = sum(count for _, count in self.finished)
        if name == "whole":
            return total / self.wall_s
        done = 0
        start = -1
        while start < 0 or done < RATES[name] * total:
            start += 1
            done += self.finished[start][1]
        previous_s = start_s = self.finished[start][0]
        later = 0
        for at_s, count in self.finished[start + 1 :]:
            later += count if later or at_s - previous_s > SAME_ARRIVAL_S else 0
            previous_s = at_s
        return later / (previous_s - start_s) if later else float("nan")


@dataclass(frozen=True)
class Case:
    """One network and its photos."""

    config: BuildIndexConfig
    photos: Manifest
    weights: Weights

    @property
    def batch_size(self) -> int:
        """Photos of a batch, in both ways."""
        return self.config.describe.batch_size


@dataclass(frozen=True)
class Rounds:
    """What one network measured."""

    case: Case
    baseline: list[Timing]
    ours: list[Timing]
    difference: float
    """The largest of all entries of the descriptors."""


def baseline(case: Case, model: PairVPR) -> tuple[Timing, NDArray[np.float32]]:
    """The bare loop."""
    size_px, urls = case.config.model.image_size_px, [case.photos.url(i) for i in range(len(case.photos))]
    device = next(model.parameters()).device
    descriptors = []
    timing = Timing()
    for first in range(0, len(urls), case.batch_size):
        batch = urls[first : first + case.batch_size]
        pixels = np.empty((len(batch), size_px, size_px, 3), np.uint8)
        for position, url in enumerate(batch):
            with Image.open(url) as image:
                resized = image.convert("RGB").resize((size_px, size_px), Image.Resampling.BILINEAR)
                pixels[position] = np.asarray(resized)
        with torch.inference_mode():
            rows, _ = model.describe(normalise(torch.from_numpy(pixels).to(device)))
            descriptors.append(rows.cpu().numpy())
        timing.add(len(batch))
    return timing.stop(), np.concatenate(descriptors)


def ours(case: Case, source: ModelSource) -> tuple[Timing, NDArray[np.float32]]:
    """The package's pipeline; its progress is what tells when a batch is finished."""
    with tempfile.TemporaryDirectory() as directory:
        description = pipeline.Description(case.photos, directory, 1, source, case.config.describe)
        timing = Timing()

        class Timed(Progress):
            def add(self, count: int) -> None:
                timing.add(count)
                super().add(count)

        with patch.object(pipeline, "Progress", Timed):
            pipeline.describe(description, case.config.model.name, needs_a_readable_photo=True)
        timing.stop()
        _, descriptors = descriptor_shards.read_descriptors(directory)
        return timing, descriptors


def measure(case: Case, num_rounds: int) -> Rounds:
    """Baseline, ours, baseline, ours, ..."""
    torch.set_num_threads(NUM_THREADS)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(case.config.model, case.weights, device)
    source = ModelSource(case.config.model, ray.put(case.weights))
    warm_up = Manifest(case.photos.root, case.photos.table.slice(0, case.batch_size))
    baseline(Case(case.config, warm_up, case.weights), model)
    bare: list[Timing] = []
    mine: list[Timing] = []
    difference = 0.0
    for number in range(num_rounds):
        time.sleep(SECONDS_TO_SETTLE)
        timing, expected = baseline(case, model)
        bare.append(timing)
        time.sleep(SECONDS_TO_SETTLE)
        timing, descriptors = ours(case, source)
        mine.append(timing)
        difference = max(difference, float(np.abs(descriptors - expected).max()))
        say(
            f"{case.config.model.name}, round {number + 1} of {num_rounds}: "
            f"baseline {bare[-1].rate('whole'):.1f}, ours {timing.rate('whole'):.1f} photos/s"
        )
    return Rounds(case, bare, mine, difference)


def summary_rows(rounds: Rounds) -> list[list[str]]:
    """The medians and their ratio, for every way to count."""
    rows = []
    for name in RATES:
        ours_rate, baseline_rate = (
            statistics.median(timing.rate(name) for timing in timings) for timings in (rounds.ours, rounds.baseline)
        )
        ratio = ours_rate / baseline_rate
        rows.append(
            [
                rounds.case.config.model.name,
                f"{len(rounds.case.photos):,}",
                f"{rounds.case.batch_size}",
                name,
                f"{baseline_rate:,.1f}",
                f"{ours_rate:,.1f}",
                f"{ratio:.2f}",
                "yes" if ratio >= GOAL else "no",
            ]
        )
    return rows


def round_rows(rounds: Rounds) -> list[list[str]]:
    """Each round by itself."""
    return [
        [rounds.case.config.model.name, f"{number}"]
        + [f"{timing.rate(name):,.1f}" for name in RATES for timing in (bare, mine)]
        + [f"{mine.wall_s:.1f}", f"{mine.finished[0][0]:.1f}"]
        for number, (bare, mine) in enumerate(zip(rounds.baseline, rounds.ours, strict=True), 1)
    ]


def report(measured: list[Rounds], load_at_start: float, num_cpus: int) -> str:
    """All tables as Markdown."""
    summary = shared.markdown_table(
        ("network", "photos", "batch", "rate", "baseline, photos/s", "ours, photos/s", "ratio", f"at least {GOAL}"),
        [row for rounds in measured for row in summary_rows(rounds)],
    )
    each = shared.markdown_table(
        (
            "network",
            "round",
            *(f"{who} {name}" for name in RATES for who in ("baseline", "ours")),
            "ours, s",
            "ours, s to first batch",
        ),
        [row for rounds in measured for row in round_rows(rounds)],
    )
    size = f"{shared.WIDTH_PX} x {shared.HEIGHT_PX}"
    differences = ", ".join(f"{rounds.case.config.model.name} {rounds.difference:.1e}" for rounds in measured)
    return f"""# Describe: Ray pipeline and bare loop

Medians of {len(measured[0].ours)} alternating rounds, JPEG photos of {size}, {NUM_THREADS} network threads in both,
Ray with {num_cpus} CPUs. `whole`: photos over wall time, with Ray already started. `steady`: from the first finished
batch to the last. `last half`: as `steady`, of the second half of the photos.

{summary}

Every round, photos/s:

{each}

Largest difference between the descriptors of both ways: {differences}.

{shared.circumstances(WHAT, load_at_start)}"""


def main() -> int:
    """Both networks, one report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each network (3)")
    parser.add_argument("--images-tiny", type=int, default=8000, help="photos for the tiny network, 0 = skip it (8000)")
    parser.add_argument("--images-vits", type=int, default=192, help="photos for vits, 0 = skip it (192)")
    parser.add_argument("--batch-tiny", type=int, default=32, help="photos of a batch for the tiny network (32)")
    parser.add_argument("--batch-vits", type=int, default=16, help="photos of a batch for vits (16)")
    parser.add_argument("--distinct", type=int, default=300, help="photos drawn; more are hard links to them (300)")
    parser.add_argument("--cpus", type=int, default=2, help="CPUs that Ray may plan with (2)")
    shared.add_report_option(parser, WHAT)
    options = parser.parse_args()
    wanted = {
        "tiny": (options.images_tiny, options.batch_tiny),
        "vits": (options.images_vits, options.batch_vits),
    }
    if options.rounds < 1 or options.images_tiny + options.images_vits < 1:
        parser.error("expected at least one round and one photo")
    load_at_start = os.getloadavg()[0]
    os.environ.pop("RAY_ADDRESS", None)  # the same machine for both
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder)
        say("drawing the photos")
        shared.draw_photos(photos, max(number for number, _ in wanted.values()), options.distinct)
        with ray_session(ClusterConfig(num_cpus=options.cpus)):
            measured = []
            for name, (number, batch_size) in wanted.items():
                if number:
                    config = shared.job_config(name, batch_size, NUM_THREADS)
                    case = Case(config, shared.first_photos(photos, number), load_weights(config.model))
                    measured.append(measure(case, options.rounds))
    shared.publish(WHAT, report(measured, load_at_start, options.cpus), options.report)
    return int(max(rounds.difference for rounds in measured) > MAX_DIFFERENCE)


if __name__ == "__main__":
    sys.exit(main())
