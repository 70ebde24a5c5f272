"""The environment of a training loop. Ray Train provides it; so can a test or a notebook."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pairvpr.models.pair_vpr import PairVPR


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Where a run is. `num_photos` were trained on, over all ranks, since the last time."""

    step: int
    num_steps: int
    loss: float
    num_photos: int
    steps_per_s: float


@dataclass(frozen=True)
class TrainContext:
    """This process among all ranks, and the run's directory.

    `validate` (called by all ranks together) gives the same recalls in percent on every rank. `group` is a process
    group separate from DDP's; None with a single rank.
    """

    rank: int
    world_size: int
    device: torch.device
    output: str
    settings: Mapping[str, Any]
    """The settings that decide the result; written into each checkpoint."""
    validate: Callable[[PairVPR], dict[str, float]] | None = None
    say: Callable[[str], object] = print
    measured: Callable[[Measured], object] = lambda _: None
    """Told by rank 0 what each row of the log says."""
    loses_a_machine: Callable[[], bool] = lambda: False
    """Asked by all ranks together: whether one of their machines is about to be taken away, which it says once."""
    group: dist.ProcessGroup | None = None

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks of a tensor on the CPU, on every rank's CPU."""
        if self.world_size == 1:
            return values
        on_device = values.to(self.device)  # where the process group works
        dist.all_reduce(on_device, group=self.group)
        return on_device.cpu()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered

    def wait(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier(group=self.group)
