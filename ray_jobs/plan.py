"""`python -m ray_jobs.plan plan.num_images=2805840 model=vitb`: sizes, memory and hours, before anything is run."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pairvpr.config.compose import load
from pairvpr.config.schema import PlanConfig
from pairvpr.distributed.plan import plan
from ray_jobs.command import run


def main(arguments: Sequence[str]) -> None:
    """One plan; it is no failure that there is no room for it."""
    plan(load(PlanConfig, arguments))


if __name__ == "__main__":
    sys.exit(run(PlanConfig, main))
