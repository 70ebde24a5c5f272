"""What one `Localizer.locate` costs, step by step, against the same network called bare.

    python -m benchmarks.locate_speed --report

Run it by hand on an idle machine, from the root of the checkout; it takes some minutes on two cores. The network is an
untrained vits (322 px): its speed is that of any weights. The candidates' features are cached, as they are for a robot
that sees a place again. The ways alternate over the rounds; the fastest round of each counts, because other work on the
machine can only slow one down.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks import shared
from pairvpr import DescribeConfig, Localizer, RerankConfig, SearchConfig
from pairvpr.models.pair_scorer import PairScorer
from pairvpr.photo import Asked
from pairvpr.retrieval.describe import Describer

WHAT = "locate_speed"
NUM_PHOTOS = 24


def main() -> None:
    """Measure, print, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vits")
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    shared.add_report_option(parser, WHAT)
    options = parser.parse_args()
    load_at_start = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        table = measure(Path(folder), options)
    about = shared.circumstances(WHAT, load_at_start)
    shared.publish(WHAT, f"# One photo through `Localizer.locate`\n\n{about}\n\n{table}", options.report)


def measure(folder: Path, options: argparse.Namespace) -> str:
    """The table of the report."""
    (folder / "photos").mkdir()
    shared.draw_photos(folder / "photos", NUM_PHOTOS, NUM_PHOTOS)
    sections = {
        "describe": DescribeConfig(num_threads_per_actor=options.threads),
        "search": SearchConfig(num_threads_per_actor=options.threads),
        "rerank": RerankConfig(num_candidates=options.candidates, num_threads_per_actor=options.threads),
    }
    build = {"model": options.model, "device": "cpu", "describe": sections["describe"]}
    Localizer.build(folder / "photos", folder / "index", **build)
    localizer = Localizer.open(folder / "index", device="cpu", **sections)
    photo = folder / "photos" / shared.photo_name(5)
    matches = localizer.locate(photo, k=options.candidates)  # from here on their features are cached

    describer: Describer = localizer._network._pair_describer  # pyright: ignore[reportAttributeAccessIssue]
    network = describer.model.config
    pixels = Asked(photo).pixels(network)
    descriptor = localizer.describe(photo)
    candidates = torch.stack([describer.embedded(Asked(match.url).pixels(network)) for match in matches])

    @torch.inference_mode()
    def bare() -> None:
        _, embedded = describer.both(pixels)
        scorer, num_pairs = PairScorer(describer.model), len(candidates)
        first, memory = scorer.as_first(embedded[None]), scorer.as_memory(embedded[None], keep=True)
        query_of, candidate_of = torch.zeros(num_pairs, dtype=torch.int64), torch.arange(num_pairs)
        scorer.logits(first, query_of, scorer.as_memory(candidates, keep=False), candidate_of)
        scorer.logits(scorer.as_first(candidates), candidate_of, memory, query_of)

    ways: dict[str, Callable[[], object]] = {
        "locate": lambda: localizer.locate(photo, k=min(5, options.candidates)),
        "the network alone: one photo, and pairs both ways": bare,
        "read, decode and resize": lambda: Asked(photo).pixels(network),
        "retrieve, and make matches of what is found": lambda: localizer.retrieve(
            descriptor, k=min(5, options.candidates)
        ),
    }
    best_ms, best_cpu_ms = dict.fromkeys(ways, np.inf), dict.fromkeys(ways, np.inf)
    for _ in range(options.rounds):
        for name, way in ways.items():
            torch.set_num_threads(options.threads)
            start_s, start_cpu_s = time.perf_counter(), time.process_time()
            way()
            best_ms[name] = min(best_ms[name], 1000 * (time.perf_counter() - start_s))
            best_cpu_ms[name] = min(best_cpu_ms[name], 1000 * (time.process_time() - start_cpu_s))
    whole_ms, bare_ms, *_ = best_ms.values()
    whole_cpu_ms, bare_cpu_ms, *_ = best_cpu_ms.values()
    lines = [
        f"{options.model}, {network.image_size_px} px, {options.candidates} candidates with cached features, "
        f"{options.threads} thread(s), the fastest of {options.rounds} rounds",
        "",
        "| step | ms | of which on processors |",
        "|---|---:|---:|",
        *(f"| {name} | {value:.1f} | {best_cpu_ms[name]:.1f} |" for name, value in best_ms.items()),
        "",
        f"What surrounds the network takes {100 * (whole_ms - bare_ms) / bare_ms:+.1f} % of its time, "
        f"{100 * (whole_cpu_ms - bare_cpu_ms) / bare_cpu_ms:+.1f} % of its processor time.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
