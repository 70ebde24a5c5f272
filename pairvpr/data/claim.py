"""A directory belongs to the settings that made it: the same ones resume, others are refused."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pairvpr.data import storage
from pairvpr.errors import UserError

FILE = "settings.json"


def check_claim(directory: str, settings: Mapping[str, Any], key: str, ignored: Collection[str] = ()) -> None:
    """Raise `UserError`, naming the setting `key` and what differs, if other settings made `directory`.

    Also where it is no directory, or can't be read. Settings whose dotted names are `ignored` may differ. Nothing is
    written.
    """
    try:
        made_by = storage.read_json(storage.join(directory, FILE))
    except FileNotFoundError:
        return
    except NotADirectoryError as error:
        raise UserError(_no_directory(directory, key)) from error
    except OSError as error:
        raise UserError(f"{key}={directory}: its {FILE} can't be read: {storage.reason(error)}") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{key}={directory}: its {FILE} is not readable: {storage.reason(error)}") from error
    found = differences(made_by, settings, ignored)
    if found:
        raise UserError(
            f"{key}={directory} was made by other settings: {'; '.join(found)}; "
            "expected the same settings, or another directory"
        )


def check_writable(directory: str, key: str) -> None:
    """Raise `UserError`, naming the setting `key`, if a local `directory` can't be made or written to.

    Nothing is written; a URL is not checked.
    """
    if not storage.is_local(directory):
        return
    path = storage.local_path(directory).absolute()
    nearest = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if not nearest.is_dir():
        raise UserError(_no_directory(directory, key))
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{key}={directory}: {nearest} is not writable; expected a directory that can be written to")


def claim(directory: str, settings: Mapping[str, Any], key: str) -> None:
    """Write the settings into a directory that has none yet; clear others of what killed writers left.

    Raises `UserError` as the two checks, and where a store refuses.
    """
    url = storage.join(directory, FILE)
    try:
        if storage.exists(url):
            check_claim(directory, settings, key)
            storage.remove_abandoned(directory)
        else:
            check_writable(directory, key)
            storage.write_json(url, settings)
    except OSError as error:
        raise UserError(f"{key}={directory}: can't be written: {storage.reason(error)}") from error


def differences(there: object, here: object, ignored: Collection[str] = ()) -> list[str]:
    """Every value that differs between two trees of settings, by its dotted name."""
    old, new = dict(_flat(there, "")), dict(_flat(here, ""))
    return [
        f"{name} {old.get(name, 'absent')} there, {new.get(name, 'absent')} now".lstrip()
        for name in sorted((old.keys() | new.keys()) - set(ignored))
        if old.get(name) != new.get(name)
    ]


def _no_directory(directory: str, key: str) -> str:
    what = "is" if os.path.lexists(storage.local_path(directory)) else "lies below"
    return f"{key}={directory}: {what} a file; expected a directory"


def _flat(value: object, prefix: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(inner, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, value
