"""A directory belongs to the settings that made it: the same ones resume, others are refused."""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pairvpr.data import sealed, storage
from pairvpr.errors import UserError
from pairvpr.secrets import plain_without_secrets

FILE = "settings.json"
CLAIMS = "claims"
SECONDS_TO_WAIT = 10.0
SECONDS_BETWEEN_LOOKS = 0.2


def check_claim(
    directory: str,
    settings: Mapping[str, Any],
    key: str,
    ignored: Collection[str] = (),
    earlier: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Raise `UserError`, naming the setting `key` and what differs, if other settings made `directory`.

    Also if it is not a directory, or its settings can't be read. Settings whose dotted names are `ignored` may differ.
    `earlier` has the same settings in the forms in which earlier versions stored them. Nothing is written.
    """
    made_by = sealed.read_json(
        storage.join(directory, FILE), f"expected another {key}: what made this one is not known"
    )
    if made_by is None:
        if storage.is_local(directory):
            _nearest_directory(directory, key)
        return
    forms = (plain_without_secrets(dict(form)) for form in (settings, *earlier))
    found = min((differences(made_by, form, ignored) for form in forms), key=len)
    if found:
        raise UserError(
            f"{key}={directory} was made with different settings: {'; '.join(found)}; "
            "expected the same settings or another directory"
        )


def check_writable(directory: str, key: str) -> None:
    """Raise `UserError`, naming the setting `key`, if a local `directory` can't be created or written to.

    Nothing is written; a URL is not checked.
    """
    if not storage.is_local(directory):
        return
    nearest = _nearest_directory(directory, key)
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{key}={directory}: {nearest} is not writable; expected a directory that can be written to")


def check_writable_file(file: str, key: str, content: str) -> None:
    """Raise `UserError`, naming the setting `key`, if a local `file` is a directory, or its folder can't be written to.

    `content` names what goes into the file. Nothing is written; a URL is not checked.
    """
    if not storage.is_local(file):
        return
    path = storage.local_path(file).absolute()
    if path.is_dir():
        raise UserError(f"{key}={file}: it is a directory; expected a file name ({content})")
    check_writable(str(path.parent), key)


def claim(directory: str, settings: Mapping[str, Any], key: str, earlier: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write the settings into a directory that has none yet; from others, delete temporary files of killed writers.

    Of several simultaneous claims with different settings, at most one succeeds. Raises `UserError` as the two checks
    do, and if the storage refuses.
    """
    url = storage.join(directory, FILE)
    try:
        if storage.exists(url):
            storage.remove_abandoned(directory)
        else:
            check_writable(directory, key)
            if storage.has_atomic_creation(directory):
                storage.create_exclusively(url, sealed.json_bytes(settings))
            else:
                _announced(directory, settings, key)
    except OSError as error:
        raise UserError(f"{key}={directory}: can't be written: {storage.reason(error)}") from error
    check_claim(directory, settings, key, earlier=earlier)


def _announced(directory: str, settings: Mapping[str, Any], key: str) -> None:
    """Write the settings to storage without exclusive creation of files, unless others do so now, or did.

    Every claimant first announces its claim in a separate file, then lists all claims: of two claimants, at least one
    sees the other. One that sees no other claim writes the settings and only then deletes its claim, so anybody who no
    longer sees that claim finds the settings. One that sees others gives up, or waits for them if its name sorts first.
    """
    data, claims = sealed.json_bytes(settings), storage.join(directory, CLAIMS)
    digest = hashlib.sha256(data).hexdigest()
    name = f"{digest}-{uuid.uuid4().hex}.json"
    storage.write_bytes(storage.join(claims, name), data)
    try:
        given_up_s = time.monotonic() + SECONDS_TO_WAIT
        while others := [other for other in storage.list_files(claims) if not other.startswith(digest)]:
            if storage.exists(storage.join(directory, FILE)):
                return
            if min(others) < name or time.monotonic() > given_up_s:
                raise UserError(
                    f"{key}={directory}: another run with different settings is claiming it now; expected another "
                    f"directory (if that run was killed, delete {storage.join(claims, min(others))})"
                )
            time.sleep(SECONDS_BETWEEN_LOOKS)
        if not storage.exists(storage.join(directory, FILE)):
            storage.write_bytes(storage.join(directory, FILE), data)
    finally:
        storage.remove_file(storage.join(claims, name))


def differences(there: object, here: object, ignored: Collection[str] = ()) -> list[str]:
    """The values that differ between two trees of settings, by dotted name."""
    old, new = dict(_flat(there, "")), dict(_flat(here, ""))
    return [
        f"{name} {old.get(name, 'absent')} there, {new.get(name, 'absent')} now".lstrip()
        for name in sorted((old.keys() | new.keys()) - set(ignored))
        if old.get(name) != new.get(name)
    ]


def _nearest_directory(directory: str, key: str) -> Path:
    """The local directory itself or, if it does not exist, its nearest parent. Raises `UserError` for a file."""
    path = storage.local_path(directory).absolute()
    nearest = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if not nearest.is_dir():
        what = "is" if nearest == path else "lies below"
        raise UserError(f"{key}={directory}: {what} a file; expected a directory")
    return nearest


def _flat(value: object, prefix: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(inner, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{prefix}[{number}]")
    else:
        yield prefix, value
