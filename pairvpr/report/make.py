"""The job report: OUT's files -> what is shown of them -> one HTML file (docs/report.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pairvpr.config.schema import ReportConfig
from pairvpr.data import storage
from pairvpr.data.claim import check_writable_file
from pairvpr.data.images import BrokenImageError, load_upright
from pairvpr.data.storage import StorageError
from pairvpr.errors import UserError
from pairvpr.evaluation.position_errors import errors_m, position_errors
from pairvpr.report import sections
from pairvpr.report.choose import pictured
from pairvpr.report.citymap import Tiles, map_content
from pairvpr.report.finished import FinishedRun, open_run
from pairvpr.report.gallery import Photos, ShownQuery, shown_queries
from pairvpr.report.outcomes import KINDS, MEANING, Kind, Outcomes, best_positions, error_of, read_outcomes
from pairvpr.report.page import page
from pairvpr.report.thumbnails import heat_uri, pictures
from pairvpr.terminal import say
from pairvpr.where import Map

BYTES_PER_PICTURED_QUERY = 40_000
"""Of thumbnails: 8 MB for 200 queries."""
EXPLAINED_FIRST = ("broken", "missed", "corrected", "out_of_reach")


def make_report(config: ReportConfig) -> str:
    """Write the report; returns its path or URL.

    Raises `UserError` for what is no finished run, and where the report can't be written.
    """
    output = config.output or storage.join(config.run, "report.html")
    check_writable_file(output, "output", "the report")
    run = open_run(config.run)
    outcomes = read_outcomes(run)
    say(f"report: {len(outcomes):,} queries, {len(run.database):,} database photos")
    chosen = pictured(outcomes, config.report.pictures)
    photos = Photos(run)
    queries = shown_queries(run, outcomes, chosen, photos, error_of(run, outcomes.first_final))
    if config.report.explain:
        explain(run, queries, photos, config.report.explain, config.report.weights)
    tiles = _tiles(run, config.report.tiles, config.report.utm_epsg)
    text = report_page(run, outcomes, queries, photos, map_content(run, outcomes, chosen, tiles), tiles)
    try:
        storage.write_bytes(output, text.encode())
    except OSError as error:
        raise UserError(f"output={output}: can't be written: {storage.reason(error)}") from error
    return output


def report_page(
    run: FinishedRun,
    outcomes: Outcomes,
    queries: Sequence[ShownQuery],
    photos: Photos,
    city_map: dict[str, Any] | None,
    tiles: Tiles | None,
) -> str:
    """The page of one run."""
    errors, metrics = all_errors(run, outcomes), run.metrics
    shown = [sections.recall_section(metrics)] if metrics["recall"] is not None else []
    audit, confidence = metrics.get("audit"), metrics.get("confidence")
    if audit:
        shown.append(sections.candidates_section(audit))
    if errors:
        shown.append(sections.errors_section(errors))
    shown.append(sections.seconds_section(metrics["seconds_per_query"]))
    if confidence and confidence.get("reliability"):
        shown.append(sections.confidence_section(confidence))
    decided = (metrics.get("decision") or {}).get("recall_at_1") or {}
    for key, title in sections.GROUPINGS.items():
        if audit and audit.get(key):
            shown.append(sections.groups_section(key, title, audit[key], decided.get(key)))
    parts = {
        "masthead": sections.masthead(run),
        "figures": sections.figures(run, errors),
        "sections": "".join(shown),
        "about": sections.protocol_section(run),
    }
    content = gallery_content(outcomes, queries, photos) | {"map": city_map}
    return page(f"{metrics['benchmark']} - place recognition", parts, content, tiles and tiles.template)


def gallery_content(outcomes: Outcomes, queries: Sequence[ShownQuery], photos: Photos) -> dict[str, Any]:
    """What the page's script draws the gallery from."""
    return {
        "rankings": [["By descriptor", "d²"], [outcomes.order.label, outcomes.order.unit]],
        "numQueries": len(outcomes),
        "filters": [
            {"name": name, "label": label, "total": int(mask.sum())} for name, (label, mask) in outcomes.tags().items()
        ],
        "kinds": [
            {"name": str(kind), "label": MEANING[kind], "right": kind is Kind.right if outcomes.has_truth else None}
            for kind in KINDS
        ],
        "photos": shown_photos(photos, BYTES_PER_PICTURED_QUERY * max(1, len(queries))),
        "queries": [asdict(query) for query in queries],
    }


def shown_photos(photos: Photos, budget_bytes: int) -> list[dict[str, str | None]]:
    """Each photo with its picture, or why there is none."""
    small = pictures(photos.urls, budget_bytes, photos.max_megapixels)
    gone = sum(picture.uri is None for picture in small)
    if gone:
        say(f"report: {gone:,} of {len(small):,} photos can't be shown, the page says why")
    return [
        {"path": path, "uri": picture.uri, "reason": picture.reason}
        for path, picture in zip(photos.paths, small, strict=True)
    ]


def all_errors(run: FinishedRun, outcomes: Outcomes) -> list[sections.Errors]:
    """How far answers are: by descriptor, by pair score, of a decision and its estimate; none without positions."""
    utm_m, queries_m = run.database.utm_m, run.queries.utm_m
    rankings: list[tuple[str, NDArray[np.float64]]] = [
        ("By descriptor", best_positions(outcomes.first_global, utm_m)),
        *([] if outcomes.order.is_retrieval else [("Re-ranked", best_positions(outcomes.first_reranked, utm_m))]),
    ]
    if outcomes.order.is_decided:
        rankings += [("Decided", best_positions(outcomes.first_final, utm_m)), ("Estimated", outcomes.estimated_m)]
    found = []
    for label, answered_m in rankings:
        summary = position_errors(answered_m, queries_m)
        if summary is not None and np.isfinite(answered_m).any():
            found.append(sections.Errors(label, errors_m(answered_m, queries_m), summary))
    return found


def explain(run: FinishedRun, queries: Sequence[ShownQuery], photos: Photos, number: int, weights: str | None) -> None:
    """Add to `number` of the queries where the re-ranker looked in them and in their final answers, failures first."""
    from pairvpr.report.attention import Explainer

    explainer, urls = Explainer(run, weights), photos.urls
    order = [query for tag in EXPLAINED_FIRST for query in queries if tag in query.tags]
    done = 0
    for query in dict.fromkeys([*map(queries.index, order), *range(len(queries))]):
        its = queries[query]
        if done < number and its.final:
            pair = urls[its.photo], urls[its.final[0].photo]
            try:
                sizes_px = [load_upright(url, max_megapixels=photos.max_megapixels).size for url in pair]
                heat = map(heat_uri, explainer.maps(*pair), sizes_px)
                its.heat = dict(zip(("query", "answer"), heat, strict=True))
            except (BrokenImageError, StorageError):
                continue  # the gallery says which photo is gone
            done += 1


def _tiles(run: FinishedRun, template: str | None, epsg: int | None) -> Tiles | None:
    if template is None:
        return None
    zone = Map(run.database, epsg).zone
    if zone is None:
        raise UserError(
            "report.tiles: the run knows metres, but not of which UTM zone; expected report.utm_epsg=..., the zone's "
            "EPSG code (32610 is zone 10 north)"
        )
    return Tiles(template, zone)
