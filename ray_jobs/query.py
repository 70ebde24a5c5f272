"""`pairvpr query index.path=INDEX queries=DIR output=OUT`: where was each of these photos taken? Q queries."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from pairvpr.cli import run_job
from pairvpr.config.benchmark_schema import PositionSource
from pairvpr.config.compose import load
from pairvpr.config.schema import FilterConfig, PositionsConfig, QueryConfig
from pairvpr.data import sealed, storage
from pairvpr.data.claim import FILE as SETTINGS_FILE
from pairvpr.data.claim import check_claim, check_writable, claim
from pairvpr.data.descriptor_file import check_photos_of_file
from pairvpr.data.located import located
from pairvpr.data.manifest import Benchmark, Manifest, folder_manifest
from pairvpr.distributed.network import ModelSource
from pairvpr.distributed.runtime import ray_session
from pairvpr.errors import UserError
from pairvpr.evaluation.confidence import calibrated
from pairvpr.index.filters import Filters, Places
from pairvpr.index.generations import IndexManifest, read_images
from pairvpr.models.weights import announce, load_weights
from pairvpr.status import published
from ray_jobs.run import (
    Run,
    check_calibration,
    check_dense_store,
    first_stage,
    given_candidates,
    open_manifest,
)
from ray_jobs.steps import answer

CONDITIONS = "conditions_sha256"


def main(arguments: Sequence[str]) -> None:
    """One folder of queries."""
    query(load(QueryConfig, arguments))


def query(config: QueryConfig) -> dict[str, Any]:
    """Answer a folder of queries; prints a summary, returns metrics.json's content."""
    index = storage.absolute(config.index.path)
    manifest = open_manifest(index, config.index.path)
    if not storage.exists(manifest.images_root):
        raise UserError(
            f"index.path={config.index.path}: its photos were in {manifest.images_root}, which does not exist; "
            "expected them where build_index read them, because re-ranking reads them again"
        )
    run = _run(config, index, manifest)
    check_calibration(run)
    filters = _filters(config.filter, run.benchmark)
    settings = run.settings() | {"generation": manifest.generation, "filter": _filter_settings(config.filter, filters)}
    check_writable(run.output, "output")
    made_by = sealed.read_json(storage.join(run.output, SETTINGS_FILE), "expected another output")
    if made_by is not None and CONDITIONS not in made_by.get("filter", {}):
        settings["filter"].pop(CONDITIONS, None)  # an earlier version made it
    check_claim(run.output, settings, "output")
    check_dense_store(run)
    if run.given is None:
        run.first.check_made(index, manifest)
    weights = run.weights and load_weights(config.model, run.weights)
    if run.weights is not None:
        announce(config.model, run.weights)
    claim(run.output, settings, "output")
    with published(run.output, "query"), ray_session(config.cluster):
        return answer(run, weights and ModelSource(config.model, ray.put(weights)), manifest, filters)


def _filter_settings(config: FilterConfig, filters: tuple[Filters, Places] | None) -> dict[str, Any]:
    """The settings that decide which photos a query may find, with a checksum of the priors file."""
    settings = asdict(config)
    if config.needs_priors and filters is not None:
        settings[CONDITIONS] = hashlib.sha256(filters[0].conditions.tobytes()).hexdigest()
    return settings


def _run(config: QueryConfig, index: str, manifest: IndexManifest) -> Run:
    """The queries as a benchmark without ground truth."""
    benchmark = Benchmark(
        name="query",
        database=read_images(index, manifest),
        queries=folder_manifest(config.queries, "queries"),
        positives=None,
        protocol={"positives": "none", "radius_m": None},
    )
    first, weights = first_stage(config, config.rerank.num_candidates)
    if first.file is not None:
        check_photos_of_file(first.file, {"query": benchmark.queries}, "describe.descriptors")
    return Run(
        config=config,
        benchmark=benchmark,
        weights=weights,
        first=first,
        query_file=first.file,
        index=index,
        num_shards=len(manifest.shards),
        output=storage.absolute(config.output),
        calibration=calibrated(config.rerank),
        given=given_candidates(config.rerank, benchmark, (index, manifest)),
    )


def _filters(config: FilterConfig, benchmark: Benchmark) -> tuple[Filters, Places] | None:
    """Conditions for each query, and the positions of the index's photos; None without conditions.

    Raises `UserError` if no photo can meet a condition, or if a query lacks a required prior.
    """
    if not config.is_set:
        return None
    places = Places(benchmark.database.utm_m, benchmark.database.heading_deg)
    needs_position, needs_heading = config.near_m is not None or config.box is not None, config.within_deg is not None
    for needed, known, what in (
        (needs_position, places.utm_m[:, 0], "position"),
        (needs_heading, places.heading_deg, "heading"),
    ):
        if needed and np.isnan(known).all():
            raise UserError(
                f"filter: the index has no {what} of its photos; expected one built with positions=names, table or "
                "exif, or "
                "by evaluate"
            )
    near, heading_deg = _priors(config, benchmark.queries, benchmark.database)
    return (
        Filters.of(
            len(benchmark.queries),
            near=near,
            radius_m=config.near_m,
            box=None if config.box is None else np.array(config.box),
            heading_deg=heading_deg,
            within_deg=config.within_deg,
        ),
        places,
    )


def _priors(
    config: FilterConfig, queries: Manifest, database: Manifest
) -> tuple[NDArray[np.float64] | None, NDArray[np.float64] | None]:
    """Prior position (2,) or (Q, 2) and heading () or (Q,), if there is a condition on them."""
    near = None if config.center is None else np.array(config.center)
    heading_deg = None if config.heading_deg is None else np.array(config.heading_deg)
    if not config.needs_priors:
        return near, heading_deg
    source = PositionSource.names if config.priors is None else PositionSource.table
    known = located(queries, PositionsConfig(positions=source, positions_table=config.priors), "queries", database)
    rows = known.ids_of(queries.path_column)
    own = {"position": known.utm_m[rows], "heading": known.heading_deg[rows]}
    if config.near_m is not None and near is None:
        near = own["position"]
    else:
        del own["position"]
    if config.within_deg is not None and heading_deg is None:
        heading_deg = own["heading"]
    else:
        del own["heading"]
    for what, values in own.items():
        unknown = (rows < 0) | np.isnan(values.reshape(len(rows), -1)).any(axis=1)
        if unknown.any():
            raise UserError(
                f"filter: query {queries.path(int(np.flatnonzero(unknown)[0]))} has no prior {what}; expected one for "
                f"each query in {config.priors or 'its name (@utm_east@utm_north@...)'}, or filter.center and "
                "filter.heading_deg for all"
            )
    return near, heading_deg


if __name__ == "__main__":
    sys.exit(run_job("query"))
