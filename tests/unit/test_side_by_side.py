"""Two runs as a page, and comparisons as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest

from pairvpr.evaluation.compare import compare, first_answer_is_right, read_run
from pairvpr.evaluation.tables import table
from pairvpr.report.side_by_side import main
from tests.support.finished import MadeUpRun, make_run


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
