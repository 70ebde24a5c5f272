"""A miniature GSV-Cities, a small network, and training runs on them, with Ray and without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pairvpr.config.compose import load
from pairvpr.config.train_schema import TrainStageOneConfig, TrainStageTwoConfig
from pairvpr.data.training_sets.gsv_cities import read_gsv_cities
from pairvpr.toy import training_sets as toy_training_sets
from pairvpr.training import loop, stage_one, stage_two
from pairvpr.training.context import TrainContext
from pairvpr.training.metrics_log import read_metrics
from tests.support.runs import SMALL_NETWORK

STAGES = (1, 2)
NUM_PLACES = 10
"""Of each of two cities: 5 steps an epoch with batches of 4."""
CONFIGS = {1: TrainStageOneConfig, 2: TrainStageTwoConfig}
MODULES = {1: stage_one, 2: stage_two}
TIMEOUT = timedelta(seconds=120)
JOBS = {1: "train_stage_one", 2: "train_stage_two"}
NOT_THE_SAME = ("images_per_s", "waiting_for_data")


def draw_training_set(root: Path) -> None:
    """`gsv_cities` below `root`."""
    toy_training_sets.write_gsv_cities(
        str(root / "gsv_cities"), num_places=NUM_PLACES, photos_per_place=5, width_px=96, height_px=72
    )


def arguments(stage: int, root: Path, output: Path, *more: str) -> list[str]:
    """The command line of a short training; later arguments win."""
    return [
        *SMALL_NETWORK,
        "train=tiny",
        f"train.root={root}",
        f"output={output}",
        "train.epochs=2",
        "train.keep_every_epochs=1",
        "train.global_batch_size=4",
        "train.log_every_steps=1",
        "train.num_threads_per_worker=1",
        "train.loader_processes=0",
        *(["train.datasets=[gsv_cities]", "train.warmup_epochs=1", "train.lr=0.01"] if stage == 1 else []),
        *more,
    ]


def train_here(
    stage: int,
    line: list[str],
    *,
    rank: int = 0,
    world_size: int = 1,
    context_type: Callable[..., TrainContext] = TrainContext,
) -> list[dict[str, Any]]:
    """A run in this process, as a worker of Ray Train would do it; the rows of its log."""
    config = load(CONFIGS[stage], line)
    torch.set_num_threads(config.train.num_threads_per_worker)
    group = dist.new_group() if world_size > 1 else None
    assert group is None or isinstance(group, dist.ProcessGroup)
    context = context_type(
        rank=rank,
        world_size=world_size,
        device=torch.device("cpu"),
        output=config.output,
        settings={},
        say=lambda _: None,
        group=group,
    )
    module = MODULES[stage]
    sets = [read_gsv_cities(f"{config.train.root}/gsv_cities")]
    made = module.make_stage(config, sets, module.start_weights(config), context)  # pyright: ignore[reportArgumentType]
    loop.run(made, config.train, context)
    return read_metrics(config.output)


def train_on_ranks(stage: int, line: list[str], world_size: int, folder: Path) -> None:
    """The same on several processes that talk over gloo."""
    train_all_on_ranks([(stage, line)], world_size, folder)


def train_all_on_ranks(runs: Sequence[tuple[int, list[str]]], world_size: int, folder: Path) -> None:
    """Several runs, each with its stage, in the same processes, whose start takes longer than a run."""
    mp.spawn(_rank, (runs, world_size, folder), nprocs=world_size)  # pyright: ignore[reportPrivateImportUsage]


def _rank(rank: int, runs: Sequence[tuple[int, list[str]]], world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    for number, (stage, line) in enumerate(runs):
        store = f"file://{folder / f'store{number}'}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
        train_here(stage, line, rank=rank, world_size=world_size)
        dist.destroy_process_group()


def losses(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What two runs that are the same have in common: everything but speed."""
    return [{name: value for name, value in row.items() if name not in NOT_THE_SAME} for row in rows]
