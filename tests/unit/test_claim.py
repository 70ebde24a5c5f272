"""A directory belongs to the settings that made it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pairvpr.data import claim as claiming
from pairvpr.data import storage
from pairvpr.data.claim import check_claim, claim
from pairvpr.errors import UserError
from tests.support.claims import claim_twice_at_once, refuse_links, slow_down

SETTINGS: dict[str, Any] = {
    "model": {"name": "tiny", "encoder": {"depth": 2, "ffn": "mlp"}, "weights_sha256": "ab"},
    "index_num_shards": 3,
    "radius_m": 25.0,
    "positives": None,
    "sizes": [1, 2],
}


def changed(**values: Any) -> dict[str, Any]:
    return {**SETTINGS, **values}


def test_an_unclaimed_directory_is_free(tmp_path: Path) -> None:
    check_claim(str(tmp_path), SETTINGS, "output")
    check_claim(str(tmp_path / "missing"), SETTINGS, "output")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="expected a directory"):
        check_claim(str(tmp_path / "file"), SETTINGS, "output")


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_the_same_settings_pass_again(tmp_path: Path, kind: str) -> None:
    directory = str(tmp_path / "run") if kind == "local" else f"memory://{tmp_path.name}/claim"
    claim(directory, SETTINGS, "output")
    check_claim(directory, SETTINGS, "output")
    check_claim(directory, dict(reversed(SETTINGS.items())), "output")
    with pytest.raises(UserError):
        check_claim(directory, changed(index_num_shards=4), "output")


def test_every_difference_is_named_and_nothing_else(tmp_path: Path) -> None:
    claim(str(tmp_path), SETTINGS, "output")
    other = changed(index_num_shards=4, model={"name": "tiny", "encoder": {"depth": 3, "ffn": "mlp"}}, seed=7)
    with pytest.raises(UserError) as caught:
        check_claim(str(tmp_path), other, "index.path")
    assert str(caught.value) == (
        f"index.path={tmp_path} was made with different settings: index_num_shards 3 there, 4 now; "
        "model.encoder.depth 2 there, 3 now; model.weights_sha256 ab there, absent now; seed absent there, 7 now; "
        "expected the same settings or another directory"
    )


def test_a_second_claim_changes_nothing(tmp_path: Path) -> None:
    claim(str(tmp_path), SETTINGS, "output")
    before = (tmp_path / "settings.json").read_bytes()
    claim(str(tmp_path), SETTINGS, "output")
    with pytest.raises(UserError, match="index_num_shards 3 there, 4 now"):
        claim(str(tmp_path), changed(index_num_shards=4), "output")
    assert (tmp_path / "settings.json").read_bytes() == before


@pytest.mark.parametrize("content", ["{not json", "", "[]", "null"])
def test_a_damaged_claim_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "settings.json").write_text(content)
    for check in (check_claim, claim):
        with pytest.raises(UserError, match=r"settings\.json is damaged: .*; expected another output"):
            check(str(tmp_path), SETTINGS, "output")


def test_a_changed_byte_of_a_claim_is_named(tmp_path: Path) -> None:
    claim(str(tmp_path), SETTINGS, "output")
    data = (tmp_path / "settings.json").read_bytes()
    (tmp_path / "settings.json").write_bytes(data.replace(b'"radius_m": 25.0', b'"radius_m": 35.0'))
    with pytest.raises(UserError, match=r"settings\.json is damaged"):
        check_claim(str(tmp_path), changed(radius_m=35.0), "output")


def test_what_killed_writers_left_goes_when_it_is_old(tmp_path: Path) -> None:
    folder = tmp_path / "index" / "parts"
    folder.mkdir(parents=True)
    old, new = (folder / f".part.npz.{digit * 32}.tmp" for digit in "ab")
    others = [folder / name for name in (".part.npz.tmp", "part.npz", "old.tmp")]
    for file in (old, new, *others):
        file.touch()
    for file in (old, *others):
        os.utime(file, (0, 0))
    claim(str(tmp_path), SETTINGS, "output")
    assert old.exists()  # a directory claimed for the first time is left as it is
    claim(str(tmp_path), SETTINGS, "output")
    assert sorted(folder.iterdir()) == sorted([new, *others])


@pytest.mark.parametrize("num_pairs", [60, pytest.param(1000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("kind", ["local", "no links", "memory"])
def test_of_two_claims_at_once_one_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, num_pairs: int
) -> None:
    monkeypatch.setattr(claiming, "SECONDS_BETWEEN_LOOKS", 0.001)
    slow_down(monkeypatch, 0.001)
    if kind == "no links":
        monkeypatch.setattr(os, "link", refuse_links)
    root = f"memory://{tmp_path.name}-{num_pairs}" if kind == "memory" else str(tmp_path)
    outcomes = [claim_twice_at_once(f"{root}/{number}", 0.002, number) for number in range(num_pairs)]
    assert [True, True] not in outcomes
    assert sum(any(outcome) for outcome in outcomes) == num_pairs
    assert {0, 1} == {outcome.index(True) for outcome in outcomes}
    assert not [name for name in storage.list_files(root) if "/claims/" in name]


def test_a_claim_that_a_killed_run_announced_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claiming, "SECONDS_TO_WAIT", 0.0)
    directory = f"memory://{tmp_path.name}/killed"
    left = f"{directory}/claims/{'0' * 64}-{'1' * 32}.json"
    storage.write_bytes(left, b"{}")
    with pytest.raises(UserError, match=f"another run with different settings is claiming it now.*delete {left}"):
        claim(directory, SETTINGS, "output")
    storage.remove_file(left)
    claim(directory, SETTINGS, "output")
