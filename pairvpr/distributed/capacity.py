"""Available capacity: memory of the cluster's nodes, and disk space for an index."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

import ray

from pairvpr.data import storage
from pairvpr.index.plan import NodeRoom, Room


def room(directory: str | None = None) -> Room:
    """Room for an index in `directory` (path or URL). Its present content counts as room, so that a run may resume."""
    return Room(nodes=node_rooms(), disk_bytes=None if directory is None else disk_bytes(directory))


def node_rooms() -> list[NodeRoom]:
    """The nodes that run tasks; empty while a cluster has not scaled up yet."""
    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [
        NodeRoom(
            memory_bytes=int(resources["memory"] + resources.get("object_store_memory", 0.0)),
            num_cpus=max(1, int(resources["CPU"])),
        )
        for resources in found
        if resources.get("CPU") and resources.get("memory")
    ]


def disk_bytes(directory: str) -> int | None:
    """Bytes that a local directory may hold in all: its files and the free disk space. None for a URL."""
    if not storage.is_local(directory):
        return None
    path = storage.local_path(directory).absolute()
    nearest = next(parent for parent in (path, *path.parents) if parent.is_dir())
    return shutil.disk_usage(nearest).free + _held_bytes(path)


def _held_bytes(path: Path) -> int:
    """Size of all files below a directory; files that vanish meanwhile count as empty."""
    size = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(OSError):
                size += os.stat(os.path.join(folder, name)).st_size
    return size
