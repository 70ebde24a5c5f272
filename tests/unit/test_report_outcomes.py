"""What became of each query, against brute force; which queries and points of a large run are shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pairvpr.data import sealed
from pairvpr.errors import UserError
from pairvpr.report.choose import pictured, spread, thinned
from pairvpr.report.finished import open_run
from pairvpr.report.outcomes import KINDS, Kind, error_of, read_outcomes
from tests.support.finished import DECISION, MadeUpRun, make_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeUpRun:
    return make_run(tmp_path_factory.mktemp("run") / "OUT", num_queries=300)


def test_each_query_is_what_a_loop_over_its_answers_says(made: MadeUpRun) -> None:
    outcomes = read_outcomes(open_run(made.folder))
    assert made.benchmark.positives is not None
    for query, (answer, positives) in enumerate(zip(made.answers, made.benchmark.positives, strict=True)):
        near = set(positives.tolist())
        if not len(answer.reranked):
            expected = Kind.unreadable
        elif int(answer.reranked[0]) in near:
            expected = Kind.right
        elif not near:
            expected = Kind.no_match
        else:
            expected = Kind.missed if near & set(answer.reranked.tolist()) else Kind.out_of_reach
        assert KINDS[outcomes.kind[query]] is expected
        first = [ids[0] in near if len(ids) else False for ids in (answer.candidates, answer.reranked)]
        assert [outcomes.corrected[query], outcomes.broken[query]] == [first == [False, True], first == [True, False]]
    assert {KINDS[kind] for kind in outcomes.kind} == set(Kind) - {Kind.answered, Kind.no_candidates}


def test_counts_are_those_of_metrics_json(made: MadeUpRun) -> None:
    outcomes, numbers = read_outcomes(open_run(made.folder)), made.metrics
    row = numbers["audit"]["by_num_candidates"][str(numbers["num_candidates"])]
    assert [outcomes.corrected.sum(), outcomes.broken.sum()] == [row["corrected"], row["broken"]]
    assert 100 * outcomes.is_kind(Kind.right).mean() == pytest.approx(numbers["recall"]["reranked"]["1"])
    found = numbers["confidence"]
    assert outcomes.refused.sum() == found["num_answered"] - found["num_in_map"]


def test_distances_are_those_of_the_positions(made: MadeUpRun) -> None:
    run = open_run(made.folder)
    outcomes = read_outcomes(run)
    found_m = error_of(run, outcomes.first_final)
    for query, answer in enumerate(made.answers[:-1]):
        apart = made.benchmark.database.utm_m[answer.reranked[0]] - made.benchmark.queries.utm_m[query]
        assert found_m[query] == pytest.approx(np.linalg.norm(apart))
    assert np.isinf(found_m[-1])


def test_without_truth_queries_are_answered(tmp_path: Path) -> None:
    made = make_run(tmp_path / "OUT", has_truth=False, has_positions=False)
    outcomes = read_outcomes(open_run(made.folder))
    assert not outcomes.has_truth
    assert outcomes.is_kind(Kind.answered).sum() == 39
    assert np.isnan(error_of(open_run(made.folder), outcomes.first_final)).all()


@pytest.mark.parametrize("has_truth", [True, False])
@pytest.mark.parametrize("how", [{}, {"decision": DECISION}, {"num_candidates": 0}], ids=["pair", "consensus", "K=0"])
def test_what_found_nothing_and_what_could_not_be_read_are_two_kinds(
    tmp_path: Path, how: dict[str, Any], has_truth: bool
) -> None:
    """As a filter leaves a query, and as a photo that goes away during the run does; both counts are the run's."""
    gone = [] if "num_candidates" in how else [5, 6]
    made = make_run(tmp_path / "OUT", without_candidates=[0, 3, 4], gone=gone, has_truth=has_truth, **how)
    outcomes = read_outcomes(open_run(made.folder))
    assert np.flatnonzero(outcomes.is_kind(Kind.no_candidates)).tolist() == [0, 3, 4]
    assert np.flatnonzero(outcomes.is_kind(Kind.unreadable)).tolist() == [*gone, 39]
    assert outcomes.is_kind(Kind.unreadable).sum() == made.metrics["rejected_images"]["queries"]
    label, shown = outcomes.tags()["no_candidates"]
    assert (label, np.flatnonzero(shown).tolist()) == ("No candidates", [0, 3, 4])
    if has_truth:
        recall = made.metrics["recall"]["global" if "num_candidates" in how else "reranked"]
        recall = made.metrics["decision"]["recall"] if "decision" in how else recall
        assert 100 * outcomes.is_kind(Kind.right).mean() == pytest.approx(recall["1"])


@pytest.mark.parametrize("number", [0, 1, 7, 60, 299])
def test_few_failures_are_all_pictured_before_many_right_ones(made: MadeUpRun, number: int) -> None:
    outcomes = read_outcomes(open_run(made.folder))
    chosen = pictured(outcomes, number)
    assert len(chosen) == number == len(set(chosen.tolist()))
    assert (np.diff(chosen) > 0).all()
    if number == 60:  # the one that can't be read, and an equal share of the others
        kinds = {KINDS[kind] for kind in outcomes.kind[chosen]}
        assert kinds == set(Kind) - {Kind.answered, Kind.no_candidates}
        assert {"corrected", "broken", "refused"} <= outcomes.tags().keys()
        assert outcomes.broken[chosen].sum() >= min(outcomes.broken.sum(), 6)


def test_spread_is_even() -> None:
    assert spread(np.arange(100), 4).tolist() == [0, 25, 50, 75]
    assert spread(np.arange(3), 5).tolist() == [0, 1, 2]


@pytest.mark.parametrize("shape", ["square", "line", "two towns", "one place"])
def test_a_thinned_map_covers_what_the_whole_one_does(shape: str) -> None:
    rng = np.random.default_rng(0)
    points_m = rng.uniform(0, 1000, (20_000, 2))
    if shape == "line":
        points_m[:, 1] = 3.0
    if shape == "two towns":
        points_m[::2] += 1e6
    if shape == "one place":
        points_m[:] = 7.0
    points_m[::100] = np.nan
    kept, cell_m = thinned(points_m, 500)
    known = points_m[~np.isnan(points_m[:, 0])]
    assert 1 <= len(kept) <= 500
    assert not np.isnan(points_m[kept]).any()
    for point in known[:: len(known) // 50]:
        assert np.hypot(*(points_m[kept] - point).T).min() <= cell_m * 2**0.5
    assert len(thinned(points_m, 20_000)[0]) == len(known)


def test_what_is_no_finished_run_is_one_line(tmp_path: Path, made: MadeUpRun) -> None:
    with pytest.raises(UserError, match="no run there"):
        open_run(str(tmp_path))
    unfinished = make_run(tmp_path / "OUT").folder
    for file, step in (
        ("metrics.json", "the report"),
        ("predictions.parquet", "re-ranking"),
        ("queries/described.json", "describing the queries"),
        ("index/manifest.json", "building the index"),
    ):
        (tmp_path / "OUT" / "candidates.parquet").touch()
        (Path(unfinished) / file).unlink()
        with pytest.raises(UserError, match=f"not finished, it stopped at {step}"):
            open_run(unfinished)
    sealed.write_json(str(tmp_path / "settings.json"), {"model": {}})
    with pytest.raises(UserError, match="made by another job"):
        open_run(str(tmp_path))


def test_predictions_of_another_run_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    ours, theirs = make_run(tmp_path / "ours"), make_run(tmp_path / "theirs", num_queries=30)
    file = Path(ours.folder) / "predictions.parquet"
    whole = file.read_bytes()
    file.write_bytes((Path(theirs.folder) / "predictions.parquet").read_bytes())
    with pytest.raises(UserError, match=r"30 queries, 40 in metrics\.json"):
        read_outcomes(open_run(ours.folder))
    (Path(theirs.folder) / "predictions.parquet").write_bytes(whole)
    with pytest.raises(UserError, match=r"40 queries, 30 in metrics\.json"):
        read_outcomes(open_run(theirs.folder))
    for place in (4, len(whole) // 2, len(whole) - 40):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match="damaged"):
            read_outcomes(open_run(ours.folder))


def test_a_run_that_was_moved_with_its_index_is_read(tmp_path: Path) -> None:
    made = make_run(tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "after")
    assert len(open_run(str(tmp_path / "after")).database) == len(made.benchmark.database)
