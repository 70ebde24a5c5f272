"""Other first stages than Pair-VPR's own in front of the pair step: given candidates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pairvpr.config.compose import load, load_evaluations
from pairvpr.config.schema import CalibrateConfig, QueryConfig
from pairvpr.data.pairs import hloc_lines
from pairvpr.errors import UserError
from pairvpr.evaluation.calibrate import calibrate
from ray_jobs.evaluate import evaluate, prepare
from tests.support.runs import arguments

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def rows(expected: bytes, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the pipeline without Ray answers in the city."""
    file = tmp_path_factory.mktemp("rows") / "expected.parquet"
    file.write_bytes(expected)
    return pq.read_table(file).to_pylist()


def photo_names(folder: Path) -> list[str]:
    """In the order of ids."""
    return sorted(str(path.relative_to(folder)) for path in folder.iterdir())


def test_given_candidates_are_scored_and_nothing_is_searched(
    city: Path, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The candidates of a run, written for hloc and read back, have the run's scores; there is no index."""
    names = photo_names(city / "database")
    pairs = [(row["query_path"], names[image_id]) for row in rows for image_id in row["candidates"][:10]]
    (tmp_path / "pairs.txt").write_bytes(hloc_lines(pairs))
    line = arguments(city, tmp_path / "out", f"rerank.candidates={tmp_path}/pairs.txt")
    (content,) = evaluate(load_evaluations(line))
    found = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pylist()
    for row, its in zip(rows, found, strict=True):
        assert its["candidates"] == row["candidates"][:10]
        assert (its["reranked"], its["pair_scores"]) == (row["reranked"], row["pair_scores"])
        assert all(distance != distance for distance in its["squared_distances"])
    assert content["index"] is None
    assert not (tmp_path / "out" / "index").exists()
    assert not (tmp_path / "out" / "queries").exists()
    with pytest.raises(UserError, match=r"a run with rerank\.candidates, whose distances nobody knows"):
        calibrate(load(CalibrateConfig, [f"predictions={tmp_path}/out", f"output={tmp_path}/calibration.json"]))

    scored = [(*pair, -float(place)) for place, pair in enumerate(pairs)]  # the same order, said by scores
    table = pa.table(dict(zip(("query", "database", "score"), map(list, zip(*scored, strict=True)), strict=True)))
    pq.write_table(table.take(list(range(len(table)))[::-1]), tmp_path / "pairs.txt")
    (other,) = load_evaluations(line)
    with pytest.raises(UserError, match=r"made with different settings: rerank\.candidates_sha256"):
        evaluate([other])
    evaluate(load_evaluations([*line, f"output={tmp_path}/again"]))
    again = pq.read_table(tmp_path / "again" / "predictions.parquet")
    known = ["query_path", "candidates", "reranked", "pair_scores", "positives"]  # a distance is no number
    assert again.select(known).to_pylist() == [{name: row[name] for name in known} for row in found]


def test_what_given_candidates_can_not_have() -> None:
    given = "rerank.candidates=pairs.txt"
    with pytest.raises(UserError, match="nobody knows the distances of given"):
        load_evaluations(
            ["benchmark=toy_city", "output=out", given, "rerank.decision=fused", "rerank.calibration=c.json"]
        )
    place = ["filter.near_m=5", "filter.center=[0,0]"]
    with pytest.raises(UserError, match="what is given is not searched for"):
        load(QueryConfig, ["index.path=i", "queries=q", "output=o", given, *place])
    with pytest.raises(UserError, match="the file is for one benchmark"):
        prepare(load_evaluations(["benchmarks=[toy_city,pitts30k_val]", "datasets_root=/", "output=out", given]))
