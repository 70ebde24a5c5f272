"""Steps of both training jobs: check, read the training sets, claim the output, train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pairvpr.config.train_schema import TrainConfig
from pairvpr.data import storage
from pairvpr.data.benchmarks import load_benchmark, prepare_benchmark
from pairvpr.data.claim import check_claim, check_writable, claim
from pairvpr.data.samples import num_batches
from pairvpr.data.training_sets.read import read_training_sets
from pairvpr.distributed.runtime import ray_session
from pairvpr.distributed.train_workers import Job, fit
from pairvpr.errors import UserError
from pairvpr.models.weights import Weights
from pairvpr.status import published
from pairvpr.terminal import say
from pairvpr.training.checkpoint import steps_done
from pairvpr.training.metrics_log import check_wandb


def train(config: Any, datasets: list[str], make_stage: Any, start_weights: Callable[[Any], Weights]) -> None:
    train: TrainConfig = config.train
    output = storage.absolute(config.output)
    check_writable(output, "output")
    if train.wandb:
        check_wandb()
    validation = None if train.validation is None else load_benchmark(train.validation, output)
    if validation is not None and validation.positives is None:
        raise UserError(
            f"train.validation={validation.name}: it has no ground truth; expected a benchmark with positives"
        )
    start = start_weights(config)
    csv = getattr(train, "gldv2_csv", None)
    sets = read_training_sets(datasets, storage.absolute(train.root), storage.join(output, "cache"), csv)
    num_places = sum(len(training_set) for training_set in sets)
    batches_per_epoch = num_batches(num_places, train.global_batch_size)
    num_steps = min(train.epochs * batches_per_epoch, train.max_steps or train.epochs * batches_per_epoch)
    job = Job(
        config=config,
        output=output,
        sets=sets,
        start=start,
        validation=validation,
        make_stage=make_stage,
        num_steps=num_steps,
    )
    settings, earlier = job.settings(), [job.earlier_settings()]
    check_claim(output, settings, "output", earlier=earlier)
    if steps_done(output) >= num_steps:
        with published(output, "training"):  # a driver that was killed after its last step left another status
            say(f"training: finished earlier ({num_steps:,} steps), skipped")
        return
    with ray_session(config.cluster):
        claim(output, settings, "output", earlier)
        if train.validation is not None:
            prepare_benchmark(train.validation, output)
        with published(output, "training"):
            say(f"training: {num_places:,} places, {batches_per_epoch:,} steps an epoch, {num_steps:,} steps in all")
            fit(job)
