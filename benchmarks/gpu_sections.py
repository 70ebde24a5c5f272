"""The sections of `benchmarks.gpu`: each measures one thing, and adds a row as soon as it knows it.

B pairs or photos of a pass, L patches, C encoder width, D decoder width, H heads, E head width.
"""

from __future__ import annotations

import importlib
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.rerank_work import network, ours, plain
from pairvpr.config.schema import DecoderConfig, EncoderConfig, ModelConfig, Precision
from pairvpr.models.attention import engine
from pairvpr.models.linear import to_sixteen_bits
from pairvpr.models.pair_scorer import PairScorer
from pairvpr.models.pair_vpr import AUTOCAST_DTYPES, PairVPR, normalise
from pairvpr.retrieval.describe import Describer
from pairvpr.training.optimizer import (
    freeze_for_stage_one,
    freeze_for_stage_two,
    set_rates,
    stage_one_optimizer,
    stage_two_optimizer,
)

BF16 = torch.bfloat16
PHOTOS_OF_A_PLACE = 4
MASK_RATIO = 0.9


class Rows(Protocol):
    """Where results go; `add` ends a section whose time is spent."""

    headlines: dict[str, float]

    def add(self, **row: Any) -> None: ...

    def headline(self, name: str, value: float) -> None: ...


class Bench:
    """The device and how much is tried on it."""

    def __init__(self, device: torch.device, small: bool) -> None:
        self.device, self.small = device, small
        self.is_gpu = device.type == "cuda"
        self.rounds = 1 if small else 7
        self.depth, self.side_px = (2, 56) if small else (12, 322)
        self.matrix_tflops: dict[torch.dtype, float] = {}

    def model(self, precision: Precision, name: str = "vitb") -> PairVPR:
        """Random weights, as `build_model` makes it."""
        return network("vits" if self.small else name, self.device, precision, self.depth, self.side_px)

    def rate(self, dtype: torch.dtype) -> float:
        """TFLOP/s of a product of two square matrices: what shares are of."""
        if dtype not in self.matrix_tflops:
            side = 256 if self.small else 8192
            one, other = (torch.randn(side, side, device=self.device, dtype=dtype) for _ in range(2))
            self.matrix_tflops[dtype] = 2 * side**3 / self.milliseconds(lambda: one @ other) / 1e9
        return self.matrix_tflops[dtype]

    def milliseconds(self, work: Callable[[], object], rounds: int | None = None) -> float:
        """Median time on the device, behind a round that warms up."""
        work()
        times = []
        for _ in range(rounds or self.rounds):
            self.wait()
            start_s = time.perf_counter()
            work()
            self.wait()
            times.append(1000 * (time.perf_counter() - start_s))
        return statistics.median(times)

    def host_milliseconds(self, work: Callable[[], object]) -> float:
        """Time until the work is queued; on a CPU, until it is done."""
        self.wait()
        start_s = time.perf_counter()
        work()
        took_ms = 1000 * (time.perf_counter() - start_s)
        self.wait()
        return took_ms

    def wait(self) -> None:
        """Until the device is idle."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def kernels(self, work: Callable[[], object]) -> int:
        """Kernels that the device runs; 0 on a CPU."""
        if not self.is_gpu:
            return 0
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            work()
            self.wait()
        return sum(event.count for event in profiled.key_averages() if str(event.device_type).endswith("CUDA"))

    def peak_gib(self) -> float:
        """The most memory since the last question."""
        if not self.is_gpu:
            return 0.0
        found = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return round(found, 2)

    def pixels(self, count: int) -> Tensor:
        """Noise (count, S, S, 3) uint8 on the device."""
        return torch.randint(256, (count, self.side_px, self.side_px, 3), dtype=torch.uint8, device=self.device)


def tflop_of(work: Callable[[], object]) -> float:
    """Multiplications and additions, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e12


def ceilings(bench: Bench, rows: Rows) -> None:
    """What the card does in its best case: products of square matrices, and a copy."""
    for dtype in (BF16, torch.float16, torch.float32):
        rows.add(product=str(dtype), tflops=round(bench.rate(dtype), 2))
    rows.headline("matrix product, bf16, TFLOP/s", bench.rate(BF16))
    source = torch.empty((1 << 20) if bench.small else (1 << 30), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    rows.add(copy_gb_per_s=round(2 * source.nbytes / bench.milliseconds(lambda: target.copy_(source)) / 1e6, 1))


def correctness(bench: Bench, rows: Rows) -> None:
    """Scores and descriptors against the CPU's in fp32, equal twice, independent of the batch; waits of the host."""
    exact = network("vits" if bench.small else "vitb", torch.device("cpu"), Precision.fp32, bench.depth, bench.side_px)
    patches, width = exact.config.num_patches, exact.config.encoder.embed_dim
    query, candidates = torch.randn(patches, width), torch.randn(3, patches, width)
    pixels = np.random.default_rng(0).integers(0, 256, (2, bench.side_px, bench.side_px, 3), dtype=np.uint8)
    scores, descriptors = ours(exact, query, candidates, batch_size=2), Describer(exact).descriptors(pixels)
    query, candidates = query.to(bench.device), candidates.to(bench.device)
    for precision in Precision:
        model = bench.model(Precision.fp32)
        model.load_state_dict(exact.state_dict())
        model.config.precision = precision
        if precision is not Precision.fp32:
            to_sixteen_bits(model, AUTOCAST_DTYPES[precision])
        ours(model, query, candidates, batch_size=2)
        with host_waits(bench) as waits:
            found = ours(model, query, candidates, batch_size=2)
        again = ours(model, query, candidates, batch_size=2)
        alone = torch.cat([ours(model, query, one[None], batch_size=2) for one in candidates])
        describer = Describer(model)
        both = describer.descriptors(pixels)
        one_by_one = np.concatenate([describer.descriptors(photo[None]) for photo in pixels])
        off_by = float((found - scores).abs().max())
        if precision is Precision.fp32:
            rows.headline("largest difference of a score from the CPU's, fp32", off_by)
        rows.add(
            precision=str(precision),
            scores_off_by=off_by,
            same_twice=bool(torch.equal(found, again)),
            batch_moves_scores_by=float((found - alone).abs().max()),
            descriptors_off_by=float(np.abs(both - descriptors).max()),
            batch_moves_descriptors_by=float(np.abs(both - one_by_one).max()),
            waits=len(waits),
        )


@contextmanager
def host_waits(bench: Bench) -> Iterator[list[str]]:
    """What torch says of each wait; nothing on a CPU."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if bench.is_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield said
        finally:
            if bench.is_gpu:
                torch.cuda.set_sync_debug_mode("default")
            said += [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]


def attention(bench: Bench, rows: Rows) -> None:
    """Every engine at the decoder's shapes: time, error, and what its first call costs."""
    patches = (bench.side_px // 14) ** 2
    for batch in (2,) if bench.small else (16, 100):
        own = torch.randn(batch, patches + 1, 3, 12, 64, device=bench.device, dtype=BF16).unbind(2)
        memory = torch.randn(2, batch, patches, 12, 64, device=bench.device, dtype=BF16)
        shapes = {
            "self": own,
            "cross": (own[0].contiguous(), *memory),
            "one memory for all": (own[0].flatten(0, 1)[None], *memory[:, :1]),
            "class token": (own[0][:, :1].contiguous(), own[1], own[2]),
        }
        rows.add(batch=batch, chosen_by_torch=engine(*own))
        for name, inputs in shapes.items():
            for its_name, run in engines(bench.is_gpu).items():
                attention_row(bench, rows, {"batch": batch, "shape": name, "engine": its_name}, inputs, run)


def by_torch(query: Tensor, key: Tensor, value: Tensor, backend: SDPBackend) -> Tensor:
    """torch's attention by one engine: (B, L, H, E)."""
    with sdpa_kernel(backend):
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def by_flash_attention_3(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch's flash attention with version 3 in its place, which needs the package of flash_attn_interface."""
    torch.nn.attention.activate_flash_attention_impl("FA3")
    try:
        return by_torch(query, key, value, SDPBackend.FLASH_ATTENTION)
    finally:
        torch.nn.attention.restore_flash_attention_impl()


def by_xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """xformers' attention, where it is installed."""
    return importlib.import_module("xformers.ops").memory_efficient_attention(query, key, value)


def engines(is_gpu: bool) -> dict[str, Callable[..., Tensor]]:
    """What is tried, by name: torch's own, and what is installed beside it."""
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    ours = {its.name: partial(by_torch, backend=its) for its in (backends if is_gpu else [SDPBackend.MATH])}
    others = {"flash_attn_interface": by_flash_attention_3, "xformers": by_xformers}
    return ours | {name: run for name, run in others.items() if find_spec(name) is not None}


def attention_row(
    bench: Bench, rows: Rows, about: dict[str, Any], inputs: Sequence[Tensor], run: Callable[..., Tensor]
) -> None:
    """One engine and shape; an engine that does not take it says why."""
    exact = by_torch(*(tensor.float() for tensor in inputs), backend=SDPBackend.MATH)
    query, key, _ = inputs
    flop = 4 * query.shape[0] * query.shape[1] * query.shape[2] * key.shape[1] * query.shape[3]
    try:
        with torch.inference_mode():
            start_s = time.perf_counter()
            found = run(*inputs)
            bench.wait()
            first_ms = 1000 * (time.perf_counter() - start_s)
            took_ms = bench.milliseconds(lambda: run(*inputs))
    except Exception as error:  # engines of others fail in ways of their own
        rows.add(**about, failed=f"{type(error).__name__}: {error}"[:100])
        return
    error = float((found.float() - exact).norm() / exact.norm())
    rows.add(
        **about,
        ms=round(took_ms, 3),
        tflops=round(flop / took_ms / 1e9, 2),
        first_call_ms=round(first_ms, 1),
        error=error,
    )


def scoring_pass(model: PairVPR, batch: int) -> Callable[[Tensor], Tensor]:
    """Both directions of one query with the embedded candidates (B, L, D), as the `Reranker` queues them."""
    scorer, device = PairScorer(model), next(model.parameters()).device
    query = torch.randn(1, *embedded_shape(model), device=device).to(embedded_dtype(model))
    query_of = torch.zeros(batch, dtype=torch.int64, device=device)
    with torch.inference_mode():
        first, memory = scorer.as_first(query), scorer.as_memory(query, keep=True)

    def both(candidates: Tensor) -> Tensor:
        forth = scorer.logits(first, query_of, scorer.as_memory(candidates, keep=False), None)
        return forth + scorer.logits(scorer.as_first(candidates), None, memory, query_of)

    return both


def embedded_shape(model: PairVPR) -> tuple[int, int]:
    """(L, D)."""
    return model.config.num_patches, model.config.decoder.embed_dim


def embedded_dtype(model: PairVPR) -> torch.dtype:
    """Of what the decoder reads."""
    return AUTOCAST_DTYPES.get(model.config.precision, torch.float32)


@torch.inference_mode()
def scoring(bench: Bench, rows: Rows) -> None:
    """Passes by size and precision: time, share of the matrix product, launches, memory."""
    for precision in (Precision.bf16,) if bench.small else (Precision.bf16, Precision.fp16, Precision.fp32):
        model = bench.model(precision)
        sizes = (8, 16, 24, 31, 32, 48, 64, 100) if precision is Precision.bf16 else (31, 100)
        for batch in (2,) if bench.small else sizes:
            both = scoring_pass(model, batch)
            candidates = torch.randn(batch, *embedded_shape(model), device=bench.device).to(embedded_dtype(model))
            bench.peak_gib()
            took_ms = bench.milliseconds(partial(both, candidates))
            tflop = tflop_of(partial(both, candidates))
            tflops = 1000 * tflop / took_ms
            share = 100 * tflops / bench.rate(embedded_dtype(model))
            host_ms = bench.host_milliseconds(partial(both, candidates))
            if precision is Precision.bf16:  # the largest pass stands last
                rows.headline("scoring, vitb, bf16, ms for 100 pairs", 100 * took_ms / batch)
                rows.headline("scoring, vitb, bf16, % of the matrix product", share)
                rows.headline("host ms to queue a pass", host_ms)
            rows.add(
                precision=str(precision),
                batch=batch,
                ms_for_100=round(100 * took_ms / batch, 2),
                tflops=round(tflops, 2),
                share_percent=round(share, 1),
                host_ms=round(host_ms, 2),
                kernels=bench.kernels(partial(both, candidates)),
                peak_gib=bench.peak_gib(),
            )


@torch.inference_mode()
def compiled(bench: Bench, rows: Rows) -> None:
    """A scoring pass as one graph. On a small trial the graph is made and run as it is, without generated code."""
    # oneDNN's packed weights of 16 bits can't be traced: a CPU tries the script in fp32.
    model = bench.model(Precision.bf16 if bench.is_gpu else Precision.fp32)
    for batch in (2,) if bench.small else (31, 100):
        both = scoring_pass(model, batch)
        candidates = torch.randn(batch, *embedded_shape(model), device=bench.device).to(embedded_dtype(model))
        exact, eager_ms = both(candidates), bench.milliseconds(partial(both, candidates))
        torch._dynamo.reset()
        graph = torch.compile(both, fullgraph=True, dynamic=False, backend="eager" if bench.small else "inductor")
        start_s = time.perf_counter()
        off_by = float((graph(candidates) - exact).abs().max())
        compile_s = time.perf_counter() - start_s
        took_ms = bench.milliseconds(partial(graph, candidates))
        rows.headline("compiled scoring, ms for 100 pairs", 100 * took_ms / batch)
        rows.add(
            batch=batch,
            ms_for_100=round(100 * took_ms / batch, 2),
            eager_ms_for_100=round(100 * eager_ms / batch, 2),
            compile_s=round(compile_s, 1),
            kernels=bench.kernels(partial(graph, candidates)),
            off_by=off_by,
        )


@torch.inference_mode()
def description(bench: Bench, rows: Rows) -> None:
    """One photo a pass, as re-ranking does; batches; a CUDA graph of one photo."""
    model = bench.model(Precision.bf16)

    def described(pixels: Tensor) -> Tensor:
        return model.embed(model.describe(normalise(pixels))[1])

    for batch in (1, 2) if bench.small else (1, 4, 16, 64):
        pixels = bench.pixels(batch)
        took_ms = bench.milliseconds(partial(described, pixels))
        tflops = 1000 * tflop_of(partial(described, pixels)) / took_ms
        if batch == 1:
            rows.headline("description, one photo a pass, ms", took_ms)
        elif batch == 64:
            rows.headline("description, 64 photos a pass, ms a photo", took_ms / batch)
        rows.add(
            batch=batch,
            ms_a_photo=round(took_ms / batch, 3),
            share_percent=round(100 * tflops / bench.rate(BF16), 1),
            host_ms=round(bench.host_milliseconds(partial(described, pixels)), 2),
            kernels=bench.kernels(partial(described, pixels)),
        )
    if bench.is_gpu:
        one = bench.pixels(1)
        expected = described(one)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = described(one)
        took_ms = bench.milliseconds(graph.replay)
        rows.headline("description, CUDA graph of one photo, ms", took_ms)
        rows.add(graph="one photo", ms_a_photo=round(took_ms, 3), same_bits=bool(torch.equal(found, expected)))


def published(bench: Bench, rows: Rows) -> None:
    """The published loop (fp32, everything for every pair) beside ours, per query."""
    jobs = (("vits", 4),) if bench.small else (("vitb", 100), ("vitg", 500))
    for name, number in jobs:
        times: dict[str, float] = {}
        plain_number = min(number, 50)  # in one pass; its time grows with the number of pairs
        for precision in (None, Precision.fp32, Precision.bf16):
            model = bench.model(precision or Precision.fp32, name)
            shape = (model.config.num_patches, model.config.encoder.embed_dim)
            query, dense = torch.randn(shape, device=bench.device), torch.randn(number, *shape, device=bench.device)
            bench.peak_gib()
            if precision is None:
                work = partial(plain, model, query, dense[:plain_number])
                times["published"] = bench.milliseconds(work, min(3, bench.rounds)) * number / plain_number
            else:
                work = partial(ours, model, query, dense, batch_size=100)
                times[str(precision)] = bench.milliseconds(work, min(3, bench.rounds))
            way = "published" if precision is None else str(precision)
            rows.add(
                model=name,
                candidates=number,
                way=way,
                ms_a_query=round(times[way], 1),
                times_as_fast=round(times["published"] / times[way], 2),
                peak_gib=bench.peak_gib(),
            )
            del model, query, dense, work
        if not bench.small:
            ratio = times["published"] / times["bf16"]
            rows.headline(f"times the published loop, {name}, {number} candidates", ratio)


Step = Callable[[int], None]  # one whole step with so many samples


def training(bench: Bench, rows: Rows) -> None:
    """A step of each stage as the recipe of ViT-B has it: time, share, memory, and the largest batch that fits."""
    for name, side_px, batch, make_step in (("one", 224, 256, stage_one_step), ("two", 322, 20, stage_two_step)):
        size = (1, 1) if bench.small else (12, 6)
        encoder = EncoderConfig(depth=size[0], num_trainable_blocks=size[1])
        decoder = DecoderConfig(depth=size[0])
        side_px = 56 if bench.small else side_px
        config = ModelConfig(image_size_px=side_px, precision=Precision.bf16, encoder=encoder, decoder=decoder)
        for is_deterministic in (True, False):
            with deterministic(is_deterministic):
                try:
                    step = make_step(config, bench.device)
                except ImportError as error:
                    rows.add(stage=name, left_out=f"{error}: pip install pytorch-metric-learning")
                    break
                training_rows(bench, rows, name, step, 2 if bench.small else batch, is_deterministic)
            del step


def training_rows(bench: Bench, rows: Rows, stage: str, step: Step, batch: int, is_deterministic: bool) -> None:
    """The recipe's batch, then ever larger ones until memory is full."""
    while True:
        bench.peak_gib()
        try:
            took_ms = bench.milliseconds(partial(step, batch), min(3, bench.rounds))
        except torch.OutOfMemoryError:
            rows.add(stage=stage, deterministic=is_deterministic, batch=batch, failed="out of memory")
            return
        tflops = 1000 * tflop_of(partial(step, batch)) / took_ms
        share, name = 100 * tflops / bench.rate(BF16), f"training step, stage {stage}, % of the matrix product"
        if name not in rows.headlines:
            rows.headline(name, share)
        rows.add(
            stage=stage,
            deterministic=is_deterministic,
            batch=batch,
            ms=round(took_ms, 1),
            share_percent=round(share, 1),
            host_ms=round(bench.host_milliseconds(partial(step, batch)), 1),
            peak_gib=bench.peak_gib(),
        )
        if not bench.is_gpu or not is_deterministic:
            return
        batch *= 2


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """As `training.loop.deterministic_sums`, which needs more than torch; False: torch's defaults."""
    torch.use_deterministic_algorithms(wanted)
    torch.utils.deterministic.fill_uninitialized_memory = not wanted  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]


def stage_one_step(config: ModelConfig, device: torch.device) -> Step:
    """Forward, backward, AdamW on pairs of views."""
    from pairvpr.training.global_batch import StageOneStep

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
    """Forward, mining, both losses, backward, AdamW on places. Raises `ImportError` without the mining library."""
    importlib.import_module("pytorch_metric_learning.miners")
    from pairvpr.training.global_batch import StageTwoStep

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


def _photos(count: int, config: ModelConfig, device: torch.device) -> Tensor:
    side_px = config.image_size_px
    return torch.randint(256, (count, side_px, side_px, 3), dtype=torch.uint8, device=device)


def _update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


SECTIONS = (ceilings, correctness, attention, scoring, description, compiled, published, training)
