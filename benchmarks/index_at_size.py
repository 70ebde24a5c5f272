"""An index as large as SF-XL's, at most: building, searching and changing it; seconds, memory, recall.

    python -m venv X && X/bin/pip install autofaiss "pyarrow<22"
    python -m benchmarks.index_at_size --autofaiss X/bin/python --report

Run it by hand on an idle machine, from the root of the checkout; it takes some 45 minutes on two cores, up to 8 GiB
of memory (more keeps files in the page cache, and is faster) and 21 GB of disk. Descriptors are synthetic
(`benchmarks/index_rows.py`). Every step runs in a fresh process, every piece of a build in one of its own, as on a
cluster:

- exact: a flat index of 8 shards, its search against one bare faiss index over all rows
- auto: what index.kind=auto makes of a budget too small for anything exact; recall of the exact 100 nearest
- autofaiss beside it, by an interpreter that has it
- 100 million: the plan's figures, one shard of its 400 built
- updates: 1 % of the photos added and 1 % removed, and as many of a tenth of the photos

A step that fails is said so in the report, and the others go on; the status is 1 then. Goals that are missed are no
failure. Needs Linux.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import index_rows, shared
from benchmarks.fresh_process import call
from benchmarks.index_beside import beside_autofaiss, hundred_million
from benchmarks.index_rows import Drawn
from benchmarks.index_sections import Bench, build_auto, build_exact, search_both, updates
from pairvpr.distributed.progress import say

WHAT = "index_at_size"


def report(bench: Bench, minutes: float, load_at_start: float) -> str:
    """All sections as Markdown."""
    sections = "\n\n".join("\n".join([f"## {title}", "", *blocks_apart(its)]) for title, its in bench.text.items())
    drawn, circumstances = bench.drawn, shared.circumstances(WHAT, load_at_start)
    for place, name in ((bench.options.autofaiss, "X/bin/python"), (bench.options.folder, "FOLDER")):
        circumstances = circumstances.replace(f" {place}", f" {name}") if place else circumstances
    return f"""# An index of {drawn.num_rows:,} descriptors

Synthetic: a {index_rows.NUM_INNER}-dimensional Gaussian mixture of {index_rows.NUM_CENTRES:,} centres, embedded
linearly, plus noise, on the unit sphere of {index_rows.NUM_VALUES} dimensions. Queries are rows seen again, a little
elsewhere. Every piece of work ran in a process of its own; "before" is what that held when it began, "without files"
the peak of memory that is no page of a file. Files were in the page cache, as far as it has room. All of it took
{minutes:.0f} minutes.

{sections}

## Circumstances

{circumstances}

Also {"; ".join(bench.versions)}. autofaiss needs numpy below 2, hence `python -m venv X; X/bin/pip install autofaiss
"pyarrow<22"`."""


def blocks_apart(blocks: Sequence[str]) -> list[str]:
    """Paragraphs and tables with an empty line between them; lines of a list stay together."""
    lines = list[str]()
    for block in blocks:
        if lines and not (block.startswith("- ") and lines[-1].startswith("- ")):
            lines.append("")
        lines.append(block)
    return lines


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_805_840, help="descriptors in the index (2,805,840)")
    parser.add_argument("--queries", type=int, default=1000, help="queries (1,000)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each search (3)")
    parser.add_argument("--folder", help="working directory; its rows are used again, its indices are not; it is kept")
    parser.add_argument("--budget-gib", type=float, default=1.0, help="memory of the auto index (1)")
    parser.add_argument("--autofaiss", metavar="PYTHON", help="an interpreter that has autofaiss")
    parser.add_argument("--autofaiss-minutes", type=float, default=15.0, help="it is stopped then (15)")
    parser.add_argument("--plan-images", type=int, default=100_000_000, help="photos of the plan (100,000,000)")
    parser.add_argument("--skip-100m", action="store_true", help="leave the plan's shard out")
    shared.add_report_option(parser, WHAT)
    return parser.parse_args()


def run_steps(bench: Bench) -> bool:
    """Every section; False if one failed."""
    steps: list[tuple[str, Callable[[Bench], None]]] = [
        ("Exact: building", build_exact),
        ("auto: building", build_auto),
        ("Search", search_both),
        ("autofaiss", beside_autofaiss),
        *([] if bench.options.skip_100m else [("100 million", hundred_million)]),
        ("Updates", updates),
    ]
    is_whole = True
    for title, step in steps:
        start_s = time.perf_counter()
        say(f"== {title}")
        try:
            step(bench)
        except Exception as error:
            is_whole = False
            traceback.print_exc()
            bench.add(title, f"**Failed**: {type(error).__name__}: {error}")
        say(f"== {title}: {time.perf_counter() - start_s:.0f} s")
    return is_whole


def main() -> None:
    """Draw, then every section."""
    options, load_at_start, start_s = parsed(), os.getloadavg()[0], time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="pairvpr-") as temporary:
        folder = Path(options.folder or temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        drawn = Drawn(folder, options.rows, max(1, options.rows // 100), options.queries)
        ran = call(index_rows.draw, drawn)
        say(f"rows: {f'drawn in {ran.seconds:.0f} s' if ran.answer else 'drawn earlier'}")
        bench = Bench(options, drawn, folder / "work")
        shutil.rmtree(bench.work, ignore_errors=True)
        is_whole = run_steps(bench)
        minutes = (time.perf_counter() - start_s) / 60
        shared.publish(WHAT, report(bench, minutes, load_at_start), options.report)
    sys.exit(0 if is_whole else 1)


if __name__ == "__main__":
    main()
