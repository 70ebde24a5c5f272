"""Encoder, scoring and stage one are one graph each for `torch.compile`: no break, the eager answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from pairvpr.models.pair_scorer import PairScorer
from pairvpr.models.pair_vpr import PairVPR, normalise
from pairvpr.retrieval.describe import Describer
from pairvpr.retrieval.features import PhotoFeatures
from pairvpr.retrieval.rerank import Reranker, WorkUnit
from pairvpr.training.global_batch import StageOneStep
from tests.support.small import shaken_model, small_model_config

pytestmark = pytest.mark.slow

PHOTOS = np.random.default_rng(0).integers(0, 256, (6, 28, 28, 3), dtype=np.uint8)
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


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounter]:
    """torch.compile that traces as ever, and counts its graphs instead of making programs of them."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    yield counter
    torch._dynamo.reset()


@pytest.mark.parametrize("second_direction", [None, 1])
def test_a_compiled_run_has_few_shapes_and_the_same_answers(
    compiles: CompileCounter, second_direction: int | None
) -> None:
    """Units of other sizes, shared and lone candidates, a last batch of photos: nothing of it makes another graph."""
    model = shaken_model(depth=2)
    units = [
        WorkUnit(0, {0: [0, 1, 2, 3], 1: [1, 2], 2: [3]}),
        WorkUnit(1, {3: [4]}),
        WorkUnit(2, {4: [0, 2, 5], 5: [5, 1]}),
    ]
    found: dict[bool, list[Any]] = {}
    for is_compiled in (False, True):
        model.config = replace(model.config, compile=is_compiled)
        describer = Describer(model)
        photos = PhotoFeatures(lambda image_id: PHOTOS[image_id], describer.embedded, device=describer.device)
        reranker = Reranker(
            model,
            batch_size=4,
            query_features=photos,
            database_features=photos,
            second_direction=second_direction,
            queries_per_unit=3,
        )
        descriptors = [describer.descriptors(PHOTOS[:number]) for number in (4, 3, 1)]
        answers = [reranker.rerank(unit) for unit in units]
        num_graphs = compiles.frame_count
        answers += [reranker.rerank(unit) for unit in reversed(units)]
        assert compiles.frame_count == num_graphs
        scores = [dict(zip(its.ids.tolist(), its.pair_scores.tolist(), strict=True)) for row in answers for its in row]
        found[is_compiled] = [descriptors, scores]
    # Photos in fours and alone, embedded; first images and memories in units and batches; either direction.
    assert compiles.frame_count == 2 + 1 + 2 + 2 + 2
    for before, after in zip(*(its[0] for its in found.values()), strict=True):
        np.testing.assert_allclose(after, before, atol=1e-5)
    for before, after in zip(*(its[1] for its in found.values()), strict=True):
        assert after == pytest.approx(before, abs=1e-4)


@pytest.mark.soak
def test_compiled_programs_give_the_same_answers() -> None:
    """By the compiler for CPUs, which takes a minute; alone and in another company a pair has the same bits."""
    model = shaken_model(depth=2)
    model.config = replace(model.config, compile=True)
    describer = Describer(model)
    photos = PhotoFeatures(lambda image_id: PHOTOS[image_id], describer.embedded, device=describer.device)
    reranker = Reranker(model, batch_size=4, query_features=photos, database_features=photos, queries_per_unit=3)
    (alone,) = reranker.rerank(WorkUnit(0, {0: [1, 2, 3]}))
    together = reranker.rerank(WorkUnit(0, {3: [1, 5], 0: [1, 2, 3], 4: [2]}))[1]
    assert alone.pair_scores.tolist() == together.pair_scores.tolist()
    model.config = replace(model.config, compile=False)
    (plain,) = Reranker(model, batch_size=4, query_features=photos, database_features=photos).rerank(
        WorkUnit(0, {0: [1, 2, 3]})
    )
    assert plain.ids.tolist() == alone.ids.tolist()
    np.testing.assert_allclose(plain.pair_scores, alone.pair_scores, atol=1e-4)
