"""A directory belongs to the settings that made it: the same ones resume, others are refused."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pairvpr.data import storage
from pairvpr.errors import UserError

FILE = "settings.json"


def check_claim(directory: str, settings: Mapping[str, Any], key: str) -> None:
    """Raise `UserError`, naming the setting `key` and what differs, if other settings made `directory`."""
    try:
        made_by = storage.read_json(storage.join(directory, FILE))
    except (FileNotFoundError, NotADirectoryError):
        return
    except ValueError as error:
        raise UserError(f"{key}={directory}: its {FILE} is not readable: {error}") from error
    there, here = dict(_flat(made_by, "")), dict(_flat(settings, ""))
    differences = [
        f"{name} {there.get(name, 'absent')} there, {here.get(name, 'absent')} now"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    if differences:
        raise UserError(
            f"{key}={directory} was made by other settings: {'; '.join(differences)}; "
            "expected the same settings, or another directory"
        )


def claim(directory: str, settings: Mapping[str, Any], key: str) -> None:
    """Write the settings into a directory that has none yet; raises as `check_claim` where it has others by now."""
    url = storage.join(directory, FILE)
    if storage.exists(url):
        check_claim(directory, settings, key)
    else:
        storage.write_json(url, settings)


def check_writable(directory: str, key: str) -> None:
    """Raise `UserError`, naming the setting `key`, where a local directory can't be made or written. Writes nothing."""
    if not storage.is_local(directory):
        return
    nearest = Path(directory.removeprefix("file://"))
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise UserError(f"{key}={directory}: {nearest} is a file; expected a directory")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{key}={directory}: {nearest} can't be written; expected a directory of yours")


def _flat(value: object, prefix: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(inner, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, value
