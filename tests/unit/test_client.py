"""The client against a server that refuses, hangs up, drips and lies. The real one: test_client_and_service.py."""

from __future__ import annotations

import email
import email.policy
import pickle
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from fractions import Fraction
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest

from pairvpr import client as module
from pairvpr.client import Client, NoAnswerError, ServiceError
from pairvpr.errors import UserError
from tests.support.scripted_server import deaf, error, hang_up, reply, scripted

UTM = {"zone": 10, "is_south": False, "east_m": 551000.5, "north_m": 4180000.25}
CANDIDATE = {
    "rank": 1, "index": "sf", "photo_id": 17, "path": "a/b.jpg", "latitude": 37.78, "longitude": -122.41, "utm": UTM,
    "heading_deg": None, "squared_distance": 0.5, "pair_score": 3.25, "confidence": 0.9,
    "photo": "/v1/photos/17?index=sf",
}  # fmt: skip
ANSWER = {
    "request_id": "r1", "index": "sf", "generation": 3, "generations": {"sf": 3},
    "model": {"name": "tiny", "weights_sha256": "ab"}, "pair_model": {"name": "tiny", "weights_sha256": "ab"},
    "answer": CANDIDATE, "in_map": True, "confidence": 0.9,
    "position": {"latitude": 37.78, "longitude": -122.41, "utm": UTM, "spread_m": 3.5},
    "candidates": [CANDIDATE], "seconds": {"total": 0.5}, "a_field_of_a_later_version": 1,
}  # fmt: skip
GOOD = reply(200, ANSWER)


def drip(connection: Any) -> None:
    """A byte every 50 ms, for ever, which no timeout of a single read ends."""
    for byte in b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10_000:
        connection.sendall(bytes([byte]))
        time.sleep(0.05)


def drip_body(connection: Any) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n")
    drip(connection)


def cut_short(connection: Any) -> None:
    connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"request')
    hang_up(connection)


def silent(connection: Any) -> None:
    time.sleep(30)


def test_a_typed_answer() -> None:
    with scripted([GOOD]) as server:
        answer = Client(server.url + "/", token="secret").locate(b"photo", near=(37.78, -122.41), radius_m=200)
    assert answer.answer == answer.candidates[0]
    assert answer.answer is not None
    assert (answer.answer.path, answer.answer.confidence) == ("a/b.jpg", 0.9)
    assert answer.position is not None
    assert answer.position.utm == module.UtmPosition(**UTM)
    assert (answer.generation, answer.model["name"], answer.seconds["total"]) == (3, "tiny", 0.5)
    line, *headers = server.heads[0].split("\r\n")
    assert line == "POST /v1/locate?near=37.78,-122.41&radius_m=200 HTTP/1.1"
    assert "Authorization: Bearer secret" in headers
    assert server.bodies == [b"photo"]


def test_conditions_are_those_of_the_contract(tmp_path: Path) -> None:
    (tmp_path / "a b.jpg").write_bytes(b"x")
    with scripted([GOOD]) as server:
        Client(server.url + "/behind/a/proxy").locate(
            tmp_path / "a b.jpg", index="s&f=1/ü", k=3, num_candidates=20, box=((37.1, -122.5), (37.2, -122.25)),
            heading_deg=90, within_deg=30.5, min_confidence=0.25,
        )  # fmt: skip
    address = urlsplit(server.heads[0].split()[1])
    assert address.path == "/behind/a/proxy/v1/locate"
    assert parse_qs(address.query) == {
        "index": ["s&f=1/ü"], "k": ["3"], "num_candidates": ["20"], "box": ["37.1,-122.5,37.2,-122.25"],
        "heading_deg": ["90"], "within_deg": ["30.5"], "min_confidence": ["0.25"],
    }  # fmt: skip


def test_numbers_have_no_exponent_and_none_is_left_out() -> None:
    with scripted([GOOD]) as server:
        client = Client(server.url)
        numbers: dict[str, Any] = {
            "near": np.array([5e-05, -1e-7]), "radius_m": 1e20, "box": ((-0.0, 2e-05), (np.float32(0.5), 5e-324)),
            "heading_deg": np.int64(90), "within_deg": Fraction(1, 4), "min_confidence": 1e-9, "k": np.int32(3),
        }  # fmt: skip
        client.locate(b"photo", **numbers)
        none: dict[str, Any] = dict.fromkeys(module.Conditions.__optional_keys__)
        client.locate(b"photo", **none)
    first, second = (urlsplit(head.split()[1]).query for head in server.heads)
    assert parse_qs(first) == {
        "near": ["0.00005,-0.0000001"], "radius_m": ["100000000000000000000"], "box": ["-0.0,0.00002,0.5,0.0"],
        "heading_deg": ["90"], "within_deg": ["0.25"], "min_confidence": ["0.000000001"], "k": ["3"],
    }  # fmt: skip
    assert second == ""


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("near", 5, "(latitude, longitude) in degrees"),
        ("near", "1,2", "(latitude, longitude) in degrees"),
        ("near", (1, float("nan")), "(latitude, longitude) in degrees"),
        ("near", (1, 2, 3), "(latitude, longitude) in degrees"),
        ("box", (1, 2, 3, 4), "the south-west and the north-east corner"),
        ("box", ((1, 2), (3, "4\n")), "the south-west and the north-east corner"),
        ("box", ((1, 2), None), "the south-west and the north-east corner"),
        ("radius_m", float("inf"), "a finite number"),
        ("radius_m", 10**400, "a finite number"),
        ("heading_deg", "90", "a finite number"),
        ("k", True, "a finite number"),
        ("index", 7, "a name"),
        ("index", "\ud800", "a name"),
    ],
)
def test_conditions_that_cannot_be_sent(name: str, value: Any, expected: str) -> None:
    condition: dict[str, Any] = {name: value}
    client = Client("http://127.0.0.1:1")
    for ask in (lambda: client.locate(b"photo", **condition), lambda: client.locate_batch([b"photo"], **condition)):
        with pytest.raises(UserError, match=f"^{name}=.*: expected {re.escape(expected)}") as caught:
            ask()
        assert "\n" not in str(caught.value)


LOST = reply(500, b"Internal Server Error")
"""What Serve's proxies say where a replica died with a request; a bug in the service has its JSON."""


@pytest.mark.parametrize(
    "bad", [hang_up, cut_short, reply(502, b"<html>"), LOST, error(504, "timeout"), error(503, "busy")]
)
def test_what_another_attempt_mends(bad: Any) -> None:
    with scripted([bad, bad, GOOD]) as server:
        assert Client(server.url).locate(b"photo").request_id == "r1"
    assert server.bodies == [b"photo"] * 3


@pytest.mark.slow
def test_retry_after_is_honoured() -> None:
    later = formatdate(time.time() + 3, usegmt=True)  # whole seconds: between two and three from now
    with scripted([error(503, "busy", Retry_After="1"), error(503, "busy", Retry_After=later), GOOD]) as server:
        started = time.monotonic()
        Client(server.url).locate(b"photo")
        assert time.monotonic() - started >= 1.9


def test_nothing_is_waited_for_that_comes_after_the_deadline() -> None:
    with scripted([error(503, "busy", "3 requests wait", Retry_After="60")]) as server:
        started = time.monotonic()
        with pytest.raises(
            NoAnswerError, match="no answer within 5 s, 1 attempts; the last: 3 requests wait"
        ) as caught:
            Client(server.url, deadline_s=5).locate(b"photo")
        assert time.monotonic() - started < 1
    assert (caught.value.code, caught.value.status, caught.value.request_id) == ("busy", 503, "id-busy")


@pytest.mark.parametrize("bad", [drip, drip_body, silent])
def test_the_deadline_ends_everything(bad: Any) -> None:
    with scripted([bad]) as server:
        started = time.monotonic()
        with pytest.raises(NoAnswerError, match=r"no answer within 0\.4 s"):
            Client(server.url, deadline_s=0.4).locate(b"photo")
        assert 0.3 < time.monotonic() - started < 1.5


def flood(head: bytes, piece: bytes, for_s: float = 4.0) -> Any:
    """An answer that goes on for `for_s` seconds, fast."""

    def reply(connection: Any) -> None:
        connection.sendall(head)
        until = time.monotonic() + for_s
        while time.monotonic() < until:
            connection.sendall(piece)
        hang_up(connection)

    return reply


LARGE, OK = 1 << 22, b"HTTP/1.1 200 OK\r\n"
FLOODS = [
    flood(OK + b"\r\n", b"x" * LARGE),
    flood(OK + b"Content-Length: %d\r\n\r\n" % 10**30, b"x" * LARGE),
    flood(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"%x\r\n%s\r\n" % (LARGE, b"x" * LARGE)),
    flood(OK + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % 10**30, b"x" * LARGE),
]
INTERIM = flood(b"", b"HTTP/1.1 100 Continue\r\n\r\n")


@pytest.mark.parametrize("bad", [*FLOODS[::2], INTERIM])
def test_the_deadline_ends_what_never_pauses(bad: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read finds bytes at once, so that no timeout of a single read ends it."""
    monkeypatch.setattr(module, "MOST_ANSWER_BYTES", 1 << 60)  # which loopback can reach before the deadline
    with scripted([bad]) as server:
        started = time.monotonic()
        with pytest.raises(NoAnswerError, match=r"no answer within 0\.4 s"):
            Client(server.url, deadline_s=0.4).locate(b"photo")
        assert time.monotonic() - started < 1.5


@pytest.mark.parametrize("bad", FLOODS)
def test_a_body_is_bounded(bad: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ANSWER_BYTES", 4 << 20)
    with scripted([bad]) as server:
        with pytest.raises(ServiceError, match="the answer has more than 4 MiB; expected a service") as caught:
            Client(server.url).locate(b"photo")
        assert len(server.heads) == 1
    assert (caught.value.code, caught.value.status) == ("no_service", 200)


@pytest.mark.parametrize("num_bytes", [0, 1, module.PIECE_BYTES, module.PIECE_BYTES + 1, 4 << 20])
@pytest.mark.parametrize("form", ["length", "chunked", "closed"])
def test_a_body_arrives_whole(num_bytes: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ANSWER_BYTES", 4 << 20)
    body = b"".join(b"%07x\n" % number for number in range(num_bytes // 8 + 1))[:num_bytes]
    chunks = [body[first : first + 700_000] for first in range(0, num_bytes, 700_000)]
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    sent = {
        "length": b"Content-Length: %d\r\n\r\n%s" % (num_bytes, body),
        "chunked": b"Transfer-Encoding: chunked\r\n\r\n" + chunked,
        "closed": b"\r\n" + body,
    }[form]

    def answer(connection: Any) -> None:
        connection.sendall(OK + sent)
        if form == "closed":
            hang_up(connection)

    with scripted([answer]) as server:
        client, candidate = Client(server.url), module._candidate(CANDIDATE)
        assert [client.photo(candidate), client.photo(candidate)] == [body] * 2
        assert server.num_connections == (2 if form == "closed" else 1)


def resolved_to(monkeypatch: pytest.MonkeyPatch, *urls: str) -> str:
    """The address of a host whose name stands for all of these servers' addresses, in this order."""
    ports = [urlsplit(url).port for url in urls]
    found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port)) for port in ports]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    return "http://several.example:8000"


def test_the_deadline_holds_for_all_addresses_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    with deaf() as url:
        several = resolved_to(monkeypatch, *[url] * 5)
        started = time.monotonic()
        with pytest.raises(NoAnswerError, match="the last: TimeoutError: timed out"):
            Client(several, deadline_s=0.5).locate(b"photo")
        assert 0.4 < time.monotonic() - started < 1.2


def test_an_address_that_does_not_answer_leaves_time_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted([GOOD]) as gone:
        refusing = gone.url
    with deaf() as url, scripted([GOOD]) as server:
        several = resolved_to(monkeypatch, url, refusing, server.url)
        assert Client(several, deadline_s=3).locate(b"photo").request_id == "r1"
        assert "Host: several.example:8000" in server.heads[0]


def test_sending_ends_at_the_deadline_that_connecting_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the time goes by on the first address; the second one takes the connection and reads nothing."""
    with deaf() as url, socket.create_server(("127.0.0.1", 0)) as unread:
        several = resolved_to(monkeypatch, url, f"http://127.0.0.1:{unread.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(NoAnswerError, match="the last: TimeoutError"):
            Client(several, deadline_s=2).locate(b"x" * 30_000_000)
        assert 1.9 < time.monotonic() - started < 3.7


def test_a_handshake_ends_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent_server:
        client = Client(f"https://127.0.0.1:{silent_server.getsockname()[1]}", deadline_s=0.4)
        started = time.monotonic()
        with pytest.raises(NoAnswerError, match="the last: TimeoutError"):
            client.indices()
        assert 0.3 < time.monotonic() - started < 1.5


@pytest.mark.parametrize("deadline_s", [float("inf"), 1e12])
def test_a_deadline_may_be_far_or_never(deadline_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeps: list[float] = []
    monkeypatch.setattr(module.time, "sleep", sleeps.append)
    with scripted([error(503, "busy"), error(503, "busy", Retry_After="1" + "0" * 11), GOOD]) as server:
        assert Client(server.url, deadline_s=deadline_s).locate(b"photo").request_id == "r1"
    assert sleeps[1] == module.A_DAY_S


def test_a_date_that_no_clock_has_is_no_wait() -> None:
    odd = "Mon, 01 Jan 99999999999999999999 00:00:00 GMT"
    with scripted([error(503, "busy", Retry_After=odd), GOOD]) as server:
        assert Client(server.url).locate(b"photo").request_id == "r1"


def test_nobody_there() -> None:
    with scripted([GOOD]) as server:
        url = server.url
    with pytest.raises(NoAnswerError, match="the last: ConnectionRefusedError") as caught:
        Client(url, deadline_s=0.3).locate(b"photo")
    assert (caught.value.code, caught.value.status) == ("unreachable", None)
    assert "\n" not in str(caught.value)


def test_waits_are_random_and_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    monkeypatch.setattr(module.time, "monotonic", lambda: sum(waits))
    with scripted([error(503, "busy")]) as server, pytest.raises(NoAnswerError):
        Client(server.url, deadline_s=200).locate(b"photo")
    bounds = [min(module.MOST_WAIT_S, module.FIRST_WAIT_S * 2**number) for number in range(len(waits))]
    assert all(wait <= bound for wait, bound in zip(waits, bounds, strict=True))
    assert len(set(waits)) == len(waits) > 20
    assert max(waits[20:]) > 10 * max(waits[:2])


@pytest.mark.parametrize("status", [400, 401, 404, 405, 413, 415, 422, 500])
def test_a_refusal_is_not_asked_again(status: int) -> None:
    with scripted([error(status, "broken_image", "photo: no image")]) as server:
        with pytest.raises(ServiceError, match=r"^photo: no image$") as caught:
            Client(server.url).locate(b"photo")
        assert len(server.heads) == 1
    its = caught.value
    assert (its.code, its.status, its.request_id) == ("broken_image", status, "id-broken_image")
    again = pickle.loads(pickle.dumps(its))
    assert (str(again), again.code, again.status, again.request_id) == (str(its), its.code, status, its.request_id)


def test_a_refusal_before_the_photo_was_read() -> None:
    def refuse(connection: Any) -> None:
        error(413, "too_large", "at most 1 MiB")(connection)
        hang_up(connection)

    with scripted([refuse], reads_body=False) as server, pytest.raises(ServiceError, match="at most 1 MiB") as caught:
        Client(server.url, deadline_s=5).locate(b"x" * 30_000_000)
    assert caught.value.status == 413


def test_connections_are_kept_and_a_closed_one_costs_no_attempt() -> None:
    def last(connection: Any) -> None:
        GOOD(connection)
        hang_up(connection)

    with scripted([GOOD, last, GOOD]) as server:
        client = Client(server.url)
        client.locate(b"1")
        client.locate(b"2")
        assert server.num_connections == 1
        time.sleep(0.1)
        client.locate(b"3")
        assert server.num_connections == 2
    assert server.bodies == [b"1", b"2", b"3"]


def test_threads_share_a_client() -> None:
    with scripted([GOOD]) as server, ThreadPoolExecutor(8) as threads:
        client = Client(server.url)
        photos = [str(number).encode() for number in range(64)]
        assert {its.request_id for its in threads.map(client.locate, photos)} == {"r1"}
        assert sorted(server.bodies) == sorted(photos)
        assert server.num_connections <= 8


@pytest.mark.parametrize("content", [b"<html>", b"", b"[1]", {"index": "sf"}, ANSWER | {"candidates": [{"rank": 1}]}])
def test_somebody_elses_answer(content: Any) -> None:
    with scripted([reply(200, content)]) as server, pytest.raises(ServiceError, match="expected a service") as caught:
        Client(server.url).locate(b"photo")
    assert caught.value.code == "no_service"
    with scripted([reply(404, b"<html>")]) as server, pytest.raises(ServiceError, match="HTTP status 404; expected a"):
        Client(server.url).locate(b"photo")


def test_a_batch_has_an_error_in_the_place_of_a_photo() -> None:
    broken = {"error": {"code": "broken_image", "message": "no image", "request_id": "r2"}}
    with scripted([reply(200, {"request_id": "r", "answers": [ANSWER, broken]})]) as server:
        first, second = Client(server.url).locate_batch([b"one\r\n", b"\x00--two"], k=2)
    assert isinstance(first, module.Answer)
    assert isinstance(second, ServiceError)
    assert (second.code, str(second), second.request_id) == ("broken_image", "no image", "r2")
    assert server.heads[0].startswith("POST /v1/locate/batch?k=2 ")
    kind = next(line for line in server.heads[0].split("\r\n") if line.startswith("Content-Type"))
    parsed = email.message_from_bytes(kind.encode() + b"\r\n\r\n" + server.bodies[0], policy=email.policy.HTTP)
    parts = list(parsed.iter_parts())
    assert [part.get_param("name", header="content-disposition") for part in parts] == ["photo", "photo"]
    assert [part.get_payload(decode=True) for part in parts] == [b"one\r\n", b"\x00--two"]


def _batch(*each: Any) -> Any:
    """What a batch is answered; a text is the code of an error."""
    said = [{"error": {"code": its, "message": its}} if isinstance(its, str) else its for its in each]
    return reply(200, {"request_id": "r", "answers": said})


def _named(number: int) -> dict[str, Any]:
    return ANSWER | {"request_id": f"r{number}"}


def test_photos_of_a_batch_without_their_time_are_sent_again_alone() -> None:
    script = [
        _batch(_named(0), "busy", "broken_image", "too_late", "unavailable"),
        error(503, "busy"),
        _batch(_named(1), "busy", _named(4)),
        _batch(_named(3)),
    ]
    with scripted(script) as server:
        found = Client(server.url).locate_batch([b"%d-th" % number for number in range(5)], k=2)
    assert [its.request_id if isinstance(its, module.Answer) else its.code for its in found] == [
        "r0", "r1", "broken_image", "r3", "r4",
    ]  # fmt: skip
    sent = [re.findall(rb"(\d)-th", body) for body in server.bodies]
    assert sent == [[b"0", b"1", b"2", b"3", b"4"], [b"1", b"3", b"4"], [b"1", b"3", b"4"], [b"3"]]
    assert {head.split()[1] for head in server.heads} == {"/v1/locate/batch?k=2"}


@pytest.mark.parametrize(
    ("then", "code"), [(_batch("busy"), "busy"), (error(401, "unauthorized"), "unauthorized"), (silent, "unreachable")]
)
def test_what_a_batch_has_is_kept_at_the_deadline(then: Any, code: str) -> None:
    with scripted([_batch(_named(0), "busy"), then]) as server:
        started = time.monotonic()
        first, second = Client(server.url, deadline_s=0.6).locate_batch([b"0", b"1"])
        assert time.monotonic() - started < 2
    assert isinstance(first, module.Answer)
    assert isinstance(second, ServiceError)
    assert second.code == code


def test_a_batch_with_another_number_of_answers() -> None:
    with scripted([_batch(_named(0))]) as server, pytest.raises(ServiceError, match="1 answers; expected one for each"):
        Client(server.url).locate_batch([b"0", b"1"])


@pytest.mark.parametrize(
    "url",
    ["", "127.0.0.1:8000", "ftp://host", "http://", "http://host:port", "http://host:0", "http://user:pw@host",
     "http://host/?a=1", "http://[::1", "file:///etc/hosts", "http://a..b", "http://ho st", "http://h\x00st",
     "http://host/a b", "http://host/\u00fc", f"http://{'a' * 64}", None, 5, b"http://host"],
)  # fmt: skip
def test_addresses_that_are_none(url: Any) -> None:
    with pytest.raises(UserError, match="expected the address of a service"):
        Client(url)


def test_mistakes_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a token"):
        Client("http://127.0.0.1:1", token="two\r\nlines")
    for wrong in (float("nan"), 0, -1, "5", None, True):
        deadline_s: Any = wrong
        with pytest.raises(UserError, match=f"deadline_s={wrong!r}: expected a number above 0"):
            Client("http://127.0.0.1:1", deadline_s=deadline_s)
    number: Any = 5
    with pytest.raises(UserError, match="expected a token"):
        Client("http://127.0.0.1:1", token=number)
    client: Any = Client("http://127.0.0.1:1")
    with pytest.raises(UserError, match=r"nothing\.jpg: No such file or directory; expected a photo"):
        client.locate(tmp_path / "nothing.jpg")
    for wrong in (5, None, [b"photo"]):
        with pytest.raises(UserError, match="expected a photo"):
            client.locate(wrong)
    with pytest.raises(UserError, match="expected a photo"):
        client.locate_batch(b"photo")
    with pytest.raises(UserError, match="radius: expected one of box, heading_deg, index"):
        client.locate(b"photo", radius=3)


def test_it_needs_the_standard_library_alone() -> None:
    code = """
import sys
before = set(sys.modules)
import pairvpr.client
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new - sys.stdlib_module_names))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['pairvpr']"
