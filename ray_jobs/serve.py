"""`pairvpr serve index.path=INDEX`: a photo in, a place out, over HTTP, until it is stopped.

`serve run ray_jobs.serve:app index.path=INDEX serve.allow_anonymous=true` runs the same under Ray Serve's own command,
and so do `serve deploy` and KubeRay's RayService with `import_path: ray_jobs.serve:app` (docs/serving.md).
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Mapping, Sequence

import ray
from ray import serve
from ray.serve.config import HTTPOptions

from pairvpr.boundary import StoppedError
from pairvpr.cli import run_job
from pairvpr.config.compose import load
from pairvpr.config.serve_schema import OWN_MACHINE, ServeConfig, ServeSettings
from pairvpr.distributed.runtime import ALONE, ray_session
from pairvpr.distributed.serve import APP, application, drain, haproxy_ports, haproxy_variables
from pairvpr.errors import IncompleteRunError, UserError
from pairvpr.models.weights import announce, find_weights
from pairvpr.serving.opening import Opening
from pairvpr.terminal import say

LAST_WORDS_S = 10.0
"""What Serve's own time limit adds to that of a request, which answers better."""


def main(arguments: Sequence[str]) -> None:
    """Serve until SIGTERM or Ctrl-C; then answer what was accepted."""
    config = load(ServeConfig, arguments)
    opening = Opening.of(config)
    announce(opening.config.model, find_weights(opening.config.model))
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 is for batches, and somebody waits for these answers
    settings = config.serve
    with haproxy_variables(settings) as variables, ray_session(config.cluster, variables):
        check_is_alone()
        if ray.get_runtime_context().namespace == ALONE:
            check_ports(settings)
        elif settings.haproxy and settings.host in OWN_MACHINE and sum(node["Alive"] for node in ray.nodes()) > 1:
            raise UserError(
                f"serve.host={settings.host}: HAProxy can't reach replicas on other nodes there; expected "
                "serve.host=0.0.0.0 and a serve.token_file"
            )
        request_s = settings.timeout_s + settings.body_timeout_s + LAST_WORDS_S
        serve.start(http_options=HTTPOptions(host=settings.host, port=settings.port, request_timeout_s=request_s))
        try:
            started(application(opening))
            names = ", ".join(opening.indices)
            say(f"serving {names} at http://{settings.host}:{settings.port} (docs: /docs); Ctrl-C or SIGTERM ends it")
            threading.Event().wait()
        except (StoppedError, KeyboardInterrupt):
            say("stopping: accepted requests are answered first")
            drain(settings.drain_s + LAST_WORDS_S)
        finally:
            serve.shutdown()


def check_is_alone() -> None:
    """Raise `UserError` where Ray Serve runs already: its address would stay, and ending this job would end it."""
    running = serve.status()
    if running.proxies or running.applications:
        names = ", ".join(running.applications) or "no application"
        raise UserError(
            f"Ray Serve already runs on this cluster, with {names}; expected a cluster without it (`serve shutdown` "
            "ends it, also what a killed `pairvpr serve` left), or `serve run ray_jobs.serve:app` beside what runs"
        )


def check_ports(settings: ServeSettings) -> None:
    """Raise `UserError` for an address or port of the service that this machine does not give."""
    listened = {"serve.port": (settings.host, str(settings.port))}
    if settings.haproxy:
        listened |= haproxy_ports(settings.host)
    for name, (host, port) in listened.items():
        if not (port.isdecimal() and 0 < int(port) < 65536):
            raise UserError(f"{name}={port}: expected a port, 1 to 65535")
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family) as listening:
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listening.bind(address)
        except OSError as error:
            why = f"{name}={port}, on {host}: {error.strerror}"
            raise UserError(f"{why}; expected an address of this machine and a free port") from error


def started(service: serve.Application) -> None:
    """Wait until every replica has opened its part. Raises `IncompleteRunError` if one can't."""
    try:
        serve.run(service, name=APP, route_prefix="/")
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise IncompleteRunError(f"the service did not start: {reason}") from error


def app(arguments: Mapping[str, str]) -> serve.Application:
    """The deployments, for `serve run ray_jobs.serve:app KEY=VALUE ...` and the `args` of a Serve config file.

    Serve decides the address there, so a token or `serve.allow_anonymous=true` is needed whatever it is.
    """
    config = load(ServeConfig, [f"{key}={value}" for key, value in arguments.items()])
    if config.serve.token_file is None and not config.serve.allow_anonymous:
        raise UserError(
            "serve.token_file is null, and others may reach the address that Ray Serve listens on; expected a file, or "
            "serve.allow_anonymous=true"
        )
    if config.serve.haproxy:
        raise UserError(
            "serve.haproxy=true: Ray Serve starts its proxies before this; expected RAY_SERVE_ENABLE_HA_PROXY=1 in the "
            "environment of all nodes, and serve.haproxy=false"
        )
    return application(Opening.of(config))


if __name__ == "__main__":
    sys.exit(run_job("serve"))
