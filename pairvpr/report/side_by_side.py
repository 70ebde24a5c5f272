"""`pairvpr compare OUT OUT2 --html FILE`: two runs of one test, and the queries that the second corrected and broke."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pairvpr.data import storage
from pairvpr.data.claim import check_writable_file
from pairvpr.errors import UserError
from pairvpr.evaluation import compare
from pairvpr.report import sections
from pairvpr.report.choose import spread
from pairvpr.report.finished import FinishedRun, open_run
from pairvpr.report.gallery import Photos, ShownQuery, shown_between
from pairvpr.report.make import BYTES_PER_PICTURED_QUERY, shown_photos
from pairvpr.report.page import page

NUM_PICTURES = 200
CHANGES = (("corrected", "Corrected", True), ("broken", "Broken", False))


def write_comparison(urls: Sequence[str], output: str) -> None:
    """Write the page of two runs. Raises `UserError` as `compare`, and for any other number of runs."""
    if len(urls) != 2:
        raise UserError(f"--html: {len(urls)} runs given; expected two, the second is compared with the first")
    check_writable_file(output, "--html", "the page")
    (tested,) = compare.same_tests(urls)
    first, second = (open_run(url) for url in urls)
    before, after = (compare.first_answer_is_right(run) for run in tested)
    changed = {"corrected": after & ~before, "broken": before & ~after}
    photos = Photos(second, beside=first)
    queries = [
        query
        for name, mask in changed.items()
        for query in shown_between(
            first, second, spread(np.flatnonzero(mask), NUM_PICTURES // len(changed)), photos, name
        )
    ]
    parts = {
        "masthead": _masthead(first, second),
        "figures": "",
        "sections": sections.comparison_section(compare.rows_of(tested), compare.paired(*tested)),
        "about": "",
    }
    content = {"rankings": [["First run", first.order.unit], ["Second run", second.order.unit]]}
    content |= _content(queries, photos, changed)
    text = page(f"{second.metrics['benchmark']} - two runs", parts, content)
    try:
        storage.write_bytes(output, text.encode())
    except OSError as error:
        raise UserError(f"--html {output}: can't be written: {storage.reason(error)}") from error


def _masthead(first: FinishedRun, second: FinishedRun) -> str:
    return (
        f'<p class="kicker">Two runs side by side</p><h1>{escape(second.metrics["benchmark"])}</h1>'
        f'<p class="facts">from {escape(first.name)} to {escape(second.name)}</p>'
    )


def _content(queries: Sequence[ShownQuery], photos: Photos, changed: dict[str, NDArray[np.bool_]]) -> dict[str, Any]:
    """What the page's script draws the gallery from; there is no map."""
    return {
        "numQueries": sum(int(mask.sum()) for mask in changed.values()),
        "filters": [{"name": name, "label": label, "total": int(changed[name].sum())} for name, label, _ in CHANGES],
        "kinds": [{"name": name, "label": label, "right": right} for name, label, right in CHANGES],
        "photos": shown_photos(photos, BYTES_PER_PICTURED_QUERY * max(1, len(queries))),
        "queries": [asdict(query) for query in queries],
        "map": None,
    }


def main(arguments: Sequence[str]) -> int:
    """The command: tables, or a page. Exit codes: 0 done, 2 a user's mistake."""
    parser = compare.arguments_parser()
    parser.add_argument("--html", metavar="FILE", help="HTML file (path or URL) to write: two runs with their photos")
    try:
        given = parser.parse_args(arguments)
        print(compare.compare(given.runs, compare.checked_format(given.format)))
        if given.html is not None:
            write_comparison(given.runs, given.html)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
