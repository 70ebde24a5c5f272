"""The report's numbers as HTML: what metrics.json says, and how far answers are from the truth. All text is escaped.

Q queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pairvpr.evaluation.position_errors import ERROR_RADII_M
from pairvpr.evaluation.predictions_file import final_recall
from pairvpr.report.charts import PERCENT, Axis, Line, bar_chart, bars, diagonal, line_chart
from pairvpr.report.finished import FinishedRun

MOST_GROUPS = 200
ERROR_MARKS_M = (1.0, 5.0, 25.0, 100.0, 1000.0, 10_000.0)
GROUPINGS = {
    "by_group": "By group",
    "by_light": "By light",
    "by_subtask": "By subtask",
    "by_sequence": "By sequence",
}
"""Entries of the audit with groups of queries, in their order on the page."""
NOTES = {
    "by_subtask": "Here the queries of each subtask search the whole database. benchmark.subtask=NAME restricts the "
    "database to the subtask's photos, too. "
}
"""What a reader must know of a table of groups."""
STEPS = (("describe", "Describe"), ("retrieve", "Retrieve"), ("rerank", "Re-rank"))
DIGEST_LENGTH = 12


@dataclass(frozen=True)
class Errors:
    """How far one ranking's best answers are from the queries: (Q,) metres, and what `position_errors` says of them."""

    label: str
    error_m: NDArray[np.float64]
    summary: Mapping[str, Any]


def masthead(run: FinishedRun) -> str:
    """Name of the test, what ran on what, and what to know before reading on."""
    metrics, protocol, model = run.metrics, run.metrics["protocol"], run.metrics["model"]
    facts = [
        f"{_count(protocol.get('num_queries'))} queries",
        f"{_count(protocol.get('num_database'))} database photos",
        f"model {model.get('name')} ({model.get('precision')})",
        f"weights {str(model.get('weights_sha256'))[:DIGEST_LENGTH]}",
    ]
    notes = []
    if model.get("untrained"):
        notes.append(
            "The network is untrained, its weights are random: these numbers show the machinery, nothing else."
        )
    if metrics["recall"] is None:
        notes.append("No ground truth: predictions are shown. Recall, errors and right or wrong are not known.")
    lines = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    return (
        f'<p class="kicker">Place recognition report</p><h1>{escape(metrics["benchmark"])}</h1>'
        f'<p class="facts">{escape("  ·  ".join(facts))}</p>{lines}'
    )


def figures(run: FinishedRun, errors: Sequence[Errors]) -> str:
    """The few numbers that most people came for."""
    metrics, cells = run.metrics, []
    if metrics["recall"] is not None:
        final, by_descriptor = final_recall(metrics), metrics["recall"]["global"]
        for n in ("1", "5"):
            cells.append((f"Recall@{n}", _percent(final.get(n)), f"{_percent(by_descriptor.get(n))} by descriptor"))
        if metrics["num_candidates"]:
            ceiling = _percent(metrics.get("candidate_ceiling"))
            cells.append(("Candidate ceiling", ceiling, f"within {metrics['num_candidates']} candidates"))
    if errors:
        its = errors[-1].summary
        median = "beyond measure" if its["median_m"] is None else f"{its['median_m']:,.1f} m"
        cells.append(("Median error", median, f"{_percent(its['within_25_m'])} within 25 m"))
    found = metrics.get("confidence") or {}
    if found.get("expected_calibration_error") is not None:
        cells.append(("Calibration error", f"{found['expected_calibration_error']:.3f}", "expected, 0 is best"))
    seconds = sum(metrics["seconds_per_query"].get(step, 0.0) for step, _ in STEPS)
    cells.append(("Work per query", _seconds(seconds), "all actors together"))
    return "".join(
        f'<div class="figure"><dt>{escape(name)}</dt><dd>{escape(value)}</dd>'
        f'<dd class="about">{escape(about)}</dd></div>'
        for name, value, about in cells
    )


def recall_section(metrics: Mapping[str, Any]) -> str:
    """Recall curves with the candidate ceiling, and their numbers."""
    recall, num_candidates = metrics["recall"], metrics["num_candidates"]
    rows = [("Global descriptor", recall["global"])]
    if num_candidates:
        rows.append((f"Re-ranked, K = {num_candidates}", recall["reranked"]))
    decided = metrics.get("decision")
    if decided and decided.get("recall"):
        rows.append((f"Decided, {decided['rule']}", decided["recall"]))
    ns = list(recall["global"])
    most = max((int(n) for n in ns), default=1)
    across = Axis(1, max(2, most), [n for n in (1, 5, 10, 20, 50, 100, 500, 1000) if n <= most], "N answers", True)
    low = min((value for _, its in rows for value in its.values()), default=0.0)
    up = _percent_axis(low)
    lines = [Line(label, style, [(int(n), v) for n, v in its.items()]) for style, (label, its) in enumerate(rows)]
    ceiling = metrics.get("candidate_ceiling")
    if ceiling is not None:
        lines.append(Line(f"Candidate ceiling, {ceiling:.1f} %", 3, [(across.low, ceiling), (across.high, ceiling)]))
    chart = line_chart("Recall@N, percent of queries", across, up, lines)
    table = _table(["Recall@N, %", *ns], [[label, *(_cell(its.get(n)) for n in ns)] for label, its in rows])
    return _section("recall", "Recall", chart + _recall_notes(metrics), table)


def _recall_notes(metrics: Mapping[str, Any]) -> str:
    protocol, notes = metrics["protocol"], []
    if protocol.get("num_queries_without_positives"):
        notes.append(f"{protocol['num_queries_without_positives']:,} queries without a match count as misses.")
    if protocol.get("num_queries_dropped"):
        notes.append(
            f"{protocol['num_queries_dropped']:,} queries without a match are dropped, by the benchmark's rule."
        )
    return "".join(f'<p class="aside">{escape(note)}</p>' for note in notes)


def candidates_section(audit: Mapping[str, Any]) -> str:
    """What re-ranking fewer candidates would have given, with what it corrected and broke."""
    sweep = audit["by_num_candidates"]
    ks = [int(k) for k in sweep]
    chart = ""
    if len(ks) > 1:
        across = Axis(min(ks), max(ks), ks, "K candidates re-ranked", True)
        first = [(int(k), row["reranked"]["1"]) for k, row in sweep.items()]
        reach = [(int(k), row["candidate_ceiling"]) for k, row in sweep.items()]
        base = audit["global_recall_at_1"]
        lines = [
            Line("Descriptor alone", 0, [(min(ks), base), (max(ks), base)]),
            Line("Re-ranked", 1, first),
            Line("Candidate ceiling", 3, reach),
        ]
        up = _percent_axis(min(base, *(value for _, value in first)))
        chart = line_chart("Recall@1 by number of candidates, percent", across, up, lines)
    ns = ("1", "5", "10")
    rows = [[k, *(_cell(row["reranked"].get(n)) for n in ns), *_tail(row)] for k, row in sweep.items()]
    table = _table(["K", *(f"Recall@{n}" for n in ns), "Ceiling", "Corrected", "Broken"], rows)
    return _section("candidates", "How many candidates", chart, table)


def errors_section(errors: Sequence[Errors]) -> str:
    """How far from the truth: the share of queries within each distance."""
    largest = max((float(its.error_m[np.isfinite(its.error_m)].max(initial=0.0)) for its in errors), default=0.0)
    high = next((mark for mark in ERROR_MARKS_M[2:] if mark >= largest), ERROR_MARKS_M[-1])
    across = Axis(1.0, high, [mark for mark in ERROR_MARKS_M if mark <= high], "metres from the truth", True)
    at = np.geomspace(1.0, high, 49)
    lines = []
    for style, its in enumerate(errors):
        known = np.sort(its.error_m[~np.isnan(its.error_m)])
        share = 100 * np.searchsorted(known, at, side="right") / max(1, len(known))
        lines.append(Line(its.label, style, list(zip(at.tolist(), share.tolist(), strict=True))))
    chart = line_chart("Queries answered within a distance, percent", across, _percent_axis(0.0), lines, dots=False)
    rows = [
        [its.label, "-" if its.summary["median_m"] is None else f"{its.summary['median_m']:,.1f}"]
        + [_cell(its.summary[f"within_{radius}_m"]) for radius in ERROR_RADII_M]
        for its in errors
    ]
    table = _table(["Best answer", "Median, m", *(f"≤ {radius} m, %" for radius in ERROR_RADII_M)], rows)
    return _section("distances", "Distance errors", chart, table)


def confidence_section(found: Mapping[str, Any]) -> str:
    """Reliability diagram and histogram of confidences, where the run was calibrated."""
    bins = found["reliability"]
    unit = Axis(0.0, 100.0, PERCENT, "confidence, percent")
    share = Axis(0.0, 100.0, PERCENT, "")
    shown = [its for its in bins if its["mean_confidence"] is not None]
    points = [(100 * its["mean_confidence"], 100 * its["share_correct"]) for its in shown]
    heights = [(100 * its["low"], 100 * its["high"], 100 * its["share_correct"]) for its in shown]
    behind = bars(unit, share, heights, "bar faint") + diagonal(unit, share)
    most = max(1, *(its["count"] for its in bins))
    counts = Axis(0.0, most, [0, most / 2, most] if most > 1 else [0, most], "confidence, percent")
    charts = line_chart("Right answers by confidence, percent", unit, share, [Line("This run", 1, points)], behind)
    charts += bar_chart(
        "Queries by confidence", unit, counts, [(100 * its["low"], 100 * its["high"], its["count"]) for its in bins]
    )
    rows = [
        [f"{its['low']:.1f} to {its['high']:.1f}", f"{its['count']:,}"]
        + ["-" if its[key] is None else f"{100 * its[key]:.1f}" for key in ("mean_confidence", "share_correct")]
        for its in bins
    ]
    table = _table(["Confidence", "Queries", "Mean confidence, %", "Right, %"], rows)
    return _section("confidence", "Confidence", charts + _refusals(found), table)


def _refusals(found: Mapping[str, Any]) -> str:
    if found.get("num_in_map") is None:
        return ""
    text = (
        f"{found['num_in_map']:,} of {found['num_answered']:,} answered queries are taken to be in this map "
        f"(confidence {found['not_in_map_below']:g} or more)"
    )
    for key, what in (
        ("recall_at_1_of_in_map", "of them right"),
        ("refused_without_positives", "refused of those without a match"),
        ("refused_with_positives", "refused of those with one"),
    ):
        if found.get(key) is not None:
            text += f"; {found[key]:.1f} % {what}"
    return f'<p class="aside">{escape(text)}.</p>'


def groups_section(name: str, title: str, groups: Mapping[str, Any], decided: Mapping[str, float] | None = None) -> str:
    """A row for each group of queries (city, day or night, subtask, sequence), the largest first.

    `decided` is the recall@1 of a decision, by group.
    """
    order = sorted(groups, key=lambda name: (-groups[name]["num_queries"], name))
    rows = []
    for group in order[:MOST_GROUPS]:
        row = list(groups[group]["by_num_candidates"].values())[-1]
        rows.append(
            [
                *(group, f"{groups[group]['num_queries']:,}", _cell(groups[group]["global_recall_at_1"])),
                *(_cell(row["reranked"]["1"]), *_tail(row)),
                *([] if decided is None else [_cell(decided.get(group))]),
            ]
        )
    headings = ["Group", "Queries", "Descriptor@1, %", "Re-ranked@1, %", "Ceiling, %", "Corrected", "Broken"]
    if decided is not None:
        headings.append("Decided@1, %")
    said = NOTES.get(name, "")
    if len(order) > MOST_GROUPS:
        said += f"The {MOST_GROUPS} largest of {len(order):,} groups. metrics.json has all of them."
    note = f'<p class="aside">{said}</p>' if said else ""
    return _section(name, title, note + _table(headings, rows))


def seconds_section(seconds: Mapping[str, float]) -> str:
    """Seconds of work per query, by step."""
    values = [(label, float(seconds.get(step, 0.0))) for step, label in STEPS]
    total = sum(value for _, value in values) or 1.0
    parts, x = [], 0.0
    for style, (_, value) in enumerate(values):
        parts.append(f'<rect class="step t{style}" x="{x:.2f}" y="0" width="{100 * value / total:.2f}" height="10"/>')
        x += 100 * value / total
    name = "Share of the work by step"
    bar = (
        f'<svg class="steps" viewBox="0 0 100 10" preserveAspectRatio="none" role="img" aria-label="{name}">'
        f"{''.join(parts)}</svg>"
    )
    rows = [[label, f"{value:.4f}", f"{100 * value / total:.1f}"] for label, value in values]
    return _section("seconds", "Time", bar + _table(["Step", "Seconds per query", "Share, %"], rows))


def protocol_section(run: FinishedRun) -> str:
    """Which test this is, how it was run, and with what versions, for the methods part of a paper."""
    metrics = run.metrics
    index = metrics.get("index") or {}
    rows = [[_words(key), _plain(value)] for key, value in metrics["protocol"].items()]
    rows += [
        ["Index", _plain({k: v for k, v in index.items() if v is not None})],
        ["Candidates K", str(metrics["num_candidates"])],
    ]
    rows += [["Model", _plain(metrics["model"])], ["Versions", _plain(metrics.get("versions", {}))]]
    rows += [["Rejected photos", _plain(metrics.get("rejected_images", {}))], ["Run", run.name]]
    return _section("protocol", "Protocol", "", _table(["Entry", "Value"], rows, "words"))


def comparison_section(rows: Sequence[Sequence[str]], verdict: Sequence[str]) -> str:
    """Two runs as a table, and whether they differ by more than chance."""
    notes = "".join(f'<p class="aside">{escape(text)}</p>' for text in verdict)
    return _section("comparison", "Recall@N, percent", "", _table(rows[0], rows[1:]) + notes)


def _section(name: str, title: str, body: str, table: str = "") -> str:
    """A section; its table is folded where a chart says the same."""
    folded = f"<details><summary>Numbers</summary>{table}</details>" if table and body else table
    charts = f'<div class="charts">{body}</div>' if body else ""
    return f'<section id="{name}" class="panel"><h2>{escape(title)}</h2>{charts}{folded}</section>'


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], style: str = "") -> str:
    head = "".join(f'<th scope="col">{escape(str(cell))}</th>' for cell in headings)
    body = "".join(
        f'<tr><th scope="row">{escape(str(first))}</th>'
        + "".join(f"<td>{escape(str(cell))}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(headings[0], quote=True)}">'
        f'<table class="{style}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _tail(row: Mapping[str, Any]) -> list[str]:
    """What ends a row of the audit: ceiling, corrected, broken."""
    return [_cell(row["candidate_ceiling"]), f"{row['corrected']:,}", f"{row['broken']:,}"]


def _percent_axis(low: float) -> Axis:
    """From a round number below `low` to 100."""
    first = max(0.0, min(80.0, 20.0 * (low // 20)))
    step = 5.0 if first >= 80 else 10.0 if first >= 60 else 20.0
    return Axis(first, 100.0, np.arange(first, 100.1, step).tolist(), "")


def _cell(percent: float | None) -> str:
    return "-" if percent is None else f"{percent:.1f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "?"


def _seconds(value: float) -> str:
    return f"{1000 * value:.1f} ms" if value < 1 else f"{value:.2f} s"


def _words(key: str) -> str:
    text = key.replace("_", " ").replace("num ", "number of ")
    return text[:1].upper() + text[1:]


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(its)}" for key, its in value.items())
    return "none" if value is None else str(value)
