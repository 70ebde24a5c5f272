"""The HTTP service around a Localizer, by a real client: answers, refusals, limits, tokens, and how it ends."""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image

from pairvpr import Localizer, RerankConfig
from pairvpr.config.serve_schema import ServeSettings
from pairvpr.deadline import Deadline
from pairvpr.where import Where
from tests.support.runs import wait_until
from tests.support.served import Served, served
from tests.unit.test_localizer import OPTIONS, folder, localizer, queries

__all__ = ["folder", "localizer", "queries"]
TOKEN = "s3cret-token"


@pytest.fixture(scope="module")
def at(localizer: Localizer) -> Iterator[Served]:
    """Two indices: the drawn city, twice."""
    with served({"one": localizer}) as service:
        yield service


@pytest.fixture(scope="module")
def two(folder: Path, localizer: Localizer) -> Iterator[Served]:
    other = Localizer.open(folder / "index", **OPTIONS)
    other._network = localizer._network  # all indices of a service share it
    with served({"a": localizer, "b": other}) as service:
        yield service


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_answers_are_those_of_the_localizer(at: Served, localizer: Localizer, queries: list[Path]) -> None:
    """As bytes, as a form, with parameters in the address and in the form; every float as it was."""
    for photo in queries[:3]:
        data = photo.read_bytes()
        expected = localizer.answer(data, k=3)
        for answer in (
            requests.post(f"{at.url}/v1/locate?k=3", data=data),
            requests.post(f"{at.url}/v1/locate", files={"photo": data}, data={"k": "3"}),
            requests.post(f"{at.url}/v1/locate?k=3", data=data, headers={"Content-Type": "image/jpeg"}),
        ):
            assert answer.status_code == 200
            found = answer.json()
            assert [each["photo_id"] for each in found["candidates"]] == [m.database_id for m in expected.matches]
            assert [each["pair_score"] for each in found["candidates"]] == [m.pair_score for m in expected.matches]
            assert [each["squared_distance"] for each in found["candidates"]] == [
                match.squared_distance for match in expected.matches
            ]
            assert found["answer"] == found["candidates"][0]
            assert expected.position is not None
            assert found["position"]["utm"]["east_m"] == expected.position.utm.east_m
            assert (found["position"]["utm"]["zone"], found["position"]["spread_m"]) == (32, expected.position.spread_m)
            assert (found["generation"], found["index"], found["in_map"], found["confidence"]) == (1, "one", None, None)
            assert answer.headers["X-Request-Id"] == found["request_id"]
            assert set(found["seconds"]) == {"decode", "describe", "search", "rerank", "total"}


def test_conditions(at: Served, localizer: Localizer, queries: list[Path]) -> None:
    data = queries[0].read_bytes()
    best = localizer.answer(data).matches[0]
    assert best.latitude is not None
    assert best.longitude is not None
    near = f"{best.latitude!r},{best.longitude!r}"
    box = f"{best.latitude - 1e-4},{best.longitude - 1e-4},{best.latitude + 1e-4},{best.longitude + 1e-4}"
    for conditions in (
        {"near": near, "radius_m": 30},
        {"box": box},
        {"heading_deg": best.heading_deg, "within_deg": 1},
    ):
        found = requests.post(f"{at.url}/v1/locate", data=data, params=conditions).json()
        assert found["answer"]["photo_id"] == best.database_id
    where = Where(near=(best.latitude, best.longitude), radius_m=30)
    ids = [match.database_id for match in localizer.answer(data, where=where).matches]
    found = requests.post(f"{at.url}/v1/locate", data=data, params={"near": near, "radius_m": 30}).json()
    assert [each["photo_id"] for each in found["candidates"]] == ids
    nowhere = requests.post(f"{at.url}/v1/locate", data=data, params={"near": "48.0,8.2", "radius_m": 1}).json()
    assert (nowhere["answer"], nowhere["position"], nowhere["candidates"]) == (None, None, [])


def test_batch(at: Served, localizer: Localizer, queries: list[Path]) -> None:
    """Each photo as if it were alone; a broken one has an error in its place."""
    photos = [queries[0].read_bytes(), b"no photo", queries[1].read_bytes()]
    answer = requests.post(f"{at.url}/v1/locate/batch", files=[("photo", each) for each in photos])
    first, broken, last = answer.json()["answers"]
    assert broken["error"]["code"] == "not_an_image"
    for found, photo in ((first, photos[0]), (last, photos[2])):
        assert found["answer"]["pair_score"] == localizer.answer(photo).matches[0].pair_score


def test_indices_together(two: Served, localizer: Localizer, queries: list[Path]) -> None:
    """The candidates of all, by pair score; each as if its index had been asked alone."""
    data = queries[0].read_bytes()
    found = requests.post(f"{two.url}/v1/locate?index=*&k=4", data=data).json()
    alone = [match.pair_score or 0.0 for match in localizer.answer(data, k=4).matches]
    assert [each["pair_score"] for each in found["candidates"]] == sorted([*alone, *alone], reverse=True)[:4]
    assert {each["index"] for each in found["candidates"]} == {"a", "b"}
    assert (found["generation"], found["generations"], found["index"]) == (None, {"a": 1, "b": 1}, "*")
    answer = requests.post(f"{two.url}/v1/locate", data=data)
    assert (answer.status_code, "expected one of a, b, or *" in answer.text) == (422, True)
    names = [index["name"] for index in requests.get(f"{two.url}/v1/index").json()["indices"]]
    assert names == ["a", "b"]


BAD_REQUESTS: tuple[tuple[str, dict[str, Any], int, str], ...] = (
    ("POST /v1/locate", {"data": b"no photo"}, 415, "expected one of JPEG"),
    ("POST /v1/locate", {"data": b""}, 422, "no bytes"),
    ("POST /v1/locate", {"data": b"{}", "headers": {"Content-Type": "application/json"}}, 415, "application/json"),
    ("POST /v1/locate", {"data": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "multipart"),
    ("POST /v1/locate", {"files": {"other": b"x"}}, 422, "expected `photo`"),
    ("POST /v1/locate", {"files": [("photo", b"x"), ("photo", b"x")]}, 422, "expected one"),
    ("POST /v1/locate", {"files": [("photo", b"x")] * 17}, 413, "serve.max_photos"),
    ("POST /v1/locate", {"files": {"photo": b"x"}, "data": {"photo": "x"}}, 422, "expected a file"),
    ("POST /v1/locate", {"files": {"photo": b"x"}, "data": {"tile": "x"}}, 422, "tile: no such parameter"),
    ("POST /v1/locate?k=1", {"files": {"photo": b"x"}, "data": {"k": "1"}}, 422, "k is given twice"),
    ("POST /v1/locate?colour=red", {"data": b"x"}, 422, "colour: no such parameter"),
    ("POST /v1/locate?k=0", {"data": b"x"}, 422, "k: "),
    ("POST /v1/locate?k=7", {"data": b"x"}, 422, "k=7: expected 1 to rerank.num_candidates=6"),
    ("POST /v1/locate?num_candidates=7", {"data": b"x"}, 422, "num_candidates=7"),
    ("POST /v1/locate?near=48.8,8.2", {"data": b"x"}, 422, "expected both of them, or neither"),
    ("POST /v1/locate?near=here&radius_m=5", {"data": b"x"}, 422, "near: "),
    ("POST /v1/locate?near=nan,8&radius_m=5", {"data": b"x"}, 422, "near: "),
    ("POST /v1/locate?near=\U0001e4f1,8.2&radius_m=5", {"data": b"x"}, 422, "near: "),  # a digit of a later Unicode
    ("POST /v1/locate?box=\U0001ccf1,1,2,3", {"data": b"x"}, 422, "box: "),
    ("POST /v1/locate?near=99,8&radius_m=5", {"data": b"x"}, 422, "latitude"),
    ("POST /v1/locate?near=-33,151&radius_m=5", {"data": b"x"}, 422, "too far from UTM zone"),
    ("POST /v1/locate?box=2,2,1,1", {"data": b"x"}, 422, "box"),
    ("POST /v1/locate?min_confidence=0.5", {"data": b"x"}, 422, "no calibration"),
    ("POST /v1/locate?index=oslo", {"data": b"x"}, 404, "expected one of one"),
    ("GET /v1/photos/9999", {}, 404, "no such photo"),
    ("GET /v1/photos/..%2f..%2fetc%2fpasswd", {}, 404, "Not Found"),
    ("GET /v1/photos/-1", {}, 404, "no such photo"),
    ("GET /v1/photos/0?index=oslo", {}, 404, "expected one of one"),
    ("GET /v1/locate", {}, 405, "Method Not Allowed"),
    ("GET /v2", {}, 404, "Not Found"),
    ("GET /v1/index?token=abc", {}, 400, "Authorization: Bearer"),
)


@pytest.mark.parametrize(("route", "body", "status", "words"), BAD_REQUESTS)
def test_refusals_are_one_line(
    at: Served, folder: Path, route: str, body: dict[str, Any], status: int, words: str
) -> None:
    method, _, path = route.partition(" ")
    answer = requests.request(method, at.url + path, **body)
    error = answer.json()["error"]
    assert (answer.status_code, words in error["message"]) == (status, True), answer.text
    assert error["request_id"] == answer.headers["X-Request-Id"]
    assert "\n" not in error["message"]
    assert str(folder) not in answer.text


def test_broken_and_too_large_photos(localizer: Localizer, queries: list[Path]) -> None:
    """A bomb is known by its header: nothing of it is decoded."""
    settings = ServeSettings(max_body_bytes=200_000, max_megapixels=1.0)
    whole = queries[0].read_bytes()
    bomb = bytearray(png(8, 8))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    with served({"one": localizer}, settings) as at:
        for data, status, code in (
            (whole[: len(whole) // 2], 422, "broken_image"),
            (whole[:20], 422, "broken_image"),
            (bytes(bomb), 422, "too_many_pixels"),
            (png(1001, 1000), 422, "too_many_pixels"),
            (png(1000, 1000), 200, None),
            (b"\xff\xd8" + bytes(200_000), 413, "too_large"),
        ):
            answer = requests.post(f"{at.url}/v1/locate", data=data)
            assert (answer.status_code, answer.json().get("error", {}).get("code")) == (status, code)
        endless = (bytes(50_000) for _ in range(1000))
        answer = requests.post(f"{at.url}/v1/locate", data=endless)
        assert answer.status_code == 413


def test_thumbnails_are_of_the_index_alone(folder: Path, queries: list[Path]) -> None:
    """Upright and small; not of a photo that has changed or is gone."""
    localizer = Localizer.open(folder / "index", **OPTIONS)
    with served({"one": localizer}) as at:
        found = requests.post(f"{at.url}/v1/locate", data=queries[0].read_bytes()).json()["answer"]
        picture = requests.get(at.url + found["photo"])
        assert picture.headers["Content-Type"] == "image/webp"
        with Image.open(io.BytesIO(picture.content)) as image:
            assert image.size == (64, 48)
        file = folder / "photos" / found["path"]
        data, times = file.read_bytes(), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
        try:
            file.write_bytes(data + b" ")
            assert "changed" in requests.get(at.url + found["photo"]).json()["error"]["message"]
            file.unlink()
            assert requests.get(at.url + found["photo"]).status_code == 404
        finally:
            file.write_bytes(data)
            os.utime(file, ns=times)
        assert requests.get(at.url + found["photo"]).status_code == 200


def test_why(at: Served, localizer: Localizer, queries: list[Path]) -> None:
    data = queries[0].read_bytes()
    best = localizer.answer(data).matches[0]
    found = requests.post(f"{at.url}/v1/why?photo_id={best.database_id}", data=data).json()
    assert found["query"].startswith("data:image/webp;base64,")
    assert found["photo"].startswith("data:image/webp;base64,")
    assert found["pair_score"] == pytest.approx(best.pair_score, abs=1e-5)
    assert requests.post(f"{at.url}/v1/why?photo_id=999", data=data).status_code == 404


def test_tokens(localizer: Localizer, caplog: pytest.LogCaptureFixture) -> None:
    """Wrong, absent, of another scheme, in the address; what is free of it."""
    caplog.set_level(logging.DEBUG)
    with served({"one": localizer}, token=TOKEN) as at:
        for headers, status in (
            ({}, 401),
            ({"Authorization": "Bearer wrong"}, 401),
            ({"Authorization": TOKEN}, 401),
            ({"Authorization": f"Basic {TOKEN}"}, 401),
            ({"Authorization": f"Bearer {TOKEN}"}, 200),
            ({"Authorization": f"bearer  {TOKEN}"}, 200),
        ):
            answer = requests.get(f"{at.url}/v1/index", headers=headers)
            assert answer.status_code == status, headers
            assert ("WWW-Authenticate" in answer.headers) == (status == 401)
        assert requests.get(f"{at.url}/v1/index?token={TOKEN}").status_code == 400
        right = {"Authorization": f"Bearer {TOKEN}"}
        assert requests.get(f"{at.url}/v1/index?Access_Token=x", headers=right).status_code == 400
        for path in ("/v1/photos/0", "/readyz", "/metrics", "/docs", "/openapi.json"):
            assert requests.get(at.url + path).status_code == 401
        assert requests.post(f"{at.url}/v1/refresh").status_code == 401
        assert requests.get(f"{at.url}/healthz").status_code == 200
    assert TOKEN not in "".join(record.getMessage() for record in caplog.records if record.name.startswith("pairvpr"))


def test_looking_at_the_conditions_counts_as_time(
    localizer: Localizer, queries: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = threading.Event()
    monkeypatch.setattr(localizer, "check", lambda **_: may_end.wait(30))
    with served({"one": localizer}, ServeSettings(timeout_s=0.5)) as at:
        started_s = time.monotonic()
        answer = requests.post(f"{at.url}/v1/locate", data=queries[0].read_bytes())
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "too_late")
        assert time.monotonic() - started_s < 10
        may_end.set()


def test_a_client_that_hangs_up_is_no_bug(at: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with socket.create_connection(("127.0.0.1", at.port)) as client:
        client.sendall(b"POST /v1/locate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nhalf of it")
    wait_until(lambda: "POST /v1/locate 400" in caplog.text, "the end of the request", 30)
    assert "bug" not in caplog.text


def test_too_late_stops_the_work(folder: Path, queries: list[Path]) -> None:
    """504 comes in time, and the network has described no further candidate soon after."""
    rerank = RerankConfig(num_candidates=6, batch_size=1, num_threads_per_actor=1)
    localizer = Localizer.open(folder / "index", **{**OPTIONS, "rerank": rerank})
    network = localizer._network
    embedded, seen = network._pair_describer.embedded, []  # pyright: ignore[reportAttributeAccessIssue]

    def slow(pixels: Any) -> Any:
        seen.append(time.monotonic())
        time.sleep(0.3)
        return embedded(pixels)

    network._pair_describer.embedded = slow  # pyright: ignore[reportAttributeAccessIssue]
    with served({"one": localizer}, ServeSettings(timeout_s=0.5)) as at:
        started_s = time.monotonic()
        answer = requests.post(f"{at.url}/v1/locate", data=queries[0].read_bytes())
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "too_late")
        assert time.monotonic() - started_s < 0.8
        time.sleep(0.5)
        assert len(seen) <= 3  # of 6
        assert at.service.answering.num_inside == 0


class Held(Localizer):
    """Answers wait until `go`."""

    def hold(self, localizer: Localizer) -> Held:
        self.__dict__.update(localizer.__dict__)
        self.go, self.num_begun = threading.Event(), 0
        return self

    def _searched(self, *arguments: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.num_begun += 1
        deadline = next(each for each in arguments if isinstance(each, Deadline))
        while not self.go.wait(0.01):
            deadline.check()
        return super()._searched(*arguments)


@pytest.fixture
def held(localizer: Localizer) -> Held:
    return Held.__new__(Held).hold(localizer)


def wait_for(happened: Any) -> None:
    deadline = Deadline(20)
    while not happened():
        deadline.check()
        time.sleep(0.005)


def test_too_many_get_503_at_once(held: Held, queries: list[Path]) -> None:
    """Two compute and one waits; the others learn within 100 ms when to come again, before their body is read."""
    data = queries[0].read_bytes()
    with served({"one": held}, ServeSettings(num_at_once=2, max_waiting=1)) as at, ThreadPoolExecutor(3) as threads:
        accepted = [threads.submit(requests.post, f"{at.url}/v1/locate", data=data) for _ in range(3)]
        wait_for(lambda: at.service.answering.num_inside == 3)
        for _ in range(20):
            started_s = time.monotonic()
            answer = requests.post(f"{at.url}/v1/locate", data=data)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "busy")
            assert time.monotonic() - started_s < 0.1
            assert int(answer.headers["Retry-After"]) >= 1
        text = requests.get(f"{at.url}/metrics").text
        assert "pairvpr_waiting_requests 1.0" in text
        assert 'pairvpr_requests_total{route="/v1/locate",status="503"} 20.0' in text
        held.go.set()
        assert [each.result().status_code for each in accepted] == [200, 200, 200]


def test_connections_are_limited(held: Held, queries: list[Path]) -> None:
    data = queries[0].read_bytes()
    with served({"one": held}, ServeSettings(max_connections=2)) as at, ThreadPoolExecutor(2) as threads:
        accepted = [threads.submit(requests.post, f"{at.url}/v1/locate", data=data) for _ in range(2)]
        wait_for(lambda: held.num_begun == 2)
        answer = requests.get(f"{at.url}/healthz")
        assert (answer.status_code, "serve.max_connections" in answer.text) == (503, True)
        held.go.set()
        assert [each.result().status_code for each in accepted] == [200, 200]
        assert requests.get(f"{at.url}/healthz").status_code == 200


def test_a_client_that_is_gone_stops_its_work(held: Held, queries: list[Path]) -> None:
    data = queries[0].read_bytes()
    with served({"one": held}) as at:
        with pytest.raises(requests.ReadTimeout):
            requests.post(f"{at.url}/v1/locate", data=data, timeout=0.3)
        wait_for(lambda: at.service.answering.num_inside == 0)
        held.go.set()


def test_slow_bodies_get_408(localizer: Localizer) -> None:
    """And cost no thread meanwhile: others are answered."""
    settings = ServeSettings(body_timeout_s=0.3)
    with served({"one": localizer}, settings) as at, socket.create_connection(("127.0.0.1", at.port)) as slow:
        slow.sendall(b"POST /v1/locate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nabc")
        assert requests.get(f"{at.url}/healthz").status_code == 200
        slow.settimeout(5)
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")


def test_shutting_down_answers_what_was_accepted(held: Held, queries: list[Path]) -> None:
    data = queries[0].read_bytes()
    with ThreadPoolExecutor(4) as threads:
        with served({"one": held}, ServeSettings(num_at_once=2, max_waiting=8)) as at:
            accepted = [threads.submit(requests.post, f"{at.url}/v1/locate", data=data) for _ in range(4)]
            wait_for(lambda: at.service.answering.num_inside == 4)
            threading.Timer(0.2, held.go.set).start()
        assert [each.result().status_code for each in accepted] == [200] * 4


def test_a_store_that_fails_is_503(folder: Path, queries: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    """Neither the answer nor the log holds a path or a traceback; the request's id is in both."""
    caplog.set_level(logging.DEBUG)
    localizer = Localizer.open(folder / "index", **OPTIONS)

    def fail(*_: Any) -> Any:
        raise OSError(5, "Input/output error", str(folder / "index"))

    localizer._now.shards.search = fail  # pyright: ignore[reportAttributeAccessIssue]
    with served({"one": localizer}) as at:
        headers = {"X-Request-Id": "mine-1"}
        answer = requests.post(f"{at.url}/v1/locate", data=queries[0].read_bytes(), headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        localizer._now.shards.search = lambda *_: [][0]  # pyright: ignore[reportAttributeAccessIssue]
        bug = requests.post(f"{at.url}/v1/locate", data=queries[0].read_bytes(), headers=headers)
        assert (bug.status_code, bug.json()["error"]["request_id"]) == (500, "mine-1")
    assert "bug in the program: IndexError in " in caplog.text
    for text in (answer.text, bug.text, "\n".join(record.getMessage() for record in caplog.records)):
        assert "mine-1" in text
        assert str(folder) not in text
        assert "Traceback" not in text


def test_photos_are_kept_only_if_told(localizer: Localizer, queries: list[Path], tmp_path: Path) -> None:
    data = queries[0].read_bytes()
    with served({"one": localizer}, ServeSettings(keep_photos=str(tmp_path / "kept"))) as at:
        assert requests.post(f"{at.url}/v1/locate", data=data).status_code == 200
    assert [file.read_bytes() for file in (tmp_path / "kept").iterdir()] == [data]


def test_openapi_says_every_unit(at: Served) -> None:
    """Each field of each answer and each parameter is described; numbers with their unit."""
    api = requests.get(f"{at.url}/openapi.json").json()
    described = [
        parameter
        for route in api["paths"].values()
        for its in route.values()
        for parameter in its.get("parameters", [])
    ]
    assert all("description" in parameter or parameter["name"] == "photo_id" for parameter in described)
    objects = {"Utm", "Position", "Candidate", "Seconds", "Answer", "Index", "Why", "Model"}
    for name in objects:
        for key, value in api["components"]["schemas"][name]["properties"].items():
            assert "description" in value or "$ref" in json.dumps(value), (name, key)
    assert "degrees" in api["components"]["schemas"]["Candidate"]["properties"]["latitude"]["description"].lower()
    page = requests.get(f"{at.url}/docs").text
    assert "//" not in page.replace("</", "").split("<script")[1].split(">")[0]
