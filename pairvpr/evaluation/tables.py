"""A table of texts as a terminal, Markdown, LaTeX (booktabs) or CSV shows it."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence

FORMATS = ("text", "markdown", "latex", "csv")
NUM_NAMES = 3
"""Columns that hold names, the first ones; the others hold numbers."""
_LATEX = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def table(rows: Sequence[Sequence[str]], form: str) -> list[str]:
    """Lines of a table, one of `FORMATS`; the first of the rows has the names of the columns."""
    if form == "markdown":
        return _markdown(rows)
    if form == "latex":
        return _latex(rows)
    return _csv(rows) if form == "csv" else _text(rows)


def note(text: str, form: str) -> list[str]:
    """Lines of a sentence about a table. CSV has room for none; in LaTeX it is a comment."""
    if form == "latex":
        return [f"% {' '.join(text.split())}"]
    return [] if form == "csv" else [_in_markdown(text) if form == "markdown" else text]


def _text(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < NUM_NAMES else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---" if column < NUM_NAMES else "---:" for column in range(len(rows[0]))]
    cells = [[_in_markdown(cell) for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:])]


def _latex(rows: Sequence[Sequence[str]]) -> list[str]:
    heading, *lines = [" & ".join(map(_in_latex, row)) + r" \\" for row in rows]
    columns = "l" * NUM_NAMES + "r" * (len(rows[0]) - NUM_NAMES)
    return [
        rf"\begin{{tabular}}{{{columns}}}",
        *(r"\toprule", heading, r"\midrule"),
        *lines,
        *(r"\bottomrule", r"\end{tabular}"),
    ]


def _csv(rows: Sequence[Sequence[str]]) -> list[str]:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return [file.getvalue().rstrip("\n")]


def _in_markdown(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(text.split()))


def _in_latex(text: str) -> str:
    return "".join(_LATEX.get(char, char) for char in " ".join(text.split()))
