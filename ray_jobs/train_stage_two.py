"""`pairvpr train_stage_two train=vitb train.root=DIR output=OUT`: global descriptor and pair classifier together."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pairvpr.cli import run_job
from pairvpr.config.compose import load
from pairvpr.config.train_schema import TrainStageTwoConfig
from pairvpr.training import stage_two
from ray_jobs.training import train


def main(arguments: Sequence[str]) -> None:
    """From the last checkpoint in `output`, or from the start."""
    train_stage_two(load(TrainStageTwoConfig, arguments))


def train_stage_two(config: TrainStageTwoConfig) -> None:
    """Train; see `docs/training.md`."""
    train(config, ["gsv_cities"], stage_two.make_stage, stage_two.start_weights)


if __name__ == "__main__":
    sys.exit(run_job("train_stage_two"))
