"""`descriptor.module`: a network of the user's in front of the pair step, in every job, equals a plain computation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

from pairvpr import Localizer
from pairvpr.config.compose import load, load_evaluations
from pairvpr.config.networks import named_network
from pairvpr.config.schema import (
    BuildIndexConfig,
    DescribeConfig,
    DescriptorConfig,
    ModelConfig,
    PlanConfig,
    QueryConfig,
    RerankConfig,
    SearchConfig,
    UpdateIndexConfig,
)
from pairvpr.data.benchmarks import load_benchmark
from pairvpr.data.manifest import folder_manifest
from pairvpr.data.photo_batches import load_batch, num_batches
from pairvpr.errors import UserError
from pairvpr.evaluation.predictions import predictions_table, write_predictions
from pairvpr.models.weights import build_model, load_weights
from pairvpr.report.finished import open_run
from pairvpr.retrieval import pipeline
from pairvpr.retrieval.user_network import UserDescriber, find_user_network
from pairvpr.toy import city as toy_city
from ray_jobs.build_index import build_index
from ray_jobs.evaluate import evaluate
from ray_jobs.plan import plan
from ray_jobs.query import query
from ray_jobs.update_index import update_index
from tests.support.runs import SMALL_NETWORK, arguments, kill_when, start_job, wait_gone
from tests.support.user_networks import SIDE_PX, WIDTH, wide

pytestmark = pytest.mark.usefixtures("local_ray")

MODULES = "tests.support.user_networks"
WIDE = (f"descriptor.module={MODULES}:wide", f"descriptor.image_size_px={SIDE_PX}")
PASSES = ("describe.batch_size=4", "describe.num_threads_per_actor=1")
SHIFTS_PX = [(x, y) for x in (0, 9, 20) for y in (0, 5, 12)]
SOAK = pytest.mark.soak


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """540 database photos, nine pieces of each of 60 drawn ones, and 12 queries; the second one is broken."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "database").mkdir()
    (folder / "queries").mkdir()
    for number, photo in enumerate(toy_city.database_photos(seed=5, num_places=20, photos_per_place=3)):
        drawn = toy_city.draw(photo, width_px=96, height_px=72)
        for piece, (x, y) in enumerate(SHIFTS_PX):
            drawn.crop((x, y, x + 70, y + 56)).save(folder / "database" / f"{number:02d}_{piece}.jpg", quality=90)
    for number, photo in enumerate(toy_city.query_photos(seed=5, num_places=12, photos_per_place=1)):
        toy_city.draw(photo, width_px=96, height_px=72).save(folder / "queries" / f"{number:02d}.jpg", quality=90)
    (folder / "database" / "00_1.jpg").write_bytes((folder / "database" / "00_1.jpg").read_bytes()[:300])
    return folder


@pytest.fixture(scope="module")
def plain(many: Path) -> dict[str, NDArray[np.float32]]:
    """Rows of the readable photos of both folders by torch alone, one thread, batches of four."""
    torch.set_num_threads(1)
    network, rows = wide().eval(), {}
    channels = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    mean, std = (values.reshape(1, 3, 1, 1) for values in channels)
    for name in ("database", "queries"):
        photos, its = folder_manifest(str(many / name), name), []
        for number in range(num_batches(len(photos), 4)):
            batch = load_batch(photos, number, 4, ModelConfig(image_size_px=SIDE_PX, patch_size_px=14))
            pixels = torch.from_numpy(batch.pixels).permute(0, 3, 1, 2).to(torch.float32) / 255
            with torch.inference_mode():
                found = torch.nn.functional.normalize(network((pixels - mean) / std), dim=-1).numpy()
            its.append(batch.kept(found)[1])
        rows[name] = np.concatenate(its)
    return rows


@pytest.fixture(scope="module")
def line(many: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command of build_index: two actors, three shards, 8,448 values as 512. It was killed while it described."""
    output = tmp_path_factory.mktemp("index")
    found = [f"database={many}/database", f"output={output}", *WIDE, *PASSES, "describe.num_actors=2"]
    found += ["index.num_shards=3", "index.reduce_to=512", "index.target_recall=0.1", "cluster.num_cpus=4"]
    process = start_job("build_index", found)
    wait_gone(kill_when(process, lambda: len(list(output.glob("parts/*.npz"))) >= 4, "four parts"))
    assert not (output / "described.json").exists(), "killed too late"
    assert len(list(output.glob("parts/*.npz"))) >= 4
    return found


def described(index: str) -> NDArray[np.float32]:
    """All described rows."""
    return np.concatenate([np.load(file) for file in sorted(Path(index).glob("shards/*/descriptors.npy"))])


def known_to_localizer(index: str, **rerank: Any) -> Localizer:
    """The index opened in this process, without Ray, with the settings of `asked`."""
    return Localizer.open(
        index,
        model=named_network("tiny"),
        device="cpu",
        describe=DescribeConfig(batch_size=4, num_threads_per_actor=1),
        search=SearchConfig(num_threads_per_actor=1, num_probes=rerank.pop("num_probes", None)),
        rerank=RerankConfig(num_threads_per_actor=1, **rerank),
        descriptor=DescriptorConfig(module=f"{MODULES}:wide", image_size_px=SIDE_PX),
    )


def asked(index: str, many: Path, output: Path, *more: str) -> list[dict[str, Any]]:
    """What the job query answers."""
    its = [f"index.path={index}", f"queries={many}/queries", f"output={output}", *WIDE, *PASSES, "model=tiny"]
    its += ["rerank.num_candidates=6", "rerank.num_threads_per_actor=1", "index.num_threads_per_actor=1", *more]
    query(load(QueryConfig, its))
    return pq.read_table(output / "predictions.parquet").to_pylist()


@pytest.mark.parametrize(
    "kind",
    [
        "flat",
        pytest.param("flat_fp16", marks=SOAK),
        pytest.param("flat_8bit", marks=SOAK),
        pytest.param("ivf_fp16", marks=SOAK),
        pytest.param("ivf_8bit", marks=SOAK),
        pytest.param("ivf_rabitq", marks=SOAK),
    ],
)
def test_killed_resumed_reduced_indexed_and_re_ranked_equals_a_plain_computation(
    many: Path, plain: dict[str, NDArray[np.float32]], line: list[str], tmp_path: Path, kind: str
) -> None:
    """Rows byte for byte; distances of numpy's SVD; answers byte for byte those of one process without Ray."""
    is_flat = kind.startswith("flat")
    lists = [] if is_flat else ["index.num_lists=4"]
    index = build_index(load(BuildIndexConfig, [*line, f"index.kind={kind}", *lists]))
    assert described(index).tobytes() == plain["database"].tobytes()
    probes = [] if is_flat else ["index.num_probes=4"]
    rows = asked(index, many, tmp_path / "out", *probes)

    paths = sorted(str(photo) for photo in (many / "queries").iterdir())
    localizer = known_to_localizer(index, num_candidates=6, num_probes=None if is_flat else 4)
    for row, matches in zip(rows, localizer.locate(paths, k=6), strict=True):
        assert isinstance(matches, list)
        assert [match.database_id for match in matches] == row["reranked"]
        assert [np.float32(match.pair_score) for match in matches] == [np.float32(x) for x in row["pair_scores"]]
        near = dict(zip(row["candidates"], row["squared_distances"], strict=True))
        assert [match.squared_distance for match in matches] == [near[match.database_id] for match in matches]

    wide_rows = plain["database"].astype(np.float64)
    mean = wide_rows.mean(axis=0)
    _, spread, axes = np.linalg.svd(wide_rows - mean, full_matrices=False)
    there, here = ((some.astype(np.float64) - mean) @ (axes[:512].T / spread[:512]) for some in plain.values())
    there, here = (some / np.linalg.norm(some, axis=1, keepdims=True) for some in (there, here))
    ids = np.delete(np.arange(540), 1)  # the broken photo
    for row, query_row in zip(rows, here, strict=True):
        distances = dict(zip(ids.tolist(), ((there - query_row) ** 2).sum(axis=1), strict=True))
        expected = [distances[i] for i in row["candidates"]]
        np.testing.assert_allclose(row["squared_distances"], expected, atol=0.1 if "8bit" in kind else 1e-4)
        if kind == "flat":
            np.testing.assert_allclose(sorted(distances.values())[:6], expected, atol=1e-4)


def test_evaluate_and_report_take_it(city: Path, tmp_path: Path) -> None:
    """The predictions are those of the pipeline without Ray; without pairs nobody needs Pair-VPR's weights."""
    its = arguments(city, tmp_path / "out", *WIDE, "index.num_shards=2", "rerank.num_candidates=4")
    (content,) = evaluate(load_evaluations(its))
    (config,) = load_evaluations(its)
    benchmark = load_benchmark(config.benchmark, config.output)
    about = find_user_network(config.descriptor, config.model)
    described_by = UserDescriber.built(about, torch.device("cpu"), 1)
    model = build_model(config.model, load_weights(config.model), torch.device("cpu"))
    answers = pipeline.run(benchmark, model, config, user_network=described_by)
    write_predictions(str(tmp_path / "plain.parquet"), predictions_table(benchmark, answers, None))
    assert (tmp_path / "out" / "predictions.parquet").read_bytes() == (tmp_path / "plain.parquet").read_bytes()
    first = {"name": f"{MODULES}:wide", "descriptor_dim": WIDTH, "weights_sha256": about.weights_sha256}
    assert content["first_stage"] == first
    assert content["kib_per_image"]["descriptor"] == WIDTH * 4 / 1024
    assert open_run(str(tmp_path / "out")).metrics["first_stage"] == first


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking for Pair-VPR's weights fails the test."""
    monkeypatch.setattr("ray_jobs.run.find_weights", lambda _: pytest.fail("weights are looked for"))


@pytest.mark.usefixtures("no_weights")
def test_added_photos_are_described_by_it_and_others_are_refused(city: Path, tmp_path: Path) -> None:
    """An added photo has the row that the network gives it in this process."""
    names = sorted(path.name for path in (city / "database").iterdir() if "broken" not in path.name)
    (tmp_path / "some").mkdir()
    for name in names[:20]:
        (tmp_path / "some" / name).write_bytes((city / "database" / name).read_bytes())
    built = [f"database={tmp_path}/some", f"output={tmp_path}/index", *PASSES]
    index = build_index(load(BuildIndexConfig, [*built, *WIDE]))
    with pytest.raises(UserError, match=r"was made with different settings: descriptor\.module .*:wide there, .* now"):
        build_index(load(BuildIndexConfig, [*built, f"descriptor.module={MODULES}:squared", WIDE[1]]))
    (tmp_path / "add.txt").write_text(names[20])
    (tmp_path / "some" / names[20]).write_bytes((city / "database" / names[20]).read_bytes())
    added = [f"index.path={index}", f"add={tmp_path}/add.txt", *PASSES]
    others = {
        f"module {MODULES}:wide there, {MODULES}:squared now": [f"descriptor.module={MODULES}:squared", WIDE[1]],
        r"mean \[0.485, 0.456, 0.406\] there, \[0.0, 0.0, 0.0\] now": [*WIDE, "descriptor.mean=[0,0,0]"],
        "scaled_decoding absent there, True now": [*WIDE, "model.scaled_decoding=true"],
    }
    asked = [f"index.path={index}", f"queries={city}/queries", f"output={tmp_path}/out", "rerank.num_candidates=0"]
    for what, network in others.items():
        with pytest.raises(UserError, match=f"was made with another network: descriptor.{what}; expected the same"):
            update_index(load(UpdateIndexConfig, [*added, *network]))
        with pytest.raises(UserError, match=f"was made with another network: descriptor.{what}; expected the same"):
            query(load(QueryConfig, [*asked, *PASSES, *network]))
    manifest = update_index(load(UpdateIndexConfig, [*added, *WIDE]))
    row = np.load(Path(index) / manifest.shards[-1].files["descriptors.npy"].path)

    about = find_user_network(DescriptorConfig(module=f"{MODULES}:wide", image_size_px=SIDE_PX), ModelConfig())
    photo = load_batch(folder_manifest(str(tmp_path / "some"), "some"), 20, 1, about)
    assert UserDescriber.built(about, torch.device("cpu"), 1).descriptors(photo.pixels).tobytes() == row.tobytes()


def test_plan_counts_its_values() -> None:
    its = ["plan.num_images=1000", *WIDE, "plan.images_per_s=1", "index.memory_budget_gib=1", "index.reduce_to=512"]
    content = plan(load(PlanConfig, its))
    assert (content["model"], content["descriptor_dim"]) == (f"{MODULES}:wide", 512)
    assert content["descriptors_bytes"] == 1000 * WIDTH * 4


@pytest.mark.soak
def test_plan_measures_its_speed() -> None:
    its = ["plan.num_images=1000", *WIDE, *PASSES, "plan.calibration_photos=8", "index.memory_budget_gib=1"]
    assert plan(load(PlanConfig, its))["calibration"]["num_photos"] == 8


def test_one_thing_makes_descriptors(city: Path, tmp_path: Path) -> None:
    its = [f"database={city}/database", f"output={tmp_path}/i", *WIDE, "describe.descriptors=rows.npy", *SMALL_NETWORK]
    with pytest.raises(UserError, match=r"both make descriptors; expected one of them"):
        build_index(load(BuildIndexConfig, its))
