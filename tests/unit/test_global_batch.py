"""The stage-two step over any ranks is the step on one process; stage one's weights for unequal ranks."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from pairvpr.config.schema import ModelConfig, Precision
from pairvpr.models.pair_vpr import PairVPR
from pairvpr.training.global_batch import (
    BatchLayout,
    StageTwoStep,
    local_loss_of_samples,
    pack_pairs,
    plan_exchange,
    unpack_pairs,
)
from pairvpr.training.losses import MinedPairs, mine_pairs
from tests.support.ranks import Case, Outcome, StageOneCase, StageTwoCase, largest_misfit, on_one_process, on_ranks
from tests.support.small import shaken_model, small_model_config

IMAGE_SIZE_PX = 28
NUM_PATCHES = 4
INT64 = torch.iinfo(torch.int64)


def _images(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX, generator=torch.Generator().manual_seed(seed))


def _stage_two_case(places_of_ranks: list[list[int]], *, seed: int = 0, config: ModelConfig | None = None) -> Case:
    """One list of labels for each rank."""
    labels = torch.tensor([label for labels in places_of_ranks for label in labels])
    # Photos of a place share a base, so that mining leaves pairs out.
    places = labels.unique(return_inverse=True)[1]
    images = 0.7 * _images(len(labels), seed) + _images(len(labels), seed + 1)[places]
    return StageTwoCase(
        config=config or small_model_config(),
        state=shaken_model().state_dict(),
        rows_per_rank=tuple(len(labels) for labels in places_of_ranks),
        images=images,
        labels=labels,
    )


def _stage_one_case(rows_per_rank: tuple[int, ...]) -> StageOneCase:
    count = sum(rows_per_rank)
    mask = torch.zeros(count, NUM_PATCHES, dtype=torch.bool)
    mask[:, 1:] = True
    state = shaken_model().state_dict()
    del state["decoder_clstoken"], state["dec_pos_embed_cls"]
    return StageOneCase(
        config=small_model_config(),
        state=state,
        rows_per_rank=rows_per_rank,
        first=_images(count, 5),
        second=_images(count, 6),
        mask=mask.roll(1, dims=1),
    )


def _random_places(seed: int) -> list[list[int]]:
    """Whole places of 2 to 4 photos on 2 to 4 ranks, numbers of places that differ by one at most, any labels."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    ranks: list[list[int]] = [[] for _ in range(draw(2, 5))]
    for place in range(len(ranks) + draw(0, 2 * len(ranks))):
        ranks[place % len(ranks)] += draw(2, 5) * [draw(INT64.min, INT64.max)]
    return ranks


FP32_CASES: dict[str, Case] = {
    **{f"random {seed}": _stage_two_case(_random_places(seed), seed=seed) for seed in range(5)},
    "a rank in a world of one": _stage_two_case([[5, 5, 6, 6]]),
    "a rank without pairs": _stage_two_case([[0, 0, 1, 1], [2], [3, 3]]),
    "one photo of each place": _stage_two_case([[0, 1], [2]]),
    "a single place": _stage_two_case([[7, 7], [7, 7]]),
    "a place on two ranks": _stage_two_case([[0, 0, 1], [1, 1, 2, 2]]),
    "stage one": _stage_one_case((2, 1, 2)),
}
BF16_CASE = _stage_two_case(
    [[0, 0, 1, 1], [2, 2, 3, 3]], config=replace(small_model_config(), precision=Precision.bf16)
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    cases = FP32_CASES | {"bf16": BF16_CASE}
    by_case = on_ranks(list(cases.values()), tmp_path_factory.mktemp("ranks"))
    return dict(zip(cases, by_case, strict=True))


@cache
def _on_one_process(name: str) -> Outcome:
    return on_one_process(FP32_CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FP32_CASES))
def test_gradients_are_those_of_one_process(name: str, outcomes: dict[str, list[Outcome]]) -> None:
    expected = _on_one_process(name)
    assert expected.gradients
    for outcome in outcomes[name]:
        assert largest_misfit(outcome.gradients, expected.gradients) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in FP32_CASES.items() if len(case.rows_per_rank) > 1])
def test_every_rank_starts_its_collectives_in_the_same_order(name: str, outcomes: dict[str, list[Outcome]]) -> None:
    """Those of two process groups: NCCL would wait for ever otherwise."""
    first, *others = (outcome.collectives for outcome in outcomes[name])
    assert all(its == first for its in others)
    assert len([its for its in first if its != "exchange"]) > 3
    assert first.count("exchange") == (2 if isinstance(FP32_CASES[name], StageTwoCase) else 0)  # there and back


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in FP32_CASES.items() if isinstance(case, StageTwoCase)])
def test_numbers_are_those_of_one_process(name: str, outcomes: dict[str, list[Outcome]]) -> None:
    expected = _on_one_process(name).result
    results = [outcome.result for outcome in outcomes[name]]
    for result in results:
        assert result.loss_global.item() == pytest.approx(expected.loss_global.item(), abs=1e-6)
        assert result.loss_pair.item() == pytest.approx(expected.loss_pair.item(), abs=1e-6)
        assert result.loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)
        assert result.batch_accuracy == expected.batch_accuracy
        for field, rows in vars(expected.pairs).items():
            assert torch.equal(getattr(result.pairs, field), rows), field
    for field in ("logit_positive", "logit_negative"):
        torch.testing.assert_close(
            torch.cat([getattr(result, field) for result in results]), getattr(expected, field), rtol=0, atol=1e-5
        )
    assert sum(result.rows_sent for result in results) == sum(result.rows_received for result in results)
    assert expected.rows_sent == expected.rows_received == 0
    # Every rank has the whole descriptor loss and its part of the pairs' loss.
    local_losses = sum(result.local_loss.item() for result in results) / len(results)
    assert local_losses == pytest.approx(
        (len(results) * expected.loss_global + 2 * expected.loss_pair).item(), rel=1e-5
    )


@pytest.mark.slow
def test_stage_one_losses_are_those_of_one_process(outcomes: dict[str, list[Outcome]]) -> None:
    losses = torch.cat([outcome.result for outcome in outcomes["stage one"]])
    torch.testing.assert_close(losses, _on_one_process("stage one").result, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_sixteen_bits_stay_near_one_process(outcomes: dict[str, list[Outcome]]) -> None:
    expected = on_one_process(BF16_CASE).gradients
    whole = torch.cat([expected[name].flatten() for name in sorted(expected)])
    for outcome in outcomes["bf16"]:
        gradient = torch.cat([outcome.gradients[name].flatten() for name in sorted(expected)])
        assert (gradient - whole).norm() < 0.02 * whole.norm()


def test_nothing_to_learn_from_a_single_place() -> None:
    outcome = _on_one_process("a single place")
    assert outcome.result.loss == 0
    assert outcome.result.batch_accuracy == 1
    assert all(not gradient.any() for gradient in outcome.gradients.values())


def test_layouts_that_do_not_fit_are_refused() -> None:
    step = StageTwoStep(PairVPR(small_model_config()))
    images, labels = _images(4, 0), torch.tensor([0, 0, 1, 1])
    for rows_per_rank in [(3,), (2, 2), (4, 0), ()]:
        with pytest.raises(ValueError, match="rows_per_rank"):
            step(images, labels, rows_per_rank)


def _mined(num_places: int, seed: int) -> MinedPairs:
    generator = torch.Generator().manual_seed(seed)
    descriptors = torch.nn.functional.normalize(torch.randn(3 * num_places, 8, generator=generator), dim=1)
    return mine_pairs(descriptors, torch.arange(num_places).repeat_interleave(3))


@pytest.mark.parametrize("seed", range(5))
def test_pairs_survive_packing(seed: int) -> None:
    pairs = _mined(num_places=6, seed=seed)
    unpacked = unpack_pairs(pack_pairs(pairs, 18))
    for anchor, other in [("anchor_positive", "positive"), ("anchor_negative", "negative")]:
        mined, found = (
            sorted(zip(getattr(some, anchor).tolist(), getattr(some, other).tolist(), strict=True))
            for some in (pairs, unpacked)
        )
        assert mined == found
    for field in ("hard_anchor", "hard_positive", "hard_negative"):
        assert torch.equal(getattr(unpacked, field), getattr(pairs, field))


@pytest.mark.parametrize("rows_per_rank", [(18,), (9, 9), (6, 3, 9), (3,) * 6])
def test_every_rank_gets_each_row_that_it_lacks_once(rows_per_rank: tuple[int, ...]) -> None:
    pairs = _mined(num_places=6, seed=1)
    layouts = [BatchLayout(None, rank, rows_per_rank) for rank in range(len(rows_per_rank))]
    plans = [plan_exchange(pairs, layout) for layout in layouts]
    parcels = [(plan.sent + layout.first_row).split(plan.num_sent) for plan, layout in zip(plans, layouts, strict=True)]
    anchors = 0
    for rank, (plan, layout) in enumerate(zip(plans, layouts, strict=True)):
        own = torch.arange(layout.first_row, layout.first_row + rows_per_rank[rank])
        received = torch.cat([parts[rank] for parts in parcels])
        assert plan.num_received == [len(parts[rank]) for parts in parcels]
        assert not set(received.tolist()) & set(own.tolist())
        assert len(received.unique()) == len(received)
        table = torch.cat([own, received])
        chosen = slice(anchors, anchors + len(plan.anchor))
        assert torch.equal(table[plan.anchor], pairs.hard_anchor[chosen])
        assert torch.equal(table[plan.positive], pairs.hard_positive[chosen])
        assert torch.equal(table[plan.negative], pairs.hard_negative[chosen])
        anchors += len(plan.anchor)
    assert anchors == len(pairs.hard_anchor)


def test_local_losses_average_to_the_global_mean() -> None:
    losses = torch.rand(7)
    parts = losses.split([3, 2, 2])
    local = [local_loss_of_samples(part, global_batch_size=7, num_workers=3) for part in parts]
    torch.testing.assert_close(torch.stack(local).mean(), losses.mean())
