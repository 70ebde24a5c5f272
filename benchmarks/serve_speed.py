"""What HTTP and Ray Serve add to a Localizer: rates, latencies, memory, and what happens beyond what it can do.

    python -m benchmarks.serve_speed --report

Run it by hand on an idle machine, from the root of the checkout; it takes half an hour on two cores. The service is
`pairvpr serve` in one piece, asked by clients in a process of their own. Beside it the same number of threads calls a
`Localizer` in a bare loop, and the service's app runs in a bare uvicorn, which tells its cost from Ray Serve's.
The three alternate over the rounds. The features of the candidates are cached in all.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import psutil
import uvicorn

from benchmarks import shared
from pairvpr import DescribeConfig, Localizer, RerankConfig, SearchConfig
from pairvpr.config.serve_schema import ServeSettings
from pairvpr.serving.app import create_app
from pairvpr.serving.metrics import Metrics
from pairvpr.serving.service import Service
from pairvpr.toy import city as toy_city

WHAT = "serve_speed"
AT_ONCE, MAX_WAITING = 2, 16
PORT, APP_PORT = 8765, 8766
NUM_PLACES, ROUNDS = 60, 4
REFUSED = 503
Asked = Callable[[int], tuple[int, float]]
"""Answers request n: its status and seconds."""


def main() -> None:
    """Measure, print, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--requests", type=int, default=2000, help="for each number of clients")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--memory-requests", type=int, default=20_000, help="0 = leave memory and overload out")
    parser.add_argument("--settings", metavar="KEY=VALUE", nargs="*", default=[], help="more settings of the service")
    parser.add_argument("--app-of", metavar="FOLDER", help=argparse.SUPPRESS)  # this program's other process
    shared.add_report_option(parser, WHAT)
    options = parser.parse_args()
    if options.app_of:
        serve_app(opened(Path(options.app_of), options))
        return
    load_at_start = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        localizer, photos = prepare(Path(folder), options)
        with serving(Path(folder), options) as pid, app_alone(Path(folder), options):
            tables = measure(localizer, photos, pid, options)
    about = shared.circumstances(WHAT, load_at_start)
    more = f"; then {' '.join(options.settings)}" if options.settings else ""
    setting = (
        f"{options.model}, {options.candidates} candidates of {3 * NUM_PLACES} photos, serve.num_at_once={AT_ONCE}, "
        f"serve.max_waiting={MAX_WAITING}, one CPU thread a request{more}"
    )
    report = ["# The service beside a bare Localizer", about, setting, *tables]
    shared.publish(WHAT, "\n\n".join(report), options.report)


def prepare(folder: Path, options: argparse.Namespace) -> tuple[Localizer, list[bytes]]:
    """An index of a drawn city, opened here, and the query photos."""
    (folder / "photos").mkdir()
    for photo in toy_city.database_photos(seed=0, num_places=NUM_PLACES, photos_per_place=3):
        toy_city.draw(photo, width_px=320, height_px=240).save(folder / "photos" / photo.path, quality=90)
    queries = []
    for photo in toy_city.query_photos(seed=0, num_places=NUM_PLACES, photos_per_place=1):
        file = folder / photo.path
        toy_city.draw(photo, width_px=320, height_px=240).save(file, quality=90)
        queries.append(file.read_bytes())
    one = DescribeConfig(num_threads_per_actor=1)
    index, model = folder / "index", options.model
    Localizer.build(folder / "photos", index, model=model, positions="names", device="cpu", describe=one)
    return opened(folder, options), queries


def opened(folder: Path, options: argparse.Namespace) -> Localizer:
    """The index, open in this process."""
    return Localizer.open(
        folder / "index",
        device="cpu",
        describe=DescribeConfig(num_threads_per_actor=1),
        search=SearchConfig(num_threads_per_actor=1),
        rerank=RerankConfig(num_candidates=options.candidates, num_threads_per_actor=1),
    )


def serve_app(localizer: Localizer) -> None:
    """Answer requests with the service's app, without Ray, until this process is ended."""
    service = Service({"default": localizer}, ServeSettings(num_at_once=AT_ONCE, max_waiting=MAX_WAITING), Metrics())
    uvicorn.run(create_app(service), port=APP_PORT, log_config=None, access_log=False)


@contextmanager
def app_alone(folder: Path, options: argparse.Namespace) -> Iterator[None]:
    """`serve_app` in a process of its own."""
    line = ["-m", "benchmarks.serve_speed", "--app-of", str(folder), "--candidates", str(options.candidates)]
    process = subprocess.Popen([sys.executable, *line])
    try:
        wait_ready(APP_PORT, process)
        yield
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def serving(folder: Path, options: argparse.Namespace) -> Iterator[int]:
    """`pairvpr serve` of the same index and settings; the process id."""
    line = [f"index.path={folder}/index", f"model={options.model}", f"rerank.num_candidates={options.candidates}"]
    line += [f"{step}.num_threads_per_actor=1" for step in ("describe", "index", "rerank")]
    line += [f"serve.port={PORT}", f"serve.num_at_once={AT_ONCE}", f"serve.max_waiting={MAX_WAITING}"]
    line += options.settings
    process = subprocess.Popen([sys.executable, "-m", "ray_jobs.serve", *line])
    try:
        wait_ready(PORT, process)
        yield process.pid
    finally:
        process.terminate()
        process.wait(120)


def wait_ready(port: int, process: subprocess.Popen[bytes]) -> None:
    """Until the service answers."""
    while not is_ready(port):
        if process.poll() is not None:
            raise SystemExit("the service ended")
        time.sleep(0.5)


def is_ready(port: int) -> bool:
    """Whether the service answers."""
    connection = HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def measure(localizer: Localizer, photos: Sequence[bytes], pid: int, options: argparse.Namespace) -> list[str]:
    """The tables of the report."""
    rows = []
    for clients in options.clients:
        rows += rates(localizer, photos, clients, options.requests)
    header = ("clients", "way", "requests/s", "p50 ms", "p95 ms", "p99 ms", "rate of the bare loop")
    tables = [shared.markdown_table(header, rows)]
    if options.memory_requests:
        tables += ["## Memory", memory(photos, pid, options.memory_requests), "## Overload", overload(photos)]
    return tables


def rates(localizer: Localizer, photos: Sequence[bytes], clients: int, number: int) -> list[tuple[str, ...]]:
    """The rows of one number of clients: the service, its app alone, and the loop on as many threads as they have."""

    def bare(n: int) -> tuple[int, float]:
        started_s = time.perf_counter()
        localizer.answer(photos[n % len(photos)])
        return 200, time.perf_counter() - started_s

    threads = min(clients, AT_ONCE)
    ways = {
        "service": (asking(photos, again=True), clients),
        "its app in uvicorn": (asking(photos, again=True, port=APP_PORT), clients),
        f"loop on {threads} thread(s)": (bare, threads),
    }
    found: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, (way, at_once) in ways.items():
            found[name].append(run(way, at_once, number // ROUNDS))
    rate = {name: np.median([each[0] for each in its]) for name, its in found.items()}
    *_, loop = rate.values()
    return [
        (
            str(clients),
            name,
            f"{rate[name]:.1f}",
            *(f"{1000 * np.quantile(np.concatenate([each[1] for each in its]), q):.1f}" for q in (0.5, 0.95, 0.99)),
            f"{rate[name] / loop:.2f}",
        )
        for name, its in found.items()
    ]


def run(way: Asked, clients: int, number: int) -> tuple[float, list[float]]:
    """Requests per second, and the seconds of each that was answered."""
    started_s = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        answers = list(threads.map(way, range(number)))
    took_s = time.perf_counter() - started_s
    assert {status for status, _ in answers} == {200}, "a request failed"
    return number / took_s, [seconds for _, seconds in answers]


def asking(photos: Sequence[bytes], *, again: bool, port: int = PORT) -> Asked:
    """A client of the service, with a connection in each thread; `again` asks until it is not refused."""
    own = threading.local()

    def ask(n: int) -> tuple[int, float]:
        if not hasattr(own, "connection"):
            own.connection = HTTPConnection("127.0.0.1", port, timeout=60)
        while True:
            started_s = time.perf_counter()
            own.connection.request("POST", "/v1/locate", photos[n % len(photos)], {"Content-Type": "image/jpeg"})
            answer = own.connection.getresponse()
            answer.read()
            seconds = time.perf_counter() - started_s
            if answer.status != REFUSED or not again:
                return answer.status, seconds
            time.sleep(0.02)

    return ask


def memory(photos: Sequence[bytes], pid: int, number: int) -> str:
    """Resident memory of every process of Serve after the first 1,000 requests and after all."""
    ask = asking(photos, again=True)
    run(ask, 4, 1000)
    before = resident(pid)
    run(ask, 4, number - 1000)
    after = resident(pid)
    mib = {name: (before[name] / 2**20, after[name] / 2**20) for name in sorted(before.keys() & after.keys())}
    rows = [(name, f"{first:.1f}", f"{last:.1f}", f"{last - first:+.1f}") for name, (first, last) in mib.items()]
    return shared.markdown_table(("process", "MiB after 1,000", f"MiB after {number:,}", "growth"), rows)


def resident(pid: int) -> dict[str, int]:
    """Resident bytes of the replicas and of the proxies below a process, by title."""
    found: dict[str, int] = {}
    for process in psutil.Process(pid).children(recursive=True):
        title = " ".join(process.cmdline())
        if title.startswith(("ray::ServeReplica", "ray::ProxyActor")):
            found[f"{title.partition(' ')[0]} {process.pid}"] = process.memory_info().rss
        elif process.name() == "haproxy":
            found[f"haproxy {process.pid}"] = process.memory_info().rss
    return found


def overload(photos: Sequence[bytes]) -> str:
    """Full load: as many clients as it takes. Overload: requests at three times that rate, whatever becomes of them."""
    rate, seconds = run(asking(photos, again=True), AT_ONCE + MAX_WAITING, 1000)
    once, begun_s = asking(photos, again=False), time.perf_counter()

    def at_its_time(n: int) -> tuple[int, float]:
        time.sleep(max(0.0, begun_s + n / (3 * rate) - time.perf_counter()))
        return once(n)

    with ThreadPoolExecutor(48) as threads:
        answers = list(threads.map(at_its_time, range(1500)))
    accepted = [took_s for status, took_s in answers if status == 200]
    refused = [took_s for status, took_s in answers if status == REFUSED]
    rows = [
        ("full load", f"{len(seconds)}", "0", f"{1000 * np.quantile(seconds, 0.99):.0f}", "-"),
        (
            "three times its rate",
            f"{len(accepted)}",
            f"{len(refused)}",
            f"{1000 * np.quantile(accepted, 0.99):.0f}",
            f"{1000 * np.quantile(refused, 0.99):.0f}" if refused else "-",
        ),
    ]
    assert len(accepted) + len(refused) == len(answers), "a request got neither an answer nor 503"
    return shared.markdown_table(("load", "answered", "503", "p99 ms of answers", "p99 ms of 503"), rows)


if __name__ == "__main__":
    main()
