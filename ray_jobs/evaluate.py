"""`python -m ray_jobs.evaluate benchmark=toy_city output=OUT`: describe, index, retrieve, re-rank, report."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pairvpr.config.compose import load_evaluations
from pairvpr.config.schema import EvaluateConfig
from pairvpr.distributed.evaluate import evaluate
from ray_jobs.command import run


def main(arguments: Sequence[str]) -> None:
    """One benchmark, or several with `benchmarks=[a,b]`."""
    evaluate(load_evaluations(arguments))


if __name__ == "__main__":
    sys.exit(run(EvaluateConfig, main))
