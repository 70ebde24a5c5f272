"""Whatever the kind, the cuts, what is removed and what a filter allows: the answer is that of brute force."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pairvpr.config.schema import BuildConfig, IndexKind
from pairvpr.errors import UserError
from pairvpr.index import build, choose
from pairvpr.index import search as search_module
from pairvpr.index.filters import Filters, Places, allowed
from pairvpr.index.generations import IndexManifest
from pairvpr.index.make import LocalRunner, next_generation
from pairvpr.index.merge import Found, merge_top_k
from pairvpr.index.reader import (
    OpenIndex,
    check_faiss_has_gpus,
    cut_into_groups,
    groups_of_shards,
    removed_ids,
    search_index,
)
from pairvpr.index.search import (
    FLOAT32_STEP,
    GPU_ROUNDS_MORE,
    NO_ID,
    SPARE_ROWS,
    Effort,
    Shard,
    flat_index,
    search,
    search_filtered,
)
from pairvpr.index.update import without
from tests.support.index import opened, write_index

pytestmark = pytest.mark.slow

Rows = NDArray[np.float32]
EXACT = (IndexKind.flat, IndexKind.flat_fp16, IndexKind.flat_8bit)


@dataclass(frozen=True)
class City:
    """Photos of small whole numbers, of which many are equal; where they were taken; what is broken and removed."""

    rows: Rows
    cuts: list[int]
    rejected: set[int]
    removed: NDArray[np.int64]
    places: Places

    @property
    def live(self) -> NDArray[np.int64]:
        gone = np.union1d(np.array(sorted(self.rejected), np.int64), self.removed)
        return np.setdiff1d(np.arange(len(self.rows)), gone)


@st.composite
def cities(draw: st.DrawFn) -> City:
    width, num_rows = draw(st.integers(1, 4)), draw(st.integers(3, 40))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = generator.integers(0, draw(st.integers(1, 3)), (num_rows, width), endpoint=True).astype(np.float32)
    cuts = sorted(draw(st.lists(st.integers(0, num_rows), max_size=4)))
    share_rejected, share_removed = draw(st.sampled_from([0, 0.2])), draw(st.sampled_from([0, 0.3, 0.9]))
    rejected = set(np.flatnonzero(generator.random(num_rows) < share_rejected).tolist()) - {0, 1, 2}
    removed = np.flatnonzero(generator.random(num_rows) < share_removed)
    utm_m = generator.integers(0, 4, (num_rows, 2)).astype(np.float64)
    utm_m[generator.random(num_rows) < 0.1] = np.nan
    headings = 90.0 * generator.integers(0, 4, num_rows).astype(np.float64)
    return City(rows, cuts, rejected, removed, Places(utm_m, headings))


@contextmanager
def index_of(city: City, kind: IndexKind, cuts: list[int], *, memory_map: bool = False) -> Iterator[OpenIndex]:
    config = BuildConfig(kind=kind, num_lists=3 if kind.startswith("ivf") else None, num_build_threads=1)
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{number:03d}.jpg" for number in range(len(city.rows))]
        manifest = write_index(
            folder, paths, city.rows, cuts, config=config, rejected=dict.fromkeys(city.rejected, "broken")
        )
        if len(city.removed):
            manifest = without(folder, replace(manifest, generation=2), "updates/2/", city.removed)
        assert manifest.num_live == len(city.live)
        yield opened(folder, manifest, memory_map=memory_map)


def brute_force(city: City, queries: Rows, k: int, is_allowed: NDArray[np.bool_] | None = None) -> Found:
    """All distances in float64, ordered by (distance, id); (Q, k) padded."""
    distances = np.full((len(queries), k), np.inf, np.float32)
    ids = np.full((len(queries), k), NO_ID, np.int64)
    for number, query in enumerate(queries):
        live = city.live if is_allowed is None else city.live[is_allowed[number, city.live]]
        squares = ((city.rows[live].astype(np.float64) - query) ** 2).sum(axis=1)
        order = np.lexsort((live, squares))[:k]
        distances[number, : len(order)], ids[number, : len(order)] = squares[order], live[order]
    return distances, ids


def trimmed(found: Found) -> Found:
    columns = int((found[1] != NO_ID).sum(axis=1).max(initial=0))
    return found[0][:, :columns], found[1][:, :columns]


def queries_of(city: City, seed: int, num_queries: int) -> Rows:
    return np.random.default_rng(seed).integers(0, 3, (num_queries, city.rows.shape[1])).astype(np.float32)


@settings(max_examples=100)
@given(cities(), st.integers(1, 45), st.integers(1, 30), st.integers(0, 2**32 - 1), st.booleans())
@pytest.mark.parametrize("kind", [IndexKind.flat, IndexKind.flat_fp16])
def test_exact_kinds_equal_brute_force(
    kind: IndexKind, city: City, k: int, num_queries: int, seed: int, memory_map: bool
) -> None:
    queries = queries_of(city, seed, num_queries)
    with index_of(city, kind, city.cuts, memory_map=memory_map) as index:
        distances, ids = search_index(index, queries, k, num_threads=1)
    expected = trimmed(brute_force(city, queries, k))
    assert ids.shape == (num_queries, min(k, len(city.live)))
    np.testing.assert_array_equal(ids, expected[1])
    np.testing.assert_array_equal(distances, expected[0])


@settings(max_examples=60)
@given(cities(), st.integers(1, 45), st.integers(0, 2**32 - 1))
def test_eight_bits_equal_brute_force_over_what_they_keep(city: City, k: int, seed: int) -> None:
    """The values that 8 bits stand for are no whole numbers: equal but for rounding, and the same for all cuts."""
    queries = queries_of(city, seed, 12)
    with index_of(city, IndexKind.flat_8bit, city.cuts) as index:
        found = search_index(index, queries, k, num_threads=1)
        assert index.manifest.trained is not None
        trained = faiss.read_index(f"{index.directory}/{index.manifest.trained.path}")
        kept = trained.sa_decode(trained.sa_encode(city.rows))
    expected = trimmed(brute_force(replace(city, rows=kept), queries, k))
    np.testing.assert_allclose(found[0], expected[0], atol=1e-4)
    for query, ids, distances in zip(queries, found[1], found[0], strict=True):
        assert len(set(ids.tolist())) == len(ids)
        assert set(ids.tolist()) <= set(city.live.tolist())
        np.testing.assert_allclose(((kept[ids] - query) ** 2).sum(axis=1), distances, atol=1e-4)
    if not city.rejected and not len(city.removed):
        with index_of(city, IndexKind.flat_8bit, []) as index:
            whole = search_index(index, queries, k, num_threads=1)
        np.testing.assert_array_equal(found[1], whole[1])
        np.testing.assert_array_equal(found[0], whole[0])


@settings(max_examples=60)
@given(cities(), st.integers(1, 45), st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_lists_that_are_all_visited_equal_brute_force(city: City, k: int, seed: int, num_probes: int) -> None:
    """Equal but for 16 bits of what a row is more than its list's centre. And k photos are found if there are k."""
    queries = queries_of(city, seed, 12)
    with index_of(city, IndexKind.ivf_fp16, city.cuts) as index:
        all_lists = search_index(index, queries, k, num_threads=1, effort=Effort(3))
        some = search_index(index, queries, k, num_threads=1, effort=Effort(num_probes))
    expected = trimmed(brute_force(city, queries, k))
    assert_nearly(all_lists, expected, city, queries)
    assert some[1].shape == expected[1].shape
    assert (some[1] != NO_ID).all()


def assert_nearly(found: Found, expected: Found, city: City, queries: Rows) -> None:
    """The distances of the right photos, up to 16 bits; and each is that of its photo."""
    np.testing.assert_array_equal(found[1] == NO_ID, expected[1] == NO_ID)
    np.testing.assert_allclose(found[0], expected[0], atol=0.01)
    for query, ids, distances in zip(queries, found[1], found[0], strict=True):
        there = ids != NO_ID
        assert len(set(ids[there].tolist())) == there.sum()
        true = ((city.rows[ids[there]] - query) ** 2).sum(axis=1)
        np.testing.assert_allclose(distances[there], true, atol=0.01)


@st.composite
def conditions(draw: st.DrawFn, num_queries: int = 8) -> Filters:
    """Each kind of condition for all queries, for each, or for none."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    near = draw(st.sampled_from(["none", "all", "each"]))
    centers = generator.integers(0, 4, (num_queries, 2)).astype(np.float64)
    has_box, has_heading = draw(st.booleans()), draw(st.booleans())
    low = generator.integers(0, 3, 2).astype(np.float64)
    return Filters.of(
        num_queries,
        near=None if near == "none" else centers if near == "each" else centers[0],
        radius_m=None if near == "none" else draw(st.sampled_from([0.5, 1.0, 2.5])),
        box=np.concatenate([low, low + generator.integers(0, 3, 2)]) if has_box else None,
        heading_deg=90.0 * generator.integers(0, 4, num_queries).astype(np.float64) if has_heading else None,
        within_deg=draw(st.sampled_from([10.0, 90.0])) if has_heading else None,
    )


def is_allowed(line: NDArray[np.float64], utm_m: NDArray[np.float64], heading_deg: float) -> bool:
    """One photo, one line, spelt out."""
    east, north, radius, west, south, box_east, box_north, heading, within = line.tolist()
    answer = True
    if not np.isnan(radius):
        answer &= (utm_m[0] - east) ** 2 + (utm_m[1] - north) ** 2 <= radius**2
    if not np.isnan(west):
        answer &= west <= utm_m[0] <= box_east and south <= utm_m[1] <= box_north
    if not np.isnan(heading):
        turn = abs(heading_deg - heading) % 360
        answer &= min(turn, 360 - turn) <= within
    return bool(answer)


@settings(max_examples=80)
@given(cities(), conditions(), st.integers(1, 45), st.integers(0, 2**32 - 1), st.integers(1, 3))
@pytest.mark.parametrize("kind", [IndexKind.flat, IndexKind.flat_fp16, IndexKind.ivf_fp16])
def test_filters_equal_brute_force_over_what_they_allow(
    kind: IndexKind, city: City, filters: Filters, k: int, seed: int, num_probes: int
) -> None:
    """Exact kinds: the same photos. Lists: as many, all allowed, and the same where all lists are visited."""
    queries, places = queries_of(city, seed, 8), city.places
    expected_allowed = np.array(
        [
            [is_allowed(line, utm_m, heading) for utm_m, heading in zip(places.utm_m, places.heading_deg, strict=True)]
            for line in filters.conditions
        ]
    )
    for line, flags in zip(filters.conditions, expected_allowed, strict=True):
        np.testing.assert_array_equal(allowed(line, places, np.arange(len(city.rows))), flags)
    expected = brute_force(city, queries, k, expected_allowed)
    with index_of(city, kind, city.cuts) as index:
        for effort in (Effort(num_probes), Effort(3)):
            parts = []
            for number in range(len(index.manifest.shards)):
                asked = (index.shard(number), queries, k, filters, places)
                parts.append(search_filtered(*asked, num_threads=1, effort=effort))
                visits = index.visits(queries, effort, 1)
                again = search_filtered(*asked, num_threads=1, effort=effort, visits=visits)
                np.testing.assert_array_equal(again[1], parts[-1][1])
            found = merge_top_k(parts, k)
            np.testing.assert_array_equal(found[1] == NO_ID, expected[1] == NO_ID)
            if kind is not IndexKind.ivf_fp16:
                np.testing.assert_array_equal(found[1], expected[1])
                np.testing.assert_array_equal(found[0], expected[0])
            elif effort.num_probes == 3:
                assert_nearly(found, expected, city, queries)
            for number, ids in enumerate(found[1]):
                assert expected_allowed[number, ids[ids != NO_ID]].all()


def clustered(num_rows: int, seed: int) -> Rows:
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((20, 32))[generator.integers(0, 20, num_rows)]
    rows = rows + 0.4 * generator.standard_normal((num_rows, 32))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("kind", [IndexKind.ivf_fp16, IndexKind.ivf_8bit, IndexKind.ivf_rabitq])
def test_shards_of_lists_equal_one_index(tmp_path: Path, kind: IndexKind) -> None:
    """One set of centres, learnt from all rows: however the rows are cut, the same photos at the same distances.

    As long as the lists that are visited hold enough rows of each shard; else more are visited there.
    """
    rows, queries = clustered(6000, 0), clustered(50, 1)
    rows[3000:3200] = rows[:200]
    paths = [f"{number:04d}.jpg" for number in range(6000)]
    answers = []
    for name, cuts in (("one", []), ("four", [2000, 2000, 4000])):
        manifest = write_index(str(tmp_path / name), paths, rows, cuts, config=BuildConfig(kind=kind, num_lists=32))
        index = opened(str(tmp_path / name), manifest)
        answers.append(search_index(index, queries, 40, num_threads=1, effort=Effort(12, 200)))
    np.testing.assert_array_equal(answers[0][1], answers[1][1])
    np.testing.assert_array_equal(answers[0][0], answers[1][0])


@pytest.mark.parametrize("kind", [IndexKind.ivf_fp16, IndexKind.ivf_8bit, IndexKind.ivf_rabitq])
def test_shards_that_are_searched_together_answer_as_each_alone(tmp_path: Path, kind: IndexKind) -> None:
    """Bit by bit, also where photos are removed, a shard is empty, and a filter allows some rows.

    As long as the lists that are visited hold enough rows of each shard.
    """
    rows, queries = clustered(6000, 0), clustered(50, 1)
    rows[3000:3200] = rows[:200]
    paths, config = [f"{number:04d}.jpg" for number in range(6000)], BuildConfig(kind=kind, num_lists=32)
    manifest = write_index(str(tmp_path), paths, rows, [2000, 2000, 4000], config=config)
    manifest = without(str(tmp_path), replace(manifest, generation=2), "updates/2/", np.arange(0, 4000, 7))
    is_grouped = kind is IndexKind.ivf_rabitq
    assert groups_of_shards(manifest) == ([range(4)] if is_grouped else [range(n, n + 1) for n in range(4)])
    for memory_map in (False, True):
        index = opened(str(tmp_path), manifest, memory_map=memory_map)
        visits = index.visits(queries, Effort(12), 1)
        places = Places(np.arange(12_000.0).reshape(6000, 2), np.zeros(6000))
        filters = Filters.of(50, near=np.array([6000.0, 6000.0]), radius_m=4000.0)
        for more in ((), (filters, places)):
            way = search_filtered if more else search

            def asked(shard: Shard, way: Any = way, more: Any = more, visits: Any = visits) -> Found:
                return way(shard, queries, 40, *more, num_threads=1, effort=Effort(12), visits=visits)

            together = asked(index.joined(range(4)))
            alone = merge_top_k([asked(index.shard(number)) for number in range(4)], 40)
            np.testing.assert_array_equal(together[1], alone[1])
            np.testing.assert_array_equal(together[0], alone[0])


@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=60), st.data())
def test_groups_hold_every_shard_once_and_about_as_many_bytes(sizes: list[int], data: st.DataObject) -> None:
    num_groups = data.draw(st.integers(1, len(sizes)))
    groups = cut_into_groups(sizes, num_groups)
    assert [number for group in groups for number in group] == list(range(len(sizes)))
    assert len(groups) <= num_groups
    for group in groups:
        assert len(group)
        its = sizes[group.start : group.stop]
        assert len(its) == 1 or sum(its) <= sum(sizes) / num_groups * (1 + 1e-9) + (its[0] + its[-1]) / 2


def test_few_rows_in_the_lists_of_a_group_are_no_lack(tmp_path: Path) -> None:
    """More lists are visited: k photos are found, whether the shards are searched as one or not."""
    rows, queries = clustered(600, 0), clustered(20, 1)
    config = BuildConfig(kind=IndexKind.ivf_rabitq, num_lists=16)
    manifest = write_index(
        str(tmp_path), [f"{number:03d}.jpg" for number in range(600)], rows, [100, 400], config=config
    )
    index = opened(str(tmp_path), manifest)
    alone = [search(index.shard(number), queries, 300, num_threads=1) for number in range(3)]
    for found in (search(index.joined(range(3)), queries, 300, num_threads=1), merge_top_k(alone, 300)):
        assert found[1].shape == (20, 300)
        for ids in found[1]:
            assert len(np.setdiff1d(ids, [NO_ID])) == 300


def test_groups_grow_with_the_lists_and_end_where_memory_does() -> None:
    sfxl, cities = (8, 2_805_840, 512), (400, 100_000_000, 512)
    for kind in (IndexKind.flat, IndexKind.ivf_fp16, IndexKind.ivf_8bit):
        assert choose.num_groups(kind, *sfxl, 4096) == 8
    assert choose.num_groups(IndexKind.ivf_rabitq, *sfxl, 4096) == 2  # 256 rows a list
    assert choose.num_groups(IndexKind.ivf_rabitq, *sfxl, 65_536) == 1
    assert choose.num_groups(IndexKind.ivf_rabitq, *sfxl, 16) == 8
    assert choose.num_groups(IndexKind.ivf_rabitq, *cities, 65_536) == 17  # 512 MiB


def scattered(num_rows: int, seed: int) -> Rows:
    """Rows of 12 dimensions without clusters, among 64: lists are a poor guide to them."""
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((num_rows, 12)) @ np.random.default_rng(99).standard_normal((12, 64))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("draw", [clustered, scattered])
@pytest.mark.parametrize("kind", [IndexKind.ivf_8bit, IndexKind.ivf_rabitq])
def test_the_measured_recall_is_that_of_brute_force(tmp_path: Path, draw: Callable[..., Rows], kind: IndexKind) -> None:
    """`measured` against every distance written out, for the whole curve and the effort that was chosen."""
    rows = draw(6000, 2)
    paths = [f"{number:04d}.jpg" for number in range(6000)]
    config = BuildConfig(kind=kind, num_lists=64, target_recall=0.85)
    manifest = write_index(str(tmp_path), paths, rows, [2000], config=config)
    if draw is scattered:  # some photos go, and the index is made again: what is gone is neither asked nor found
        removed = np.arange(0, 6000, 3)
        manifest = without(str(tmp_path), replace(manifest, generation=2), "updates/2/", removed)
        manifest = next_generation(str(tmp_path), replace(manifest, generation=3), config, 1e15, LocalRunner())
    measured = manifest.measured
    assert measured is not None
    held_out = np.array([row for run in build.held_out_runs(6000) for row in run])
    gone = removed_ids(str(tmp_path), manifest)
    held_out = np.setdiff1d(held_out, gone)
    squares = ((rows[held_out, None].astype(np.float64) - rows[None]) ** 2).sum(axis=2)
    squares[np.arange(len(held_out)), held_out] = np.inf
    squares[:, gone] = np.inf
    exact = np.argsort(squares, axis=1)[:, :100]
    index = opened(str(tmp_path), manifest)
    chosen = {"recall": measured["recall"], **manifest.effort}
    for step in (chosen, *measured["curve"][:: 4 if kind is IndexKind.ivf_rabitq else 1]):
        effort = Effort(step["num_probes"], step["num_rescored"])
        _, found = search_index(index, rows[held_out], 101, num_threads=1, effort=effort)
        others = [[i for i in line.tolist() if i != own][:100] for line, own in zip(found, held_out, strict=True)]
        shares = [len(set(line) & set(truth.tolist())) / 100 for line, truth in zip(others, exact, strict=True)]
        assert np.mean(shares) >= step["recall"] - 5e-3
        if step["num_probes"] >= 8:  # fewer lists may hold fewer rows than are wanted; then more are visited
            assert np.mean(shares) == pytest.approx(step["recall"], abs=5e-3)
    recalls = [step["recall"] for step in measured["curve"] if step["num_rescored"] in (0, 1600)]
    assert recalls == sorted(recalls)
    assert measured["recall"] - 2 * measured["standard_error"] >= 0.85
    assert manifest.effort["num_probes"] < 64


def test_equal_conditions_are_one_group() -> None:
    filters = Filters.of(50, box=np.array([0.0, 0.0, 1.0, 1.0]))
    assert [len(chosen) for _, chosen in filters.groups()] == [50]
    filters = Filters.of(50, near=np.repeat(np.arange(10.0), 10).reshape(50, 2), radius_m=3.0)
    groups = list(filters.groups())
    assert sorted(row for _, chosen in groups for row in chosen.tolist()) == list(range(50))
    for line, chosen in groups:
        np.testing.assert_array_equal(filters.conditions[chosen], np.tile(line, (len(chosen), 1)))


def test_distances_that_overflow_are_refused() -> None:
    shard = Shard(flat_index(np.full((4, 2), 2e19, np.float32)), np.arange(4))
    with pytest.raises(UserError, match="overflow float32"):
        search(shard, np.zeros((1, 2), np.float32), 2, num_threads=1)


def test_auto_takes_what_fits_and_reaches_the_recall(tmp_path: Path) -> None:
    rows = clustered(5000, 3)
    paths = [f"{number:04d}.jpg" for number in range(5000)]
    sizes = {}
    for name, budget_bytes in (("large", 5000 * 32 * 4 * 2), ("middle", 500_000), ("small", 200_000)):
        config = BuildConfig(num_lists=32, target_recall=0.9)
        manifest = write_index(str(tmp_path / name), paths, rows, [], config=config, budget_bytes=budget_bytes)
        sizes[name] = manifest.kind
        if manifest.measured is not None:
            assert manifest.measured["recall"] >= 0.9
    assert sizes == {"large": "flat", "middle": "ivf_fp16", "small": "ivf_rabitq"}


def test_manifest_says_which_kind(tmp_path: Path) -> None:
    rows = clustered(700, 4)
    manifest: IndexManifest = write_index(
        str(tmp_path),
        [f"{i:03d}.jpg" for i in range(700)],
        rows,
        config=BuildConfig(kind=IndexKind.ivf_8bit, num_lists=16),
    )
    assert (manifest.kind, manifest.factory) == ("ivf_8bit", "IVF16,SQ8")
    assert build.spec_of(manifest.kind, manifest.factory) == build.IndexSpec(IndexKind.ivf_8bit, 16)


class ContraryGpu:
    """A GPU's stand-in that errs as far as it may, and where it hurts: the nearest rows seem farther than they are."""

    def __init__(self, rows: Rows, nearest: NDArray[np.int64]) -> None:
        self.rows = rows
        self.nearest = nearest

    def search(self, queries: Rows, k: int) -> Found:
        distances = ((queries[:, None] - self.rows[None]) ** 2).sum(axis=2)
        most = 0.9 * (queries.shape[1] + 4) * FLOAT32_STEP * (2 * np.linalg.norm(queries, axis=1)) ** 2
        pushed = np.take_along_axis(distances, self.nearest, 1) + most[:, None]
        np.put_along_axis(distances, self.nearest, pushed, 1)
        order = np.argsort(distances, axis=1)[:, :k]
        return np.take_along_axis(distances, order, 1).astype(np.float32), order


@pytest.mark.parametrize("k", [1, 10, 20])
def test_short_lists_that_are_made_roughly_give_the_same_answer(k: int) -> None:
    """What a GPU may have rounded away is looked at again on the CPU, as far behind the k-th as it may have been."""
    angles = np.linspace(0, 2 * np.pi, 200_000, endpoint=False)
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    queries = rows[::37_100] * np.float32(0.999)
    exact = Shard(flat_index(rows), np.arange(len(rows)))
    expected = search(exact, queries, k, num_threads=1)
    rough = ContraryGpu(rows, expected[1])
    first_list = rough.search(queries, k + k // 8 + SPARE_ROWS)[1]
    assert not any(np.isin(expected[1][line], first_list[line]).any() for line in range(len(queries)))
    found = search(replace(exact, on_gpu=rough), queries, k, num_threads=1)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])


class RoundingGpu:
    """A GPU's stand-in that rounds each value to some bits before it multiplies, as TF32 does to ten."""

    def __init__(self, rows: Rows, num_bits: int) -> None:
        self.num_bits = num_bits
        self.rows = self._rounded(rows)

    def _rounded(self, values: Rows) -> Rows:
        fractions, exponents = np.frexp(values)
        return np.ldexp(np.round(fractions * 2**self.num_bits) / 2**self.num_bits, exponents).astype(np.float32)

    def search(self, queries: Rows, k: int) -> Found:
        lengths = (self.rows**2).sum(axis=1) + (queries**2).sum(axis=1)[:, None]
        distances = (lengths - 2 * self._rounded(queries) @ self.rows.T).astype(np.float32)
        order = np.argsort(distances, axis=1)[:, :k]
        return np.take_along_axis(distances, order, 1), order


def _unit_rows(count: int) -> Rows:
    rows = np.random.default_rng(0).standard_normal((count, 64)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("k", [100, 1000])
def test_a_gpu_that_rounds_as_float32_does_answers_alone(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    rows = _unit_rows(6000)
    exact = Shard(flat_index(rows), np.arange(len(rows)))
    expected = search(exact, rows[:20], k, num_threads=1)
    monkeypatch.setattr(search_module, "_parameters", None)  # which only a search on the CPU asks for
    found = search(replace(exact, on_gpu=RoundingGpu(rows, 24)), rows[:20], k, num_threads=1)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])


def test_a_gpu_that_rounds_more_is_noticed_and_the_cpu_answers() -> None:
    rows = _unit_rows(6000)
    exact = Shard(flat_index(rows), np.arange(len(rows)))
    expected = search(exact, rows[:20], 10, num_threads=1)
    with pytest.warns(UserWarning, match=GPU_ROUNDS_MORE):
        found = search(replace(exact, on_gpu=RoundingGpu(rows, 11)), rows[:20], 10, num_threads=1)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])


def test_a_gpu_and_a_faiss_without_gpus_is_one_line() -> None:
    if hasattr(search_module.faiss, "StandardGpuResources"):
        pytest.skip("this faiss has GPUs")
    with pytest.raises(UserError, match=r"index.num_gpus_per_actor: .*faiss-cpu.*expected faiss-gpu"):
        check_faiss_has_gpus()
