"""Asks a service (`pairvpr serve`) where photos were taken. Needs the standard library alone.

    client = Client("http://127.0.0.1:8000")
    answer = client.locate("photo.jpg", near=(37.78, -122.41), radius_m=200)
    print(answer.answer.path, answer.confidence)

A service that is busy or can't be reached is asked again until the deadline (docs/serving.md).
"""

from __future__ import annotations

import dataclasses
import email.utils
import io
import json
import math
import os
import random
import selectors
import socket
import ssl
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from functools import cache, partial
from http.client import HTTP_PORT, HTTPS_PORT, HTTPConnection, HTTPException, HTTPResponse, IncompleteRead
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack
from urllib.parse import SplitResult, urlencode, urlsplit

from pairvpr.errors import UserError

T = TypeVar("T")

AGAIN = {408, 429, 502, 503, 504}
"""Statuses of a service, or of a proxy before it, that another attempt may mend."""
OF_A_LOST_REPLICA = 500
"""What Ray Serve's proxies say, without the service's JSON, where a replica died with the request."""
AGAIN_IN_A_BATCH = {"busy", "too_late", "unavailable"}
"""The service's codes of such a status, which one photo of a batch may get."""
FIRST_WAIT_S, MOST_WAIT_S = 0.1, 5.0
"""The random wait before attempt n + 1 is below `FIRST_WAIT_S` times 2 to the n, and below `MOST_WAIT_S`."""
A_DAY_S = 86_400.0
"""The longest single wait: operating systems refuse much longer ones."""
MOST_ANSWER_BYTES, PIECE_BYTES = 256 << 20, 1 << 20
"""Of a body: a thousand photos with a hundred candidates each take less. It is read in pieces."""
UNREACHABLE, NO_SERVICE = "unreachable", "no_service"
"""Codes where there is no service that could give one."""
EXPECTED = {
    "index": "a name",
    "near": "(latitude, longitude) in degrees",
    "box": "the south-west and the north-east corner, each (latitude, longitude) in degrees",
}
"""What a condition must be; of all others a finite number."""


class ServiceError(UserError):
    """The service refused: its one line for people."""

    def __init__(self, message: str, code: str, status: int | None = None, request_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        """The service's word for it, such as broken_image."""
        self.status = status
        """HTTP status, None without an answer."""
        self.request_id = request_id
        """Finds the request in the service's log."""

    def __reduce__(self) -> tuple[type[ServiceError], tuple[str, str, int | None, str | None]]:
        return type(self), (str(self), self.code, self.status, self.request_id)


class NoAnswerError(ServiceError):
    """No answer before the deadline; code, status and request id are those of the last attempt."""


class Conditions(TypedDict, total=False):
    """What may be asked with a photo; what is left out is as the service has it."""

    index: str
    """Name of one of the service's indices; `*` asks all of them together."""
    k: int
    """How many candidates are answered."""
    num_candidates: int
    """How many of the nearest photos are re-ranked."""
    near: tuple[float, float]
    """(latitude, longitude) in degrees, from which photos may be `radius_m` away."""
    radius_m: float
    box: tuple[tuple[float, float], tuple[float, float]]
    """South-west and north-east corner, (latitude, longitude) in degrees each."""
    heading_deg: float
    """Viewing direction, clockwise from north, from which those of photos may differ by `within_deg`."""
    within_deg: float
    min_confidence: float
    """Below it the answer is that the photo is not in the map."""


@dataclass(frozen=True, slots=True)
class UtmPosition:
    """Metres in a UTM zone; `zone` and `is_south` are None where the index's zone is unknown."""

    zone: int | None
    is_south: bool | None
    east_m: float
    north_m: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """A photo of the map that may show the same place."""

    rank: int
    """From 1, best first."""
    index: str
    photo_id: int
    path: str
    latitude: float | None
    """Degrees of WGS84; None if the photo's position or the index's UTM zone is unknown."""
    longitude: float | None
    utm: UtmPosition | None
    heading_deg: float | None
    """Viewing direction, clockwise from north; None if unknown."""
    squared_distance: float
    pair_score: float | None
    confidence: float | None
    """Probability that it shows the place; None without a calibration."""
    photo: str
    """Path of its thumbnail on the service: `Client.photo` reads it."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Where the photo was taken, as estimated from the photos near the best candidate."""

    latitude: float | None
    """Degrees of WGS84; None if the index's UTM zone is unknown."""
    longitude: float | None
    utm: UtmPosition
    spread_m: float
    """Root mean square distance of the photos that agree on it, in metres; 0 of a single one."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the service says of one photo."""

    request_id: str
    index: str
    """Name of the index that was asked; `*` for all of them."""
    generation: int | None
    """None where several indices were asked."""
    generations: Mapping[str, int]
    """Of each index that was asked, by name."""
    model: Mapping[str, str]
    """The network that describes photos: `name` and `weights_sha256`."""
    pair_model: Mapping[str, str]
    """The network that scores pairs, in the same form."""
    answer: Candidate | None
    """The best candidate; None if nothing was found, or the photo is not in the map."""
    in_map: bool | None
    """None without a calibration."""
    confidence: float | None
    position: Estimate | None
    candidates: Sequence[Candidate]
    """Best first."""
    seconds: Mapping[str, float]
    """By step, and in total."""


@dataclass(frozen=True, slots=True)
class IndexInfo:
    """An index of the service."""

    name: str
    num_photos: int
    generation: int
    kind: str
    model: Mapping[str, str]
    """The network that describes photos: `name` and `weights_sha256`."""
    pair_model: Mapping[str, str]
    """The network that scores pairs, in the same form."""
    has_positions: bool
    utm_zone: str | None
    """Such as 10N; None if unknown."""
    calibrated: bool
    """Whether answers have a confidence."""
    decision: str
    """What orders the candidates: pair, fused or consensus."""


class Client:
    """A service at `url`, such as http://127.0.0.1:8000. Threads may share a client.

    `token` is what `serve.token_file` contains. A call returns or raises after at most `deadline_s` seconds, attempts
    and waits together, and what the operating system takes to look up the host's name on top; `math.inf` never gives
    up. Raises `UserError` for an address that can't be one.
    """

    def __init__(self, url: str, *, token: str | None = None, deadline_s: float = 30.0) -> None:
        address = _address(url)
        if not (_is_number(deadline_s) and deadline_s > 0):
            raise UserError(f"deadline_s={deadline_s!r}: expected a number above 0")
        if token is not None and not (isinstance(token, str) and token.isascii() and token.isprintable() and token):
            raise UserError("expected a token of printable ASCII, as serve.token_file contains")
        self._url = f"{address.scheme}://{address.netloc}{address.path.rstrip('/')}"
        self._root = address.path.rstrip("/")
        is_tls = address.scheme == "https"
        if is_tls:
            _tls()  # here, so that no call's deadline has to wait for it
        port = address.port or (HTTPS_PORT if is_tls else HTTP_PORT)
        self._connection = partial(_Connection, address.hostname or "", port, is_tls)
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._deadline_s = float(deadline_s)
        self._idle: deque[_Connection] = deque()

    def locate(self, photo: str | os.PathLike[str] | bytes, **conditions: Unpack[Conditions]) -> Answer:
        """Where a photo (path, or the bytes of an image file) was taken. What is left out is as the service has it.

        Raises `ServiceError` if the service refuses, `NoAnswerError` if no answer came in time, `UserError` for a file
        that can't be read and for conditions that can't be sent.
        """
        target = f"/v1/locate{_query(conditions)}"
        body, until = _bytes_of(photo), self._until()
        return _answer(self._asked("POST", target, until, body, "application/octet-stream"))

    def locate_batch(
        self, photos: Sequence[str | os.PathLike[str] | bytes], **conditions: Unpack[Conditions]
    ) -> list[Answer | ServiceError]:
        """`locate` of several photos in one request, under the same conditions.

        A photo that the service refuses has the error in its place. One that it had no time for is sent again, without
        the others, until the deadline. Raises as `locate` where the whole request is refused or not answered.
        """
        target, contents = f"/v1/locate/batch{_query(conditions)}", [_bytes_of(photo) for photo in photos]
        until, attempt = self._until(), 0
        found = self._batch(target, contents, until)
        while again := [number for number, its in enumerate(found) if _may_be_mended(its)]:
            attempt += 1
            if not _has_waited(attempt, 0.0, until):
                break
            try:
                answers = self._batch(target, [contents[number] for number in again], until)
            except ServiceError as error:
                answers = [error] * len(again)
            for number, its in zip(again, answers, strict=True):
                found[number] = its
        return found

    def _batch(self, target: str, photos: Sequence[bytes], until: float) -> list[Answer | ServiceError]:
        """What one request for all the photos says of each."""
        boundary = uuid.uuid4().hex
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="photo"; filename="%d"\r\n\r\n'
        parts = [(head % number).encode() + photo + b"\r\n" for number, photo in enumerate(photos)]
        body = b"".join([*parts, f"--{boundary}--\r\n".encode()])
        kind = f"multipart/form-data; boundary={boundary}"
        answers = _field(self._asked("POST", target, until, body, kind), "answers")
        if len(answers) != len(photos):
            raise ServiceError(f"{len(answers)} answers; expected one for each of {len(photos)} photos", NO_SERVICE)
        return [_error(its["error"], None) if "error" in its else _answer(its) for its in answers]

    def indices(self) -> list[IndexInfo]:
        """The indices of the service."""
        return [_made(IndexInfo, its) for its in _field(self._asked("GET", "/v1/index", self._until()), "indices")]

    def photo(self, candidate: Candidate) -> bytes:
        """The thumbnail of a candidate, an image file."""
        return self._ask("GET", candidate.photo, self._until())

    def _until(self) -> float:
        """When a call that begins now must end."""
        return time.monotonic() + self._deadline_s

    def _asked(
        self, method: str, target: str, until: float, body: bytes | None = None, content_type: str | None = None
    ) -> Any:
        """What the JSON of a good answer says."""
        answered = self._ask(method, target, until, body, content_type)
        try:
            return json.loads(answered)
        except ValueError as error:
            raise ServiceError(f"{self._url}: answered no JSON; expected a service of pairvpr", NO_SERVICE) from error

    def _ask(
        self, method: str, target: str, until: float, body: bytes | None = None, content_type: str | None = None
    ) -> bytes:
        """The body of a good answer; asks again, after a wait, what another attempt may mend."""
        attempt = 0
        headers = self._headers | ({} if content_type is None else {"Content-Type": content_type})
        while True:
            attempt, retry_after_s = attempt + 1, 0.0
            try:
                response = self._once(method, target, body, headers, until)
            except (OSError, HTTPException) as error:
                refusal = ServiceError(f"{type(error).__name__}: {error}".rstrip(": "), UNREACHABLE)
            else:
                if response.status == 200:
                    return response.body
                refusal = response.refusal(self._url)
                is_of_a_proxy = response.status == OF_A_LOST_REPLICA and refusal.code == NO_SERVICE
                if response.status not in AGAIN and not is_of_a_proxy:
                    raise refusal
                retry_after_s = response.retry_after_s
            if not _has_waited(attempt, retry_after_s, until):
                raise NoAnswerError(
                    f"{self._url}: no answer within {self._deadline_s:g} s, {attempt} attempts; the last: {refusal}",
                    refusal.code,
                    refusal.status,
                    refusal.request_id,
                ) from refusal

    def _once(
        self, method: str, target: str, body: bytes | None, headers: Mapping[str, str], until: float
    ) -> _Response:
        """One attempt, over a connection of an earlier one if there is one that is still open."""
        connection = self._idle_or_new(until)
        try:
            if connection.sock is None:
                connection.connect()
            with suppress(
                BrokenPipeError, ConnectionResetError
            ):  # refused before it was read whole: the answer says why
                connection.request(method, self._root + target, body, dict(headers))
            response = connection.getresponse()
            answered = _Response(response.status, dict(response.headers.items()), _body_of(response, self._url))
        except BaseException:
            connection.close()
            raise
        if connection.sock is not None:
            self._idle.append(connection)
        return answered

    def _idle_or_new(self, until: float) -> _Connection:
        while self._idle:
            with suppress(IndexError):  # another thread took it
                connection = self._idle.pop()
                if connection.sock is not None and not _has_ended(connection.sock):
                    connection.ends(until)
                    return connection
                connection.close()  # the service closed it
        connection = self._connection()
        connection.ends(until)
        return connection


@dataclass(frozen=True)
class _Response:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def retry_after_s(self) -> float:
        """Retry-After: seconds, or a date; 0 where it is absent or neither."""
        text = next((value for name, value in self.headers.items() if name.lower() == "retry-after"), "0").strip()
        if text.isascii() and text.isdigit():
            return float(text)
        try:
            return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
        except (ValueError, OverflowError):
            return 0.0

    def refusal(self, url: str) -> ServiceError:
        """The error in it; of a proxy, or another service, its status."""
        try:
            return _error(json.loads(self.body)["error"], self.status)
        except (ValueError, TypeError, KeyError):
            message = f"{url}: HTTP status {self.status}; expected a service of pairvpr"
            return ServiceError(message, NO_SERVICE, self.status)


class _Connection(HTTPConnection):
    """Connects, sends and receives until a moment, however slowly that goes on; then raises `TimeoutError`."""

    def __init__(self, host: str, port: int, is_tls: bool) -> None:
        super().__init__(host, port)
        self.default_port = HTTPS_PORT if is_tls else HTTP_PORT  # which the header Host leaves out
        self._is_tls, self._until = is_tls, math.inf

    def ends(self, until: float) -> None:
        """The next request ends at `until`."""
        self._until = until
        self.response_class = partial(_PatientResponse, until=until)  # type: ignore[assignment]

    def connect(self) -> None:
        """Connect to the first of the host's addresses that answers."""
        self.sock = _connected(self.host, self.port, self._until)
        if self._is_tls:
            self.sock.settimeout(_left_s(self._until))
            self.sock = _tls().wrap_socket(self.sock, server_hostname=self.host)

    def send(self, data: bytes) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Send all of it. `sendall` would give each record of TLS the whole time."""
        left = memoryview(data)
        while left:
            self.sock.settimeout(_left_s(self._until))
            left = left[self.sock.send(left) :]


@cache
def _tls() -> ssl.SSLContext:
    """What checks a service's certificate. Reading this machine's list of authorities may take a second."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def _connected(host: str, port: int, until: float) -> socket.socket:
    """A connection to the first of the host's addresses that answers; each may take its share of the time left."""
    _left_s(until)
    addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    refusal = OSError(f"{host}: no address")
    for number, (family, kind, protocol, _, address) in enumerate(addresses):
        try:
            return _connected_to(address, (family, kind, protocol), _left_s(until) / (len(addresses) - number))
        except OSError as error:
            refusal = error
    raise refusal


def _connected_to(address: Any, kind: tuple[int, int, int], timeout_s: float) -> socket.socket:
    sock = socket.socket(*kind)
    try:
        sock.settimeout(timeout_s)
        sock.connect(address)
        with suppress(OSError):  # some systems know no TCP_NODELAY
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        sock.close()
        raise
    return sock


def _body_of(response: HTTPResponse, url: str) -> bytes:
    """The whole body. Raises `ServiceError` for one above `MOST_ANSWER_BYTES`."""
    body, piece = bytearray(), b"-"
    while piece:
        if len(body) + (response.length or 0) > MOST_ANSWER_BYTES:
            why = f"{url}: the answer has more than {MOST_ANSWER_BYTES >> 20} MiB; expected a service of pairvpr"
            raise ServiceError(why, NO_SERVICE, response.status)
        piece = response.read(PIECE_BYTES)
        body += piece
    if response.length:
        raise IncompleteRead(bytes(body), response.length)
    return bytes(body)


class _PatientResponse(HTTPResponse):
    """Read until a moment, however slowly the bytes come."""

    def __init__(self, sock: socket.socket, *args: Any, until: float, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp = io.BufferedReader(_Until(self.fp.detach(), sock, until))  # pyright: ignore[reportAttributeAccessIssue]


class _Until(io.RawIOBase):
    def __init__(self, raw: io.RawIOBase, sock: socket.socket, until: float) -> None:
        self._raw, self._sock, self._until = raw, sock, until

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int | None:
        self._sock.settimeout(_left_s(self._until))
        return self._raw.readinto(buffer)  # pyright: ignore[reportAttributeAccessIssue]

    def close(self) -> None:
        self._raw.close()
        super().close()


def _address(url: str) -> SplitResult:
    with suppress(ValueError, TypeError, AttributeError):
        its = urlsplit(url)
        host, is_plain = its.hostname or "", url.isprintable() and " " not in url and its.path.isascii()
        host.encode("idna")  # a name that no host can have is a ValueError
        if its.scheme in ("http", "https") and host and is_plain and its.port != 0 and not (its.query or its.username):
            return its
    raise UserError(f"{url!r}: expected the address of a service, such as http://127.0.0.1:8000")


def _left_s(until: float) -> float:
    """How long a socket may wait. Raises `TimeoutError` where the time is over."""
    left_s = until - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("timed out")
    return min(left_s, A_DAY_S)


def _has_waited(attempt: int, retry_after_s: float, until: float) -> bool:
    """Wait after attempt number `attempt` (from 1); False, at once, if the next one would come after `until`."""
    wait_s = random.uniform(0, min(MOST_WAIT_S, FIRST_WAIT_S * 2 ** min(attempt - 1, 16))) + retry_after_s
    if time.monotonic() + wait_s >= until:
        return False
    time.sleep(min(wait_s, A_DAY_S))
    return True


def _has_ended(sock: socket.socket) -> bool:
    """Whether the other side closed an idle connection: there is something to read on it."""
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        return bool(selector.select(0))


def _query(conditions: Mapping[str, Any]) -> str:
    """The query string; positions and corners become numbers with commas between them."""
    unknown = set(conditions) - Conditions.__optional_keys__
    if unknown:
        raise UserError(f"{min(unknown)}: expected one of {', '.join(sorted(Conditions.__optional_keys__))}")
    texts = {name: _text(name, value) for name, value in conditions.items() if value is not None}
    return f"?{urlencode(texts, safe=',')}" if texts else ""


def _text(name: str, value: Any) -> bytes:
    """A condition as the service reads it."""
    try:
        if name == "index":
            return str.encode(value)
        if name == "near":
            latitude, longitude = value
            numbers = [latitude, longitude]
        elif name == "box":
            (south, west), (north, east) = value
            numbers = [south, west, north, east]
        else:
            numbers = [value]
        return ",".join(map(_without_exponent, numbers)).encode()
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{name}={value!r}: expected {EXPECTED.get(name, 'a finite number')}") from error


def _without_exponent(number: Any) -> str:
    """A finite number in plain digits, at most twenty of them after the point; four fit into the service's limit."""
    if not _is_number(number) or not math.isfinite(number):
        raise ValueError
    return str(int(number)) if isinstance(number, Integral) else f"{Decimal(repr(round(float(number), 20))):f}"


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _may_be_mended(its: Answer | ServiceError) -> bool:
    return isinstance(its, ServiceError) and its.code in AGAIN_IN_A_BATCH


def _bytes_of(photo: str | os.PathLike[str] | bytes) -> bytes:
    if isinstance(photo, bytes | bytearray | memoryview):
        return bytes(photo)
    try:
        return Path(photo).read_bytes()
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{photo}: {getattr(error, 'strerror', None) or error}; expected a photo") from error


def _error(content: Mapping[str, Any], status: int | None) -> ServiceError:
    return ServiceError(str(content["message"]), str(content["code"]), status, content.get("request_id"))


def _answer(content: Any) -> Answer:
    best, position = _field(content, "answer"), _field(content, "position")
    return _made(
        Answer,
        content,
        answer=None if best is None else _candidate(best),
        position=None if position is None else _made(Estimate, position, utm=_utm(position)),
        candidates=[_candidate(its) for its in _field(content, "candidates")],
    )


def _candidate(content: Any) -> Candidate:
    return _made(Candidate, content, utm=_utm(content))


def _utm(content: Any) -> UtmPosition | None:
    utm = _field(content, "utm")
    return None if utm is None else _made(UtmPosition, utm)


def _made(kind: type[T], content: Any, **known: Any) -> T:
    """A dataclass of the fields of a JSON object; the service may know more of them."""
    names = [its.name for its in dataclasses.fields(kind)]  # pyright: ignore[reportArgumentType]
    return kind(**{name: known[name] if name in known else _field(content, name) for name in names})


def _field(content: Any, name: str) -> Any:
    try:
        return content[name]
    except (TypeError, KeyError) as error:
        raise ServiceError(f"the answer has no {name}; expected a service of this version", NO_SERVICE) from error
