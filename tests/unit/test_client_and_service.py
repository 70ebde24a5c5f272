"""The clients (Python, JavaScript, curl as docs/serving.md has it) and the real service."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pairvpr import Localizer
from pairvpr.client import Answer, Client, Conditions, NoAnswerError, ServiceError
from pairvpr.config.serve_schema import ServeSettings
from pairvpr.errors import UserError
from pairvpr.where import Where
from tests.support.served import Served, served
from tests.unit.test_client_examples import locate_mjs
from tests.unit.test_localizer import folder, localizer, queries

__all__ = ["folder", "localizer", "queries"]
DOCS = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
TOKEN = "a-token-of-this-test"
SETTINGS = ServeSettings(max_body_bytes=1 << 20)


@pytest.fixture(scope="module")
def at(localizer: Localizer) -> Iterator[Served]:
    with served({"city": localizer}, SETTINGS, token=TOKEN) as service:
        yield service


@pytest.fixture(scope="module")
def client(at: Served) -> Client:
    return Client(at.url, token=TOKEN)


def test_typed_answers_are_those_of_the_localizer(client: Client, localizer: Localizer, queries: list[Path]) -> None:
    expected = localizer.answer(queries[0], k=3)
    best = expected.matches[0]
    for photo in (queries[0], str(queries[0]), queries[0].read_bytes()):
        answer = client.locate(photo, k=3)
        assert [(its.photo_id, its.pair_score, its.squared_distance) for its in answer.candidates] == [
            (match.database_id, match.pair_score, match.squared_distance) for match in expected.matches
        ]
        assert answer.answer == answer.candidates[0]
        assert answer.position is not None
        assert expected.position is not None
        assert (answer.position.latitude, answer.position.spread_m) == (
            expected.position.latitude,
            expected.position.spread_m,
        )
        assert (answer.generation, answer.generations, answer.index) == (1, {"city": 1}, "city")
    assert best.latitude is not None
    assert best.longitude is not None
    near = (best.latitude, best.longitude)
    box = ((near[0] - 1e-4, near[1] - 1e-4), (near[0] + 1e-4, near[1] + 1e-4))
    for found, where in (
        (client.locate(queries[0], near=near, radius_m=30), Where(near=near, radius_m=30)),
        (client.locate(queries[0], box=box), Where(box=box)),
    ):
        ids = [match.database_id for match in localizer.answer(queries[0], where=where).matches]
        assert [its.photo_id for its in found.candidates] == ids


def test_indices_thumbnails_and_a_batch(client: Client, localizer: Localizer, queries: list[Path]) -> None:
    (index,) = client.indices()
    assert (index.name, index.num_photos, index.utm_zone) == ("city", localizer.num_photos, "32N")
    first, broken = client.locate_batch([queries[0], b"no photo"], k=1)
    assert isinstance(first, Answer)
    assert isinstance(broken, ServiceError)
    assert (broken.code, first.candidates[0].photo_id) == ("not_an_image", localizer.locate(queries[0])[0].database_id)
    assert client.photo(first.candidates[0])[8:12] == b"WEBP"


def test_refusals_are_those_of_the_service(client: Client, at: Served, queries: list[Path]) -> None:
    for number in range(5):  # the refusal overtakes the body, whose rest is reset
        with pytest.raises(ServiceError, match=r"more than 1,048,576 bytes") as caught:
            client.locate(bytes([number]) * (20 << 20))
        assert (caught.value.status, caught.value.code) == (413, "too_large")
    with pytest.raises(ServiceError, match="Authorization: Bearer TOKEN") as caught:
        Client(at.url, token="another-token-of-this-test").locate(queries[0])
    assert caught.value.status == 401
    with pytest.raises(ServiceError, match="index=oslo: expected one of city") as caught:
        client.locate(queries[0], index="oslo")
    assert (caught.value.status, len(caught.value.request_id or "")) == (404, 16)


NUMBERS = st.one_of(st.floats(), st.integers(), st.floats(-180, 180), st.just(5e-05))
ANYTHING = st.recursive(
    st.one_of(NUMBERS, st.none(), st.booleans(), st.text(), st.binary(), st.fractions()),
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner),
    max_leaves=6,
)
PAIRS = st.tuples(NUMBERS, NUMBERS)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    conditions=st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(Conditions.__optional_keys__, ANYTHING)
        | {"near": ANYTHING | PAIRS, "box": ANYTHING | st.tuples(PAIRS, PAIRS)},
    ),
    batch=st.booleans(),
)
def test_whatever_is_asked_is_refused_in_a_line(client: Client, conditions: dict[str, Any], batch: bool) -> None:
    try:
        found = client.locate_batch([b"no photo"], **conditions) if batch else client.locate(b"no photo", **conditions)
    except UserError as error:
        found = error
    (refusal,) = found if isinstance(found, list) else (found,)
    assert isinstance(refusal, UserError)
    assert "\n" not in str(refusal)
    if isinstance(refusal, ServiceError):
        assert not isinstance(refusal, NoAnswerError), refusal
        assert refusal.code in ("not_an_image", "bad_parameter", "not_found"), refusal


@settings(max_examples=150, deadline=None)
@given(st.floats(-90, 90), st.floats(-180, 180), st.floats(1e-3, 1e8), st.floats(-360, 360), st.floats(1e-3, 360))
@example(5e-05, 9.0, 1e8, 1e-300, 1e-3)
@example(-5e-324, 9.0, 1e8, 5e-324, 360)
def test_every_place_on_earth_can_be_asked(
    client: Client, latitude: float, longitude: float, radius_m: float, heading_deg: float, within_deg: float
) -> None:
    """The photo is none, so that only conditions which the service accepts get as far as it."""
    near = (latitude, longitude)
    more: Any = {"heading_deg": heading_deg, "within_deg": within_deg}
    with pytest.raises(ServiceError, match=r"too far from UTM zone|no heading of its photos|not an image"):
        client.locate(b"no photo", near=near, radius_m=radius_m, box=(near, near), **more)


@pytest.mark.parametrize(
    ("near", "expected"),
    [
        ("5e-05,9", "not an image"),
        ("-5E-5,9.0e+0", "not an image"),
        ("1e999,9", "finite numbers"),
        *((wrong, "pattern") for wrong in ("1e,9", "e5,9", "1e5e5,9", "nan,9")),
    ],
)
def test_the_service_takes_exponents(at: Served, near: str, expected: str) -> None:
    request = urllib.request.Request(
        f"{at.url}/v1/locate?{urlencode({'near': near, 'radius_m': '1e3'})}", b"no photo",
        {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/octet-stream"},
    )  # fmt: skip
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    said = json.load(caught.value)["error"]["message"]
    assert expected in said


def test_a_service_that_is_gone(localizer: Localizer, queries: list[Path]) -> None:
    with served({"city": localizer}) as service:
        client = Client(service.url, deadline_s=0.5)
        client.locate(queries[0])
    with pytest.raises(NoAnswerError, match="no answer within"):
        client.locate(queries[0])


def test_javascript(at: Served, localizer: Localizer, queries: list[Path]) -> None:
    best = localizer.locate(queries[0], k=1)[0]
    done = locate_mjs(at.url, queries[0], token=TOKEN)
    assert done.stderr == ""
    assert done.stdout.split()[0] == best.path
    refused = locate_mjs(at.url, queries[0], token="wrong")
    assert (refused.returncode, "Authorization: Bearer TOKEN" in refused.stderr) == (1, True)


def test_the_curl_line_of_the_docs(at: Served, localizer: Localizer, queries: list[Path], tmp_path: Path) -> None:
    (line,) = re.findall(r"^curl --data-binary @photo\.jpg -H [^`]*?radius_m=200'$", DOCS.read_text(), re.M)
    best = localizer.locate(queries[0], k=1)[0]
    line = line.replace("http://127.0.0.1:8000", at.url).replace("37.78,-122.41", f"{best.latitude},{best.longitude}")
    shutil.copy(queries[0], tmp_path / "photo.jpg")
    (tmp_path / "token.txt").write_text(TOKEN + "\n")
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    answer = json.loads(done.stdout)
    assert answer["candidates"][0]["photo_id"] == best.database_id
    assert len(answer["candidates"]) == 3
