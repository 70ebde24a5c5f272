"""Files of weights: find one, know it by its checksum, read its tensors without running anything.

A local file is read where it lies. A remote one is fetched once into a private folder of this user, and again only when
the store has another version of it. `hf://` files are in the hub's own cache (docs/formats.md, "Weights").
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import torch
from torch import Tensor

from pairvpr.data import storage
from pairvpr.errors import UserError
from pairvpr.quiet import ignore_warnings
from pairvpr.secrets import without_secrets
from pairvpr.terminal import say

TORCH_STARTS = (b"PK\x03\x04", b"\x80")  # how files of torch.save begin: zip, and pickle protocol 2 or later
SAFE_CLASSES = (argparse.Namespace,)  # published stage-one files carry their command line in one
WRAPPERS = ("model", "state_dict")
PREFIXES = ("module.", "_orig_mod.")
CACHE_BYTES = 20 << 30
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HUB_FILE = re.compile(
    r"hf://(?:(models|datasets|spaces)/)?([^/@]+/[^/@]+)(?:@(refs/(?:pr|convert)/[^/]+|[^/]+))?/(.+)"
)


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights on this machine, known by its content."""

    url: str
    """As the settings name it."""
    path: Path
    sha256: str
    """Hex digest of the file's bytes."""


def find_weights_file(url: str, key: str = "model.weights") -> WeightsFile:
    """The local file of a path or URL, with its checksum. Remote files are fetched if they aren't cached.

    Raises `UserError`, naming the setting `key`, where there is none or it can't be read.
    """
    try:
        if storage.is_local(url):
            path = storage.local_path(url)
            return WeightsFile(url, path, storage.sha256(str(path)))
        if url.startswith("hf://"):
            return _from_hub(url)
        return _fetched(url)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(f"{key}={url}: no such file") from error
    except OSError as error:
        raise UserError(f"{key}={url}: can't be read: {storage.reason(error)}") from error


def read_state_dict(file: WeightsFile, key: str = "model.weights") -> dict[str, Tensor]:
    """The tensors of a `.pth` or `.safetensors` file on the CPU; what wrappers put into their names is taken off.

    Raises `UserError`, naming the setting `key`, for a file that is neither, that is damaged, that holds more than
    tensors, or that has changed since it was found.
    """
    data = _read(file, key)
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise UserError(
            f"{key}={file.url}: the file changed while the run started; expected a file that does not change"
        )
    try:
        content = _tensors_of_torch(data) if data.startswith(TORCH_STARTS) else _tensors_of_safetensors(data)
        state, taken_off = _without_wrappers(_state_dict(content))
    except _UnusableError as error:
        raise UserError(f"{key}={file.url}: {error}") from error
    if taken_off:
        say(f"{key}={file.url}: {taken_off}")
    return state


def _read(file: WeightsFile, key: str) -> bytes:
    try:
        if not file.path.exists() and not storage.is_local(file.url):  # another process has made room since
            file = find_weights_file(file.url, key)
        return file.path.read_bytes()
    except OSError as error:
        raise UserError(f"{key}={file.url}: can't be read: {storage.reason(error)}") from error


class _UnusableError(Exception):
    """What is wrong with the content of a file of weights."""


def _tensors_of_safetensors(data: bytes) -> dict[str, Tensor]:
    import safetensors.torch

    if data[8:9] != b"{":
        raise _UnusableError("not a .pth or .safetensors file")
    try:
        return safetensors.torch.load(data)
    except Exception as error:
        raise _UnusableError(f"not a complete .safetensors file: {storage.reason(error)}") from error


def _tensors_of_torch(data: bytes) -> object:
    """What `torch.save` wrote. Its unpickler knows tensors, plain values and `SAFE_CLASSES`, and runs nothing."""
    if data.startswith(b"PK"):
        _check_zip(data)
    ignore_warnings(module=r"torch\.", message="Detected pickle protocol")
    # For the process, and for good: torch's context manager would take the classes from other threads.
    torch.serialization.add_safe_globals([*SAFE_CLASSES])
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _UnusableError(
            "refused: it contains more than tensors (a pickle can run code); "
            "expected a state dict saved by torch.save, or .safetensors"
        ) from error
    except Exception as error:  # the unpickler raises nearly anything on damaged bytes
        raise _UnusableError("not a complete .pth file") from error


def _check_zip(data: bytes) -> None:
    """torch stores its records uncompressed, each with a checksum, and reads both without a look at either."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = archive.infolist()
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise _UnusableError("a compressed archive; expected a state dict saved by torch.save")
            if len({record.filename for record in records}) < len(records):
                raise _UnusableError("damaged: two records have the same name")
            damaged = archive.testzip()
    except _UnusableError:
        raise
    except Exception as error:  # zipfile, too
        raise _UnusableError(f"not a complete .pth file: {storage.reason(error)}") from error
    if damaged is not None:
        raise _UnusableError(
            f"damaged: the checksum of its record {damaged!r} does not match; expected a complete file"
        )


def _state_dict(content: object) -> Mapping[str, Tensor]:
    """The state dict that a file is, or holds under one of `WRAPPERS`."""
    expected = "expected a state dict, or a dict with one under 'model' or 'state_dict'"
    if not isinstance(content, Mapping):
        raise _UnusableError(f"it holds {type(content).__name__}; {expected}")
    below = [name for name in WRAPPERS if isinstance(content.get(name), Mapping)]
    if len(below) > 1:
        raise _UnusableError(f"it holds a dict under {' and under '.join(map(repr, below))}; {expected}")
    state = content[below[0]] if below else content
    for name, value in state.items():
        if not isinstance(name, str) or not _is_plain_tensor(value):
            raise _UnusableError(f"it holds {str(name)[:60]!r}, which is not a plain tensor; {expected}")
    return state


def _is_plain_tensor(value: object) -> bool:
    """Whether it is a tensor with numbers in memory: no sparse, quantized or nested one, no mere description."""
    return (
        isinstance(value, Tensor)
        and type(value) in (Tensor, torch.nn.Parameter)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not (value.is_quantized or value.is_nested)
    )


def _without_wrappers(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The state dict under the names of the network itself, and what was taken off to that end (empty: nothing).

    DistributedDataParallel and torch.compile put `PREFIXES` into the names of what they wrap, the whole or a part.
    """
    plain = {_plain_name(name): tensor for name, tensor in state.items()}
    changed = [name for name in state if name != _plain_name(name)]
    if not changed or len(plain) < len(state):
        return dict(state), ""
    found = [prefix for prefix in PREFIXES if any(f".{prefix}" in f".{name}" for name in changed)]
    return plain, f"{' and '.join(map(repr, found))} taken off the names of {len(changed)} of {len(state)} tensors"


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if f"{part}." not in PREFIXES)


def _from_hub(url: str) -> WeightsFile:
    """The file in Hugging Face's own cache, which the hub's client keeps and reads without a network, too."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    parts = _HUB_FILE.fullmatch(url)
    if parts is None:
        raise FileNotFoundError(f"{url}: expected hf://OWNER/NAME/FILE, or hf://OWNER/NAME@REVISION/FILE")
    kind, repository, revision, name = parts.groups()
    try:
        path = hf_hub_download(
            repository,
            name,
            repo_type=None if kind is None else kind.removesuffix("s"),
            revision=None if revision is None else unquote(revision),
        )
    except LocalEntryNotFoundError as error:
        raise OSError("Hugging Face can't be reached, and the file is not in its cache on this machine") from error
    except (EntryNotFoundError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(url) from error
    except ValueError as error:  # a repository's name that none can have
        raise OSError(storage.reason(error)) from error
    file = WeightsFile(url, Path(path), storage.sha256(path))
    blob = file.path.resolve()
    if _SHA256.fullmatch(blob.name) and blob.name != file.sha256:  # large files are named for their content
        raise OSError(f"the copy in Hugging Face's cache is damaged; delete {blob}")
    return file


def _fetched(url: str) -> WeightsFile:
    """The cached copy of the version that the store has now; the last one known where the store can't be reached."""
    folder = _cache_folder()
    record = folder / f"{hashlib.sha256(without_secrets(url).encode()).hexdigest()}.json"
    known = _read_record(record)
    copy = folder / known["sha256"] if known else None
    try:
        version = storage.version(url)
    except storage.StorageDeniedError:
        raise
    except storage.StorageError as error:
        if copy is None or not _is_whole(copy):
            raise
        say(f"{error}: using the copy from an earlier run")
        return WeightsFile(url, copy, copy.name)
    if copy is None or version is None or known["version"] != version or not _is_whole(copy):
        copy = _fetch(url, folder)
        storage.write_json(str(record), {"version": version, "sha256": copy.name})
    _make_room(folder, copy)
    return WeightsFile(url, copy, copy.name)


@cache
def _cache_folder() -> Path:
    """A private folder of this user that outlives the process; where there can be none, one that doesn't."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "pairvpr" / "weights"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK):
            folder.chmod(0o700)
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="pairvpr-weights-"))


def _read_record(path: Path) -> dict[str, Any]:
    """What was known of a URL; nothing where the record is gone or damaged."""
    with suppress(OSError, ValueError):
        record = json.loads(path.read_bytes())
        if isinstance(record, dict) and _SHA256.fullmatch(str(record.get("sha256"))) and "version" in record:
            return record
    return {}


def _is_whole(copy: Path) -> bool:
    """Whether a copy has the content that it is named for; it is marked as used just now."""
    try:
        os.utime(copy)
        return storage.sha256(str(copy)) == copy.name
    except FileNotFoundError:
        return False


def _fetch(url: str, folder: Path) -> Path:
    """Download a file to `folder`, under the name of its sha256."""
    digest = hashlib.sha256()
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".part") as target:
        with storage.open_input(url) as source:
            while piece := source.read(storage.PIECE_BYTES):
                digest.update(piece)
                target.write(piece)
        target.flush()
        os.fsync(target.fileno())
        copy = folder / digest.hexdigest()
        copy.unlink(missing_ok=True)  # a damaged one
        with suppress(FileExistsError):  # another process fetched it meanwhile
            os.link(target.name, copy)
    return copy


def _make_room(folder: Path, kept: Path) -> None:
    """Delete the copies that were used least recently until all are below `CACHE_BYTES`; `kept` stays."""
    found, total_bytes = list[tuple[bool, int, int, Path]](), 0
    for path in folder.iterdir():
        if _SHA256.fullmatch(path.name):
            with suppress(FileNotFoundError):  # another process makes room, too
                status = path.stat()
                found.append((path == kept, status.st_mtime_ns, status.st_size, path))
    for is_kept, _, num_bytes, path in sorted(found, reverse=True):
        total_bytes += num_bytes
        if total_bytes > CACHE_BYTES and not is_kept:
            path.unlink(missing_ok=True)
