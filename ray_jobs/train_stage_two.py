"""`python -m ray_jobs.train_stage_two train=vitb train.root=DIR output=OUT`: training (docs/training.md)."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pairvpr.config.compose import load
from pairvpr.config.train_schema import TrainStageTwoConfig
from pairvpr.distributed.train import train_stage_two
from ray_jobs.command import run


def main(arguments: Sequence[str]) -> None:
    """From the last checkpoint in `output`, or from the start."""
    train_stage_two(load(TrainStageTwoConfig, arguments))


if __name__ == "__main__":
    sys.exit(run(TrainStageTwoConfig, main))
