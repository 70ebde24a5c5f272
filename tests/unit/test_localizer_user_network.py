"""`Localizer` with a network of the user's in front of the pair step, compared with the pipeline without an index."""

from __future__ import annotations

import math
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch

from pairvpr import DescriptorConfig, Localizer, SearchConfig, UserError
from pairvpr.config.serve_schema import ServeConfig, ServedIndexConfig
from pairvpr.data.manifest import Benchmark, folder_manifest
from pairvpr.index.generations import read_manifest
from pairvpr.localizer import local_shards
from pairvpr.models.weights import build_model, find_weights, load_weights
from pairvpr.opened import network_of
from pairvpr.retrieval import pipeline
from pairvpr.retrieval.user_network import UserDescriber, find_user_network
from pairvpr.serving.opening import Opening
from pairvpr.toy import city as toy_city
from tests.support.browser import browser, require_browser, until, visited
from tests.support.served import served
from tests.support.small import small_evaluate_config
from tests.support.user_networks import SIDE_PX, WIDTH

CONFIG = small_evaluate_config("unused", num_candidates=5)
WIDE = DescriptorConfig(module="tests.support.user_networks:wide", image_size_px=SIDE_PX)
LARGE = DescriptorConfig(module="tests.support.user_networks:of_any_side", image_size_px=SIDE_PX + 12)
"""Its photos are not those of the pair network: pixels of one are no pixels of the other."""
MISSPELT = DescriptorConfig(module="tests.support.user_networks:wild", image_size_px=SIDE_PX)
SQUARED = DescriptorConfig(module="tests.support.user_networks:squared", image_size_px=SIDE_PX)
SECTIONS: dict[str, Any] = {
    "model": CONFIG.model,
    "device": "cpu",
    "describe": CONFIG.describe,
    "search": SearchConfig(num_threads_per_actor=1),
    "rerank": CONFIG.rerank,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos, queries, and the photos' index; the second photo is broken."""
    root = tmp_path_factory.mktemp("user_network")
    for part, photos in (
        ("photos", toy_city.database_photos(seed=6, num_places=5, photos_per_place=3)),
        ("queries", toy_city.query_photos(seed=6, num_places=5, photos_per_place=1)),
    ):
        (root / part).mkdir()
        for photo in photos:
            toy_city.draw(photo, width_px=64, height_px=48).save(root / part / photo.path)
    broken = sorted((root / "photos").iterdir())[1]
    broken.write_bytes(broken.read_bytes()[:200])
    options: dict[str, Any] = {"model": CONFIG.model, "describe": CONFIG.describe, "device": "cpu", "descriptor": WIDE}
    Localizer.build(root / "photos", root / "index", **options)
    return root


def test_answers_are_those_of_the_pipeline(folder: Path) -> None:
    """Byte for byte, of several photos and of one, which passes through both networks."""
    localizer = Localizer.open(folder / "index", descriptor=WIDE, **SECTIONS)
    benchmark = Benchmark(
        name="query",
        database=folder_manifest(str(folder / "photos"), "photos"),
        queries=folder_manifest(str(folder / "queries"), "queries"),
        positives=None,
        protocol={},
    )
    model = build_model(CONFIG.model, load_weights(CONFIG.model), torch.device("cpu"))
    described_by = UserDescriber.built(find_user_network(WIDE, CONFIG.model), torch.device("cpu"))
    answers = pipeline.run(benchmark, model, CONFIG, user_network=described_by)
    photos = [benchmark.queries.url(image_id) for image_id in range(len(benchmark.queries))]
    for answer, matches in zip(answers, localizer.locate(photos, k=5), strict=True):
        assert isinstance(matches, list)
        assert [match.database_id for match in matches] == answer.reranked.tolist()
        assert [match.pair_score for match in matches] == answer.pair_scores.tolist()
        near = dict(zip(answer.candidates.tolist(), answer.squared_distances.tolist(), strict=True))
        assert [match.squared_distance for match in matches] == [near[match.database_id] for match in matches]
    rows = localizer.describe(photos[0])
    assert rows.shape == (1, WIDTH)
    np.testing.assert_allclose(np.linalg.norm(rows), 1, atol=1e-5)
    (alone,) = localizer.locate([photos[0]], k=1)
    assert isinstance(alone, list)
    assert alone[0].database_id == answers[0].reranked[0]


def test_one_photo_is_described_at_the_side_of_its_own_network(folder: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    options: dict[str, Any] = {"model": CONFIG.model, "describe": CONFIG.describe, "device": "cpu", "descriptor": LARGE}
    Localizer.build(folder / "photos", index, **options)
    localizer = Localizer.open(index, descriptor=LARGE, **SECTIONS)
    photo = sorted((folder / "queries").iterdir())[0]
    (nearest,) = localizer.retrieve(localizer.describe(photo), k=CONFIG.rerank.num_candidates)
    expected = {match.database_id: match.squared_distance for match in nearest}
    for found in (localizer.locate(photo, k=5), localizer.answer(photo, k=5).matches):
        assert {match.database_id: match.squared_distance for match in found} == expected


def test_another_network_or_none_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"was made with descriptor\.module=.*:wide; expected model=\.\.\., which"):
        Localizer.open(folder / "index")
    with pytest.raises(UserError, match=r"was made with model .*:wide and weights .*, not with .* and weights"):
        Localizer.open(folder / "index", **SECTIONS)
    with pytest.raises(UserError, match=r"another network: descriptor\.module .*:wide there, .*:squared now"):
        Localizer.open(folder / "index", descriptor=SQUARED, **SECTIONS)


def test_a_service_of_such_an_index(folder: Path) -> None:
    """Its answers are those of the Localizer, and name both networks. Without descriptor.module it does not start."""
    config = ServeConfig(
        index=ServedIndexConfig(path=str(folder / "index"), num_threads_per_actor=1),
        model=CONFIG.model,
        describe=CONFIG.describe,
        descriptor=WIDE,
        rerank=CONFIG.rerank,
    )
    opening = Opening.of(pickle.loads(pickle.dumps(config)))
    opening = pickle.loads(pickle.dumps(opening))
    network = opening.network(torch.device("cpu"))
    localizers = opening.localizers(network, lambda _: local_shards(config.index, math.inf))
    photo = sorted((folder / "queries").iterdir())[0].read_bytes()
    expected = Localizer.open(folder / "index", descriptor=WIDE, **SECTIONS).answer(photo, k=5).matches
    with served(localizers) as at:
        found = requests.post(f"{at.url}/v1/locate?k=5", data=photo, timeout=60).json()
        index = requests.get(f"{at.url}/v1/index", timeout=60).json()["indices"][0]
    assert [(each["photo_id"], each["pair_score"], each["squared_distance"]) for each in found["candidates"]] == [
        (match.database_id, match.pair_score, match.squared_distance) for match in expected
    ]
    for said in (found, index):
        assert said["model"] == {"name": WIDE.module, "weights_sha256": opening.first_stage.weights_sha256}
        assert said["pair_model"] == {
            "name": CONFIG.model.name,
            "weights_sha256": find_weights(CONFIG.model).sha256,
        }
    with pytest.raises(UserError, match=r"was made with model .*:wide and weights .*, not with .* and weights"):
        Opening.of(replace(config, descriptor=DescriptorConfig()))
    with pytest.raises(UserError, match=r"nowhere/there: no finished index there"):
        Opening.of(replace(config, index=ServedIndexConfig(path="nowhere/there"), descriptor=MISSPELT))
    with pytest.raises(UserError, match=r"^model\.weights=.*: they have changed since the service started"):
        replace(opening, weights_sha256="0" * 64).network(torch.device("cpu"))


@pytest.mark.slow
def test_the_page_names_both_networks(folder: Path) -> None:
    require_browser()
    named = {"theirs": Localizer.open(folder / "index", descriptor=WIDE, **SECTIONS)}
    with served(named) as at, browser() as running, visited(running, at.url) as seen:
        until(seen, "document.getElementById('facts').textContent")
        facts = seen.page.locator("#facts").text_content()
    assert facts.endswith(f"model {WIDE.module}, pairs scored by {CONFIG.model.name}")


def test_a_photo_that_the_network_fails_on(folder: Path) -> None:
    """Is refused in one line, which no client repeats; the next one is answered."""
    localizer = Localizer.open(folder / "index", descriptor=WIDE, **SECTIONS)
    photo = sorted((folder / "queries").iterdir())[0].read_bytes()
    network = localizer._network._describer._network  # type: ignore[attr-defined]
    with served({"one": localizer}) as at:
        for failing in (lambda _: 1 / 0, lambda photos: torch.zeros(len(photos), WIDTH), lambda photos: photos):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(network, "forward", failing)
                answer = requests.post(f"{at.url}/v1/locate", data=photo, timeout=60)
            assert answer.status_code == 422
            assert answer.json()["error"]["code"] == "not_described"
        assert requests.post(f"{at.url}/v1/locate", data=photo, timeout=60).status_code == 200


def test_threads_share_a_network_that_keeps_something_of_a_call() -> None:
    """As networks do whose features are taken by a hook."""

    class Kept(torch.nn.Module):
        def forward(self, photos: torch.Tensor) -> torch.Tensor:
            self.kept = photos.flatten(1)[:, :4].clone()
            time.sleep(0.002)
            return self.kept + 1

    photos = np.random.default_rng(0).integers(256, size=(8, SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    about = find_user_network(WIDE, CONFIG.model)
    describer = UserDescriber(replace(about, width=4), Kept().eval(), torch.device("cpu"))
    expected = [describer.descriptors(photo[None]) for photo in photos]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda number: describer.descriptors(photos[number % 8][None]), range(80)))
    for number, rows in enumerate(found):
        np.testing.assert_array_equal(rows, expected[number % 8])


def test_an_index_of_a_file_is_refused(folder: Path) -> None:
    """Nothing in a Localizer makes such rows of a photo."""
    manifest = read_manifest(str(folder / "index"))
    assert manifest is not None
    of_file = replace(manifest, model={"name": "descriptors", "weights_sha256": ""})
    with pytest.raises(UserError, match="has descriptors of a file, and a Localizer describes photos by a network"):
        network_of(str(folder / "index"), of_file, CONFIG.model)
