"""Sections of `benchmarks.index_at_size`: an index is built, searched and changed. Q queries, G values a row."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from benchmarks import index_rows, index_steps, shared
from benchmarks.fresh_process import Ran, call
from benchmarks.index_rows import Drawn
from benchmarks.index_steps import Asked
from pairvpr.config.schema import BuildConfig, IndexKind, ModelConfig
from pairvpr.distributed.progress import say
from pairvpr.index import choose, measure
from pairvpr.index.generations import IndexManifest
from pairvpr.index.plan import plan_index, size_text

K, NUM_SHARDS = 100, 8
NUM_BRUTE_FORCE, NUM_OF_CURVE, NUM_AFTER_UPDATE = 50, 250, 100
GOAL_RATIO, GOAL_RECALL, GOAL_TIMES_FASTER = 1.15, 0.95, 10.0
GOAL_BUILD_BYTES, GOAL_SEARCH_SHARE, GOAL_SEARCH_SPARE_BYTES = 1.5 * choose.GIB, 1.1, 300 << 20
GOAL_UPDATE_BYTES, GOAL_UPDATE_SECONDS = 1.1, 1.5
PLENTY_BYTES = 1e15
MIB = 2**20
BARE, EXACT, AUTO = "one bare faiss index", "ours, exact", "ours, auto"
MEMORY_HEADER = ("MiB before", "MiB at the peak", "without files")


@dataclass
class Bench:
    """Where everything lies, and what is known so far."""

    options: argparse.Namespace
    drawn: Drawn
    work: Path
    text: dict[str, list[str]] = field(default_factory=dict)
    versions: list[str] = field(default_factory=lambda: [f"faiss {faiss.__version__}"])
    indices: dict[str, IndexManifest] = field(default_factory=dict)
    truth: NDArray[np.int64] | None = None

    @property
    def directory(self) -> str:
        """Of the index of all rows."""
        return str(self.work / "index")

    @property
    def queries(self) -> NDArray[np.float32]:
        """(Q, G)"""
        return np.load(self.drawn.queries_file)

    def add(self, title: str, *blocks: str) -> None:
        """Text of a section."""
        self.text.setdefault(title, []).extend(blocks)
        say("\n".join(blocks))


def verdict(is_met: bool, text: str) -> str:
    """A line on a goal."""
    return f"- {'met' if is_met else '**missed**'}: {text}"


def mib(num_bytes: float) -> str:
    """MiB for a table."""
    return f"{num_bytes / MIB:,.0f}"


def memory_cells(ran: Sequence[Ran[Any]]) -> list[str]:
    """Largest of each: before the work, at the peak, at the peak without pages of files."""
    each = zip(*((one.start_bytes, one.peak_bytes, one.peak_anonymous_bytes) for one in ran), strict=True)
    return [mib(max(values)) for values in each]


def work_table(ran: Sequence[Ran[Any]]) -> str:
    """Pieces of work by what they do."""
    by_name: dict[str, list[Ran[Any]]] = {}
    for one in ran:
        by_name.setdefault(one.what.strip("_").replace("_", " "), []).append(one)
    rows = [
        [name, f"{len(its)}", f"{sum(one.seconds for one in its):.1f}", *memory_cells(its)]
        for name, its in by_name.items()
    ]
    return shared.markdown_table(("work", "pieces", "seconds", *MEMORY_HEADER), rows)


def build_exact(bench: Bench) -> None:
    """Shards described and filled."""
    title, drawn = "Exact: building", bench.drawn
    described = call(index_steps.describe, bench.directory, drawn.rows_file, drawn.num_rows, NUM_SHARDS)
    config = BuildConfig(kind=IndexKind.flat)
    built = call(index_steps.build_index, bench.directory, None, config, PLENTY_BYTES)
    bench.indices[EXACT], ran = built.answer
    peak_bytes = max(one.peak_bytes for one in ran)
    planned = plan_index(
        drawn.num_rows, ModelConfig(), replace(config, num_shards=NUM_SHARDS), budget_bytes=PLENTY_BYTES
    )
    bench.add(
        title,
        f"{NUM_SHARDS} shards of {drawn.num_rows:,} rows; descriptors written in {described.seconds:.1f} s.",
        work_table([*ran, built]),
        verdict(
            peak_bytes < GOAL_BUILD_BYTES,
            f"filling a shard takes {size_text(peak_bytes)}, goal below {size_text(GOAL_BUILD_BYTES)} "
            f"(`plan.py` says {size_text(planned.memory.fill_bytes)})",
        ),
    )


def build_auto(bench: Bench) -> None:
    """The same shards as the next generation of the index, of the kind that fits."""
    title, budget_gib = "auto: building", bench.options.budget_gib
    config = BuildConfig(kind=IndexKind.auto, memory_budget_gib=budget_gib, target_recall=GOAL_RECALL)
    start = replace(bench.indices[EXACT], generation=2)
    built = call(index_steps.build_index, bench.directory, start, config, budget_gib * choose.GIB)
    manifest, ran = built.answer
    if choose.KINDS[IndexKind(manifest.kind)].is_exact:
        raise ValueError(f"auto chose {manifest.kind}: expected a smaller --budget-gib")
    bench.indices[AUTO], measured = manifest, manifest.measured or {}
    learn_s, fill_s = (sum(one.seconds for one in ran if one.what == what) for what in ("_train", "_build_shard"))
    measure_s = sum(one.seconds for one in ran) - learn_s - fill_s
    sizes = index_steps.shards_bytes(manifest)
    num_bytes = sum(sizes) + (manifest.trained.bytes if manifest.trained else 0)
    bench.add(
        title,
        f"Budget {budget_gib:g} GiB: auto chose **{manifest.factory}** ({manifest.kind}), {size_text(num_bytes)} for a "
        f"search, effort {manifest.effort}; it measured recall {measured['recall']} +- {measured['standard_error']} "
        f"with {measure.NUM_STANDARD_ERRORS:g} standard errors to spare for {config.target_recall}.",
        f"Learning {learn_s:.0f} s, filling {fill_s:.0f} s, measuring {measure_s:.0f} s; {built.seconds:.0f} s with "
        "the start of all processes.",
        work_table([*ran, built]),
        verdict(num_bytes <= budget_gib * choose.GIB, f"{size_text(num_bytes)} in search, budget {budget_gib:g} GiB"),
    )


def search_both(bench: Bench) -> None:
    """Rounds of the bare index, ours and auto, one after another."""
    queries, asked = bench.queries, dict[str, list[Ran[Asked]]]()
    for number in range(bench.options.rounds):
        asked.setdefault(BARE, []).append(call(index_steps.search_bare, bench.drawn.rows_file, queries, K))
        for name, manifest in bench.indices.items():
            asked.setdefault(name, []).append(call(index_steps.search_held, bench.directory, manifest, queries, K))
        said = ", ".join(f"{name} {its[-1].answer.seconds:.2f} s" for name, its in asked.items())
        say(f"round {number + 1}: {said}")
    rows = [
        [
            name,
            f"{median_ms(its, len(queries)):.2f}",
            ", ".join(f"{one.answer.seconds:.2f}" for one in its),
            f"{1000 * statistics.median(one.answer.alone_s for one in its):.1f}",
            f"{statistics.median(one.answer.open_s for one in its):.1f}",
            *memory_cells(its),
        ]
        for name, its in asked.items()
    ]
    header = ("", "ms/query", "seconds of each round", "ms of a query alone", "opening (s)", *MEMORY_HEADER)
    table = shared.markdown_table(header, rows)
    bench.truth = asked[EXACT][0].answer.ids
    bench.add(
        "Search",
        f"{len(queries):,} queries at once, {K} nearest, {index_steps.NUM_THREADS} threads, shards in memory; "
        f"{bench.options.rounds} alternating rounds, each search in a fresh process. Opening: reading and checksums, "
        "before the clock starts.",
        table,
    )
    check_exact(bench, asked, bench.truth)
    check_search_memory(bench, asked[EXACT])
    if AUTO in asked:
        check_auto(bench, asked, bench.truth)


def median_ms(its: Sequence[Ran[Asked]], num_queries: int) -> float:
    """Milliseconds a query."""
    return 1000 * statistics.median(one.answer.seconds for one in its) / num_queries


def check_exact(bench: Bench, asked: dict[str, list[Ran[Asked]]], ours: NDArray[np.int64]) -> None:
    """Ours against the bare index, and against float64."""
    files, counts, queries = [bench.drawn.rows_file], [bench.drawn.num_rows], bench.queries
    ratio = median_ms(asked[EXACT], len(queries)) / median_ms(asked[BARE], len(queries))
    bare = index_rows.difference(files, counts, queries, ours, asked[BARE][0].answer.ids)
    some = queries[:NUM_BRUTE_FORCE]
    brute = call(index_rows.nearest, files, counts, some, K, np.empty(0, np.int64)).answer
    wide = index_rows.difference(files, counts, some, ours[:NUM_BRUTE_FORCE], brute)
    num_other = sum(not np.array_equal(ours, one.answer.ids) for one in asked[EXACT])
    bench.add(
        "Search: exact",
        verdict(ratio <= GOAL_RATIO, f"{ratio:.3f} times the seconds of {BARE}, goal at most {GOAL_RATIO}"),
        verdict(bare.is_equal, f"against {BARE}: {bare}"),
        verdict(wide.is_equal, f"against brute force in float64, {len(some)} queries: {wide}"),
        verdict(num_other == 0, f"{num_other} rounds gave other ids than the first"),
    )


def check_search_memory(bench: Bench, held: list[Ran[Asked]]) -> None:
    """All shards in memory, one at a time, and the whole way through Ray."""
    manifest, queries, title = bench.indices[EXACT], bench.queries, "Search: exact"
    sizes = index_steps.shards_bytes(manifest)
    one = call(index_steps.search_one_at_a_time, bench.directory, manifest, queries, K)
    for what, ran, num_bytes in (
        ("all shards in memory", held, sum(sizes)),
        (f"one shard at a time ({one.seconds:.1f} s with reading and checksums)", [one], max(sizes)),
    ):
        most = GOAL_SEARCH_SHARE * num_bytes + GOAL_SEARCH_SPARE_BYTES
        peak = max(each.peak_bytes for each in ran)
        bench.add(
            title,
            verdict(
                peak <= most,
                f"{what}: {mib(peak)} MiB at the peak; {mib(num_bytes)} MiB of shards, goal at most {mib(most)} MiB",
            ),
        )
    ray = call(index_steps.search_with_ray, bench.directory, manifest, queries, K).answer
    is_same = np.array_equal(ray.ids, held[0].answer.ids)
    bench.add(title, verdict(is_same, f"{way_through_ray(ray)}, ids as above"))


def way_through_ray(ray: Asked) -> str:
    """What the job's way took."""
    return (
        f"the job's way through Ray, 1 actor: {ray.seconds:.1f} s with loading and checksums (and {ray.open_s:.1f} s "
        "to start Ray)"
    )


def check_auto(bench: Bench, asked: dict[str, list[Ran[Asked]]], truth: NDArray[np.int64]) -> None:
    """Recall and speed at the chosen effort, and beyond it."""
    manifest, queries = bench.indices[AUTO], bench.queries
    recall, error = measure.recall(asked[AUTO][0].answer.ids, truth)
    times = median_ms(asked[EXACT], len(queries)) / median_ms(asked[AUTO], len(queries))
    exact_s, auto_s = (statistics.median(one.answer.alone_s for one in asked[name]) for name in (EXACT, AUTO))
    some = slice(0, NUM_OF_CURVE)
    steps = call(index_steps.curve, bench.directory, manifest, queries[some], K, truth[some]).answer
    rows = [
        [f"{effort.num_probes}", f"{effort.num_rescored}", f"{value:.4f}", f"{1000 * seconds / len(queries[some]):.2f}"]
        for effort, value, seconds in steps
    ]
    peak = max(one.peak_anonymous_bytes for one in asked[AUTO])
    ray = call(index_steps.search_with_ray, bench.directory, manifest, queries, K).answer
    group = call(index_steps.search_one_at_a_time, bench.directory, manifest, queries, K)
    config = BuildConfig(kind=IndexKind(manifest.kind), num_shards=NUM_SHARDS)
    planned = plan_index(bench.drawn.num_rows, ModelConfig(), config, budget_bytes=PLENTY_BYTES).memory.search_bytes
    bench.add(
        "Search: auto",
        verdict(recall >= GOAL_RECALL, f"recall {recall:.4f} +- {error:.4f} of the exact {K}, goal {GOAL_RECALL}"),
        verdict(times >= GOAL_TIMES_FASTER, f"{times:.1f} times as fast as exact, goal {GOAL_TIMES_FASTER:g}"),
        f"- a query that is asked alone: {exact_s / auto_s:.1f} times as fast as exact",
        verdict(
            peak <= bench.options.budget_gib * choose.GIB,
            f"{mib(peak)} MiB at the peak without pages of files; mapped descriptors come on top, which the system "
            "drops when it needs room",
        ),
        verdict(
            group.peak_anonymous_bytes <= planned,
            f"one group of shards at a time ({group.seconds:.1f} s with reading and checksums): "
            f"{mib(group.peak_anonymous_bytes)} MiB without pages of files; `plan.py` says {mib(planned)} MiB",
        ),
        f"- {way_through_ray(ray)}; recall {measure.recall(ray.ids, truth)[0]:.4f}",
        f"Over the effort, the first {len(queries[some])} queries:",
        shared.markdown_table(("num_probes", "num_rescored", f"recall of {K}", "ms/query"), rows),
    )


def updates(bench: Bench) -> None:
    """The same change of both kinds, of all photos and of a tenth of them."""
    title, drawn, tenth = "Updates", bench.drawn, str(bench.work / "tenth")
    num_tenth, num_changed = drawn.num_rows // 10, drawn.num_added
    call(index_steps.describe, tenth, drawn.rows_file, num_tenth, 1)
    random, rows, costs, answers = np.random.default_rng(4), [], list[str](), list[str]()
    gone_of = {size: np.sort(random.choice(size, num_changed, replace=False)) for size in (drawn.num_rows, num_tenth)}
    for number, (name, manifest) in enumerate(bench.indices.items()):
        small = call(index_steps.build_alike, tenth, bench.directory, manifest).answer
        done = {}
        for directory, index in ((bench.directory, manifest), (tenth, small)):
            gone = gone_of[index.num_images]
            ran = call(index_steps.update, directory, index, 3 + number, drawn.added_file, num_changed, gone)
            done[index.num_images] = updated = ran.answer
            cells = [f"{seconds:.2f}" for seconds in updated.seconds.values()]
            rows.append([f"{name}, {index.num_images:,} photos", *cells, mib(updated.num_bytes), mib(ran.peak_bytes)])
            answers.append(check_updated(bench, name, directory, updated.manifest, index.num_images, gone))
        costs += update_verdicts(name, list(done.values()))
    header = ("", *(f"{step} (s)" for step in index_steps.UPDATE_STEPS), "MiB written", "MiB at the peak")
    bench.add(
        title,
        f"{num_changed:,} photos added and as many removed, of {drawn.num_rows:,} and of {num_tenth:,}; both auto "
        "indices have the same lists, because adding a row takes as long as there are lists.",
        shared.markdown_table(header, rows),
        *costs,
        *answers,
    )


def update_verdicts(name: str, done: Sequence[index_steps.Updated]) -> list[str]:
    """Of all photos against a tenth of them."""
    large, small = done
    of_bytes = large.num_bytes / small.num_bytes
    of_seconds = sum(large.seconds.values()) / sum(small.seconds.values())
    return [
        verdict(of_bytes <= GOAL_UPDATE_BYTES, f"{name}: {of_bytes:.3f} times the bytes for ten times the photos"),
        verdict(of_seconds <= GOAL_UPDATE_SECONDS, f"{name}: {of_seconds:.2f} times the seconds"),
    ]


def check_updated(
    bench: Bench, name: str, directory: str, manifest: IndexManifest, num_before: int, gone: NDArray[np.int64]
) -> str:
    """A search of the changed index against brute force over the photos that are there."""
    files = [bench.drawn.rows_file, bench.drawn.added_file]
    counts, some = [num_before, bench.drawn.num_added], bench.queries[:NUM_AFTER_UPDATE]
    found = call(index_steps.search_one_at_a_time, directory, manifest, some, K).answer.ids
    truth = call(index_rows.nearest, files, counts, some, K, gone).answer
    num_gone, num_new = int(np.isin(found, gone).sum()), int((found >= num_before).sum())
    about = f"{name}, {num_before:,} photos, {len(some)} queries after it: {num_gone} removed and {num_new} added found"
    if name == EXACT:
        wide = index_rows.difference(files, counts, some, found, truth)
        return verdict(wide.is_equal and not num_gone, f"{about}; against brute force in float64, {wide}")
    recall, error = measure.recall(found, truth)
    text = f"{about}; recall {recall:.4f} +- {error:.4f}"
    if num_before < bench.drawn.num_rows:
        return f"- {text} (at an effort that was measured with all photos)"
    return verdict(recall >= GOAL_RECALL and not num_gone, text)
