"""A real S3 server for tests: OpenStack Swift with its S3 interface, at one address, below one directory."""

from __future__ import annotations

import json
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ACCOUNT = {"access_key": "test:tester", "secret_key": "testing", "region": "us-east-1"}
PROCESS_SCRIPT = Path(__file__).with_name("swift_process.py")
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5.0


class SwiftStartError(RuntimeError):
    """Swift did not come up; the message ends with its log."""


@dataclass(frozen=True)
class SwiftServer:
    """How to reach a running server."""

    endpoint_url: str
    access_key: str
    secret_key: str
    region: str
    pid: int

    @property
    def environment(self) -> dict[str, str]:
        """Variables that lead s3fs, botocore and pyarrow's `FileSystem.from_uri` here without any argument.

        pyarrow's `S3FileSystem()` constructor ignores AWS_ENDPOINT_URL: give it `endpoint_override`.
        """
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@contextmanager
def running_swift(root: Path, address: str = "127.0.0.1", prefix: Sequence[str] = ()) -> Iterator[SwiftServer]:
    """Start Swift, yield how to reach it, stop it. `prefix` stands before the command, to run it somewhere else.

    `root` holds all of the server's files and has to be on a file system with extended attributes. It is created if
    need be, and is empty or what an earlier server left, whose objects are then there again. The server also stops when
    this process dies.
    """
    root.mkdir(parents=True, exist_ok=True)
    if any(root.iterdir()) and not (root / "swift.conf").exists():
        raise ValueError(f"{root} is not empty")
    process = subprocess.Popen(
        [*prefix, sys.executable, str(PROCESS_SCRIPT), str(root.resolve()), json.dumps(ACCOUNT), address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        port = _reported_port(process, root / "swift.log")
        yield SwiftServer(endpoint_url=f"http://{address}:{port}", pid=process.pid, **ACCOUNT)
    finally:
        _stop(process)


def _reported_port(process: subprocess.Popen[bytes], log: Path) -> int:
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], START_TIMEOUT_S)
    line = process.stdout.readline() if readable else b""
    if not line:
        tail = log.read_text(errors="replace")[-4000:] if log.exists() else "(no log)"
        raise SwiftStartError(f"Swift did not start within {START_TIMEOUT_S} s:\n{tail}")
    return int(json.loads(line)["port"])


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
