"""The service while its index changes, and against bodies that nobody means well."""

from __future__ import annotations

import ctypes
import io
import random
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import psutil
import pytest
import requests
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from PIL import Image
from ray.exceptions import RayTaskError

from pairvpr import Localizer, PhotoError, UserError
from pairvpr.config.serve_schema import ServeSettings
from pairvpr.deadline import Deadline
from pairvpr.distributed.serve import GENERATIONS_HELD, _apart, _called, _Held
from pairvpr.engines import Described
from pairvpr.index.generations import IndexManifest, commit, read_manifest
from pairvpr.index.update import without
from pairvpr.opened import GenerationKey
from tests.support.runs import wait_until
from tests.support.served import Served, served
from tests.unit.test_localizer import BUILD, OPTIONS, folder, localizer, queries

pytestmark = pytest.mark.slow

__all__ = ["folder", "localizer", "queries"]
NUM_SWAPS, NUM_REQUESTS = 10, 1000
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")
MOST_GROWTH_BYTES = 48 << 20
CHECKS = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large, HealthCheck.large_base_example]


@pytest.fixture(scope="module")
def at(localizer: Localizer) -> Iterator[Served]:
    with served({"one": localizer}, ServeSettings(max_waiting=64, body_timeout_s=1.0)) as service:
        yield service


def read(directory: str) -> IndexManifest:
    manifest = read_manifest(directory)
    assert manifest is not None
    return manifest


@pytest.mark.parametrize("refresh_s", [None, pytest.param(0.05, marks=pytest.mark.soak)])
def test_every_answer_belongs_to_one_generation(
    folder: Path, queries: list[Path], tmp_path: Path, refresh_s: float | None
) -> None:
    """Ten swaps under load: the best photo goes and comes back, and no request fails.

    Each answer is what its generation has. `refresh_s` finds the generations by itself.
    """
    directory = str(shutil.copytree(folder / "index", tmp_path / "index"))
    whole = read(directory)
    photo = queries[0].read_bytes()
    localizer = Localizer.open(directory, **OPTIONS)
    expected = {True: localizer.answer(photo).matches}
    gone = expected[True][0].database_id
    served_at = ServeSettings(max_waiting=64, refresh_s=refresh_s)
    answers: list[tuple[int, list[Any]]] = []
    statuses: Counter[int] = Counter()

    with served({"one": localizer}, served_at) as at, ThreadPoolExecutor(4) as threads:

        def ask(_: int) -> None:
            answer = requests.post(f"{at.url}/v1/locate", data=photo)
            statuses[answer.status_code] += 1
            found = answer.json()
            pairs = [(each["photo_id"], each["pair_score"]) for each in found["candidates"]]
            answers.append((found["generation"], pairs))
            assert all(f"generation={found['generation']}" in each["photo"] for each in found["candidates"])

        asking = threads.map(ask, range(NUM_REQUESTS))
        for number in range(2, NUM_SWAPS + 2):
            draft = replace(whole, generation=number)
            is_back = number % 2 == 1
            commit(directory, draft if is_back else without(directory, draft, f"updates/{number}/", np.array([gone])))
            if refresh_s is None:
                refreshed = requests.post(f"{at.url}/v1/refresh").json()
                assert refreshed == {"generations": {"one": number}, "changed": ["one"]}
            while localizer.generation != number:
                time.sleep(0.005)
            found = requests.post(f"{at.url}/v1/locate", data=photo).json()
            assert (gone in [each["photo_id"] for each in found["candidates"]]) == is_back
        list(asking)
    expected[False] = Localizer.open(directory, generation=2, **OPTIONS).answer(photo).matches
    pairs_of = {whole: [(each.database_id, each.pair_score) for each in its] for whole, its in expected.items()}
    assert statuses == {200: NUM_REQUESTS}
    assert len({generation for generation, _ in answers}) > 3
    for generation, pairs in answers:
        assert pairs == pairs_of[generation % 2 == 1], generation


def test_going_back_by_hand(folder: Path, queries: list[Path], tmp_path: Path) -> None:
    directory = str(shutil.copytree(folder / "index", tmp_path / "index"))
    localizer = Localizer.open(directory, **OPTIONS)
    before = localizer.locate(queries[0])
    draft = replace(read(directory), generation=2)
    commit(directory, without(directory, draft, "updates/2/", np.array([before[0].database_id])))
    assert localizer.refresh()
    assert localizer.locate(queries[0]) != before
    assert localizer.refresh(1)
    assert localizer.locate(queries[0]) == before


def test_a_refresh_that_fails_leaves_the_old_generation(folder: Path, queries: list[Path], tmp_path: Path) -> None:
    directory = shutil.copytree(folder / "index", tmp_path / "index")
    localizer = Localizer.open(directory, **OPTIONS)
    with served({"one": localizer}) as at:
        manifest = directory / "manifest.json"
        kept = manifest.read_bytes()
        manifest.write_bytes(kept[:-20])
        answer = requests.post(f"{at.url}/v1/refresh")
        assert (answer.status_code, str(tmp_path) in answer.text) == (503, False)
        assert requests.post(f"{at.url}/v1/locate", data=queries[0].read_bytes()).status_code == 200
        manifest.write_bytes(kept)
        assert requests.post(f"{at.url}/v1/refresh").json()["changed"] == []


@pytest.mark.parametrize("number", [1, 2])
def test_an_index_built_anew_is_none_of_its_generations(
    folder: Path, queries: list[Path], tmp_path: Path, number: int
) -> None:
    """In the same place, with the same number or a later one: the open one stays, and its pictures are its own."""
    directory, photos = Path(shutil.copytree(folder / "index", tmp_path / "index")), tmp_path / "photos"
    photos.mkdir()
    for photo in sorted((folder / "photos").iterdir())[3:]:
        shutil.copy(photo, photos)
    localizer = Localizer.open(directory, **OPTIONS)
    other = Localizer.build(photos, tmp_path / "other", positions="names", **BUILD)
    before = localizer.locate(queries[0])
    with served({"one": localizer}) as at:
        found = requests.post(f"{at.url}/v1/locate", data=queries[0].read_bytes()).json()["answer"]
        shutil.rmtree(directory)
        shutil.copytree(tmp_path / "other", directory)
        if number > 1:
            commit(str(directory), replace(read(str(directory)), generation=number))
        with pytest.raises(UserError, match=r"was built anew: its generation \d is none of the open index; expected"):
            localizer.refresh()
        assert requests.post(f"{at.url}/v1/refresh").status_code == 503
        assert localizer.locate(queries[0]) == before
        assert requests.get(at.url + found["photo"]).status_code == 200
    with served({"one": other}) as at:
        answer = requests.get(at.url + found["photo"])
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
        address = f"{at.url}/v1/why?photo_id=0&of={found['photo'].rpartition('=')[2]}"
        assert requests.post(address, data=queries[0].read_bytes()).status_code == 404


def two_of(folder: Path, tmp_path: Path) -> tuple[Path, Path, dict[str, Localizer]]:
    """Two directories with the same index, and the open indices `a` and `b`."""
    first, second = (Path(shutil.copytree(folder / "index", tmp_path / name)) for name in "ab")
    a, b = (Localizer.open(directory, **OPTIONS) for directory in (first, second))
    b._network = a._network
    return first, second, {"a": a, "b": b}


def test_an_index_that_fails_keeps_no_other_from_switching(folder: Path, tmp_path: Path) -> None:
    broken, whole, localizers = two_of(folder, tmp_path)
    with served(localizers) as at:
        (broken / "manifest.json").write_bytes(b"{")
        commit(str(whole), replace(read(str(whole)), generation=2))
        assert requests.post(f"{at.url}/v1/refresh").status_code == 503
        assert at.service.generations == {"a": 1, "b": 2}


def test_a_bug_does_not_end_the_looking_for_generations(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory = str(shutil.copytree(folder / "index", tmp_path / "index"))
    localizer = Localizer.open(directory, **OPTIONS)
    refresh, tries = localizer.refresh, []

    def fails_once(generation: int | None = None) -> bool:
        tries.append(generation)
        if len(tries) == 1:
            raise KeyError("a bug")
        return refresh(generation)

    monkeypatch.setattr(localizer, "refresh", fails_once)
    with served({"one": localizer}, ServeSettings(refresh_s=0.05)):
        wait_until(lambda: len(tries) > 1, "a second look", 30)
        commit(directory, replace(read(directory), generation=2))
        wait_until(lambda: localizer.generation == 2, "the swap", 30)
    assert "refresh: bug in the program: KeyError in " in caplog.text
    assert "a bug" not in caplog.text


@pytest.mark.parametrize(
    ("limits", "token", "status"),
    [
        (ServeSettings(), None, 200),
        (ServeSettings(allow_anonymous=True), None, 401),
        (ServeSettings(host="0.0.0.0", allow_anonymous=True), None, 401),
        (ServeSettings(host="0.0.0.0", allow_anonymous=True), "a-token-of-16-chars", 200),
    ],
)
def test_strangers_cannot_swap(localizer: Localizer, limits: ServeSettings, token: str | None, status: int) -> None:
    """Under `serve run`, Ray Serve chooses the address, whatever serve.host says."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    with served({"one": localizer}, limits, token) as at:
        assert requests.post(f"{at.url}/v1/refresh", headers=headers).status_code == status


def test_an_error_of_a_replica_is_not_taken_for_a_slow_answer() -> None:
    """A timeout of a store inside a replica is an error of the call, and nobody waits for it until the deadline."""
    error = RayTaskError("search", "traceback", TimeoutError("the store")).as_instanceof_cause()
    assert isinstance(error, TimeoutError)
    calls = []

    def result(timeout_s: float) -> None:
        calls.append(timeout_s)
        raise error

    method = SimpleNamespace(remote=lambda: SimpleNamespace(result=result, cancel=lambda: None))
    with pytest.raises(TimeoutError, match="the store"):
        _called(method, Deadline(60.0))
    assert len(calls) == 1


def test_photos_that_were_described_together_come_apart() -> None:
    """Each as if it had been alone; one that was alone keeps what scoring can use."""
    broken = PhotoError("1.jpg", "half there")
    rows = np.array([[1, 0], [0, 1]], np.float32)
    first, second, third = _apart(Described(np.array([0, 2]), rows, {1: broken}), 3)
    for found, row in ((first, 0), (third, 1)):
        assert (found.places.tolist(), found.descriptors.tolist(), found.broken) == ([0], [rows[row].tolist()], {})
    assert (second.places.tolist(), len(second.descriptors), second.broken) == ([], 0, {0: broken})
    alone = Described(np.array([0]), rows[:1], {}, torch.zeros(1))
    assert _apart(alone, 1) == [alone]


def held_bytes() -> int:
    """Resident memory without what glibc's malloc keeps of freed photos, which its arenas bound."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss


def fuzzed(seed: int, photos: list[bytes]) -> bytes:
    """A photo in some format with some bits flipped, bytes cut, repeated or put in."""
    at_random = random.Random(seed)
    data = bytearray(at_random.choice(photos))
    for _ in range(at_random.choice((1, 1, 3, 30))):
        place = at_random.randrange(len(data))
        if at_random.random() < 0.5:
            place = min(place, at_random.randrange(64))  # headers decide more
        match at_random.randrange(6):
            case 0 | 1 | 2:
                data[place] ^= 1 << at_random.randrange(8)
            case 3:
                del data[place : place + at_random.randrange(1, 200)]
            case 4:
                data[place:place] = at_random.randbytes(at_random.randrange(1, 50))
            case 5:
                data[place : place + 4] = at_random.choice((b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"))
        if not data:
            return b""
    return bytes(data)


@pytest.mark.parametrize("number", [300, pytest.param(10_000, marks=pytest.mark.soak)])
def test_fuzzed_photos(at: Served, queries: list[Path], number: int) -> None:
    """No 500, no hang, no growth; an undamaged photo is answered in between."""
    whole = queries[0].read_bytes()
    photos = []
    with Image.open(io.BytesIO(whole)) as image:
        for name in FORMATS:
            file = io.BytesIO()
            image.save(file, name)
            photos.append(file.getvalue())

    def ask(seed: int) -> int:
        data = fuzzed(seed, photos)
        answer = requests.post(f"{at.url}/v1/locate?k=1", data=data, timeout=20)
        if seed % 50 == 0:
            assert requests.post(f"{at.url}/v1/locate?k=1", data=whole, timeout=20).status_code == 200
        return answer.status_code

    seen, held = Counter[int](), list[int]()
    with ThreadPoolExecutor(4) as threads:
        for first in range(0, number, number // 5):
            seen += Counter(threads.map(ask, range(first, first + number // 5)))
            held.append(held_bytes())
    assert set(seen) <= {200, 415, 422}, seen
    assert seen[422] > number // 20
    assert min(held[3:]) - max(held[:2]) < MOST_GROWTH_BYTES, held


@pytest.mark.parametrize("number", [10, pytest.param(300, marks=pytest.mark.soak)])
def test_malicious_requests(at: Served, queries: list[Path], number: int) -> None:
    """Raw bytes on the wire: huge headers, endless chunks, half requests, slow ones. The service answers others."""
    head = b"POST /v1/locate HTTP/1.1\r\nHost: localhost\r\n"
    parts = b"--x\r\nContent-Disposition: form-data; name=photo; filename=a\r\n\r\n"
    sent = (
        head + b"X: " + b"a" * 200_000 + b"\r\n\r\n",
        head + b"".join(b"X%d: y\r\n" % each for each in range(20_000)) + b"\r\n",
        head + b"Content-Length: 99999999999999999999\r\n\r\nabc",
        head + b"Content-Length: -5\r\n\r\nabc",
        head + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nabc",
        head + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * 5000,
        head + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\nzz\r\n",
        head + b"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 70\r\n\r\n" + parts,
        head + b"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 5\r\n\r\nabcde",
        head + b"Content-Type: multipart/form-data; boundary=" + b"y" * 5000 + b"\r\nContent-Length: 5\r\n\r\nabcde",
        b"GET /v1/photos/0?" + b"index=a&" * 3000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20,
        b"\r\n" * 1000,
        head[:20],
    )
    at_random = random.Random(7)

    def attack(which: int) -> bytes:
        with socket.create_connection(("127.0.0.1", at.port), timeout=10) as raw:
            try:
                data = sent[which % len(sent)]
                for first in range(0, len(data), 50_000):
                    raw.sendall(data[first : first + 50_000])
                raw.settimeout(2.0)
                return raw.recv(200)
            except (ConnectionError, TimeoutError):
                return b""

    numbers = [at_random.randrange(len(sent)) for _ in range(number)] + list(range(len(sent)))
    with ThreadPoolExecutor(8) as threads:
        before_bytes = held_bytes()
        answers = list(threads.map(attack, numbers))
    assert not [answer for answer in answers if b" 500 " in answer[:40]]
    assert requests.post(f"{at.url}/v1/locate", data=queries[0].read_bytes()).status_code == 200
    assert at.service.answering.num_inside == 0
    assert held_bytes() - before_bytes < MOST_GROWTH_BYTES


@pytest.mark.parametrize("num_examples", [10, pytest.param(300, marks=pytest.mark.soak)])
def test_its_own_openapi(at: Served, num_examples: int) -> None:
    """schemathesis draws requests from the description: no 5xx, and no answer that is not described."""
    api = schemathesis.openapi.from_url(f"{at.url}/openapi.json")
    failures: list[str] = []
    for each in api.get_all_operations():
        operation = cast(Any, each).ok()

        @settings(max_examples=num_examples, suppress_health_check=CHECKS)
        @given(case=operation.as_strategy())
        def check(case: Any) -> None:
            answer = case.call(timeout=20)
            described = {*case.operation.definition.raw["responses"], "405"}
            if answer.status_code >= 500 and answer.status_code not in (503, 504):
                failures.append(f"{case.method} {case.formatted_path}: {answer.status_code}")
            elif str(answer.status_code) not in described:
                failures.append(f"{case.method} {case.formatted_path}: {answer.status_code} is not described")

        check()
    assert not failures, failures[:5]


def test_many_slow_clients_at_once(localizer: Localizer, queries: list[Path]) -> None:
    """Slow-loris bodies hold no thread: others are answered meanwhile, and each slow one gets 408 in time."""
    with served({"one": localizer}, ServeSettings(body_timeout_s=1.0, max_connections=100)) as at:
        slow = [socket.create_connection(("127.0.0.1", at.port)) for _ in range(40)]
        for each in slow:
            each.sendall(b"POST /v1/locate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
        stop = threading.Event()

        def drip() -> None:
            while not stop.wait(0.1):
                for each in slow:
                    try:
                        each.sendall(b"a")
                    except OSError:
                        return

        dripping = threading.Thread(target=drip)
        dripping.start()
        assert requests.post(f"{at.url}/v1/locate", data=queries[0].read_bytes()).status_code == 200
        for each in slow:
            each.settimeout(5)
            assert each.recv(100).startswith(b"HTTP/1.1 408")
        stop.set()
        dripping.join()
        for each in slow:
            each.close()


def test_a_generation_that_is_being_opened_keeps_nobody_waiting() -> None:
    """A replica of a split service answers from the open generations while it opens the next one, once."""
    begun, may_end, opened = threading.Event(), threading.Event(), list[tuple[int, int | None]]()

    def open_it(generation: Any, newest: int | None) -> int:
        number = generation.key.number
        opened.append((number, newest))
        if number == 2:
            begun.set()
            assert may_end.wait(30)
        return number

    def key(number: int, sha256: str = "") -> GenerationKey:
        return GenerationKey("d", number, sha256)

    index = SimpleNamespace(directory="d", open=lambda number: SimpleNamespace(key=key(number)))
    held = _Held[int](cast(Any, SimpleNamespace(indices={"a": index})), open_it)
    assert held.get(key(1)) == 1
    with ThreadPoolExecutor(3) as threads:
        try:
            waiting = [threads.submit(held.get, key(2)) for _ in range(2)]
            assert begun.wait(30)
            assert threads.submit(held.get, key(1)).result(timeout=10) == 1
        finally:
            may_end.set()
        assert [each.result(timeout=30) for each in waiting] == [2, 2]
    assert opened == [(1, None), (2, 1)]
    for number in range(3, 3 + GENERATIONS_HELD):
        held.get(key(number))
    assert held.get(key(1)) == 1
    assert opened[-1] == (1, 2 + GENERATIONS_HELD)  # it had been let go
    with pytest.raises(UserError, match=r"^index d was built anew; expected a new start of the service$"):
        held.get(key(1, "of another index"))
