"""One training step over the global batch, exact for any number of workers; DistributedDataParallel wraps it.

The global batch is the ranks' rows, one rank after another. Every loss to backpropagate is scaled so that the mean of
the gradients over ranks, which is what DistributedDataParallel takes, is the gradient of the global loss. Collectives
run on a process group of their own. All ranks build the same graph, so autograd starts these and those of
DistributedDataParallel in one order everywhere; NCCL keeps to the order of starting (`train_workers`).

B photos on this rank, G descriptor width, L patches, D decoder width, S image side, N rows, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pairvpr.models.pair_vpr import PairVPR, sent
from pairvpr.training.losses import (
    MinedPairs,
    batch_accuracy,
    mine_pairs,
    multi_similarity_loss,
    pair_loss_sum,
    reconstruction_losses,
)

# The roles of a mined pair of photos; a pair may have several.
POSITIVE, NEGATIVE, HARDEST_POSITIVE, HARDEST_NEGATIVE = 1, 2, 4, 8


class StageOneStep(nn.Module):
    """Reconstruct the masked first views: the forward pass of one stage-one step."""

    def __init__(self, model: PairVPR, *, norm_pix_loss: bool) -> None:
        super().__init__()
        self.model = model
        self.norm_pix_loss = norm_pix_loss

    def forward(self, first: Tensor, second: Tensor, mask: Tensor) -> Tensor:
        """Normalised views (B, 3, S, S), mask (B, L) bool, True = hidden in the first -> losses of samples (B,)."""
        prediction = self.model.reconstruct(first, second, mask)
        return reconstruction_losses(prediction, first, mask, norm_pix_loss=self.norm_pix_loss)


def local_loss_of_samples(losses: Tensor, *, global_batch_size: int, num_workers: int) -> Tensor:
    """The loss () to backpropagate on this rank for the mean over the global batch, from its losses (B,).

    Gradients of parts of a rank's batch add up to the gradient of the whole.
    """
    return losses.sum() * (num_workers / global_batch_size)


@dataclass(frozen=True)
class StageTwoResult:
    """One stage-two step: `local_loss` is this rank's, to backpropagate; all else is detached.

    `loss` = `loss_global` + weight * `loss_pair`, `batch_accuracy` and `pairs` are of the global batch and the same on
    every rank; the logits (N,) are of this rank's hard anchors, in order.
    """

    local_loss: Tensor
    loss: Tensor
    loss_global: Tensor
    loss_pair: Tensor
    batch_accuracy: float
    pairs: MinedPairs
    logit_positive: Tensor
    logit_negative: Tensor
    rows_sent: int
    rows_received: int


class StageTwoStep(nn.Module):
    """Describe, mine the global batch, score the mined pairs: the forward pass of one stage-two step.

    `group` is a process group only for this module (`torch.distributed.new_group()`); None = one worker.
    """

    def __init__(
        self, model: PairVPR, group: dist.ProcessGroup | None = None, *, pair_loss_weight: float = 2.0
    ) -> None:
        super().__init__()
        self.model = model
        self.group = group
        self.pair_loss_weight = pair_loss_weight

    def forward(self, images: Tensor, labels: Tensor, rows_per_rank: Sequence[int]) -> StageTwoResult:
        """This rank's normalised photos (B, 3, S, S) and places (B,) int64; every rank's number of photos (W,).

        Labels are equal within a place and differ between places, over all ranks.
        """
        layout = BatchLayout.of(self.group, rows_per_rank, len(images))
        descriptors, dense = self.model.describe(images)
        embedded = self.model.embed(dense)
        all_descriptors, all_labels = gather_rows(descriptors, layout), gather_rows(labels, layout)
        pairs = mine_on_first_rank(all_descriptors.detach(), all_labels, layout)
        loss_global = multi_similarity_loss(all_descriptors, all_labels, pairs)

        exchange = plan_exchange(pairs, layout)
        logit_positive, logit_negative = self._pair_logits(fetch_rows(embedded, exchange, layout), exchange)
        num_pairs = 2 * max(len(pairs.hard_anchor), 1)
        local_loss_pair = pair_loss_sum(logit_positive, logit_negative) / num_pairs
        loss_pair = sum_over_ranks(local_loss_pair.detach(), layout)
        return StageTwoResult(
            local_loss=layout.world_size * (loss_global + self.pair_loss_weight * local_loss_pair),
            loss=loss_global.detach() + self.pair_loss_weight * loss_pair,
            loss_global=loss_global.detach(),
            loss_pair=loss_pair,
            batch_accuracy=batch_accuracy(pairs, layout.num_rows),
            pairs=pairs,
            logit_positive=logit_positive.detach(),
            logit_negative=logit_negative.detach(),
            rows_sent=sum(exchange.num_sent),
            rows_received=sum(exchange.num_received),
        )

    def _pair_logits(self, table: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
        """Logits (N,) of (anchor, positive) and of (anchor, negative) from the available rows (., L, D)."""
        num_pairs = len(exchange.anchor)
        first = torch.cat([exchange.anchor, exchange.anchor])
        second = torch.cat([exchange.positive, exchange.negative])
        if num_pairs == 0:
            # DistributedDataParallel waits for a gradient of every parameter, and other ranks for the gradients of
            # their rows: an unused pair gives zeros.
            first = second = torch.zeros(1, dtype=torch.int64)
        x_first, x_second = table[sent(first, table.device)], table[sent(second, table.device)]
        logits = self.model.pair_logits_of_embedded(x_first, x_second)
        return logits[:num_pairs], logits[num_pairs : 2 * num_pairs]


@dataclass(frozen=True)
class BatchLayout:
    """Which rank holds which rows of the global batch."""

    group: dist.ProcessGroup | None
    rank: int
    rows_per_rank: tuple[int, ...]

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, rows_per_rank: Sequence[int], num_own_rows: int) -> BatchLayout:
        """Check the layout as this rank sees it; ranks that disagree would wait for each other forever."""
        rank = 0 if group is None else dist.get_rank(group)
        world_size = 1 if group is None else dist.get_world_size(group)
        if len(rows_per_rank) != world_size or rows_per_rank[rank] != num_own_rows or min(rows_per_rank) < 1:
            raise ValueError(
                f"rank {rank} of {world_size} holds {num_own_rows} photos, but rows_per_rank={list(rows_per_rank)}"
            )
        return cls(group, rank, tuple(rows_per_rank))

    @property
    def world_size(self) -> int:
        return len(self.rows_per_rank)

    @property
    def num_rows(self) -> int:
        return sum(self.rows_per_rank)

    @property
    def first_row(self) -> int:
        """The global row of this rank's first photo."""
        return sum(self.rows_per_rank[: self.rank])

    def owners(self, rows: Tensor) -> Tensor:
        """Ranks (N,) int64 that hold global rows (N,) int64."""
        ends = torch.tensor(self.rows_per_rank, device=rows.device).cumsum(0)
        return torch.searchsorted(ends, rows, right=True)


def gather_rows(own: Tensor, layout: BatchLayout) -> Tensor:
    """Gather the global batch's rows from each rank's own (B, ...). Gradients flow only to the own rows.

    That is sufficient: every rank computes the whole global loss, so its own rows get their full gradient.
    """
    if layout.group is None:
        return own
    most = max(layout.rows_per_rank)
    padded = own.new_zeros(most, *own.shape[1:])
    padded[: len(own)] = own.detach()
    gathered = [torch.empty_like(padded) for _ in range(layout.world_size)]
    dist.all_gather(gathered, padded, group=layout.group)
    pieces = [piece[:count] for piece, count in zip(gathered, layout.rows_per_rank, strict=True)]
    pieces[layout.rank] = own
    return torch.cat(pieces)


def sum_over_ranks(value: Tensor, layout: BatchLayout) -> Tensor:
    """The sum of every rank's detached value, on every rank."""
    if layout.group is not None:
        value = value.clone()
        dist.all_reduce(value, group=layout.group)
    return value


def mine_on_first_rank(descriptors: Tensor, labels: Tensor, layout: BatchLayout) -> MinedPairs:
    """The global batch's pairs, mined by the first rank: unlike devices round, and so might mine, differently.

    On its CPU, and so are the pairs: a GPU would wait some twenty times for numbers of pairs.
    """
    if layout.rank == 0:
        kinds = pack_pairs(mine_pairs(descriptors.cpu(), labels.cpu()), layout.num_rows)
    else:
        kinds = torch.empty(layout.num_rows, layout.num_rows, dtype=torch.uint8)
    if layout.group is not None:
        kinds = sent(kinds, descriptors.device)
        dist.broadcast(kinds, group=layout.group, group_src=0)
    return unpack_pairs(kinds.cpu())


def pack_pairs(pairs: MinedPairs, num_rows: int) -> Tensor:
    """(N, N) uint8: the role of each mined (anchor, other). Its size does not depend on the result."""
    kinds = torch.zeros(num_rows, num_rows, dtype=torch.uint8, device=pairs.hard_anchor.device)
    for anchor, other, kind in (
        (pairs.anchor_positive, pairs.positive, POSITIVE),
        (pairs.anchor_negative, pairs.negative, NEGATIVE),
        (pairs.hard_anchor, pairs.hard_positive, HARDEST_POSITIVE),
        (pairs.hard_anchor, pairs.hard_negative, HARDEST_NEGATIVE),
    ):
        kinds[anchor, other] += kind
    return kinds


def unpack_pairs(kinds: Tensor) -> MinedPairs:
    """The inverse of `pack_pairs`, sorted by anchor and other."""
    (anchor_positive, positive), (anchor_negative, negative), (hard_anchor, hard_positive), (_, hard_negative) = (
        torch.where(kinds & kind > 0) for kind in (POSITIVE, NEGATIVE, HARDEST_POSITIVE, HARDEST_NEGATIVE)
    )
    return MinedPairs(anchor_positive, positive, anchor_negative, negative, hard_anchor, hard_positive, hard_negative)


@dataclass(frozen=True)
class Exchange:
    """The rows that this rank sends and receives to score the pairs whose anchor it owns. Row numbers (N,) on the CPU.

    `anchor`, `positive`, `negative` index the own rows, then the received ones. `sent` are own rows, for rank 0 first;
    `num_sent` and `num_received` (W,) count rows by rank.
    """

    anchor: Tensor
    positive: Tensor
    negative: Tensor
    sent: Tensor
    num_sent: list[int]
    num_received: list[int]


def plan_exchange(pairs: MinedPairs, layout: BatchLayout) -> Exchange:
    """Every rank plans from the same pairs, so no requests are needed. Each remote row is sent once."""
    triplets = torch.stack([pairs.hard_anchor, pairs.hard_positive, pairs.hard_negative]).cpu()
    owners = layout.owners(triplets[0])
    needs = []
    for rank in range(layout.world_size):
        partners = triplets[1:, owners == rank].unique()
        needs.append(partners[layout.owners(partners) != rank])
    wanted = [need[layout.owners(need) == layout.rank] for need in needs]
    received = needs[layout.rank]

    own_rows = layout.rows_per_rank[layout.rank]
    position = torch.full((layout.num_rows,), -1)
    position[layout.first_row : layout.first_row + own_rows] = torch.arange(own_rows)
    position[received] = own_rows + torch.arange(len(received))
    anchor, positive, negative = position[triplets[:, owners == layout.rank]]
    return Exchange(
        anchor=anchor,
        positive=positive,
        negative=negative,
        sent=torch.cat(wanted) - layout.first_row,
        num_sent=[len(rows) for rows in wanted],
        num_received=layout.owners(received).bincount(minlength=layout.world_size).tolist(),
    )


def fetch_rows(own: Tensor, exchange: Exchange, layout: BatchLayout) -> Tensor:
    """The own rows (B, L, D), then the received ones; gradients are sent back the same way."""
    if layout.group is None:
        return own
    given = own[sent(exchange.sent, own.device)]
    return torch.cat([own, exchange_rows(given, exchange.num_sent, exchange.num_received, layout.group)])


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, sent: Tensor, num_sent: list[int], num_received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.num_sent, ctx.num_received, ctx.group = num_sent, num_received, group
        return _all_to_all(sent, num_sent, num_received, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_received,) = grad_outputs
        return _all_to_all(grad_received, ctx.num_received, ctx.num_sent, ctx.group), None, None, None


def exchange_rows(sent: Tensor, num_sent: list[int], num_received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Differentiable all-to-all of rows (N, ...): `num_sent[r]` rows go to rank r, `num_received[r]` come from it."""
    return _ExchangeRows.apply(sent, num_sent, num_received, group)  # pyright: ignore[reportReturnType]


def _all_to_all(sent: Tensor, num_sent: list[int], num_received: list[int], group: dist.ProcessGroup) -> Tensor:
    received = sent.new_empty(sum(num_received), *sent.shape[1:])
    dist.all_to_all_single(received, sent.contiguous(), num_received, num_sent, group=group)
    return received
