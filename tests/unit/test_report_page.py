"""What a report says, without a browser: numbers of metrics.json, texts that are never markup, attention."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from pairvpr import cli
from pairvpr.config.schema import ReportConfig, ReportSettings
from pairvpr.data.images import load_upright
from pairvpr.errors import UserError
from pairvpr.models.class_attention import class_attention
from pairvpr.models.pair_decoder import DecoderBlock
from pairvpr.models.weights import build_model, load_weights
from pairvpr.report import thumbnails
from pairvpr.report.attention import Explainer
from pairvpr.report.finished import open_run
from pairvpr.report.gallery import Photos, ShownAnswer, ShownQuery
from pairvpr.report.make import explain, make_report, shown_photos
from pairvpr.report.page import json_in_html, page
from tests.support.finished import DECISION, FACTS, MadeUpRun, draw_photos, make_run
from tests.support.small import small_model_config

ROOT = Path(__file__).parents[2]
HOSTILE = "</script><script>window.hacked=1</script>\"'&<!--\u2028{{data}}"


class Tables(HTMLParser):
    """The cells of every table, by the id of its section."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.section, self.rows, self.cell = "", {}, None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "section":
            self.section = dict(attrs).get("id") or ""
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.rows[self.section][-1].append("")
            self.cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.cell = None

    def handle_data(self, data: str) -> None:
        if self.cell:
            self.rows[self.section][-1][-1] += data


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeUpRun:
    return make_run(tmp_path_factory.mktemp("run") / "OUT")


def test_tables_are_metrics_json(made: MadeUpRun) -> None:
    rows = Tables(Path(make_report(ReportConfig(run=made.folder))).read_text()).rows
    recall, audit = made.metrics["recall"], made.metrics["audit"]
    assert rows["recall"][0] == ["Recall@N, %", *recall["global"]]
    assert [float(cell) for cell in rows["recall"][1][1:]] == pytest.approx(list(recall["global"].values()), abs=0.05)
    reranked = [float(cell) for cell in rows["recall"][2][1:] if cell != "-"]
    assert reranked == pytest.approx(list(recall["reranked"].values()), abs=0.05)
    for cells, (number, its) in zip(rows["candidates"][1:], audit["by_num_candidates"].items(), strict=True):
        assert cells[0] == number
        assert [int(cell) for cell in cells[-2:]] == [its["corrected"], its["broken"]]
        assert float(cells[-3]) == pytest.approx(its["candidate_ceiling"], abs=0.05)
    for cells, its in zip(rows["confidence"][1:], made.metrics["confidence"]["reliability"], strict=True):
        assert int(cells[1]) == its["count"]
    assert {cells[0]: int(cells[1]) for cells in rows["by_group"][1:]} == {
        name: its["num_queries"] for name, its in audit["by_group"].items()
    }
    seconds = made.metrics["seconds_per_query"]
    assert [float(cells[1]) for cells in rows["seconds"][1:]] == pytest.approx(list(seconds.values()), abs=5e-5)
    assert dict(rows["protocol"])["Positives sha256"] == made.metrics["protocol"]["positives_sha256"]


def test_a_decision_has_its_columns(tmp_path: Path) -> None:
    """Recall, every group, distances and the gallery show what the decision made of the same scores."""
    made = make_run(tmp_path / "OUT", decision=DECISION)
    text = Path(make_report(ReportConfig(run=made.folder))).read_text()
    rows, entry = Tables(text).rows, made.metrics["decision"]
    final = [its.decided.ids if its.decided else np.empty(0, np.int64) for its in made.answers]
    assert any(list(ids) != its.reranked.tolist() for ids, its in zip(final, made.answers, strict=True))
    assert rows["recall"][3][0] == "Decided, consensus"
    assert [float(cell) for cell in rows["recall"][3][1:] if cell != "-"] == pytest.approx(
        list(entry["recall"].values()), abs=0.05
    )
    assert made.benchmark.positives is not None
    right = np.array([len(ids) > 0 and ids[0] in its for ids, its in zip(final, made.benchmark.positives, strict=True)])
    for name, groups in made.benchmark.groupings.items():
        place = rows[f"by_{name}"][0].index("Decided@1, %")
        assert {cells[0]: float(cells[place]) for cells in rows[f"by_{name}"][1:]} == pytest.approx(
            {group: 100 * right[ids].mean() for group, ids in groups.items()}, abs=0.05
        )
    assert set(made.benchmark.groupings) == {"group", "light", "sequence", "subtask"}
    assert "benchmark.subtask=NAME restricts the database to the subtask" in text
    assert [cells[0] for cells in rows["distances"][1:]] == ["By descriptor", "Re-ranked", "Decided", "Estimated"]
    for cells, name in zip(rows["distances"][1:], ("global", "reranked", "decided", "estimated"), strict=True):
        assert float(cells[3]) == pytest.approx(entry["error_m"][name]["within_25_m"], abs=0.05)
    data = json.loads(re.findall(r'id="data">(.*?)</script>', text, re.S)[0])
    assert data["rankings"][1] == ["Decided", "evidence"]
    paths = [its["path"] for its in data["photos"]]
    for query in data["queries"]:
        shown = [paths[answer["photo"]] for answer in query["final"]]
        assert shown == [made.benchmark.database.path(int(i)) for i in final[query["id"]][:3]]


def test_without_re_ranking_the_order_of_retrieval_is_the_final_one(tmp_path: Path) -> None:
    made = make_run(tmp_path / "OUT", num_candidates=0)
    text = Path(make_report(ReportConfig(run=made.folder))).read_text()
    rows, recall = Tables(text).rows, made.metrics["recall"]["global"]
    assert [cells[0] for cells in rows["recall"][1:]] == ["Global descriptor"]
    assert [cells[0] for cells in rows["distances"][1:]] == ["By descriptor"]
    found = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text))
    assert found["Recall@1"] == f"{recall['1']:.1f} %"
    assert "Candidate ceiling" not in found
    data = json.loads(re.findall(r'id="data">(.*?)</script>', text, re.S)[0])
    assert data["rankings"][1] == ["Final, by descriptor", "d²"]
    total = {its["name"]: its["total"] for its in data["filters"]}
    assert 100 * total["right"] / len(made.answers) == pytest.approx(recall["1"])
    assert total["unreadable"] == made.metrics["rejected_images"]["queries"]
    assert not {"corrected", "broken"} & set(total)
    for query in data["queries"]:
        assert query["final"] == query["retrieved"]


def test_the_distances_are_those_of_the_answers(made: MadeUpRun) -> None:
    rows = Tables(Path(make_report(ReportConfig(run=made.folder))).read_text()).rows["distances"]
    utm_m, queries_m = made.benchmark.database.utm_m, made.benchmark.queries.utm_m
    for cells, ranked in zip(rows[1:], ("candidates", "reranked"), strict=True):
        best = [getattr(answer, ranked)[:1] for answer in made.answers]
        far_m = [
            float(np.linalg.norm(utm_m[ids[0]] - query)) if len(ids) else np.inf
            for ids, query in zip(best, queries_m, strict=True)
        ]
        assert float(cells[1].replace(",", "")) == pytest.approx(float(np.median(np.array(far_m))), abs=0.05)
        for cell, radius_m in zip(cells[2:], (5, 25, 100), strict=True):
            assert float(cell) == pytest.approx(100 * np.mean(np.array(far_m) <= radius_m), abs=0.05)


def test_texts_are_never_markup() -> None:
    data = {"name": HOSTILE, "list": [HOSTILE]}
    written = json_in_html(data)
    assert not set(written) & set("<>&\u2028\u2029")
    assert json.loads(written) == data
    text = page(HOSTILE, {"masthead": "", "figures": "", "sections": "", "about": ""}, data)
    assert text.count("<script") == 2
    assert json.loads(re.findall(r'id="data">(.*?)</script>', text, re.S)[0]) == data


def test_thousands_of_groups_are_cut(made: MadeUpRun) -> None:
    from pairvpr.report.sections import MOST_GROUPS, groups_section

    one = next(iter(made.metrics["audit"]["by_group"].values()))
    groups = {f"{HOSTILE} {number}": one | {"num_queries": number} for number in range(5000)}
    text = groups_section("by_sequence", "By sequence", groups)
    assert f"The {MOST_GROUPS} largest of 5,000 groups" in text
    assert len(text) < 200_000
    assert Tables(text).rows["by_sequence"][1][:2] == [f"{HOSTILE} 4999", "4,999"]


def test_thumbnails_keep_to_their_budget(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    urls = [str(tmp_path / f"{number}.png") for number in range(6)]
    for url in urls:
        thumbnails.Image.fromarray(rng.integers(0, 256, (300, 400, 3), np.uint8)).save(url)
    for budget_bytes in (1_000, 40_000, 400_000):
        found = thumbnails.pictures(urls, budget_bytes)
        assert sum(len(its.uri or "") for its in found) <= budget_bytes
        assert all((its.uri is None) == (its.reason is not None) for its in found)
    assert all(its.uri for its in found)


def test_attention_is_that_of_the_forward_pass() -> None:
    """Softmax by hand, head by head."""
    config = small_model_config()
    model = build_model(config, load_weights(config), torch.device("cpu"))
    torch.manual_seed(0)
    first, second = torch.randn(2, 1, config.num_patches, config.decoder.embed_dim).unbind()
    block = cast(DecoderBlock, model.dec_blocks[0])
    x, memory = model.first_sequence(first), model.second_sequence(second)
    over_first, over_second = class_attention(model, first, second)
    heads, width = 2, config.decoder.embed_dim // 2
    inner = block.norm1(x)
    query = block.cross_attn.projq(block.norm2(block.attend_itself(x)))[0, 0].unflatten(-1, (heads, width))
    key = block.cross_attn.projk(block.norm_y(memory))[0].unflatten(-1, (heads, width))
    by_hand = torch.stack([torch.softmax(key[:, h] @ query[h] / width**0.5, 0) for h in range(heads)]).mean(0)
    torch.testing.assert_close(over_second, by_hand)
    q, k, _ = block.attn.qkv(inner)[0].unflatten(-1, (3, heads, width)).unbind(1)
    own = torch.stack([torch.softmax(k[:, h] @ q[0, h] / width**0.5, 0) for h in range(heads)]).mean(0)[1:]
    torch.testing.assert_close(over_first, own / own.sum())


def test_explained_pairs_and_weights_that_are_not_the_runs(tmp_path: Path) -> None:
    made = make_run(tmp_path / "OUT", num_queries=12, num_database=20)
    draw_photos(made.benchmark)
    run = open_run(made.folder)
    run.settings["model"].update(small_model_config().settings())
    run.metrics["model"]["untrained"] = True
    with pytest.raises(UserError, match=f"the run's weights have {str(FACTS.weights_sha256)[:12]}"):
        Explainer(run, None)
    run.metrics["model"]["weights_sha256"] = load_weights(small_model_config()).sha256
    urls = made.benchmark.queries.url(0), made.benchmark.database.url(0)
    both = Explainer(run, None).maps(*urls)
    swapped = Explainer(run, None).maps(*reversed(urls))
    for its, same in zip(both, reversed(swapped), strict=True):
        assert its.shape == (2, 2)
        assert its.sum() == pytest.approx(1)
        np.testing.assert_allclose(its, same, rtol=1e-5)  # which photo comes first does not matter
    assert thumbnails.heat_uri(both[0], load_upright(urls[0]).size).startswith("data:image/webp")


@pytest.mark.slow
def test_photos_above_the_default_limit_are_shown_and_explained(tmp_path: Path) -> None:
    """A run that takes 183 megapixels has read a photo of 182."""
    made = make_run(tmp_path / "OUT", num_queries=12, num_database=20)
    draw_photos(made.benchmark)
    thumbnails.Image.new("L", (13_500, 13_500), 120).save(made.benchmark.database.url(0), "PNG")
    run, other = open_run(made.folder), open_run(made.folder)
    run.settings["model"].update(replace(small_model_config(), max_megapixels=183).settings())
    run.metrics["model"] |= {"untrained": True, "weights_sha256": load_weights(small_model_config()).sha256}
    for photos in (Photos(other, beside=run), Photos(run)):
        query, answer = photos.add("queries", 0), photos.add("database", 0)
        shown = shown_photos(photos, 40_000)
        assert [its["reason"] for its in shown] == [None, None]
    final = [ShownAnswer(photo=answer, right=None, metres=None, score=1.0)]
    its = ShownQuery(
        id=0, photo=query, kind="missed", tags=[], confidence=None, error=None, retrieved=[], final=final, truth=None
    )
    explain(run, [its], photos, 1, None)
    assert set(its.heat) == {"query", "answer"}
    photos = Photos(other)
    photos.add("database", 0)
    assert "more than model.max_megapixels=178" in str(shown_photos(photos, 40_000)[0]["reason"])


def test_the_command_takes_a_directory_and_needs_neither_torch_nor_ray(tmp_path: Path) -> None:
    folder = tmp_path / "a 'run', with=odd $name"
    make_run(folder)
    code = """
import sys
from pairvpr.cli import main
code = main()
print(sorted({"torch", "ray"} & set(sys.modules)), file=sys.stderr)
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", code, "report", str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(folder / "report.html")
    assert done.stderr.splitlines()[-1] == "[]"
    assert len((folder / "report.html").read_text()) > 10_000


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("NOWHERE",), "NOWHERE: no run there; expected the output directory of evaluate or query"),
        (("OUT", "report.pictures=0"), "report.pictures=0: expected a number above 0"),
        (("OUT", "report.tiles=file:///etc"), "report.tiles=file:///etc: expected an address such as"),
        (("OUT", "report.tiles='https://host/{z}/{x}/{y}.png'"), "not of which UTM zone; expected report.utm_epsg"),
        (("OUT", "output=OUT"), "output=OUT: it is a directory; expected a file name (the report)"),
    ],
)
def test_mistakes_are_one_line(
    words: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "OUT", num_queries=5, num_database=9)
    assert cli.run_job("report", words) == 2
    error = capsys.readouterr().err
    assert says in error.splitlines()[-1]


def test_tiles_stand_where_the_world_has_them(tmp_path: Path) -> None:
    """The map's corner and the places of queries, in Web Mercator, are those of their latitude and longitude."""
    from pairvpr.data.utm import UtmZone, to_degrees

    made = make_run(tmp_path / "OUT")
    report = make_report(
        ReportConfig(run=made.folder, report=ReportSettings(tiles="https://h/{z}/{x}/{y}.png", utm_epsg=32632))
    )
    text = Path(report).read_text()
    data = json.loads(re.findall(r'id="data">(.*?)</script>', text, re.S)[0])["map"]
    east_m, north_m = np.array(data["tiles"]["corner"]) + np.array(data["queries"][3]["at"]) / data["tiles"]["units"]
    latitude, longitude = to_degrees(made.benchmark.queries.utm_m[[3]], UtmZone(32, south=False))[0]
    assert np.degrees(east_m / 6378137) == pytest.approx(longitude, abs=1e-5)
    assert np.degrees(2 * np.arctan(np.exp(north_m / 6378137)) - np.pi / 2) == pytest.approx(latitude, abs=1e-5)
    assert "img-src data: https://h;" in text
