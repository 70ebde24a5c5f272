"""What a training step costs on one GPU: images/s, model FLOP utilisation, and the largest batch that fits.

    python -m benchmarks.train_gpu --report FILE

Run it by hand on an idle GPU, from the root of the checkout. Needs torch and pytorch-metric-learning; neither Ray nor
faiss. For each stage, ViT-B in bf16 as the published recipe has it (224 px and 6 trainable blocks; 322 px), photos of
random pixels that lie on the device already:

- the largest batch (stage one: pairs of views; stage two: places of 4 photos) of a step that does not run out of
  memory, found by doubling and halving;
- the median time of a step with the recipe's batch per GPU, or the largest if that is less;
- model FLOP utilisation: the operations of that step, counted by torch as they run (`torch.utils.flop_counter`), over
  what the GPU could do in that time by its data sheet (`--peak-tflops`).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pairvpr.config.schema import DecoderConfig, EncoderConfig, ModelConfig, Precision
from pairvpr.models.pair_vpr import PairVPR, normalise
from pairvpr.training.global_batch import StageOneStep, StageTwoStep
from pairvpr.training.optimizer import (
    freeze_for_stage_one,
    freeze_for_stage_two,
    set_rates,
    stage_one_optimizer,
    stage_two_optimizer,
)

DENSE_BF16_TFLOPS = {"H100": 989.4, "H200": 989.4, "A100": 312.0, "L40S": 362.1}
"""Data sheets, without sparsity; the boards with NVLink."""
PHOTOS_OF_A_PLACE = 4
MASK_RATIO = 0.9
NUM_STEPS_TO_WARM_UP = 3

Step = Callable[[int], None]  # one whole step with so many samples


@dataclass(frozen=True)
class Job:
    """A stage as the published recipe of ViT-B has it; `batch` is that of one GPU, in samples."""

    name: str
    image_size_px: int
    batch: int
    photos_per_sample: int
    make_step: Callable[[ModelConfig, torch.device], Step]


def stage_one_step(config: ModelConfig, device: torch.device) -> Step:
    """Forward, backward, AdamW on pairs of views."""
    model = PairVPR(config, pair_classifier_token=False).to(device).train()
    freeze_for_stage_one(model)
    forward = StageOneStep(model, norm_pix_loss=True)
    optimizer = stage_one_optimizer(model, layerwise_decay=0.9, patch_embed_lr_mult=0.2)
    set_rates(optimizer, lr=1e-5, weight_decay=0.04)
    num_hidden = int(MASK_RATIO * config.num_patches)

    def step(batch: int) -> None:
        first, second = (_photos(batch, config, device) for _ in range(2))
        mask = torch.zeros(batch, config.num_patches, dtype=torch.bool, device=device)
        mask[:, :num_hidden] = True
        _update(optimizer, forward(normalise(first), normalise(second), mask).mean())

    return step


def stage_two_step(config: ModelConfig, device: torch.device) -> Step:
    """Forward, mining, both losses, backward, AdamW on places."""
    model = PairVPR(config).to(device).train()
    freeze_for_stage_two(model)
    forward = StageTwoStep(model)
    optimizer = stage_two_optimizer(model)
    set_rates(optimizer, lr=1e-5, weight_decay=0.05)

    def step(batch: int) -> None:
        photos = _photos(batch * PHOTOS_OF_A_PLACE, config, device)
        labels = torch.arange(batch, device=device).repeat_interleave(PHOTOS_OF_A_PLACE)
        _update(optimizer, forward(normalise(photos), labels, [len(photos)]).local_loss)

    return step


JOBS = (
    Job("stage one", 224, 256, 2, stage_one_step),
    Job("stage two", 322, 20, PHOTOS_OF_A_PLACE, stage_two_step),
)


def _photos(count: int, config: ModelConfig, device: torch.device) -> Tensor:
    side_px = config.image_size_px
    return torch.randint(256, (count, side_px, side_px, 3), dtype=torch.uint8, device=device)


def _update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def largest_batch(step: Step, smallest: int, limit: int) -> int:
    """The most samples, up to `limit`, of a step that fits; 0 if not even one does. `smallest` is tried first."""
    fits, batch = 0, smallest
    while batch <= limit and _fits(step, batch):
        fits, batch = batch, 2 * batch
    too_many = min(batch, limit + 1)
    while too_many - fits > 1:
        batch = (fits + too_many) // 2
        if _fits(step, batch):
            fits = batch
        else:
            too_many = batch
    return fits


def _fits(step: Step, batch: int) -> bool:
    try:
        step(batch)
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return True


def seconds_of_a_step(step: Step, batch: int, num_steps: int) -> float:
    """Median over `num_steps` of them, after some that warm up."""
    times = []
    for number in range(NUM_STEPS_TO_WARM_UP + num_steps):
        start_s = time.perf_counter()
        step(batch)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number >= NUM_STEPS_TO_WARM_UP:
            times.append(time.perf_counter() - start_s)
    return statistics.median(times)


def flop_of_a_step(step: Step, batch: int) -> int:
    """Multiplications and additions of forward and backward pass, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        step(batch)
    return counter.get_total_flops()


def measure(job: Job, options: argparse.Namespace, device: torch.device, peak_tflops: float | None) -> list[str]:
    """A row of the table."""
    encoder = EncoderConfig(depth=options.depth, num_trainable_blocks=min(6, options.depth))
    decoder = DecoderConfig(depth=options.depth)
    config = ModelConfig(image_size_px=job.image_size_px, precision=Precision.bf16, encoder=encoder, decoder=decoder)
    step = job.make_step(config, device)
    most = largest_batch(step, 2, options.limit)
    if most == 0:
        return [job.name, "0", *["-"] * 6]
    batch = min(job.batch, most)
    seconds, flop = seconds_of_a_step(step, batch, options.steps), flop_of_a_step(step, batch)
    tflops = flop / seconds / 1e12
    peak_gib = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if device.type == "cuda" else "-"
    return [
        job.name,
        f"{most}{'+' if most == options.limit else ''}",
        str(batch),
        f"{1000 * seconds:.1f}",
        f"{batch * job.photos_per_sample / seconds:.1f}",
        f"{tflops:.2f}",
        "-" if peak_tflops is None else f"{100 * tflops / peak_tflops:.1f}",
        peak_gib,
    ]


def peak_of(device: torch.device, given: float | None) -> float | None:
    """TFLOP/s in bf16 of the data sheet, or what `--peak-tflops` says."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return given or next((peak for part, peak in DENSE_BF16_TFLOPS.items() if part in name), None)


def main() -> None:
    """Both stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script (cuda)")
    parser.add_argument(
        "--depth", type=int, default=12, help="blocks of encoder and decoder; fewer to try the script (12)"
    )
    parser.add_argument("--limit", type=int, default=1024, help="largest batch that is tried (1024)")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed (20)")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak of the GPU, where it is not known here")
    parser.add_argument("--report", type=Path, help="also write the report to this file")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(
            "no CUDA device here; expected one, or --device cpu --depth 1 --limit 2 --steps 1 to try the script"
        )
    torch.manual_seed(0)
    peak = peak_of(device, options.peak_tflops)
    columns = ("", "largest batch", "batch", "ms a step", "images/s", "TFLOP/s", "MFU %", "peak GiB")
    lines = ["# Training steps of ViT-B in bf16 on one device", "", f"| {' | '.join(columns)} |"]
    lines.append("| --- |" + " ---: |" * (len(columns) - 1))
    for job in JOBS:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        lines.append(f"| {' | '.join(measure(job, options, device, peak))} |")
        print(lines[-1], flush=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    lines += [
        "",
        f"A batch is pairs of views (stage one) or places of {PHOTOS_OF_A_PLACE} photos (stage two).",
        f"Device: {name}, peak {peak or 'not known'} TFLOP/s; torch {torch.__version__}; "
        f"{options.depth} blocks in encoder and decoder.",
        f"Command: `python -m benchmarks.train_gpu --device {options.device} --depth {options.depth} "
        f"--limit {options.limit} --steps {options.steps}`",
    ]
    text = "\n".join(lines)
    print(text)
    if options.report is not None:
        options.report.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
