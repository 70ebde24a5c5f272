"""`pairvpr train_stage_one train=vitb train.root=DIR output=OUT`: place-aware pre-training of encoder and decoder."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pairvpr.cli import run_job
from pairvpr.config.compose import load
from pairvpr.config.train_schema import TrainStageOneConfig
from pairvpr.training import stage_one
from ray_jobs.training import train


def main(arguments: Sequence[str]) -> None:
    """From the last checkpoint in `output`, or from the start."""
    train_stage_one(load(TrainStageOneConfig, arguments))


def train_stage_one(config: TrainStageOneConfig) -> None:
    """Train; see `docs/training.md`."""
    train(config, [str(name) for name in config.train.datasets], stage_one.make_stage, stage_one.start_weights)


if __name__ == "__main__":
    sys.exit(run_job("train_stage_one"))
