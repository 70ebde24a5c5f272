"""Every reuse alone, and all together, against the plain decoder and the original implementation's scores."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from pairvpr.config.schema import Precision
from pairvpr.models.linear import to_sixteen_bits
from pairvpr.models.pair_scorer import PairScorer, Reuse
from pairvpr.models.pair_vpr import AUTOCAST_DTYPES, PairVPR
from tests.support.shared import needs_shared, parity_arrays, parity_model_config, weights_of
from tests.support.small import shaken_model

REUSES = [
    Reuse(memory=memory, first_attention=attention, last_row=last_row)
    for memory, attention, last_row in product((False, True), repeat=3)
]


def scores_of(model: PairVPR, dense: Tensor, reuse: Reuse) -> tuple[Tensor, Tensor]:
    """Logits (n, n) of all pairs of photos: row first, and column first; each photo's part computed once."""
    scorer = PairScorer(model, reuse)
    numbers = torch.arange(len(dense))
    rows, columns = numbers.repeat_interleave(len(dense)), numbers.repeat(len(dense))
    with torch.no_grad():
        embedded = model.embed(dense)
        first = scorer.as_first(embedded)
        kept, transient = (scorer.as_memory(embedded, keep=keep) for keep in (True, False))
        return tuple(
            scorer.logits(first, one, memory, other).reshape(len(dense), -1)
            for one, memory, other in ((rows, transient, columns), (columns, kept, rows))
        )  # type: ignore[return-value]


def plain_logits(model: PairVPR, dense: Tensor) -> Tensor:
    """Logits (n, n), row first, by the whole decoder for each pair alone."""
    with torch.no_grad():
        return torch.tensor([[float(model.pair_logits(one[None], other[None])) for other in dense] for one in dense])


@pytest.mark.slow
@pytest.mark.parametrize("reuse", REUSES, ids=str)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_every_reuse_gives_the_plain_decoders_logits(reuse: Reuse, depth: int) -> None:
    model = shaken_model(depth=depth)
    dense = torch.randn(5, model.config.num_patches, 32, generator=torch.Generator().manual_seed(1))
    plain = plain_logits(model, dense)
    assert plain.std() > 0.01  # pairs differ
    row_first, column_first = scores_of(model, dense, reuse)
    np.testing.assert_allclose(row_first, plain, rtol=0, atol=1e-5)
    np.testing.assert_allclose(column_first, plain.T, rtol=0, atol=1e-5)


@needs_shared
@pytest.mark.parametrize("reuse", REUSES, ids=str)
@pytest.mark.parametrize("name", ["registers_mlp", "plain_swiglu"])
def test_every_reuse_gives_the_original_scores(name: str, reuse: Reuse) -> None:
    arrays = parity_arrays(name)
    model = PairVPR(parity_model_config(name, stage="two")).eval()
    model.load_state_dict(weights_of(arrays, "two/weights/"), strict=True)
    dense = torch.from_numpy(arrays["two/dense"])
    row_first, column_first = scores_of(model, dense, reuse)
    np.testing.assert_allclose(row_first[0, 1:], arrays["two/score_query_first"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(column_first[0, 1:], arrays["two/score_candidate_first"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("precision", [Precision.bf16, Precision.fp16])
def test_sixteen_bits_stay_near_and_do_not_tie(precision: Precision) -> None:
    """The last products are made in 32 bits: at 16, thousands of scores would fall on a few hundred values."""
    model = shaken_model()
    dense = torch.randn(24, model.config.num_patches, 32, generator=torch.Generator().manual_seed(2))
    exact, _ = scores_of(model, dense, Reuse())
    model.config.precision = precision
    to_sixteen_bits(model, AUTOCAST_DTYPES[precision])
    rounded, _ = scores_of(model, dense, Reuse())
    assert rounded.dtype == torch.float32
    whole, _ = scores_of(model, dense, Reuse(memory=False, first_attention=False, last_row=False))
    for scores in (rounded, whole):
        assert 1e-6 < (scores - exact).abs().max() < 0.1 * exact.std()
    assert len(rounded.flatten().unique()) > 0.95 * rounded.numel()
