"""The report's map as plain values: points of database and queries, where each query was answered to be.

Coordinates are whole decimetres from the corner of the map, which keeps the page small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pairvpr.data.utm import UtmZone, to_degrees
from pairvpr.report.choose import MOST_ON_MAP, spread, thinned
from pairvpr.report.finished import FinishedRun
from pairvpr.report.outcomes import Outcomes, best_positions

UNITS_PER_M = 10
EARTH_RADIUS_M = 6_378_137.0


@dataclass(frozen=True)
class Tiles:
    """Background pictures of others that a user asked for: a template of their address, and the zone of the metres."""

    template: str
    """With {z}, {x} and {y}."""
    zone: UtmZone


def map_content(
    run: FinishedRun, outcomes: Outcomes, chosen: NDArray[np.int64], tiles: Tiles | None
) -> dict[str, Any] | None:
    """What the page draws, with the notes on what was thinned out; None where no position is known.

    `chosen` are the ids of the pictured queries, which are all on the map if their place, or their answer's, is known.
    """
    database_m, queries_m = run.database.utm_m, run.queries.utm_m
    answers_m = best_positions(outcomes.first_final, database_m)
    shown, cell_m = thinned(database_m)
    if not len(shown):
        return None
    located = np.asarray(np.isfinite(queries_m[:, 0]) | np.isfinite(answers_m[:, 0]))
    is_pictured = np.isin(np.arange(len(outcomes)), chosen)
    others = np.flatnonzero(located & ~is_pictured)
    on_map = np.sort(np.concatenate([chosen[located[chosen]], spread(others, max(0, MOST_ON_MAP - len(chosen)))]))
    points = [database_m[shown], queries_m[on_map], answers_m[on_map]]
    if tiles is not None:
        points = [_mercator_m(metres, tiles.zone) for metres in points]
    scale = 1.0 if tiles is None else _metres_per_unit(database_m, tiles.zone)
    known = np.concatenate(points)
    corner = np.nanmin(known, axis=0)
    database, queries, answers = (_units(metres - corner) for metres in points)
    return {
        "unitsPerMetre": UNITS_PER_M / scale,
        "database": database,
        "queries": [
            {
                "id": int(query),
                "kind": int(outcomes.kind[query]),
                "at": at,
                "answer": answer,
                "pictured": bool(pictured),
            }
            for query, at, answer, pictured in zip(on_map, queries, answers, is_pictured[on_map], strict=True)
        ],
        "notes": _notes(len(shown), database_m, cell_m, len(on_map), int(located.sum())),
        "tiles": None
        if tiles is None
        else {"template": tiles.template, "corner": corner.tolist(), "units": UNITS_PER_M},
    }


def _units(metres: NDArray[np.float64]) -> list[list[int] | None]:
    """Whole units; None of what is not known."""
    return [
        None if np.isnan(east) or np.isnan(north) else [round(UNITS_PER_M * east), round(UNITS_PER_M * north)]
        for east, north in metres.tolist()
    ]


def _mercator_m(utm_m: NDArray[np.float64], zone: UtmZone) -> NDArray[np.float64]:
    """(n, 2) UTM metres -> (n, 2) metres of Web Mercator, in which tiles are cut."""
    latitude, longitude = np.radians(to_degrees(utm_m, zone)).T
    return EARTH_RADIUS_M * np.stack([longitude, np.arcsinh(np.tan(latitude))], axis=1)


def _metres_per_unit(database_m: NDArray[np.float64], zone: UtmZone) -> float:
    """How many metres of Web Mercator a metre on the ground takes in the middle of the map."""
    latitude = to_degrees(np.nanmedian(database_m, axis=0)[None], zone)[0, 0]
    return float(np.cos(np.radians(latitude)))


def _notes(num_shown: int, database_m: NDArray[np.float64], cell_m: float, on_map: int, located: int) -> list[str]:
    notes = []
    if cell_m:
        known = int(np.isfinite(database_m).all(axis=1).sum())
        notes.append(f"Database thinned out: {num_shown:,} of {known:,} points, one in each cell of {cell_m:,.1f} m.")
    if on_map < located:
        notes.append(
            f"Queries thinned out: {on_map:,} of {located:,}, all pictured ones and every so many of the others."
        )
    return notes
