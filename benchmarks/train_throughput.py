"""How fast a training job's steps are, next to a plain torch loop in one process with the same network and batch.

    python -m benchmarks.train_throughput --report

Run it by hand on an idle machine, from the root of the checkout. A miniature GSV-Cities of 1,380 places is drawn into a
temporary folder, so that an epoch, at whose end the job writes a checkpoint, has 21 (stage one) and 115 steps. Rounds
alternate: baseline, ours, ...

- baseline: draw the samples of a batch, normalise, forward, backward, AdamW; no log, no checkpoint, no Ray.
- ours: `python -m ray_jobs.train_stage_one` and `train_stage_two` with one worker and the recipe's loader process; the
  rates are those of its own `metrics.jsonl`, from the first logged row on, so that starting Ray and the worker does not
  count. It also says which share of the time a step waits for its photos.

Goal: ours / baseline of the medians at least 0.9.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import shared
from pairvpr.config.compose import load
from pairvpr.config.train_schema import TrainStageOneConfig, TrainStageTwoConfig
from pairvpr.data.samples import PHOTOS_PER_PLACE
from pairvpr.data.training_sets.gsv_cities import read_gsv_cities
from pairvpr.distributed.progress import say
from pairvpr.models.pair_vpr import PairVPR, normalise
from pairvpr.training import stage_one, stage_two
from pairvpr.training.context import TrainContext
from pairvpr.training.losses import mine_pairs, multi_similarity_loss, pair_loss_sum, reconstruction_losses
from pairvpr.training.metrics_log import read_metrics
from pairvpr.training.stage_one import PairBatch
from pairvpr.training.stage_two import PlaceBatch

WHAT = "train_throughput"
GOAL = 0.9
NUM_THREADS = 2
STEPS_TO_WARM_UP, STEPS_A_ROW = 10, 10
JOBS = {"stage one": "train_stage_one", "stage two": "train_stage_two"}


def arguments(name: str, root: str, output: str, batch: int, steps: int) -> list[str]:
    """The job's command line."""
    return [
        f"train={'vits' if name.endswith('vits') else 'tiny'}",
        f"train.root={root}",
        f"output={output}",
        "model.precision=fp32",
        f"train.global_batch_size={batch}",
        "train.epochs=1000",
        f"train.max_steps={steps}",
        f"train.log_every_steps={STEPS_A_ROW}",
        f"train.num_threads_per_worker={NUM_THREADS}",
        *(["train.datasets=[gsv_cities]"] if name.startswith("stage one") else []),
    ]


def stage_one_loss(model: PairVPR, batch: PairBatch) -> Tensor:
    """() of one batch."""
    first = normalise(batch.first)
    prediction = model.reconstruct(first, normalise(batch.second), batch.mask)
    return reconstruction_losses(prediction, first, batch.mask, norm_pix_loss=True).mean()


def stage_two_loss(model: PairVPR, batch: PlaceBatch) -> Tensor:
    """() of one batch."""
    descriptors, dense = model.describe(normalise(batch.photos))
    pairs = mine_pairs(descriptors.detach(), batch.labels)
    first = dense[pairs.hard_anchor]
    positive = model.pair_logits(first, dense[pairs.hard_positive])
    negative = model.pair_logits(first, dense[pairs.hard_negative])
    pair_loss = pair_loss_sum(positive, negative) / (2 * len(first))
    return multi_similarity_loss(descriptors, batch.labels, pairs) + 2.0 * pair_loss


def baseline(name: str, line: list[str], steps: int) -> float:
    """Photos/s of the plain loop, after its first steps."""
    torch.set_num_threads(NUM_THREADS)
    context = TrainContext(rank=0, world_size=1, device=torch.device("cpu"), output="unused", settings={})
    places = [read_gsv_cities(f"{_value(line, 'train.root')}/gsv_cities")]
    loss_of: Callable[..., Tensor]
    if name.startswith("stage one"):
        config = load(TrainStageOneConfig, line)
        stage = stage_one.make_stage(config, places, stage_one.start_weights(config), context)
        loss_of, photos_per_sample = stage_one_loss, 2
    else:
        config = load(TrainStageTwoConfig, line)
        stage = stage_two.make_stage(config, places, stage_two.start_weights(config), context)
        loss_of, photos_per_sample = stage_two_loss, PHOTOS_PER_PLACE
    size = config.train.global_batch_size
    optimizer = torch.optim.AdamW([p for p in stage.model.parameters() if p.requires_grad], lr=1e-5)
    started_s = 0.0
    batches_per_epoch = len(stage.sampler) // size
    for step in range(steps):
        if step == STEPS_TO_WARM_UP:
            started_s = time.perf_counter()
        epoch, batch = divmod(step, batches_per_epoch)
        samples = [stage.sampler.sample(epoch, batch * size + i) for i in range(size)]
        loss = loss_of(stage.model, stage.collate(samples))  # pyright: ignore[reportArgumentType]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return (steps - STEPS_TO_WARM_UP) * size * photos_per_sample / (time.perf_counter() - started_s)


def ours(name: str, line: list[str]) -> tuple[float, float]:
    """Photos/s of the job after its first row, and the share of the time that it waits for photos."""
    job = JOBS[" ".join(name.split()[:2])]
    subprocess.run([sys.executable, "-m", f"ray_jobs.{job}", *line], check=True, capture_output=True)
    rows = [row for row in read_metrics(_value(line, "output")) if "images_per_s" in row][1:]
    seconds = [1 / row["images_per_s"] for row in rows]
    waiting = sum(row["waiting_for_data"] * s for row, s in zip(rows, seconds, strict=True)) / sum(seconds)
    return len(rows) / sum(seconds), waiting


def _value(line: list[str], key: str) -> str:
    return next(word.partition("=")[2] for word in line if word.startswith(f"{key}="))


def main() -> None:
    """Both stages of the small network, and of vits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each case (3)")
    parser.add_argument("--steps", type=int, default=60, help="steps of the small network in a round (60)")
    shared.add_report_option(parser, WHAT)
    options = parser.parse_args()
    os.environ.pop("RAY_ADDRESS", None)
    load_at_start = os.getloadavg()[0]
    cases = {"stage one, tiny": 64, "stage two, tiny": 12}
    summary, each = [], []
    with tempfile.TemporaryDirectory() as folder:
        draw = [sys.executable, "-m", "pairvpr.toy.training_sets", f"{folder}/root"]
        subprocess.run([*draw, "--places", "60", "--photos", "5"], check=True)
        for name, batch in cases.items():
            job_name = name.replace(",", "")
            rates: list[tuple[float, float, float]] = []
            for number in range(options.rounds):
                output = str(Path(folder) / f"{job_name} {number}".replace(" ", "_"))
                line = arguments(job_name, f"{folder}/root", output, batch, options.steps)
                rates.append((baseline(job_name, line, options.steps), *ours(job_name, line)))
                say(f"{name}, round {number + 1}: baseline {rates[-1][0]:.1f}, ours {rates[-1][1]:.1f} photos/s")
                each.append(
                    [name, f"{number + 1}", *(f"{value:.1f}" for value in rates[-1][:2]), f"{rates[-1][2]:.0%}"]
                )
            plain, job, waiting = (statistics.median(values) for values in zip(*rates, strict=True))
            verdict = "yes" if job / plain >= GOAL else "no"
            summary.append(
                [name, f"{batch}", f"{plain:.1f}", f"{job:.1f}", f"{job / plain:.2f}", f"{waiting:.0%}", verdict]
            )
    header = (
        "step",
        "batch",
        "baseline, photos/s",
        "ours, photos/s",
        "ratio",
        "waiting for photos",
        f"at least {GOAL}",
    )
    text = f"""# Training: the job's steps and a plain loop

Medians of {options.rounds} alternating rounds of {options.steps} steps, {NUM_THREADS} threads in both, one worker,
fp32.

{shared.markdown_table(header, summary)}

Every round:

{shared.markdown_table(("step", "round", "baseline, photos/s", "ours, photos/s", "waiting for photos"), each)}

{shared.circumstances(WHAT, load_at_start)}"""
    shared.publish(WHAT, text, options.report)


if __name__ == "__main__":
    main()
