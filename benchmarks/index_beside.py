"""More sections of `benchmarks.index_at_size`: autofaiss on the same rows, and a shard of an index of 100 million."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil

from benchmarks import index_steps, shared
from benchmarks.fresh_process import Ran, call
from benchmarks.index_sections import EXACT, NUM_AFTER_UPDATE, PLENTY_BYTES, Bench, K, mib, verdict
from benchmarks.index_steps import Asked
from pairvpr.config.schema import BuildConfig, IndexKind, ModelConfig
from pairvpr.index import build, choose, measure
from pairvpr.index.generations import IndexManifest
from pairvpr.index.plan import Plan, plan_index, size_text

GOAL_OF_PLAN = 0.1


def beside_autofaiss(bench: Bench) -> None:
    """Its build from the same rows, and its search of the same queries."""
    python, title = bench.options.autofaiss, "autofaiss"
    if python is None:
        bench.add(title, "Left out: no --autofaiss.")
        return
    output = bench.work / "autofaiss"
    output.mkdir(parents=True)
    status, seconds, peak_bytes = run_autofaiss(bench, python, output)
    versions = output / "versions.json"
    if versions.exists():
        its = ", ".join(f"{name} {version}" for name, version in json.loads(versions.read_text()).items())
        bench.versions.append(f"beside it {its}")
    call_text = f"`build_index(max_index_memory_usage='{memory_of_autofaiss(bench)}', metric_type='l2', nb_cores=2)`"
    if status != 0:
        why = "stopped" if status is None else f"failed with status {status}"
        bench.add(
            title,
            f"{call_text}: {why} after {seconds / 60:.1f} minutes, {mib(peak_bytes)} MiB at the peak; it was at: "
            f"`{last_line(output / 'log', of_steps=status is None)}`.",
        )
        return
    told = json.loads((output / "about.json").read_text())
    queries = bench.queries
    assert bench.truth is not None, "no exact answer to compare with"
    recall, error = measure.recall(np.load(output / "ids.npy"), bench.truth)
    rows = [
        ("index", str(told["about"].get("index_key", ""))),
        ("search parameters", str(told["about"].get("index_param", ""))),
        ("building (s)", f"{told['build_s']:.0f}"),
        ("peak of all its processes (MiB)", mib(peak_bytes)),
        ("index on disk (MiB)", mib((output / "knn.index").stat().st_size)),
        (f"recall of the exact {K}", f"{recall:.4f} +- {error:.4f}"),
        ("ms/query", f"{1000 * told['search_s'] / len(queries):.2f}"),
    ]
    bench.add(title, f"{call_text}:", shared.markdown_table(("", "autofaiss"), rows))


def memory_of_autofaiss(bench: Bench) -> str:
    """The budget, as it wants it."""
    return f"{bench.options.budget_gib * choose.GIB / 1e6:.0f}MB"


def run_autofaiss(bench: Bench, python: str, output: Path) -> tuple[int | None, float, int]:
    """Its status (None: stopped), its seconds, and the most that its processes held together."""
    script, drawn = Path(__file__).with_name("index_autofaiss.py"), bench.drawn
    command = [python, str(script), str(drawn.rows_file.parent), str(drawn.queries_file), str(output)]
    command += [memory_of_autofaiss(bench), str(K)]
    start_s, peak_bytes = time.perf_counter(), 0
    with (output / "log").open("wb") as log:
        process = psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None and time.perf_counter() - start_s < 60 * bench.options.autofaiss_minutes:
            peak_bytes = max(peak_bytes, sum(map(resident_bytes, [process, *children(process)])))
            time.sleep(0.25)
        status = process.poll()
        for each in [*children(process), process] if status is None else []:
            each.kill()
        process.wait()
    return status, time.perf_counter() - start_s, peak_bytes


def children(process: psutil.Process) -> list[psutil.Process]:
    """All processes below one that may have ended."""
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def resident_bytes(process: psutil.Process) -> int:
    """0 for one that has ended."""
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def last_line(log: Path, of_steps: bool) -> str:
    """The last line of a log, or the last step that autofaiss announced, without its date."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    steps = [line.partition("]: ")[2].strip() for line in lines if "]: " in line and of_steps]
    return next((line for line in reversed(steps or lines) if line), "nothing")


def hundred_million(bench: Bench) -> None:
    """What the plan says, and one of its shards."""
    title, num_images = "100 million", bench.options.plan_images
    config = BuildConfig(kind=IndexKind.ivf_rabitq)
    plan = plan_index(num_images, ModelConfig(), config, budget_bytes=PLENTY_BYTES)
    spec = build.IndexSpec(plan.kind, choose.default_num_lists(num_images))
    num_rows = min(plan.images_per_shard, bench.drawn.num_rows)
    directory = str(bench.work / "one_of_many")
    call(index_steps.describe, directory, bench.drawn.rows_file, num_rows, 1)
    other = bench.indices[EXACT]
    manifest, ran = call(index_steps.one_of_many_shards, directory, spec, bench.directory, other).answer
    searched = call(index_steps.search_held, directory, manifest, bench.queries[:NUM_AFTER_UPDATE], K)
    num_shards = num_images / num_rows
    learn, fill = (next(one for one in ran if one.what == what) for what in ("_train", "_build_shard"))
    bench.add(
        title,
        f"{num_images:,} photos in {plan.num_shards} shards, {spec.factory}, learnt from a sample of "
        f"{choose.num_training_rows(other.num_live, plan.descriptor_dim, spec.num_lists):,} rows; one shard of "
        f"{num_rows:,} rows was built, and its figures taken {num_shards:,.0f} times where they are of all.",
        *plan_blocks(plan, manifest, num_shards, learn, fill, searched),
        f"One actor searches some {plan.num_shards / plan.num_groups:.0f} of the shards as one, at most "
        f"{size_text(plan.memory.search_bytes)} by the plan; that was not tried at this size (the smaller index above "
        "was).",
        f"Learning: {learn.seconds:.0f} s. Filling: {fill.seconds:.1f} s a shard, "
        f"{num_shards * fill.seconds / 3600:.1f} hours for all, one after another on "
        f"{index_steps.NUM_THREADS} threads.",
    )


def plan_blocks(
    plan: Plan,
    manifest: IndexManifest,
    num_shards: float,
    learn: Ran[None],
    fill: Ran[None],
    searched: Ran[Asked],
) -> list[str]:
    """The plan's bytes beside what was measured, with verdicts below."""
    assert manifest.trained is not None, "an index of lists has learnt"
    in_search = num_shards * sum(index_steps.shards_bytes(manifest)) + manifest.trained.bytes
    files = sum(file.bytes for entry in manifest.shards for file in entry.files.values())
    on_disk = num_shards * files + manifest.trained.bytes
    planned = next(each for each in plan.kinds if each.kind is plan.kind)
    paths_bytes = plan.storage.index_bytes - planned.bytes - plan.descriptors_bytes
    sizes = {
        "index of all shards in search": (planned.bytes, in_search),
        "on disk, without the list of photos": (plan.storage.index_bytes - paths_bytes, on_disk),
    }
    config = BuildConfig(kind=plan.kind, num_shards=1, num_lists=planned.num_lists)
    alone = plan_index(manifest.num_images, ModelConfig(), config, budget_bytes=PLENTY_BYTES)
    alone_bytes = alone.memory.search_bytes
    peaks = {
        "learning": (plan.memory.learn_bytes, learn.peak_anonymous_bytes, learn.peak_bytes),
        "filling a shard": (plan.memory.fill_bytes, fill.peak_anonymous_bytes, fill.peak_bytes),
        "searching one shard alone": (alone_bytes, searched.peak_anonymous_bytes, searched.peak_bytes),
    }
    rows = [
        [what, size_text(there), size_text(here), "", f"{here / there:.2f}"] for what, (there, here) in sizes.items()
    ]
    rows += [
        [f"memory: {what}", size_text(there), size_text(here), size_text(resident), f"{here / there:.2f}"]
        for what, (there, here, resident) in peaks.items()
    ]
    verdicts = [
        verdict(abs(here / there - 1) <= GOAL_OF_PLAN, f"{what}: within {GOAL_OF_PLAN:.0%} of the plan")
        for what, (there, here) in sizes.items()
    ] + [verdict(here <= there, f"{what}: no more memory than planned") for what, (there, here, _) in peaks.items()]
    table = shared.markdown_table(("", "plan", "measured", "with pages of files", "measured / plan"), rows)
    return [table, *verdicts]
