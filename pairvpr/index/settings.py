"""The settings that decide the bytes of an index: the content of its settings.json."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from pairvpr.data.manifest import Manifest


def index_settings(
    database: Manifest, num_shards: int, first_stage: Mapping[str, Any], reduce_to: int | None = None
) -> dict[str, Any]:
    """What decides the descriptors of an index, in plain values; kinds of index can be built from them at any time.

    `first_stage` are the sections that say what makes them.
    """
    return {
        **first_stage,
        "database": {
            "root": database.root,
            "num_images": len(database),
            "paths_sha256": database.paths_sha256,
        },
        "index_num_shards": num_shards,
        **({} if reduce_to is None else {"index_reduce_to": reduce_to}),
    }


POSITIONS_SHA256 = "positions_sha256"


def position_settings(database: Manifest) -> dict[str, Any]:
    """The same for the positions of an index's photos, if it is built with positions."""
    places = database.utm_m.tobytes() + database.heading_deg.tobytes()
    return {POSITIONS_SHA256: hashlib.sha256(places).hexdigest()}
