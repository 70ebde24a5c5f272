"""Re-ranking on a CPU by two checkouts of this project, in turn: is the newer one as fast, and are its scores the same?

    python -m benchmarks.rerank_beside --before CHECKOUT --report

CHECKOUT is a directory with an earlier version (`git worktree add CHECKOUT COMMIT`). Each round starts a process for
each version; both do the work of `benchmarks.rerank_work`. Processor seconds count beside wall seconds, because another
program on the machine changes them less. It takes some 15 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks import shared

WHAT = "rerank_beside"
HERE = Path(__file__).resolve().parents[1]
WORK = """
import hashlib, json, sys, time
import torch
from benchmarks import rerank_work as work
from pairvpr.config.schema import Precision

num_threads, num_candidates = map(int, sys.argv[1:])
torch.set_num_threads(num_threads)
cpu, found = torch.device("cpu"), {}
exact, rounded = work.network("vitb", cpu), work.network("vitb", cpu, Precision.bf16)
city = work.random_city(1, num_candidates, 322)
with torch.no_grad():
    query, *candidates = (work.plain_dense(exact, pixels) for pixels in (*city.queries, *city.database))
dense = torch.stack(candidates)
small = work.random_city(3, 3, 322)
ways = {
    "pairs, fp32": lambda: {0: work.ours(exact, query, dense, batch_size=4)},
    "pairs, bf16": lambda: {0: work.ours(rounded, query, dense, batch_size=4)},
    "3 queries x 3 candidates, described and scored": lambda: work.our_city(
        exact, small, batch_size=4, queries_per_unit=3, cache_bytes=1 << 32
    ),
}
for name, way in ways.items():
    wall_s, processor_s = time.perf_counter(), time.process_time()
    scores = way()
    seconds = time.perf_counter() - wall_s, time.process_time() - processor_s
    bits = b"".join(scores[number].numpy().tobytes() for number in sorted(scores))
    found[name] = {"seconds": seconds, "sha256": hashlib.sha256(bits).hexdigest()}
print(json.dumps(found))
"""


def measured(checkout: Path, options: argparse.Namespace) -> dict[str, dict]:
    """By work: its seconds (wall, processor) and the digest of its scores, in a process that imports this checkout."""
    ran = subprocess.run(
        [sys.executable, "-c", WORK, str(options.threads), str(options.candidates)],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(ran.stdout.splitlines()[-1])


def main() -> None:
    """Both versions, `--rounds` times in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="checkout of the earlier version")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (1)")
    parser.add_argument("--candidates", type=int, default=8, help="candidates of the query (8)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (5)")
    shared.add_report_option(parser, WHAT)
    options, load_at_start = parser.parse_args(), os.getloadavg()[0]
    versions = {"before": options.before.resolve(), "now": HERE}
    rounds: dict[str, list[dict[str, dict]]] = {name: [] for name in versions}
    for number in range(options.rounds):
        for name, checkout in versions.items():
            rounds[name].append(measured(checkout, options))
            print(f"round {number + 1}, {name}: {rounds[name][-1]}", flush=True)
    rows = []
    for work in rounds["now"][0]:
        for place, clock in enumerate(("wall", "processor")):
            before, now = ([its[work]["seconds"][place] for its in rounds[name]] for name in versions)
            rows.append(
                [
                    f"{work}, {clock}",
                    *(", ".join(f"{s:.2f}" for s in its) for its in (before, now)),
                    f"{statistics.median(now) / statistics.median(before):.3f}",
                ]
            )
    same = [
        work
        for work in rounds["now"][0]
        if len({its[work]["sha256"] for name in versions for its in rounds[name]}) == 1
    ]
    commits = {
        name: subprocess.check_output(["git", "-C", str(its), "rev-parse", "--short", "HEAD"], text=True).strip()
        for name, its in versions.items()
    }
    table = shared.markdown_table(("", "before, s", "now, s", "now / before, medians"), rows)
    report = f"""# Re-ranking on a CPU, two versions in turn

vitb at 322 px, torch's threads: {options.threads}; {options.candidates} candidates of one query, 4 pairs in a pass.
Before is {commits["before"]}, now is {commits["now"]}; each round starts a process for each. A ratio below 1 is faster.

{table}

Scores with the same bits in both versions and all rounds: {"; ".join(same) or "none"}.

## Circumstances

{shared.circumstances(WHAT, load_at_start)}"""
    shared.publish(WHAT, report, options.report)


if __name__ == "__main__":
    main()
