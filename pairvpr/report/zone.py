"""The UTM zone of a run's metres, for latitude and longitude."""

from __future__ import annotations

import numpy as np

from pairvpr.data.positions import positions_from_names, zone_of_names
from pairvpr.data.problems import Problems
from pairvpr.data.utm import UtmZone
from pairvpr.report.finished import FinishedRun
from pairvpr.where import Map

AGREE_M = 1.0


def zone_of_run(run: FinishedRun, epsg: int | None) -> UtmZone | None:
    """As the EPSG code says, or as the names of the database's photos state it, where their metres are the run's.

    None where neither says it. Raises `UserError` for a code of no zone.
    """
    given = Map(run.database, epsg).zone
    stated = zone_of_names(run.database)
    if given is not None or stated is None:
        return given
    problems = Problems()
    by_name = positions_from_names(run.database, "database", problems, stated)
    if problems.lines or len(by_name) != len(run.database):
        return None
    apart_m = np.abs(by_name.utm_m - run.database.utm_m)
    return stated if np.nanmax(apart_m, initial=np.inf if np.isnan(apart_m).all() else 0.0) <= AGREE_M else None
