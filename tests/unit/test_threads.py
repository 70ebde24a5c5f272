"""Numbers of CPU threads: a search leaves those of others alone, and torch computes with those of the settings."""

from __future__ import annotations

import ast
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pairvpr import DescribeConfig, Localizer, RerankConfig, SearchConfig
from pairvpr.config.schema import BuildConfig, IndexKind
from pairvpr.data.benchmarks import load_benchmark
from pairvpr.distributed.validate import validate
from pairvpr.index.filters import Filters, Places
from pairvpr.index.measure import exact_nearest
from pairvpr.index.reader import rescored_in_groups, search_index
from pairvpr.index.search import Effort
from pairvpr.index.threads import faiss, faiss_threads
from pairvpr.models.pair_scorer import PairScorer
from pairvpr.toy import city as toy_city
from pairvpr.training.context import TrainContext
from tests.support.index import opened, write_index
from tests.support.small import SMALL_CITY, small_model, small_model_config

PACKAGE = Path(__file__).parents[2] / "pairvpr"
OURS, OTHERS = 2, 3
"""Threads of the caller, and of what is called. Both differ from one, which some functions take by themselves."""
NUM_ROWS, WIDTH = 400, 16
NETWORK = replace(small_model_config(), name="small")


@pytest.fixture(autouse=True)
def ours() -> Iterator[None]:
    """torch and faiss share one number of threads or have one each, by which of them a process imports first."""
    before = torch.get_num_threads()
    torch.set_num_threads(OURS)
    faiss.omp_set_num_threads(OURS)
    yield
    torch.set_num_threads(before)
    faiss.omp_set_num_threads(before)


def now() -> tuple[int, int]:
    return torch.get_num_threads(), faiss.omp_get_max_threads()


def test_one_place_sets_the_threads_of_faiss() -> None:
    def sets_them(path: Path) -> bool:
        names = (node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute))
        return "omp_set_num_threads" in names

    assert [path.name for path in sorted(PACKAGE.rglob("*.py")) if sets_them(path)] == ["threads.py"]


@pytest.mark.parametrize("kind", [kind for kind in IndexKind if kind is not IndexKind.auto])
def test_building_and_searching_leave_the_threads_of_others_alone(kind: IndexKind, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((NUM_ROWS, WIDTH), np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    config = BuildConfig(kind=kind, num_lists=4 if kind.startswith("ivf") else None, num_build_threads=OTHERS)
    names = [f"{number:04d}.jpg" for number in range(NUM_ROWS)]
    index = opened(str(tmp_path), write_index(str(tmp_path), names, rows, config=config))
    assert now() == (OURS, OURS)
    places = Places(np.zeros((NUM_ROWS, 2)), np.zeros(NUM_ROWS))
    filters = Filters.of(5, box=np.array([-1.0, -1.0, 1.0, 1.0])), places
    calls: list[Callable[[], object]] = [
        lambda: index.visits(rows[:5], Effort(2), OTHERS),
        lambda: search_index(index, rows[:5], 7, num_threads=OTHERS),
        lambda: search_index(index, rows[:5], 7, num_threads=OTHERS, filters=filters),
        lambda: rescored_in_groups(index, [range(1)], rows[:5], np.arange(35).reshape(5, 7), num_threads=OTHERS),
        lambda: exact_nearest(rows, np.arange(NUM_ROWS), np.ones(NUM_ROWS, np.bool_), rows[:5], 7, OTHERS),
    ]
    for call in calls:
        call()
        assert now() == (OURS, OURS)


def test_the_threads_of_others_stay_also_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), faiss_threads(OTHERS):
        _ = 1 / 0
    assert now() == (OURS, OURS)


def test_every_thread_that_searches_has_its_own_number() -> None:
    """All are inside at once."""
    inside = threading.Barrier(4)

    def seen(number: int) -> tuple[int, int, int]:
        before = faiss.omp_get_max_threads()
        with faiss_threads(number):
            inside.wait(30)
            here = faiss.omp_get_max_threads()
            inside.wait(30)
        return before, here, faiss.omp_get_max_threads()

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(seen, (1, 3, 4, 5)))
    assert [here for _, here, _ in found] == [1, 3, 4, 5]
    assert all(before == after for before, _, after in found)
    assert now() == (OURS, OURS)


def test_training_goes_on_with_its_threads_after_a_validation(tmp_path: Path) -> None:
    context = TrainContext(rank=0, world_size=1, device=torch.device("cpu"), output="unused", settings={})
    validate(small_model(), load_benchmark(SMALL_CITY, str(tmp_path)), 4, context)
    assert now() == (OURS, OURS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index, and query.jpg."""
    root = tmp_path_factory.mktemp("threads")
    (root / "photos").mkdir()
    for photo in toy_city.database_photos(seed=5, num_places=4, photos_per_place=1):
        toy_city.draw(photo, width_px=64, height_px=48).save(root / "photos" / photo.path)
    Image.open(next((root / "photos").iterdir())).rotate(3).save(root / "query.jpg")
    describe = DescribeConfig(num_threads_per_actor=OURS)
    Localizer.build(root / "photos", root / "index", model=NETWORK, describe=describe, device="cpu")
    return root


@pytest.mark.parametrize("num_describing", [OTHERS, 1])
def test_scores_have_the_threads_of_the_settings(
    folder: Path, num_describing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a photo that is embedded already and whose candidates are all kept."""
    settings: dict[str, Any] = {
        "describe": DescribeConfig(num_threads_per_actor=num_describing),
        "search": SearchConfig(num_threads_per_actor=1),
        "rerank": RerankConfig(num_candidates=4, num_threads_per_actor=OTHERS),
    }
    localizer = Localizer.open(folder / "index", model=NETWORK, device="cpu", **settings)
    query = folder / "query.jpg"
    expected = localizer.locate(query, k=4)
    seen = set[int]()
    logits = PairScorer.logits

    def spied(scorer: PairScorer, *arguments: Any) -> Any:
        seen.add(torch.get_num_threads())
        return logits(scorer, *arguments)

    monkeypatch.setattr(PairScorer, "logits", spied)
    assert localizer.locate(query, k=4) == expected
    localizer.score(query, expected[0].url)
    assert seen == {OTHERS}
    assert now() == (OURS, OURS)
