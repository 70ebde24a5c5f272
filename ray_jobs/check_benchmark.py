"""`pairvpr check_benchmark benchmark=msls_val datasets_root=DIR`: is the download whole?"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pairvpr.cli import run_job
from pairvpr.config.compose import load
from pairvpr.config.schema import CheckBenchmarkConfig
from pairvpr.data.benchmarks.check import check_benchmark
from pairvpr.errors import IncompleteRunError


def main(arguments: Sequence[str]) -> None:
    """One benchmark; no Ray is started."""
    config = load(CheckBenchmarkConfig, arguments)
    problems = check_benchmark(config)
    if problems:
        what = "problem" if len(problems) == 1 else "problems"
        raise IncompleteRunError(f"{config.benchmark.name}: {len(problems):,} {what}, listed above")
    print(f"{config.benchmark.name}: no problems")


if __name__ == "__main__":
    sys.exit(run_job("check_benchmark"))
