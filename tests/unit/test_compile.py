"""Encoder, scoring and stage one are one graph each for `torch.compile`: no break, the eager answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pairvpr.models.pair_scorer import PairScorer
from pairvpr.models.pair_vpr import PairVPR, normalise
from pairvpr.training.global_batch import StageOneStep
from tests.support.small import shaken_model, small_model_config

PIXELS = torch.randint(256, (3, 28, 28, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def described(scorer: PairScorer) -> Tensor:
    """Global descriptors."""
    return scorer.model.describe(normalise(PIXELS))[0]


def scored(scorer: PairScorer) -> Tensor:
    """Both directions of one query with two candidates."""
    embedded = scorer.model.embed(scorer.model.describe(normalise(PIXELS))[1])
    query_of = torch.zeros(2, dtype=torch.int64)
    first, memory = scorer.as_first(embedded[:1]), scorer.as_memory(embedded[:1], keep=True)
    forth = scorer.logits(first, query_of, scorer.as_memory(embedded[1:], keep=False), None)
    return forth + scorer.logits(scorer.as_first(embedded[1:]), None, memory, query_of)


@pytest.mark.parametrize("work", [described, scored])
def test_inference_is_one_graph(work: Callable[[PairScorer], Tensor]) -> None:
    with torch.inference_mode():
        _check_one_graph(work, PairScorer(shaken_model(depth=2)))


def test_a_step_of_stage_one_is_one_graph() -> None:
    step = StageOneStep(PairVPR(small_model_config(), pair_classifier_token=False), norm_pix_loss=True)
    mask = torch.tensor([[True, False, True, True]]).repeat(3, 1)
    _check_one_graph(step, normalise(PIXELS), normalise(PIXELS.flip(0)), mask)


def _check_one_graph(work: Callable[..., Tensor], *inputs: Any) -> None:
    expected = work(*inputs)
    torch._dynamo.reset()
    explained = torch._dynamo.explain(work)(*inputs)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons
    torch._dynamo.reset()
    compiled = torch.compile(work, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), expected, rtol=1e-4, atol=1e-5)
