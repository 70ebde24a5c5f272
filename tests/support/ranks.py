"""Training steps on several processes that talk over gloo: one start of the processes for many cases.

B photos, L patches, S image side, N rows, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from pairvpr.config.schema import ModelConfig
from pairvpr.models.pair_vpr import PairVPR
from pairvpr.training import global_batch
from pairvpr.training.global_batch import StageOneStep, StageTwoResult, StageTwoStep, local_loss_of_samples
from pairvpr.training.optimizer import freeze_for_stage_one, freeze_for_stage_two

TIMEOUT = timedelta(seconds=120)
BUCKET_MB = 0.02
"""A few parameters of a small network in each bucket."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network and the rows of its global batch, in the order of the ranks that hold them."""

    config: ModelConfig
    state: dict[str, Tensor]
    rows_per_rank: tuple[int, ...]

    def rows_of(self, rank: int) -> slice:
        ends = [0, *accumulate(self.rows_per_rank)]
        return slice(ends[rank], ends[rank + 1])


@dataclass(frozen=True, kw_only=True)
class StageOneCase(Case):
    """first, second (B, 3, S, S), mask (B, L)."""

    first: Tensor
    second: Tensor
    mask: Tensor


@dataclass(frozen=True, kw_only=True)
class StageTwoCase(Case):
    """images (B, 3, S, S), labels (B,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Outcome:
    """What one rank saw: its step's answer (stage one: losses of its samples) and the gradients by name."""

    result: Any
    gradients: dict[str, Tensor]
    collectives: list[str] = field(default_factory=list)
    """What the second backward pass started: exchanges of rows, and the buckets of DistributedDataParallel."""


def on_one_process(case: Case) -> Outcome:
    """The whole batch of a case in this process, without torch.distributed."""
    whole = replace(case, rows_per_rank=(sum(case.rows_per_rank),))
    return _run(whole, 0, group=None, ddp_group=None)


def on_ranks(cases: Sequence[Case], folder: Path) -> list[list[Outcome]]:
    """Every case on as many processes as it has ranks -> for each case the ranks' outcomes."""
    num_processes = max(len(case.rows_per_rank) for case in cases)
    mp.spawn(_work, (cases, folder), nprocs=num_processes)  # pyright: ignore[reportPrivateImportUsage]
    by_rank = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(num_processes)]
    return [[by_rank[rank][i] for rank in range(len(case.rows_per_rank))] for i, case in enumerate(cases)]


def _work(rank: int, cases: Sequence[Case], folder: Path) -> None:
    torch.set_num_threads(1)
    num_processes = max(len(case.rows_per_rank) for case in cases)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=num_processes, timeout=TIMEOUT)
    outcomes: list[Outcome | None] = []
    for case in cases:
        ranks = list(range(len(case.rows_per_rank)))
        group, ddp_group = dist.new_group(ranks), dist.new_group(ranks)
        if rank in ranks:
            assert isinstance(group, dist.ProcessGroup)
            assert isinstance(ddp_group, dist.ProcessGroup)
            outcomes.append(_run(case, rank, group, ddp_group))
        else:
            outcomes.append(None)
    torch.save(outcomes, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _run(case: Case, rank: int, group: dist.ProcessGroup | None, ddp_group: dist.ProcessGroup | None) -> Outcome:
    """Two passes: DistributedDataParallel complains about parameters without gradient in the second."""
    model = PairVPR(case.config, pair_classifier_token=isinstance(case, StageTwoCase))
    model.load_state_dict(case.state)
    step: nn.Module
    if isinstance(case, StageTwoCase):
        freeze_for_stage_two(model)
        step = StageTwoStep(model, group)
    else:
        freeze_for_stage_one(model)
        step = StageOneStep(model, norm_pix_loss=True)
    started: list[str] = []
    if ddp_group is not None:
        step = DistributedDataParallel(step, process_group=ddp_group, bucket_cap_mb=BUCKET_MB)
        step.register_comm_hook(ddp_group, lambda group, bucket: _bucket(started, group, bucket))
    result = None
    with mock.patch.object(global_batch, "_all_to_all", partial(_exchange, started, global_batch._all_to_all)):
        for _ in range(2):
            started.clear()
            model.zero_grad()
            result = _pass(case, rank, step)
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return Outcome(result, gradients, started)


def _bucket(started: list[str], group: dist.ProcessGroup, bucket: Any) -> torch.futures.Future[Tensor]:
    """As DistributedDataParallel averages a bucket, noted."""
    started.append(f"bucket {bucket.index()}")
    return allreduce_hook(group, bucket)


def _exchange(started: list[str], exchange: Callable[..., Tensor], *args: Any) -> Tensor:
    started.append("exchange")
    return exchange(*args)


def _pass(case: Case, rank: int, step: nn.Module) -> Any:
    rows = case.rows_of(rank)
    if isinstance(case, StageTwoCase):
        result: StageTwoResult = step(case.images[rows], case.labels[rows], case.rows_per_rank)
        result.local_loss.backward()
        return replace(result, local_loss=result.local_loss.detach())
    assert isinstance(case, StageOneCase)
    losses: Tensor = step(case.first[rows], case.second[rows], case.mask[rows])
    local_loss_of_samples(
        losses, global_batch_size=sum(case.rows_per_rank), num_workers=len(case.rows_per_rank)
    ).backward()
    return losses.detach()


def largest_misfit(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest ||difference|| / (1e-3 ||gradient|| + 1e-6) over the tensors; the same names are demanded."""
    assert gradients.keys() == expected.keys()
    return max(
        float((gradients[name] - value).norm() / (1e-3 * value.norm() + 1e-6)) for name, value in expected.items()
    )
