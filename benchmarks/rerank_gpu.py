"""Re-ranking and description on one GPU: pairs/s, images/s, utilisation, memory, the kernels that take the time.

    python -m benchmarks.rerank_gpu --report FILE

Run it by hand on an idle GPU, from the root of the checkout. Needs torch alone: neither Ray nor faiss nor hydra. Random
weights of full size, dense features that lie in the GPU's memory, one query at a time as far as sharing goes:

- the published procedure written plainly (fp32, its features repeated, both directions, the whole decoder), in passes
  of `--plain-batch` pairs, against `Reranker` in fp32, bf16 and fp16, in passes of `--batch-size`;
- utilisation: the operations that ran, counted by torch, over what the GPU does in a product of two square matrices of
  the same type, measured in this run;
- description: photos of noise that lie in the GPU's memory as uint8, normalised there;
- which attention operator ran, and how far it is from torch's own in fp32.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.rerank_work import network, ours, plain
from pairvpr.config.schema import Precision
from pairvpr.models.attention import _xformers_operator, attention
from pairvpr.models.pair_vpr import AUTOCAST_DTYPES, PairVPR, normalise

JOBS = (("vitb", 100), ("vitg", 500))
MATRIX_SIDE = 8192
WARM_UPS = 2
HEADER = ("", "batch", "ms", "pairs/s", "TFLOP/s", "% of a product", "times as fast", "peak GiB")


def seconds_of(work: Callable[[], object], rounds: int, device: torch.device) -> float:
    """Median of some rounds, after some that warm up."""
    times = []
    for number in range(WARM_UPS + rounds):
        start_s = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= WARM_UPS:
            times.append(time.perf_counter() - start_s)
    return statistics.median(times)


def product_tflops(dtype: torch.dtype, side: int, device: torch.device) -> float:
    """TFLOP/s of a product of two square matrices."""
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / seconds_of(lambda: one @ other, 10, device) / 1e12


def flop_of(work: Callable[[], object]) -> int:
    """Multiplications and additions, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def pair_rows(name: str, num_candidates: int, options: argparse.Namespace, device: torch.device) -> list[list[str]]:
    """A row for each way to score the pairs of a query."""
    rows: list[list[str]] = []
    baseline_pairs_per_s = 0.0
    ways = [("published procedure, fp32", Precision.fp32, options.plain_batch)]
    ways += [(f"ours, {precision}", precision, size) for precision in Precision for size in options.batch_size]
    for title, precision, batch_size in ways:
        model = network(name, device, precision, options.depth)
        shape = (model.config.num_patches, model.config.encoder.embed_dim)
        query = torch.randn(shape, device=device)
        is_plain = not rows
        number = min(options.plain_candidates, num_candidates) if is_plain else num_candidates
        dense = torch.randn(number, *shape, device=device)
        work = (
            partial(plain_passes, model, query, dense, options.plain_batch)
            if is_plain
            else partial(ours, model, query, dense, batch_size=batch_size)
        )
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds, flop = seconds_of(work, options.rounds, device), flop_of(work)
        baseline_pairs_per_s = baseline_pairs_per_s or number / seconds
        tflops = flop / seconds / 1e12
        peak = product_tflops(AUTOCAST_DTYPES.get(precision, torch.float32), options.side, device)
        rows.append(
            [
                f"{name}: {title}",
                f"{batch_size}",
                f"{1000 * seconds:.1f}",
                f"{number / seconds:.1f}",
                f"{tflops:.1f}",
                f"{100 * tflops / peak:.0f}",
                f"{number / seconds / baseline_pairs_per_s:.1f}",
                f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if device.type == "cuda" else "-",
            ]
        )
        print(" | ".join(rows[-1]), flush=True)
        del model, query, dense, work
    return rows


def plain_passes(model: PairVPR, query: Tensor, dense: Tensor, batch_size: int) -> list[Tensor]:
    """The plain loop in passes of some pairs."""
    return [plain(model, query, some) for some in dense.split(batch_size)]


def description_row(name: str, precision: Precision, options: argparse.Namespace, device: torch.device) -> list[str]:
    """Photos per second."""
    model = network(name, device, precision, options.depth)
    side = model.config.image_size_px
    pixels = torch.randint(256, (options.photos, side, side, 3), dtype=torch.uint8, device=device)

    def work() -> object:
        with torch.inference_mode():
            return model.describe(normalise(pixels))

    seconds, flop = seconds_of(work, options.rounds, device), flop_of(work)
    return [
        name,
        f"{precision}",
        f"{options.photos}",
        f"{options.photos / seconds:.1f}",
        f"{flop / seconds / 1e12:.1f}",
    ]


def attention_lines(device: torch.device) -> list[str]:
    """Which operator runs, and how far it is from torch's in fp32, for one pair of the published decoder."""
    lines = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        query, key, value = (torch.randn(4, 529, 12, 64, device=device, dtype=dtype) for _ in range(3))
        heads_first = [x.float().transpose(1, 2) for x in (query, key, value)]
        exact = F.scaled_dot_product_attention(heads_first[0], heads_first[1], heads_first[2])
        operator = None if device.type == "cpu" else _xformers_operator(device.type, dtype, 64)
        difference = float((attention(query, key, value).float().transpose(1, 2) - exact).abs().max())
        name = "torch" if operator is None else "xformers"
        lines.append(f"- {dtype}: {name}; differs from torch's in fp32 by {difference:.1e} at most")
    return lines


def kernel_table(options: argparse.Namespace, device: torch.device) -> str:
    """What takes the time of a bf16 query, by kernel."""
    model = network("vitb", device, Precision.bf16, options.depth)
    query, *dense = torch.randn(1 + 100, model.config.num_patches, model.config.encoder.embed_dim, device=device)
    candidates = torch.stack(dense[: options.profiled])
    size = max(options.batch_size)
    ours(model, query, candidates, batch_size=size)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        ours(model, query, candidates, batch_size=size)
        if device.type == "cuda":
            torch.cuda.synchronize()
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return profiled.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=60)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column is text."""
    ruler = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ruler, *rows])


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script (cuda)")
    parser.add_argument("--models", nargs="+", default=[name for name, _ in JOBS], help="vitb vitg")
    parser.add_argument("--candidates", type=int, help="of a query (100 for vitb, 500 for vitg)")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[32, 100], help="pairs in our passes (32 100)")
    parser.add_argument("--plain-batch", type=int, default=50, help="pairs in a pass of the plain loop (50)")
    parser.add_argument("--plain-candidates", type=int, default=100, help="candidates of the plain loop (100)")
    parser.add_argument("--photos", type=int, default=64, help="photos in a pass of description (64)")
    parser.add_argument("--profiled", type=int, default=100, help="candidates of the profile (100)")
    parser.add_argument("--depth", type=int, default=12, help="blocks of the decoder; fewer to try the script (12)")
    parser.add_argument("--side", type=int, default=MATRIX_SIDE, help=f"of the matrices ({MATRIX_SIDE})")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that are timed (5)")
    parser.add_argument("--report", type=Path, help="also write the report to this file")
    return parser.parse_args()


def main() -> None:
    """All sections."""
    options = parsed()
    device = torch.device(options.device)
    jobs = [(name, options.candidates or number) for name, number in JOBS if name in options.models]
    rows = [row for name, number in jobs for row in pair_rows(name, number, options, device)]
    described = [
        description_row(name, precision, options, device)
        for name, _ in jobs
        for precision in (Precision.fp32, Precision.bf16)
    ]
    what = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU"
    text = "\n".join(
        [
            "# Re-ranking on a GPU",
            "",
            f"{what}; torch {torch.__version__}, Python {platform.python_version()}; {time.strftime('%Y-%m-%d')}.",
            f"`{options}`",
            "",
            "Pairs of one query, both directions. A product is one of two square matrices of the same type.",
            "",
            table(HEADER, rows),
            "",
            "Description:",
            "",
            table(("", "precision", "photos in a pass", "images/s", "TFLOP/s"), described),
            "",
            "Attention:",
            "",
            *attention_lines(device),
            "",
            "Kernels of one query in bf16:",
            "",
            "```",
            kernel_table(options, device),
            "```",
        ]
    )
    print(text)
    if options.report is not None:
        options.report.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
