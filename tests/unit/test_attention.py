"""Attention and position tables against their formulas written out."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend

from pairvpr.models import attention as attention_module
from pairvpr.models.attention import _by_products, attention, engine
from pairvpr.models.pair_vpr import PairVPR
from pairvpr.models.pos_embed import resize_encoder_table, sine_cosine_2d
from tests.support.simulated_gpu import CUDA, simulated_gpu
from tests.support.small import small_model_config


def naive_attention(
    query: NDArray[np.float64], key: NDArray[np.float64], value: NDArray[np.float64]
) -> NDArray[np.float64]:
    logits = np.einsum("blhe,bmhe->bhlm", query, key) / math.sqrt(query.shape[-1])
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.einsum("bhlm,bmhe->blhe", exponentials / exponentials.sum(axis=-1, keepdims=True), value)


@pytest.mark.slow
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 9), st.integers(1, 3), st.sampled_from([1, 4, 8])),
    st.integers(0, 2**32 - 1),
)
def test_attention_is_a_softmax_of_scaled_products(shape: tuple[int, int, int, int, int], seed: int) -> None:
    B, L, M, H, E = shape
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        3 * torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((B, L, H, E), (B, M, H, E), (B, M, H, E))
    )
    expected = naive_attention(query.numpy(), key.numpy(), value.numpy())
    np.testing.assert_allclose(attention(query, key, value).numpy(), expected, rtol=0, atol=1e-12)
    single = attention(query.float(), key.float(), value.float())
    assert single.shape == (B, L, H, E)
    np.testing.assert_allclose(single.numpy(), expected, rtol=0, atol=1e-4)


@pytest.fixture
def empty_memory_is_nan() -> Iterator[None]:
    """What `torch.empty` gives is not left to chance."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@pytest.mark.usefixtures("empty_memory_is_nan")
@pytest.mark.parametrize("engine", [attention, _by_products])
@given(
    st.tuples(
        st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), st.sampled_from([1, 8, 32])
    ),
    st.floats(0.1, 3.0),
    st.integers(0, 2**32 - 1),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_attention_in_bf16_is_off_by_its_roundings_alone(
    engine: Callable[..., Tensor], shape: tuple[int, int, int, int, int], scale: float, seed: int
) -> None:
    B, L, M, H, E = shape
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        (scale * torch.randn(B, rows, 2, H, E, generator=generator)).bfloat16()[:, :, 1] for rows in (L, M, M)
    )
    with torch.inference_mode():
        found = engine(query, key, value)
    assert (found.shape, found.dtype) == ((B, L, H, E), torch.bfloat16)
    query, key, value = (tensor.double().numpy() for tensor in (query, key, value))
    largest_logit = np.einsum("blhe,bmhe->bhlm", np.abs(query), np.abs(key)).max() / math.sqrt(E)
    half_a_step = torch.finfo(torch.bfloat16).eps / 2
    # A query is rounded when it is scaled, a logit when it is made; either moves a weight, and the sum of all of them;
    # weights and the answer are rounded, too.
    allowed = half_a_step * (4 * largest_logit + 3) * 1.1 * np.abs(value).max()
    np.testing.assert_allclose(found.double().numpy(), naive_attention(query, key, value), rtol=0, atol=allowed)


@pytest.mark.parametrize(("is_large", "has_fast_products"), [(True, True), (True, False), (False, True)])
def test_large_photos_in_bf16_go_by_products_where_these_are_fast(
    monkeypatch: pytest.MonkeyPatch, is_large: bool, has_fast_products: bool
) -> None:
    monkeypatch.setattr(attention_module, "_products_are_faster", lambda: has_fast_products)
    monkeypatch.setattr(attention_module, "MANY_WEIGHTS", 3 * 50 * 60 if is_large else 3 * 50 * 60 + 1)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, rows, 3, 16, generator=generator).bfloat16() for rows in (50, 60, 60))
    with torch.no_grad():
        by_products = torch.equal(attention(query, key, value), _by_products(query, key, value))
    assert by_products == (is_large and has_fast_products)


def test_the_engine_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.zeros(1, 50, 2, 16, dtype=torch.bfloat16)
    monkeypatch.setattr(attention_module, "MANY_WEIGHTS", 50 * 50 * 2)
    monkeypatch.setattr(attention_module, "_products_are_faster", lambda: True)
    with torch.no_grad():
        assert engine(query, query, query) == "oneDNN's products"
    assert engine(*[query.float()] * 3) in {f"torch's {name.lower()}" for name in SDPBackend.__members__}


def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A stand-in for xformers' operator, in its layout, which is ours."""
    weights = torch.softmax(torch.einsum("blhe,bmhe->bhlm", query, key) / query.shape[-1] ** 0.5, -1)
    return torch.einsum("bhlm,bmhe->blhe", weights, value)


def wrong(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return exact(query, key, value) * 1.001


def unfit(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    raise NotImplementedError("no kernel for this device")


@pytest.mark.parametrize(("operator", "is_chosen"), [(exact, True), (wrong, False), (unfit, False), (None, False)])
def test_xformers_runs_where_it_is_installed_and_right(
    monkeypatch: pytest.MonkeyPatch, operator: Callable[..., Tensor] | None, is_chosen: bool
) -> None:
    """In inference alone, and after one trial."""
    calls: list[tuple[int, ...]] = []

    def counted(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        calls.append(tuple(query.shape))
        assert operator is not None
        return operator(query, key, value)

    if operator is not None:
        package = ModuleType("xformers")
        package.__dict__.update(__version__="0.0.34", ops=SimpleNamespace(memory_efficient_attention=counted))
        monkeypatch.setitem(sys.modules, "xformers", package)
        monkeypatch.setitem(sys.modules, "xformers.ops", package.ops)
    attention_module._xformers_operator.cache_clear()
    with simulated_gpu() as record:
        query, key, value = torch.randn(3, 2, 5, 2, 8, generator=torch.Generator().manual_seed(0)).to(CUDA)
        with torch.inference_mode():
            attention(query, key, value)
            waits_of_trial = record.waits_in()
            found, name = attention(query, key, value).cpu(), engine(query, key, value)
            assert record.waits_in() - waits_of_trial == 1  # for the copy to the CPU
        num_calls = len(calls)
        attention(query, key, value)  # with gradients
        assert len(calls) == num_calls
    attention_module._xformers_operator.cache_clear()
    assert calls == ([(1, 64, 2, 8)] * (operator is not None) + [(2, 5, 2, 8)] * 2 * is_chosen)
    assert name == ("xformers 0.0.34" if is_chosen else "torch's flash_attention")
    torch.testing.assert_close(found, exact(*(tensor.cpu() for tensor in (query, key, value))))


@pytest.mark.parametrize(("embed_dim", "grid_size"), [(4, 1), (8, 3), (32, 7), (768, 23)])
def test_the_sine_cosine_table_entry_by_entry(embed_dim: int, grid_size: int) -> None:
    quarter = embed_dim // 4
    expected = np.empty((grid_size**2, embed_dim))
    for row in range(grid_size):
        for column in range(grid_size):
            for i in range(quarter):
                frequency = 10000 ** (-i / (embed_dim / 4))
                for half, position in ((0, column), (embed_dim // 2, row)):
                    expected[row * grid_size + column, half + i] = math.sin(position * frequency)
                    expected[row * grid_size + column, half + quarter + i] = math.cos(position * frequency)
    table = sine_cosine_2d(embed_dim, grid_size)
    assert table.dtype == torch.float32
    np.testing.assert_allclose(table.numpy(), expected, rtol=0, atol=1e-7)


def test_the_class_token_has_a_row_of_zeros() -> None:
    model = PairVPR(small_model_config())
    assert not model.dec_pos_embed_cls[0].any()
    assert torch.equal(model.dec_pos_embed_cls[1:], model.dec_pos_embed)
    assert torch.equal(model.dec_pos_embed, sine_cosine_2d(32, 2))


def test_the_stored_grid_is_used_as_it_is() -> None:
    table = torch.randn(1, 17, 6)
    assert torch.equal(resize_encoder_table(table, 4, antialias=True, offset=0.1), table)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("grid_size", [2, 3, 7])
def test_a_constant_table_stays_constant_and_keeps_its_class_row(grid_size: int, antialias: bool) -> None:
    table = torch.cat([torch.full((1, 1, 6), 9.0), torch.full((1, 25, 6), 2.5)], dim=1)
    for offset in (0.0, 0.1):
        resized = resize_encoder_table(table, grid_size, antialias=antialias, offset=offset)
        assert resized.shape == (1, 1 + grid_size**2, 6)
        assert (resized[:, 0] == 9).all()
        torch.testing.assert_close(resized[:, 1:], torch.full((1, grid_size**2, 6), 2.5))


def test_a_table_is_resized_as_an_image_with_rows_first() -> None:
    table = torch.randn(1, 26, 3, generator=torch.Generator().manual_seed(0))
    image = torch.empty(1, 3, 5, 5)
    for row in range(5):
        for column in range(5):
            image[0, :, row, column] = table[0, 1 + row * 5 + column]
    given_size = F.interpolate(image, size=(3, 3), mode="bicubic")
    given_factor = F.interpolate(image, scale_factor=3.1 / 5, mode="bicubic")
    for offset, expected in ((0.0, given_size), (0.1, given_factor)):
        resized = resize_encoder_table(table, 3, antialias=False, offset=offset)
        for row in range(3):
            for column in range(3):
                torch.testing.assert_close(resized[0, 1 + row * 3 + column], expected[0, :, row, column])
    sixteen_bits = resize_encoder_table(table.to(torch.bfloat16), 3, antialias=False, offset=0.0)
    assert sixteen_bits.dtype == torch.bfloat16
