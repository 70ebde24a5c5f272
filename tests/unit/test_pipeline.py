"""Both steps on one machine: candidates equal brute force, and broken photos are no photos."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pairvpr.config.schema import DenseFeatures, ModelConfig
from pairvpr.data.benchmarks import load_benchmark, prepare_benchmark
from pairvpr.data.manifest import Benchmark, Manifest
from pairvpr.data.photo_batches import load_batch, num_batches
from pairvpr.errors import UserError
from pairvpr.models.pair_vpr import PairVPR, normalise
from pairvpr.models.weights import build_model, load_weights
from pairvpr.retrieval import pipeline
from pairvpr.retrieval.describe import Describer
from pairvpr.retrieval.rerank import WorkUnit
from pairvpr.toy import city as toy_city
from tests.support.small import SMALL_CITY, shaken_model, small_evaluate_config, small_model

BROKEN_QUERY, BROKEN_PHOTOS = 2, (0, 7, 17)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The pipeline sets torch's threads; other tests get theirs back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> PairVPR:
    """The small network, its weights shaken so that photos differ."""
    return shaken_model()


@pytest.fixture(scope="module")
def city(tmp_path_factory: pytest.TempPathFactory) -> Benchmark:
    """Six places; one query and three database photos are broken."""
    output = str(tmp_path_factory.mktemp("city"))
    prepare_benchmark(SMALL_CITY, output)
    benchmark = load_benchmark(SMALL_CITY, output)
    Path(benchmark.queries.url(BROKEN_QUERY)).write_text("not a photo")
    for image_id, damage in zip(BROKEN_PHOTOS, ("truncate", "remove", "empty"), strict=True):
        path = Path(benchmark.database.url(image_id))
        path.write_bytes(path.read_bytes()[:500] if damage == "truncate" else b"")
        if damage == "remove":
            path.unlink()
    return benchmark


def test_scaled_decoding_is_what_the_network_sees(tmp_path: Path, city: Benchmark) -> None:
    sizes = [(400, 300), (120, 90), (240, 500)]
    for number, (width_px, height_px) in enumerate(sizes):
        photo = toy_city.database_photos(seed=0, num_places=1)[number]
        toy_city.draw(photo, width_px=width_px, height_px=height_px).save(tmp_path / f"{number}.jpg", quality=90)
    photos = Manifest.of(str(tmp_path), [f"{number}.jpg" for number in range(len(sizes))])
    config = small_evaluate_config("unused")
    scaled = replace(config, model=replace(config.model, scaled_decoding=True))
    pixels = {}
    for is_on, settings in ((False, config), (True, scaled)):
        rows = []
        for number, denominator in enumerate((4, 1, 4) if is_on else (1, 1, 1)):
            with Image.open(tmp_path / f"{number}.jpg") as image:
                image.draft(None, (image.width // denominator, image.height // denominator))
                rows.append(np.asarray(image.resize((28, 28), Image.Resampling.BILINEAR)))
        pixels[is_on] = np.stack(rows)
        weights = load_weights(settings.model)
        describer = Describer(build_model(settings.model, weights, torch.device("cpu")))
        found = pipeline.describe(photos, describer, settings.describe)
        np.testing.assert_array_equal(found.descriptors, describer.descriptors(pixels[is_on]))
        reranker = pipeline.photo_reranker(replace(city, database=photos), describer, settings.rerank)
        for features, its in zip(reranker._database_features(range(3)), pixels[is_on], strict=True):
            np.testing.assert_array_equal(features, describer.embedded(its))
    assert [bool((pixels[True][i] != pixels[False][i]).any()) for i in range(3)] == [True, False, True]


def test_candidates_equal_brute_force(city: Benchmark, model: PairVPR) -> None:
    config = small_evaluate_config("unused", num_candidates=5, num_retrieved=10)
    answers = pipeline.run(city, model, config)
    describer = Describer(model)
    database = pipeline.describe(city.database, describer, config.describe)
    queries = pipeline.describe(city.queries, describer, config.describe)
    assert [answer.query_id for answer in answers] == list(range(len(city.queries)))
    for query_id, descriptor in zip(queries.ids, queries.descriptors, strict=True):
        answer = answers[query_id]
        distances = ((database.descriptors.astype(np.float64) - descriptor) ** 2).sum(axis=1)
        order = np.argsort(distances, kind="stable")[:10]
        assert (np.diff(distances[order]) > 1e-6).all()  # far enough apart for float32 to agree on the order
        assert answer.candidates.tolist() == database.ids[order].tolist()
        np.testing.assert_allclose(answer.squared_distances, distances[order], rtol=0, atol=1e-6)


def test_reranking_sorts_the_first_candidates_by_the_plain_networks_scores(city: Benchmark, model: PairVPR) -> None:
    config = small_evaluate_config("unused", num_candidates=5)

    def dense(manifest: Manifest, image_id: int) -> torch.Tensor:
        pixels = load_batch(manifest, image_id, 1, ModelConfig(image_size_px=28)).pixels
        with torch.no_grad():
            return model.describe(normalise(torch.from_numpy(pixels)))[1]

    for answer in pipeline.run(city, model, config):
        scores = {}
        for image_id in answer.candidates[:5].tolist():
            pair = dense(city.queries, answer.query_id), dense(city.database, image_id)
            scores[image_id] = float(model.pair_logits(*pair) + model.pair_logits(*pair[::-1]))
        assert answer.reranked.tolist() == sorted(scores, key=lambda image_id: -scores[image_id])
        np.testing.assert_allclose(answer.pair_scores, sorted(scores.values(), reverse=True), rtol=0, atol=1e-5)


def test_broken_photos_are_no_photos(city: Benchmark, model: PairVPR) -> None:
    config = small_evaluate_config("unused", num_candidates=100, num_retrieved=50)
    answers = pipeline.run(city, model, config)
    readable = sorted(set(range(len(city.database))) - set(BROKEN_PHOTOS))
    for answer in answers:
        expected = [] if answer.query_id == BROKEN_QUERY else readable
        assert sorted(answer.candidates.tolist()) == sorted(answer.reranked.tolist()) == expected
        assert len(answer.squared_distances) == len(answer.pair_scores) == len(expected)
    database = pipeline.describe(city.database, Describer(model), config.describe)
    assert database.ids.tolist() == readable
    assert sorted(database.rejected) == list(BROKEN_PHOTOS)
    assert "FileNotFoundError" in database.rejected[7]


def test_a_broken_photo_changes_no_neighbour(city: Benchmark, model: PairVPR) -> None:
    config = small_evaluate_config("unused")
    before = pipeline.describe(city.queries, Describer(model), config.describe)
    whole = Path(city.queries.url(BROKEN_QUERY + 1)).read_bytes()
    path = Path(city.queries.url(BROKEN_QUERY))
    path.write_bytes(whole)
    after = pipeline.describe(city.queries, Describer(model), config.describe)
    path.write_text("not a photo")
    assert after.ids.tolist() == list(range(len(city.queries)))
    np.testing.assert_array_equal(np.delete(after.descriptors, BROKEN_QUERY, axis=0), before.descriptors)
    np.testing.assert_allclose(np.linalg.norm(after.descriptors, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("part", ["database", "queries"])
def test_nothing_readable_gives_empty_answers(tmp_path: Path, city: Benchmark, model: PairVPR, part: str) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_text("not a photo")
    broken = Manifest.of(str(tmp_path), ["a.jpg", "b.jpg"])
    benchmark = replace(city, **{part: broken})
    answers = pipeline.run(benchmark, model, small_evaluate_config("unused"))
    assert len(answers) == len(benchmark.queries)
    assert all(len(answer.candidates) == len(answer.reranked) == 0 for answer in answers)


def test_the_cache_changes_no_bit(city: Benchmark, model: PairVPR) -> None:
    results = []
    for dense_features, cache_gib, num_threads in (("recompute", 0.5, 1), ("cache", 0.5, 1), ("cache", 3e-6, 3)):
        config = small_evaluate_config("unused")
        config.rerank.dense_features = DenseFeatures(dense_features)
        config.rerank.cache_gib, config.rerank.num_loading_threads = cache_gib, num_threads
        answers = pipeline.run(city, model, config)
        results.append([(answer.reranked.tobytes(), answer.pair_scores.tobytes()) for answer in answers])
    assert results[0] == results[1] == results[2]


def test_batches_are_cut_by_position(city: Benchmark) -> None:
    assert [num_batches(num_images, 4) for num_images in (0, 1, 4, 5, 18)] == [0, 1, 1, 2, 5]
    batch = load_batch(city.database, 4, 4, ModelConfig(image_size_px=28))
    assert (batch.first_id, batch.pixels.shape, batch.pixels.dtype) == (16, (2, 28, 28, 3), np.uint8)
    assert sorted(batch.rejected) == [17]
    assert not batch.pixels[1].any()
    ids, rows = batch.kept(np.array([[1.0], [2.0]], np.float32))
    assert (ids.tolist(), rows.tolist()) == ([16], [[1.0]])


@pytest.mark.parametrize("settings", [{}, {"second_direction": 2}, {"dense_features": DenseFeatures.cache}])
def test_a_candidate_that_is_gone_costs_itself_alone(
    city: Benchmark, model: PairVPR, settings: dict[str, object]
) -> None:
    """The others get the scores that they get beside it; it keeps the order of retrieval behind them, named."""
    config, gone = small_evaluate_config("unused").rerank, BROKEN_PHOTOS[1]
    for name, value in settings.items():
        setattr(config, name, value)
    unit = WorkUnit(0, {0: [gone, 1, 2, 3], 1: [2, gone, 3], 2: [3, 1]})
    reranker = pipeline.photo_reranker(city, Describer(model), config)
    found = {answer.query_id: answer for answer in reranker.rerank(unit)}
    assert list(reranker.lost_candidates) == [gone]
    assert f"{city.database.url(gone)}: FileNotFoundError" in reranker.lost_candidates[gone]
    for query_id in (0, 1):
        assert found[query_id].ids[-1] == gone
        assert np.isneginf(found[query_id].pair_scores).tolist() == [False] * (len(found[query_id].ids) - 1) + [True]
    present = WorkUnit(0, {query_id: [i if i != gone else 4 for i in ids] for query_id, ids in unit.candidates.items()})
    whole = pipeline.photo_reranker(city, Describer(model), config).rerank(present)
    if config.second_direction is None:
        for answer in whole:
            there = dict(zip(answer.ids.tolist(), answer.pair_scores.tolist(), strict=True))
            its = found[answer.query_id]
            for image_id, score in zip(its.ids.tolist(), its.pair_scores.tolist(), strict=True):
                assert image_id == gone or score == there[image_id]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_second_direction_is_that_of_the_best_who_are_there(city: Benchmark, model: PairVPR, number: int) -> None:
    """By the plain network, pair by pair: who is gone takes no place among those that are scored both ways."""
    config, gone = small_evaluate_config("unused").rerank, BROKEN_PHOTOS[1]
    config.second_direction = number
    candidates = [gone, 1, 2, 3, 4]
    (answer,) = pipeline.photo_reranker(city, Describer(model), config).rerank(WorkUnit(0, {0: candidates}))

    def dense(photos: Manifest, image_id: int) -> torch.Tensor:
        pixels = load_batch(photos, image_id, 1, ModelConfig(image_size_px=28)).pixels
        return model.describe(normalise(torch.from_numpy(pixels)))[1]

    with torch.no_grad():
        query = dense(city.queries, 0)
        features = {image_id: dense(city.database, image_id) for image_id in candidates[1:]}
        first = {image_id: float(model.pair_logits(query, its)) for image_id, its in features.items()}
        best = sorted(first, key=lambda image_id: -first[image_id])[:number]
        scores = {
            image_id: logit + (float(model.pair_logits(features[image_id], query)) if image_id in best else logit)
            for image_id, logit in first.items()
        }
    order = sorted(scores, key=lambda image_id: -scores[image_id])
    assert answer.ids.tolist() == [*order, gone]
    np.testing.assert_allclose(answer.pair_scores[:-1], [scores[image_id] for image_id in order], rtol=0, atol=1e-5)
    assert np.isneginf(answer.pair_scores[-1])


def test_a_candidate_that_has_changed_is_not_scored(city: Benchmark, model: PairVPR) -> None:
    config = small_evaluate_config("unused").rerank
    reranker = pipeline.photo_reranker(city, Describer(model), config, changed={2: "it has changed"})
    (answer,) = reranker.rerank(WorkUnit(0, {0: [2, 1, 3]}))
    assert (answer.ids[-1], np.isneginf(answer.pair_scores).sum()) == (2, 1)


def test_a_query_that_is_gone_has_no_answer_like_one_that_is_unreadable(city: Benchmark, model: PairVPR) -> None:
    photos = replace(city, queries=Manifest.of(city.queries.root, ["gone.jpg", *city.queries.paths[1:]]))
    reranker = pipeline.photo_reranker(photos, Describer(model), small_evaluate_config("unused").rerank)
    first, second = reranker.rerank(WorkUnit(0, {0: [1, 2], 1: [2, 3]}))
    assert (len(first.ids), len(second.ids), list(reranker.lost_queries)) == (0, 2, [0])


def test_weights_that_are_not_finite_are_a_users_mistake() -> None:
    network = small_model()
    network.globalizer[0].bias.fill_(float("nan"))  # type: ignore[union-attr,operator]
    with pytest.raises(UserError, match=r"descriptors of model small are not finite at model\.precision=fp32"):
        Describer(network).descriptors(np.zeros((1, 28, 28, 3), np.uint8))
