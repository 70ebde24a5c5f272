"""`make soak`: every class of actor of every job is killed again and again, at random moments, for the same results.

The classes are not listed here: Ray says which actors a job has while it runs undisturbed, Ray's own included.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private import state

from pairvpr.config.compose import load, load_evaluations
from pairvpr.config.schema import BuildIndexConfig, QueryConfig, UpdateIndexConfig
from pairvpr.config.train_schema import SearchCheckpointsConfig
from pairvpr.errors import IncompleteRunError
from pairvpr.training import checkpoint
from pairvpr.training.metrics_log import read_metrics
from ray_jobs.build_index import build_index
from ray_jobs.evaluate import evaluate
from ray_jobs.query import query
from ray_jobs.search_checkpoints import search_checkpoints
from ray_jobs.train_stage_one import train_stage_one
from ray_jobs.train_stage_two import train_stage_two
from ray_jobs.update_index import update_index
from tests.support import training
from tests.support.runs import SMALL_NETWORK, arguments

pytestmark = [pytest.mark.soak, pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(1500)]

NUM_KILLS = 20
LONGEST_RUN_S = 600.0
POLL_S = 0.02
DESCRIBE = (*SMALL_NETWORK, "describe.batch_size=4", "describe.num_threads_per_actor=1")
TRAIN = {1: train_stage_one, 2: train_stage_two}


@dataclass
class Killer:
    """Kills actors at random moments of their lives, at most `most` of a class in a run.

    The undisturbed run says how long the actors of a class live: some do for half a second. Of a longer life than
    `latest_s` only the beginning counts, or a run of many steps would see few kills.
    """

    latest_s: float
    most: int
    random: random.Random
    lives_s: dict[str, float] = field(default_factory=dict)
    hits: Counter[str] = field(default_factory=Counter)

    def watch(self, work: Callable[[], object]) -> None:
        """Do `work` undisturbed, and note which classes there are and how long their longest life is."""
        first_s: dict[int, float] = {}

        def look(name: str, pid: int) -> None:
            life_s = time.monotonic() - first_s.setdefault(pid, time.monotonic())
            self.lives_s[name] = max(life_s, self.lives_s.get(name, 0.0))

        _beside(work, look)

    def disturb(self, work: Callable[[], object]) -> float:
        """Do `work` while actors are killed; the seconds it took."""
        due_s: dict[int, float] = {}
        hits: Counter[str] = Counter()

        def kill(name: str, pid: int) -> None:
            life_s = min(self.latest_s, self.lives_s.setdefault(name, 0.0))
            now_s = time.monotonic()
            due = due_s.setdefault(pid, now_s + life_s * self.random.random())
            if hits[name] < self.most and self.hits[name] < NUM_KILLS and now_s >= due:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    hits[name] += 1
                    self.hits[name] += 1
                    due_s[pid] = math.inf  # Ray lists it until it notices

        return _beside(work, kill)

    def missing(self) -> dict[str, int]:
        """The classes that have not been killed often enough, and how often they have been."""
        return {name: self.hits[name] for name in sorted(self.lives_s) if self.hits[name] < NUM_KILLS}


def _beside(work: Callable[[], object], look: Callable[[str, int], None]) -> float:
    """Do `work`, and meanwhile `look` at class and process of every actor again and again; the seconds `work` took."""
    ended, started_s = threading.Event(), time.monotonic()

    def watch() -> None:
        while not ended.wait(POLL_S):
            for name, pid in _actors():
                look(name, pid)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work()
    finally:
        ended.set()
        thread.join()
    return time.monotonic() - started_s


def _actors() -> list[tuple[str, int]]:
    """Class and process of every actor that is alive."""
    return [
        (actor["ActorClassName"], actor["Pid"])
        for actor in state.actors().values()
        if actor["State"] == "ALIVE" and actor["Pid"]
    ]


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """A row for each class of each job, printed at the end."""
    rows = ["| job | class | kills |", "| --- | --- | ---: |"]
    yield rows
    print("\n" + "\n".join(rows))


@pytest.fixture(scope="module")
def index(city: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished index of two thirds of the city's photos, which lie in `photos` beside it, as do the others."""
    root = tmp_path_factory.mktemp("index")
    shutil.copytree(city / "database", root / "photos")
    (root / "later.txt").write_text("\n".join(sorted(path.name for path in (root / "photos").iterdir())[::3]))
    for name in (root / "later.txt").read_text().split():
        (root / "photos" / name).rename(root / name)
    _build(root / "photos", root / "index")
    for name in (root / "later.txt").read_text().split():
        (root / name).rename(root / "photos" / name)
    return root


@pytest.fixture(scope="module")
def photos_to_train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    training.draw_training_set(folder)
    return folder


def _check(
    job: str,
    run: Callable[[Path], object],
    result: Callable[[Path], object],
    killer: Killer,
    table: list[str],
    folder: Path,
) -> None:
    """`run(output)`, undisturbed and then with kills until every class has had enough: always the same `result`."""
    killer.watch(lambda: run(folder / "undisturbed"))
    expected, num_runs, longest_s = result(folder / "undisturbed"), 0, 0.0
    while killer.missing():
        output = folder / f"killed_{num_runs}"
        for _ in range(50):
            num_runs += 1
            try:
                longest_s = max(longest_s, killer.disturb(lambda output=output: run(output)))
                break
            except IncompleteRunError as error:
                print(f"{job}: {error}")
        assert result(output) == expected
        assert longest_s < LONGEST_RUN_S
        shutil.rmtree(output)
        print(f"{job}: {num_runs} runs, to be killed yet: {killer.missing()}", flush=True)
    table += [f"| {job} | `{name}` | {killer.hits[name]} |" for name in sorted(killer.lives_s)]
    table.append(f"| {job} | {num_runs} runs, the longest {longest_s:.0f} s | {sum(killer.hits.values())} |")


def _bytes_of(*names: str) -> Callable[[Path], object]:
    """The contents of some files of an output."""
    return lambda output: [(output / name).read_bytes() for name in names]


def _index_bytes(index: Path) -> object:
    """Every file that the newest generation names, and which."""
    files = [path for path in sorted(index.rglob("*")) if path.suffix in (".npy", ".faiss", ".parquet")]
    return [(str(path.relative_to(index)), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]


def _build(photos: Path, output: Path) -> None:
    line = [f"database={photos}", f"output={output}", "positions=names", "index.num_shards=3", *DESCRIBE]
    build_index(load(BuildIndexConfig, [*line, "describe.num_actors=2", "index.kind=ivf_rabitq", "index.num_lists=4"]))


def test_build_index(city: Path, table: list[str], tmp_path: Path) -> None:
    killer = Killer(2.0, 3, random.Random(1))
    _check("build_index", lambda output: _build(city / "database", output), _index_bytes, killer, table, tmp_path)


def test_update_index(index: Path, table: list[str], tmp_path: Path) -> None:
    def run(output: Path) -> None:
        if not output.exists():
            shutil.copytree(index / "index", output)
        line = [f"index.path={output}", "positions=names", f"add={index}/later.txt", "index.num_shards=2", *DESCRIBE]
        update_index(load(UpdateIndexConfig, line))

    killer = Killer(2.0, 3, random.Random(2))
    _check("update_index", run, _index_bytes, killer, table, tmp_path)


@pytest.mark.parametrize("features", ["recompute", "cache", "store"])
def test_evaluate(city: Path, table: list[str], tmp_path: Path, features: str) -> None:
    def run(output: Path) -> None:
        more = [f"rerank.dense_features={features}", "rerank.num_actors=2", "rerank.queries_per_unit=1"]
        evaluate(load_evaluations(arguments(city, output, *more, "index.num_shards=3")))

    killer = Killer(1.5, 3, random.Random(3))
    _check(f"evaluate, {features}", run, _bytes_of("predictions.parquet"), killer, table, tmp_path)


def test_query(city: Path, index: Path, table: list[str], tmp_path: Path) -> None:
    def run(output: Path) -> None:
        line = [f"index.path={index}/index", f"queries={city}/queries", f"output={output}", *DESCRIBE]
        more = ["rerank.num_candidates=10", "rerank.num_threads_per_actor=1", "index.num_threads_per_actor=1"]
        query(load(QueryConfig, [*line, *more, "rerank.num_actors=2", "rerank.queries_per_unit=1"]))

    killer = Killer(1.5, 3, random.Random(4))
    _check("query", run, _bytes_of("predictions.parquet"), killer, table, tmp_path)


def _train(stage: int, photos: Path, output: Path, *more: str) -> None:
    line = training.arguments(stage, photos, output, "train.num_workers=2", "train.checkpoint_every_steps=1", *more)
    TRAIN[stage](load(training.CONFIGS[stage], line))  # pyright: ignore[reportArgumentType]


def _trained(stage: int) -> Callable[[Path], object]:
    """The losses, and every weight."""

    def result(output: Path) -> object:
        found = checkpoint.load(checkpoint.last_url(str(output)), stage, "output")
        digests = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in found.model.items()}
        return training.losses(read_metrics(str(output))), found.position, digests

    return result


@pytest.mark.parametrize("stage", training.STAGES)
def test_train(photos_to_train: Path, table: list[str], tmp_path: Path, stage: int) -> None:
    killer = Killer(6.0, 4, random.Random(5 + stage))
    run: Callable[[Path], object] = lambda output: _train(stage, photos_to_train, output)  # noqa: E731
    _check(training.JOBS[stage], run, _trained(stage), killer, table, tmp_path)


def test_search_checkpoints(city: Path, photos_to_train: Path, table: list[str], tmp_path: Path) -> None:
    _train(2, photos_to_train, tmp_path / "trained", "train.epochs=4")

    def run(output: Path) -> None:
        line: Sequence[Any] = [
            word for word in arguments(city, output, "rerank.num_actors=2") if not word.startswith("model.weights")
        ]
        more = [f"checkpoints={tmp_path}/trained/checkpoints", "rerank.queries_per_unit=1"]
        kept = [
            word for word in line if word.split("=")[0] not in ("index.num_retrieved", "index.num_threads_per_actor")
        ]
        search_checkpoints(load(SearchCheckpointsConfig, [*kept, *more]))

    killer = Killer(2.0, 3, random.Random(8))
    _check("search_checkpoints", run, _bytes_of("checkpoints.csv"), killer, table, tmp_path)


def test_ray_knows_every_class(city: Path) -> None:
    """The look at Ray's actors is no stub: an actor made here is seen, with its process."""

    @ray.remote(num_cpus=0)
    class Seen:
        def pid(self) -> int:
            return os.getpid()

    actor: Any = Seen.remote()
    assert ("Seen", ray.get(actor.pid.remote())) in [(name.rsplit(".", 1)[-1], pid) for name, pid in _actors()]
