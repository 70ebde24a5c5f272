"""Passwords, tokens and signatures never reach a message, a log, a file of settings or a report."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairvpr.boundary import outcome_of
from pairvpr.config.compose import load
from pairvpr.config.schema import EvaluateConfig
from pairvpr.data import storage
from pairvpr.data.claim import check_claim, claim
from pairvpr.data.manifest import Manifest
from pairvpr.errors import IncompleteRunError, UserError
from pairvpr.models.weights_file import find_weights_file
from pairvpr.secrets import plain_without_secrets, without_secrets

SECRET = "hunter2SECRETxyz"
URLS = [
    f"https://user:{SECRET}@host/w.pth",
    f"https://{SECRET}@host/w.pth",
    f"s3://key:{SECRET}@bucket/w.pth",
    f"s3://key:a/{SECRET}/b@bucket/w.pth",
    f"https://host:8443/w.pth?X-Amz-Expires=60&X-Amz-Signature={SECRET}",
    f"https://host/w.pth?sig={SECRET}#part",
    f"https://host/w.pth?token={SECRET}",
    f"simplecache::s3://key:{SECRET}@bucket/w.pth",
    f"ftp://user:{SECRET}@10.0.0.1:21/w.pth",
]
TEXTS = [
    f"storage_options={{'key': 'k', 'secret': '{SECRET}'}}",
    f'{{"aws_secret_access_key": "{SECRET}"}}',
    f"Authorization: Bearer {SECRET}",
    f"password={SECRET}, retries=3",
    f"X-Amz-Security-Token: {SECRET}",
    f"account_key={SECRET}",
    f"private_key: {SECRET}",
    f"sas_token=sv=2020&sig={SECRET}%3D",
    f"{{'secret': 'two words {SECRET}'}}",
]
HARMLESS = [
    "/data/@0543210.12@4182345.67@.jpg: no such file",
    "s3://bucket/db/@543210@4182345@17@S@photo.jpg",
    "http://127.0.0.1:9000/bucket/@1@2@.jpg and s3://b/@3@4@.jpg",
    "hf://OWNER/NAME@main/w.pth: no such file",
    "error: output=s3://bucket/a: other settings made it; expected the same settings, or another directory?",
    "cluster.address=ray://host:10001: nothing answers there",
    "s3://bucket/a: NoCredentialsError: Unable to locate credentials",
    "a basic arrangement of tokens, one for each patch",
]


@pytest.mark.parametrize("text", [*URLS, *TEXTS, *(f"model.weights={url}: no such file" for url in URLS)])
def test_a_secret_is_hidden(text: str) -> None:
    hidden = without_secrets(text)
    assert SECRET not in hidden
    assert "***" in hidden
    assert without_secrets(hidden) == hidden


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret_stays(text: str) -> None:
    assert without_secrets(text) == text


LETTERS = st.text("abcdefghijkXYZ0123456789-_.~!$*+%", min_size=1, max_size=20)


@settings(max_examples=300)
@given(
    scheme=st.sampled_from(["https", "s3", "ftp", "gs", "abfs", "hdfs", "simplecache::s3"]),
    user=LETTERS,
    words=st.lists(st.sampled_from(["no such file:", "(", "'", '"', "error", "->"]), max_size=4),
    place=st.sampled_from(["password", "user", "query"]),
    noise=LETTERS,
)
def test_a_secret_is_hidden_wherever_it_stands_in_a_url(
    scheme: str, user: str, words: list[str], place: str, noise: str
) -> None:
    secret = f"{noise}SECRET{noise}"
    url = {
        "password": f"{scheme}://{user}:{secret}@host/{noise}",
        "user": f"{scheme}://{secret}@host:1234/{noise}",
        "query": f"{scheme}://host/{noise}?a={user}&{user}={secret}",
    }[place]
    assert "SECRET" not in without_secrets(" ".join([*words, url, *words]))
    assert "SECRET" not in without_secrets("".join([*words, url, *words]))


@pytest.mark.parametrize("url", URLS)
def test_nothing_that_leaves_a_job_holds_a_secret(url: str, tmp_path: Path) -> None:
    for error in (
        UserError(f"x={url}: wrong"),
        IncompleteRunError(url),
        storage.StorageError(url),
        OSError(2, url, url),
    ):
        assert SECRET not in str(outcome_of(error))
    error = UserError(f"x={url}: wrong")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    content = {"a": [url, {"b": url}], "c": 1}
    storage.write_json(f"{tmp_path}/metrics.json", content)
    claim(f"{tmp_path}/run", content, "output")
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 2
    assert not any(SECRET in text for text in written)
    check_claim(f"{tmp_path}/run", plain_without_secrets(content), "output")
    check_claim(f"{tmp_path}/run", content, "output")  # the same settings as before
    with pytest.raises(UserError, match=r"was made with different settings: c 1 there, 2 now"):
        check_claim(f"{tmp_path}/run", content | {"c": 2}, "output")
    assert json.loads((tmp_path / "metrics.json").read_text())["c"] == 1


@pytest.mark.parametrize("url", URLS)
def test_photos_lie_at_no_url_with_a_secret(url: str) -> None:
    with pytest.raises(UserError, match="a photo URL can't contain a password") as caught:
        Manifest.of(url, ["a.jpg"])
    assert SECRET not in str(caught.value)


def test_weights_at_a_url_with_a_secret_keep_it_to_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://user:{SECRET}@127.0.0.1:9/w.pth?sig={SECRET}"
    monkeypatch.setattr(storage, "NUM_TRIES", 1)
    with pytest.raises(
        UserError, match=r"^model\.weights=http://\*\*\*@127\.0\.0\.1:9/w\.pth\?\*\*\*: can't be read: "
    ) as caught:
        find_weights_file(url)
    assert SECRET not in str(caught.value)


def test_a_mistake_beside_a_secret() -> None:
    with pytest.raises(UserError) as caught:
        load(EvaluateConfig, ["benchmark=toy_city", f"output=s3://k:{SECRET}@b/${{x}}"])
    assert SECRET not in str(caught.value)
