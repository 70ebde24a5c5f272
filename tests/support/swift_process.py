"""The process behind `swift_server`: Swift's proxy and three storage servers in one eventlet loop.

Run as a script with a directory, an account (JSON: access_key, secret_key, region) and the proxy's address. It prints
one JSON line with its port when it is ready, logs to `swift.log` in that directory, and exits as soon as its standard
input closes, so it never outlives its parent.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

STORAGE_SERVERS = ("account", "container", "object")

COMMON_SETTINGS = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {root}
devices = {root}/devices
recon_cache_path = {root}
mount_check = false
fallocate_reserve = 0
log_level = WARNING
"""

STORAGE_SETTINGS = """
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
"""

PROXY_SETTINGS = """
[pipeline:main]
pipeline = catch_errors cache s3api tempauth slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
node_timeout = 60
conn_timeout = 10
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:cache]
paste.filter_factory = __main__:local_cache_factory
[filter:s3api]
use = egg:swift#s3api
location = {region}
min_segment_size = 5242880
[filter:tempauth]
use = egg:swift#tempauth
user_{user} = {secret_key} .admin
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
"""

WsgiApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class LocalCache:
    """The part of Swift's memcached client that its proxy calls, kept in this process."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[object, float]] = {}

    def get(self, key: str, raise_on_error: bool = False) -> object | None:
        """The value under `key`, or None if it was never set or has expired."""
        value, expiry = self._entries.get(key, (None, 0.0))
        return value if expiry > time.time() else None

    def set(self, key: str, value: object, time: float = 0, **_: object) -> None:
        """Keep `value` for `time` seconds, or for good if `time` is 0."""
        self._entries[key] = (value, _expiry(time))

    def delete(self, key: str, server_key: str | None = None) -> None:
        """Forget `key`."""
        self._entries.pop(key, None)

    def incr(self, key: str, delta: int = 1, time: float = 0) -> int:
        """Add `delta` to a counter that starts at 0 and never falls below it."""
        count = self.get(key)
        total = max(0, (count if isinstance(count, int) else 0) + int(delta))
        self.set(key, total, time=time)
        return total

    def set_multi(self, mapping: Mapping[str, object], server_key: str, time: float = 0, **_: object) -> None:
        """Set every item of `mapping`."""
        for key, value in mapping.items():
            self.set(key, value, time=time)

    def get_multi(self, keys: Iterable[str], server_key: str) -> list[object | None]:
        """The values of `keys`, in order."""
        return [self.get(key) for key in keys]


def _expiry(seconds: float) -> float:
    return time.time() + seconds if seconds else float("inf")


def local_cache_factory(_global: Mapping[str, str], **_local: str) -> Callable[[WsgiApp], WsgiApp]:
    """Paste filter that stands in for Swift's memcached middleware."""
    cache = LocalCache()

    def wrap(app: WsgiApp) -> WsgiApp:
        def call(env: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            env["swift.cache"] = cache
            return app(env, start_response)

        return call

    return wrap


def exit_with_parent() -> None:
    """Exit when the parent closes our standard input, which its death does too."""
    lifeline = os.dup(0)

    def watch() -> None:
        while os.read(lifeline, 1):
            pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def divert_output(log: Path) -> int:
    """Send standard output and error to `log`; return a descriptor of the former standard output."""
    report = os.dup(1)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    return report


def write_settings(root: Path, ports: Mapping[str, int], account: Mapping[str, str]) -> None:
    """Write the settings of all four servers and the cluster's hash salt."""
    (root / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = tests\n")
    user = account["access_key"].replace(":", "_")
    for kind, port in ports.items():
        settings = COMMON_SETTINGS.format(port=port, root=root)
        if kind == "proxy":
            settings += PROXY_SETTINGS.format(user=user, **account)
        else:
            settings += STORAGE_SETTINGS.format(kind=kind)
        (root / f"{kind}-server.conf").write_text(settings)


def write_rings(root: Path, ports: Mapping[str, int]) -> None:
    """Map every partition to the one device, as `swift-ring-builder` would."""
    from swift.common.ring import RingBuilder

    (root / "devices" / "disk").mkdir(parents=True, exist_ok=True)
    for kind in STORAGE_SERVERS:
        builder = RingBuilder(part_power=8, replicas=1, min_part_hours=0)
        device = {
            "region": 1,
            "zone": 1,
            "ip": "127.0.0.1",
            "port": ports[kind],
            "device": "disk",
            "weight": 1.0,
        }
        builder.add_dev(device)
        builder.rebalance(seed=1)
        builder.get_ring().save(str(root / f"{kind}.ring.gz"))


def load_servers(root: Path, kinds: Iterable[str]) -> dict[str, WsgiApp]:
    """Swift's WSGI applications, from the settings below `root`."""
    from swift.common import utils, wsgi

    utils.set_swift_dir(str(root))
    apps: dict[str, WsgiApp] = {}
    for kind in kinds:
        settings = str(root / f"{kind}-server.conf")
        utils.get_logger(wsgi.appconfig(settings, name=f"{kind}-server"), kind, log_to_console=True)
        apps[kind] = wsgi.loadapp(settings, global_conf={"log_name": kind})
    return apps


def serve(root: Path, account: Mapping[str, str], address: str, report: int) -> None:
    """Run the servers until the process is killed."""
    import eventlet
    import eventlet.wsgi
    from swift.common import utils, wsgi
    from swift.common.utils import logs

    utils.monkey_patch()
    # Swift always logs to syslog; its console handler writes the log below the root.
    setattr(logs, "ThreadSafeSysLogHandler", lambda **_: logging.NullHandler())  # noqa: B010
    addresses = dict.fromkeys(STORAGE_SERVERS, "127.0.0.1") | {"proxy": address}
    sockets = {kind: eventlet.listen((at, 0), backlog=512) for kind, at in addresses.items()}
    ports = {kind: socket.getsockname()[1] for kind, socket in sockets.items()}
    write_settings(root, ports, account)
    write_rings(root, ports)
    # S3 clients want "ETag", which eventlet would spell "Etag".
    options = {"protocol": wsgi.SwiftHttpProtocol, "capitalize_response_headers": False}
    running = [
        eventlet.spawn(eventlet.wsgi.server, sockets[kind], app, utils.NullLogger(), **options)
        for kind, app in load_servers(root, sockets).items()
    ]
    os.write(report, json.dumps({"port": ports["proxy"]}).encode() + b"\n")
    os.close(report)
    for server in running:
        server.wait()


def main() -> None:
    """Serve below the directory, for the account and at the address that the command line names."""
    exit_with_parent()
    root = Path(sys.argv[1])
    report = divert_output(root / "swift.log")
    serve(root, json.loads(sys.argv[2]), sys.argv[3], report)


if __name__ == "__main__":
    main()
