"""Two runs as a page, and comparisons as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pairvpr.evaluation.compare import compare, first_answer_is_right, read_run
from pairvpr.evaluation.tables import table
from pairvpr.report.side_by_side import main
from pairvpr.retrieval.pipeline import Answer
from tests.support.finished import DECISION, MadeUpRun, make_run

MADE_AS: dict[str, dict[str, Any]] = {
    "re-ranked": {},
    "decided by consensus": {"decision": DECISION},
    "by descriptor": {"num_candidates": 0},
}
"""How a run with each kind of final answers is made, by the words for them."""


def final_ids(answer: Answer, words: str) -> list[int]:
    """The final answers to a query, as the docs define them."""
    if words == "by descriptor":
        return answer.candidates.tolist()
    return answer.reranked.tolist() if answer.decided is None else answer.decided.ids.tolist()


def is_right(run: MadeUpRun, words: str) -> np.ndarray:
    """(Q,) whether the best final answer is right, by a loop."""
    assert run.benchmark.positives is not None
    return np.array(
        [
            bool(ids) and ids[0] in positives
            for ids, positives in zip(
                (final_ids(its, words) for its in run.answers), run.benchmark.positives, strict=True
            )
        ]
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[MadeUpRun, MadeUpRun]:
    folder = tmp_path_factory.mktemp("runs")
    # Photos lie where the first run's do, so that both are one test.
    return make_run(folder / "one_&_first"), make_run(folder / "two", order_seed=5)


def test_the_page_shows_the_queries_that_compare_counts(two: tuple[MadeUpRun, MadeUpRun], tmp_path: Path) -> None:
    urls = [run.folder for run in two]
    assert main([*urls, "--html", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    data = json.loads(re.findall(r'id="data">(.*?)</script>', text, re.S)[0])
    before, after = (first_answer_is_right(read_run(url)) for url in urls)
    by_tag = {
        name: [query["id"] for query in data["queries"] if name in query["tags"]] for name in ("corrected", "broken")
    }
    assert by_tag == {
        "corrected": (after & ~before).nonzero()[0].tolist(),
        "broken": (before & ~after).nonzero()[0].tolist(),
    }
    assert by_tag["corrected"]
    assert by_tag["broken"]
    for query in data["queries"]:
        first, second = (run.answers[query["id"]].reranked for run in two)
        for shown, ids in ((query["retrieved"], first), (query["final"], second)):
            paths = [data["photos"][answer["photo"]]["path"] for answer in shown]
            assert paths == [two[0].benchmark.database.path(int(image_id)) for image_id in ids[:3]]
    said = compare(urls)
    assert f"{len(by_tag['corrected'])} queries corrected, {len(by_tag['broken'])} broken" in said
    for line in said.splitlines()[-2:]:
        assert line.replace("&", "&amp;") in text


@pytest.mark.parametrize("first", MADE_AS)
@pytest.mark.parametrize("second", MADE_AS)
def test_final_answers_are_compared_whatever_ordered_them(tmp_path: Path, first: str, second: str) -> None:
    runs = [
        make_run(tmp_path / name, order_seed=seed, **MADE_AS[words])
        for seed, (name, words) in enumerate((("one", first), ("two", second)), start=3)
    ]
    urls = [run.folder for run in runs]
    before, after = (is_right(run, words) for run, words in zip(runs, (first, second), strict=True))
    said = compare(urls)
    count = f"{(after & ~before).sum()} queries corrected, {(before & ~after).sum()} broken"
    assert (after != before).any()
    named = f"{urls[0]} to {urls[1]}, {first}" if first == second else f"{urls[0]} ({first}) to {urls[1]} ({second})"
    assert f"from {named}, N = 1: {count}\n" in said
    assert f"recall@1, {100 * (after.mean() - before.mean()):+.1f} points, is " in said
    for run, right, words in zip(runs, (before, after), (first, second), strict=True):
        recall = {"re-ranked": run.metrics["recall"]["reranked"], "by descriptor": run.metrics["recall"]["global"]}
        its = recall.get(words) or run.metrics["decision"]["recall"]
        assert 100 * right.mean() == pytest.approx(its["1"])

    assert main([*urls, "--html", str(tmp_path / "page.html")]) == 0
    data = json.loads(re.findall(r'id="data">(.*?)</script>', (tmp_path / "page.html").read_text(), re.S)[0])
    units = {"re-ranked": "score", "by descriptor": "d²", "decided by consensus": "evidence"}
    assert data["rankings"] == [["First run", units[first]], ["Second run", units[second]]]
    assert len(data["queries"]) == (after != before).sum()
    for query in data["queries"]:
        for shown, run, words in ((query["retrieved"], runs[0], first), (query["final"], runs[1], second)):
            paths = [data["photos"][answer["photo"]]["path"] for answer in shown]
            ids = final_ids(run.answers[query["id"]], words)[:3]
            assert paths == [run.benchmark.database.path(image_id) for image_id in ids]
        assert [query["final"][0]["right"]] == [after[query["id"]]]


@pytest.mark.parametrize("form", ["text", "markdown", "latex", "csv", "html"])
def test_tables_say_what_the_final_answers_are(tmp_path: Path, form: str) -> None:
    runs = [make_run(tmp_path / f"run{place}", **how) for place, how in enumerate(MADE_AS.values())]
    decided = [f"{value:.1f}" for n, value in runs[1].metrics["decision"]["recall"].items() if n in ("1", "5", "10")]
    assert decided
    if form == "html":
        assert main([runs[0].folder, runs[1].folder, "--html", str(tmp_path / "page.html")]) == 0
        text, kinds = (tmp_path / "page.html").read_text(), list(MADE_AS)[:2]
    else:
        text, kinds = compare([run.folder for run in runs], form), list(MADE_AS)
    for part in ("decided@1", "decided@5", "decided@10", "final answers", *kinds, *decided):
        assert part in text
    if form == "csv":
        rows = list(csv.DictReader(io.StringIO(text)))
        assert [row["final answers"] for row in rows] == kinds
        assert [row["decided@1"] for row in rows] == ["-", decided[0], "-"]
        assert [row["re-ranked@1"] == "-" for row in rows] == [False, False, True]


def test_every_format_says_the_same_cells(two: tuple[MadeUpRun, MadeUpRun]) -> None:
    urls = [run.folder for run in two]
    plain = [line.split() for line in compare(urls).splitlines()[1:4]]
    assert list(csv.reader(io.StringIO(compare(urls, "csv")))) == plain
    markdown = [line for line in compare(urls, "markdown").splitlines() if line.startswith("|")]
    cells = [re.split(r" \| ", line.strip("| ")) for line in markdown]
    assert [[re.sub(r"\\(.)", r"\1", cell) for cell in row] for row in (cells[0], *cells[2:])] == plain
    latex = compare(urls, "latex")
    assert latex.count(r" \\") == 3
    assert [line for line in latex.splitlines() if line.startswith("\\")] == [
        r"\begin{tabular}{lllrrrrrrrr}",
        *(r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}"),
    ]
    rows = [line.removesuffix(r" \\") for line in latex.splitlines() if line.endswith(r" \\")]
    undone = [[re.sub(r"\\([&_#%$])", r"\1", cell) for cell in re.split(r" (?<!\\)& ", row)] for row in rows]
    assert undone == plain
    assert "% the difference in recall@1" in latex


@pytest.mark.parametrize(
    ("form", "shown"),
    [
        ("latex", r"a\_b \& \textbackslash{}c \{\$\} \textasciitilde{}"),
        ("markdown", r"a\_b & \\c {$} ~"),
        ("csv", "a_b & \\c {$} ~"),
        ("text", "a_b & \\c {$} ~"),
    ],
)
def test_names_are_escaped_as_each_format_needs(form: str, shown: str) -> None:
    name = "a_b & \\c {$} ~"
    assert any(shown in line for line in table([["run"], [name]], form))


def test_mistakes_are_one_line(two: tuple[MadeUpRun, MadeUpRun], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    urls = [run.folder for run in two]
    for words, says in (
        ([*urls, "--format", "word"], "--format word: expected one of text, markdown, latex, csv"),
        ([*urls, urls[0], "--html", str(tmp_path / "p.html")], "--html: 3 runs given; expected two"),
        ([*urls, "--html", str(tmp_path)], "it is a directory"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1
