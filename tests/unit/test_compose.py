"""The command line becomes the dataclasses of the schema; every mistake becomes one line that helps."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast, get_type_hints

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.version import VersionBase
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version

from pairvpr.config import schema
from pairvpr.config.benchmark_schema import (
    BenchmarkConfig,
    BenchmarkJobConfig,
    FoldersConfig,
    MslsConfig,
    MslsSplit,
    MslsSubtask,
    NordlandConfig,
    PittsburghConfig,
    ToyCityConfig,
)
from pairvpr.config.compose import JOBS, help_text, load, load_evaluations
from pairvpr.config.schema import (
    BuildIndexConfig,
    CalibrateConfig,
    CheckBenchmarkConfig,
    EvaluateConfig,
    PlanConfig,
    QueryConfig,
    ReportConfig,
    UpdateIndexConfig,
)
from pairvpr.config.serve_schema import ServeConfig
from pairvpr.config.train_schema import (
    ExportWeightsConfig,
    SearchCheckpointsConfig,
    TrainStageOneConfig,
    TrainStageTwoConfig,
)
from pairvpr.errors import UserError
from pairvpr.models.pair_vpr import PairVPR
from tests.support.small import PUBLIC

TOY = ["benchmark=toy_city", "output=/out"]
FOLDERS = ["benchmark.database=/d", "benchmark.queries=/q"]


def evaluation(*arguments: str) -> EvaluateConfig:
    return load(EvaluateConfig, [*TOY, *arguments])


def mistake(*arguments: str) -> str:
    """The message for arguments that are wrong: one line, without the libraries' inner words."""
    with pytest.raises(UserError) as caught:
        load_evaluations(arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert not re.search(r"object_type|full_key|Traceback|DictConfig object", message)
    return message


def test_defaults_are_those_of_the_schema_and_the_tiny_model() -> None:
    config = evaluation()
    assert config.output == "/out"
    assert config.benchmark == ToyCityConfig(name="toy_city")
    assert (config.describe, config.index, config.rerank, config.cluster) == (
        schema.DescribeBothConfig(),
        schema.IndexConfig(),
        schema.RerankConfig(),
        schema.ClusterConfig(),
    )
    assert (config.model.name, config.model.image_size_px) == ("tiny", 84)
    assert config.model.weights is not None
    assert Path(config.model.weights).is_file()  # wherever the project is installed
    assert evaluation("model.weights=null").model.weights is None
    assert type(config.model.encoder.ffn) is schema.Ffn
    assert type(config.model.precision) is schema.Precision


def test_values_reach_their_fields_with_their_types() -> None:
    config = evaluation(
        "rerank.num_candidates=7",
        "rerank.cache_gib=0",
        "describe.num_actors=null",
        "model.precision=bf16",
        "model.encoder.ffn=swiglu",
        "benchmark.radius_m=10",
        "index.path=s3://bucket/index",
        "output='a b=c'",
        "model.weights=/w.pth",
    )
    assert config.rerank.num_candidates == 7
    assert isinstance(config.rerank.cache_gib, float)
    assert config.describe.num_actors is None
    assert config.model.precision is schema.Precision.bf16
    assert config.model.encoder.ffn is schema.Ffn.swiglu
    assert isinstance(config.benchmark, ToyCityConfig)
    assert config.benchmark.radius_m == 10.0
    assert (config.index.path, config.output, config.model.weights) == ("s3://bucket/index", "a b=c", "/w.pth")


def test_a_margin_is_for_pairs_scored_both_ways() -> None:
    message = mistake(*TOY, "rerank.calibration=/c", "rerank.adaptive=true", "rerank.second_direction=5")
    assert message.startswith("rerank.adaptive=true, rerank.second_direction=5: expected one of them")


def test_a_search_of_checkpoints_has_no_calibration() -> None:
    with pytest.raises(UserError, match=r"^rerank\.calibration=/c: a calibration is for one network"):
        load(SearchCheckpointsConfig, [*TOY, "checkpoints=/k", "rerank.calibration=/c"])


def test_the_last_of_two_equal_keys_wins() -> None:
    assert evaluation("rerank.batch_size=3", "rerank.batch_size=4").rerank.batch_size == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("benchmark=toycity", ["benchmark=toycity: unknown", "did you mean toy_city?", "eynsham, folders, msls_test"]),
        ("model=vitx", ["model=vitx: unknown", "tiny, vitb, vitg, vitl, vits"]),
        (
            "experiment=spede",
            ["experiment=spede: unknown", "did you mean speed?", "performance, sfxl_performance, sfxl_speed, speed"],
        ),
        ("model=null", ["model=", "tiny, vitb, vitg, vitl, vits"]),
        ("~model", ["tiny, vitb, vitg, vitl, vits"]),
        ("model={a:1}", ["tiny, vitb, vitg, vitl, vits"]),
        ("rerank.num_candidats=3", ["unknown key rerank.num_candidats", "did you mean rerank.num_candidates?"]),
        (
            "rerankk.batch_size=3",
            ["unknown key rerankk.batch_size", "did you mean rerank?", "descriptor, index"],
        ),
        ("model.encoder.dept=3", ["did you mean model.encoder.depth?", "model.encoder.num_heads"]),
        ("benchmark.database=/d", ["unknown key benchmark.database", "benchmark.num_places"]),
        ("rerank.batch_size.x=3", ["unknown key rerank.batch_size.x"]),
        ("hydra.run.dir=x", ["unknown key hydra.run.dir"]),
        ("+foo=1", ["unknown key foo", "output"]),
        ("++rerank.foo=1", ["unknown key rerank.foo", "rerank.batch_size"]),
        ("rerank=3", ["rerank is a section", "rerank.num_candidates=..."]),
        ("~rerank.batch_size", ["rerank.batch_size"]),
        ("model", ["'model'", "expected key=value"]),
        ("rerank.batch_size=1,2", ["rerank.batch_size", "'1,2'", "Integer"]),
        ("rerank.batch_size=0755", ["rerank.batch_size=0755", "without a leading 0"]),
        ("rerank.cache_gib=01.5", ["rerank.cache_gib=01.5", "without a leading 0"]),
        ("rerank.batch_size=0x1F", ["rerank.batch_size", "'0x1F'", "Integer"]),
        ("rerank.batch_size=1e3", ["rerank.batch_size", "'1000.0'", "Integer"]),
        ("rerank.adaptive=2", ["rerank.adaptive=2: expected true or false"]),
        ("rerank.adaptive='2'", ["rerank.adaptive='2': expected true or false"]),
        ("rerank.adaptive=null", ["rerank.adaptive"]),
        ("rerank.batch_size=abc", ["rerank.batch_size", "'abc'", "Integer"]),
        ("rerank.batch_size=2.5", ["rerank.batch_size", "'2.5'"]),
        ("rerank.batch_size=null", ["rerank.batch_size", "not Optional"]),
        ("rerank.batch_size=true", ["rerank.batch_size"]),
        ("model.precision=fp8", ["model.precision", "'fp8'", "fp32, bf16, fp16"]),
        ("model.encoder.ffn=relu", ["model.encoder.ffn", "mlp, swiglu"]),
        ("output='???'", ["missing: output=..."]),
        ("rerank.batch_size=0", ["rerank.batch_size=0: expected a number above 0"]),
        ("rerank.cache_gib=-1", ["rerank.cache_gib=-1.0: expected 0 or more"]),
        ("rerank.cache_gib=nan", ["rerank.cache_gib=nan"]),
        ("rerank.adaptive=true", ["rerank.adaptive is set without rerank.calibration", "pairvpr calibrate"]),
        ("rerank.not_in_map_below=0.5", ["rerank.not_in_map_below is set without rerank.calibration"]),
        ("rerank.not_in_map_below=1.5", ["rerank.not_in_map_below=1.5: expected a probability, 0 to 1"]),
        ("rerank.not_in_map_below=nan", ["rerank.not_in_map_below=nan: expected a probability, 0 to 1"]),
        ("index.num_shards=0", ["index.num_shards=0: expected a number above 0"]),
        ("index.num_retrieved=-5", ["index.num_retrieved=-5"]),
        ("describe.num_gpus_per_actor=-1", ["describe.num_gpus_per_actor=-1.0: expected 0 or more"]),
        (
            "describe.num_gpus_per_actor=1.5",
            ["describe.num_gpus_per_actor=1.5: expected", "and a whole number above 1"],
        ),
        ("rerank.num_gpus_per_actor=inf", ["rerank.num_gpus_per_actor=inf: expected 0 or more"]),
        ("rerank.num_gpus_per_actor=nan", ["rerank.num_gpus_per_actor=nan: expected 0 or more"]),
        ("cluster.num_cpus=0", ["cluster.num_cpus=0"]),
        ("benchmark.seed=-1", ["benchmark.seed=-1: expected 0 or more"]),
        ("benchmark.radius_m=0", ["benchmark.radius_m=0.0"]),
        ("model.image_size_px=100", ["model.image_size_px=100: expected a multiple of model.patch_size_px=14"]),
        ("model.encoder.pretrain_image_size_px=99", ["model.encoder.pretrain_image_size_px=99"]),
        ("model.encoder.num_heads=5", ["model.encoder.num_heads=5 does not divide model.encoder.embed_dim=96"]),
        ("model.encoder.num_trainable_blocks=9", ["model.encoder.num_trainable_blocks=9: expected 0 to depth=4"]),
        ("model.encoder.num_registers=-1", ["model.encoder.num_registers=-1: expected 0 or more"]),
        ("model.decoder.num_heads=5", ["model.decoder.num_heads=5 does not divide"]),
        ("model.decoder.embed_dim=90", ["model.decoder.embed_dim=90: expected a multiple of 4"]),
        ("output=${nope}", ["output=${nope}: '${' (interpolation) is not supported here"]),
        ("benchmark.seed=${oc.env:NOT_SET_ANYWHERE}", ["NOT_SET_ANYWHERE"]),
        ("model@encoder=vitb", ["model@encoder"]),
        ("benchmark@benchmark=toy_city", ["benchmark"]),
        ("~output", ["output"]),
    ],
)
def test_a_mistake_is_one_line_that_names_the_choices(argument: str, parts: list[str]) -> None:
    message = mistake(*TOY, argument)
    assert [part for part in parts if part not in message] == [], message


TEXTS = ["2026_11_26", "1.10", "0755", "yes", "[a", "1e3", "0x1F", "1_000", "off", "true", "nan", "[a]", "{a: 1}"]
TEXTS += ["a,b", "a=b", "a b", " a ", "it's", '"', "a\\'b", "a\\\\", "#x", "a # b", "f(1,2)", "@a@b", "%", "été", "${"]
JOBS_WITH_WHAT_THEY_NEED: dict[type, list[str]] = {
    EvaluateConfig: TOY,
    BuildIndexConfig: ["database=/d", "output=/o"],
    QueryConfig: ["index.path=/i", "queries=/q", "output=/o"],
    UpdateIndexConfig: ["index.path=/i", "add=/a"],
    PlanConfig: ["plan.num_images=1"],
    CheckBenchmarkConfig: ["benchmark=folders", *FOLDERS],
    CalibrateConfig: ["predictions=/p", "output=/o.json"],
    ReportConfig: ["run=/r"],
    TrainStageOneConfig: ["train=vitb", "train.root=/r", "output=/o"],
    TrainStageTwoConfig: ["train=vitb", "train.root=/r", "output=/o", "train.validation=toy_city"],
    SearchCheckpointsConfig: ["checkpoints=/c", *TOY],
    ExportWeightsConfig: ["checkpoint=/c", "output=/o.pth"],
    ServeConfig: ["index.path=/i"],
}


def settings_of(config: object, prefix: str = "") -> dict[str, tuple[Any, object]]:
    """Every setting of an object of the schema by its dotted name: its type and its value."""
    found = dict[str, tuple[Any, object]]()
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if is_dataclass(value):
            found |= settings_of(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = (kind, value)
    return found


@cache
def text_settings() -> list[tuple[type, str]]:
    """Every setting of type text of every job."""
    return [
        (job, key)
        for job, needed in JOBS_WITH_WHAT_THEY_NEED.items()
        for key, (kind, _) in settings_of(load(job, needed)).items()
        if kind in (str, str | None)
    ]


def check_text(job: type, key: str, text: str) -> bool:
    """Whether a text arrived as it was typed; it must be that, or refused in one line."""
    try:
        found = load(job, [*JOBS_WITH_WHAT_THEY_NEED[job], f"{key}={text}"])
    except UserError as error:
        message = str(error)
    else:
        kind, value = settings_of(found)[key]
        expected = text
        if key in ("output", "datasets_root") and not text.endswith("://"):
            expected = text.rstrip("/") or text
        if text.lower() == "null" and kind != str:  # noqa: E721
            expected = None
        if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" and value != text:  # quotation marks
            expected = text[1:-1].replace(f"\\{text[0]}", text[0]).replace("\\\\", "\\")
            assert isinstance(value, str)
            assert value.replace("\\", "") == expected.replace("\\", "")
            return True
        assert value == expected
        return True
    assert len(message.splitlines()) <= 1 or not text.isprintable(), message
    assert not re.search(r"object_type|full_key|Traceback|DictConfig object", message)
    return False


def test_there_are_no_other_jobs() -> None:
    assert JOBS_WITH_WHAT_THEY_NEED.keys() == JOBS.keys()


@pytest.mark.parametrize("num_texts", [5, pytest.param(len(TEXTS), marks=pytest.mark.soak)])
def test_a_text_setting_gets_the_characters_that_were_typed(num_texts: int) -> None:
    keys = ["output", "index.path", "model.weights", "model.name", "datasets_root"]
    arrived = [
        check_text(EvaluateConfig, keys[number % len(keys)], text) for number, text in enumerate(TEXTS[:num_texts])
    ]
    assert sum(arrived) >= num_texts - 1  # `${` is refused


@pytest.mark.slow
@pytest.mark.parametrize("num_examples", [10, pytest.param(4_000, marks=[pytest.mark.soak, pytest.mark.timeout(7200)])])
def test_any_text_arrives_or_is_refused(num_examples: int) -> None:
    """Some texts are refused by the setting that they are for, or by another one that it excludes."""
    keys = text_settings()
    assert len(keys) > 40
    texts = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=12) | st.sampled_from(TEXTS)
    arrived = Counter[bool]()

    @settings(max_examples=num_examples)
    @given(st.sampled_from(keys), texts)
    def check(setting: tuple[type, str], text: str) -> None:
        arrived[check_text(*setting, text)] += 1

    check()
    print(f"{arrived[True]} arrived, {arrived[False]} refused")
    assert arrived[True] > 0.3 * arrived.total()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "value"), [("null", None), ("'null'", "null"), ('"a b"', "a b"), ('"it\'s"', "it's")]
)
def test_null_and_quotation_marks(typed: str, value: str | None) -> None:
    assert evaluation(f"model.weights={typed}").model.weights == value
    assert evaluation("output=null").output == "null"  # there is no run without one


@pytest.mark.parametrize(("typed", "value"), [("1_000", 1000), ("+7", 7), (" 7", 7), ("'7'", 7)])
def test_a_whole_number_keeps_its_value(typed: str, value: int) -> None:
    assert evaluation(f"rerank.num_candidates={typed}").rerank.num_candidates == value


@pytest.mark.parametrize(("typed", "value"), [("1_000", 1000), ("1e3", 1000), (".5", 0.5), ("1.10", 1.1)])
def test_a_number_keeps_its_value(typed: str, value: float) -> None:
    assert evaluation(f"rerank.cache_gib={typed}").rerank.cache_gib == value


def test_a_process_that_uses_hydra_keeps_its_own(tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text("a: 1\n")
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.2"):
        process, theirs = GlobalHydra.instance(), GlobalHydra.instance().hydra
        assert evaluation().output == "/out"
        assert (GlobalHydra.instance(), GlobalHydra.instance().hydra) == (process, theirs)
        assert VersionBase.instance().getbase() == Version("1.2")
        assert hydra.compose("theirs") == {"a": 1}
    assert not GlobalHydra.instance().is_initialized()


def test_threads_read_command_lines_at_the_same_time() -> None:
    def output(number: int) -> str:
        return evaluation(f"output={number}").output

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(output, range(4))) == [str(number) for number in range(4)]


def test_what_is_missing_is_named() -> None:
    assert mistake("output=/out").startswith("missing: benchmark=... (one of amstertime, eynsham, folders, msls_test, ")
    assert mistake("benchmark=toy_city") == "missing: output=... (--help explains each key)"
    assert "benchmark.database=..., benchmark.queries=..." in mistake("benchmark=folders", "output=/out")
    with pytest.raises(UserError, match=r"missing: index\.path=\.\.\., output=\.\.\., queries=\.\.\."):
        load(QueryConfig, [])
    with pytest.raises(UserError, match=r"missing: database=\.\.\., output=\.\.\."):
        load(BuildIndexConfig, ["model=vitb"])


def test_two_sources_of_positives_are_one_too_many() -> None:
    message = mistake("benchmark=folders", "output=/o", *FOLDERS, "benchmark.positives=/p.csv", "benchmark.radius_m=25")
    assert "benchmark.positives and benchmark.radius_m are both set" in message


def test_an_experiment_belongs_to_evaluate_alone() -> None:
    with pytest.raises(UserError, match="unknown key experiment"):
        load(BuildIndexConfig, ["database=/d", "output=/o", "experiment=speed"])


@pytest.mark.parametrize(
    ("experiment", "model", "num_candidates"), [("speed", "vitb", 100), ("performance", "vitg", 500)]
)
def test_experiments_set_what_they_say(experiment: str, model: str, num_candidates: int) -> None:
    config = evaluation(f"experiment={experiment}")
    plain = evaluation(f"model={model}")
    assert asdict(config.model) == asdict(plain.model)
    assert config.rerank.num_candidates == num_candidates
    config.rerank.num_candidates = plain.rerank.num_candidates
    assert asdict(config) == asdict(plain)


def test_the_command_line_beats_an_experiment() -> None:
    config = evaluation("experiment=performance", "rerank.num_candidates=7", "model=tiny")
    assert (config.rerank.num_candidates, config.model.name) == (7, "tiny")


SFXL = ["sfxl_v1", "sfxl_v2", "sfxl_night", "sfxl_occlusion"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["speed", "performance"])
def test_an_sfxl_experiment_is_four_benchmarks_over_one_index(mode: str) -> None:
    configs = load_evaluations([f"experiment=sfxl_{mode}", "datasets_root=/data", "output=/o"])
    assert [config.benchmark.name for config in configs] == SFXL
    folders = [cast(FoldersConfig, config.benchmark) for config in configs]
    assert {folder.database for folder in folders} == {"/data/sf_xl/test/database"}
    assert len({folder.queries for folder in folders}) == 4
    assert {config.index.path for config in configs} == {"/o/index"}
    (slash,) = load_evaluations(
        [f"experiment=sfxl_{mode}", "datasets_root=s3://d/", "output=s3://b/o/", "benchmark=sfxl_v1"]
    )
    assert (slash.output, slash.index.path, slash.benchmarks) == ("s3://b/o", "s3://b/o/index", [])
    assert cast(FoldersConfig, slash.benchmark).database == "s3://d/sf_xl/test/database"
    plain = evaluation(f"experiment={mode}")
    assert [(config.model, config.rerank) for config in configs] == [(plain.model, plain.rerank)] * 4


@pytest.mark.slow
def test_the_command_line_beats_the_benchmarks_of_an_experiment() -> None:
    line = ["experiment=sfxl_speed", "output=/o", "datasets_root=/data"]
    (config,) = load_evaluations([*line, "benchmark=toy_city", "index.path=/elsewhere", "rerank.num_candidates=7"])
    assert (config.benchmark.name, config.index.path, config.rerank.num_candidates) == ("toy_city", "/elsewhere", 7)
    assert config.model.name == "vitb"
    configs = load_evaluations([*line, "benchmarks=[sfxl_night,sfxl_v1]"])
    assert [config.benchmark.name for config in configs] == ["sfxl_night", "sfxl_v1"]
    configs = load_evaluations([*line, "benchmark.radius_m=10"])
    assert {cast(FoldersConfig, config.benchmark).radius_m for config in configs} == {10.0}


def test_an_experiment_without_benchmarks_names_none() -> None:
    assert mistake("experiment=speed", "output=/o").startswith("missing: benchmark=... (one of ")
    assert "did you mean sfxl_speed?" in mistake("experiment=sfxl_sped", "output=/o")
    assert "missing: datasets_root=..." in mistake("experiment=sfxl_speed", "output=/o")
    assert "missing: output=..." in mistake("experiment=sfxl_speed", "datasets_root=/data")


def test_several_benchmarks_share_everything_but_their_own_keys() -> None:
    both = load_evaluations(
        [
            "benchmarks=[toy_city,folders]",
            "output=/o",
            *FOLDERS,
            "benchmark.seed=3",
            "benchmark.radius_m=7",
            "model=vits",
        ]
    )
    assert [config.benchmark for config in both] == [
        ToyCityConfig(name="toy_city", seed=3, radius_m=7.0),
        FoldersConfig(name="folders", database="/d", queries="/q", radius_m=7.0),
    ]
    assert {(config.output, config.model.name) for config in both} == {("/o", "vits")}


def test_one_benchmark_in_the_list_is_that_benchmark() -> None:
    (config,) = load_evaluations(["benchmarks=[toy_city]", "output=/out"])
    assert config.benchmark == evaluation().benchmark
    assert load_evaluations(TOY) == [evaluation()]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["benchmarks=[toy_city]", "benchmark=toy_city"], ["both given", "expected one of them"]),
        (["benchmarks=toy_city"], ["expected a list of names such as [toy_city,folders]"]),
        (["benchmarks=[]"], ["expected a list of names"]),
        (["benchmarks=[1]"], ["expected a list of names"]),
        (["benchmarks=null"], ["expected a list of names"]),
        (["benchmarks=[toy_city,toy_city]"], ["two have the same name"]),
        (["benchmarks=[toy_city,folders]", *FOLDERS, "benchmark.name=x"], ["two have the same name"]),
        (["benchmarks=[toy_city,nope]"], ["benchmark=nope: unknown", "tokyo247, toy_city"]),
        (["benchmarks=[nope,toy_city]", "benchmark.seed=1"], ["benchmark=nope: unknown", "tokyo247, toy_city"]),
        (["benchmarks=[toy_city,nope]", "benchmark.seed=1"], ["benchmark=nope: unknown", "tokyo247, toy_city"]),
        (["benchmarks=[toy_city,folders]", "benchmark.sed=1"], ["did you mean benchmark.seed?"]),
        (["benchmarks=[toy_city,folders]"], ["missing: benchmark.database=..., benchmark.queries=..."]),
    ],
)
def test_mistakes_with_several_benchmarks(arguments: list[str], parts: list[str]) -> None:
    message = mistake("output=/o", *arguments)
    assert [part for part in parts if part not in message] == [], message


TRAINING = ["output=/out", "train.root=/t", "train.validation=msls_val"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "arguments"),
    [
        (EvaluateConfig, ["benchmark=msls_val", "output=/out"]),
        (CheckBenchmarkConfig, ["benchmark=sfxl_v1"]),
        (SearchCheckpointsConfig, ["benchmark=pitts30k_val", "checkpoints=/c", "output=/out"]),
        (TrainStageOneConfig, TRAINING),
        (TrainStageTwoConfig, TRAINING),
    ],
)
def test_datasets_root_is_missing_only_where_the_benchmark_lies_below_it(job: type, arguments: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load(job, arguments)
    assert str(caught.value) == (
        "missing: datasets_root=... (datasets_root: the folder or URL below which the data sets lie; "
        "--help explains each key)"
    )
    load(job, [*arguments, "datasets_root=/data"])
    section = "train.validation" if "train.root=/t" in arguments else "benchmark"
    drawn = load(job, [*arguments, f"{section}=toy_city"])
    assert drawn.datasets_root is None


def test_benchmarks_lie_below_datasets_root() -> None:
    config = load(CheckBenchmarkConfig, ["benchmark=msls_val", "datasets_root=s3://bucket/data/"])
    assert config.benchmark == MslsConfig(
        name="msls_val",
        root="s3://bucket/data/msls",
        split=MslsSplit.train_val,
        cities=["cph", "sf"],
        subtask=MslsSubtask.all,
        radius_m=25.0,
    )
    validation = load(TrainStageTwoConfig, [*TRAINING, "datasets_root=here"]).train.validation
    assert isinstance(validation, MslsConfig)
    assert validation.root == "here/msls"


def test_a_benchmark_with_paths_of_its_own_needs_no_datasets_root() -> None:
    folders = ["benchmark.database=/d", "benchmark.queries=/q"]
    benchmark = load(CheckBenchmarkConfig, ["benchmark=nordland_2760", *folders]).benchmark
    assert isinstance(benchmark, NordlandConfig)
    assert (benchmark.database, benchmark.frames_per_query, benchmark.tolerance_frames) == ("/d", 10, 1)
    message = mistake("benchmark=nordland_2760", "benchmark.database=/d", "output=/o")
    assert message.startswith("missing: datasets_root=... (")


@pytest.mark.slow
def test_datasets_root_with_several_benchmarks() -> None:
    several = ["benchmarks=[toy_city,sfxl_v1,sfxl_v2]"]
    assert mistake("output=/o", *several).startswith("missing: datasets_root=... (datasets_root: ")
    assert mistake(*several).startswith("missing: output=... (--help")  # toy_city alone is looked at
    _, v1, v2 = (config.benchmark for config in load_evaluations([*several, "output=/o", "datasets_root=/data"]))
    assert isinstance(v1, FoldersConfig)
    assert isinstance(v2, FoldersConfig)
    assert v1.database == v2.database == "/data/sf_xl/test/database"
    assert (v1.queries, v2.queries) == ("/data/sf_xl/test/queries_v1", "/data/sf_xl/test/queries_v2")


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLIC)
def test_every_benchmark_has_its_own_name_and_is_complete(name: str) -> None:
    benchmark = load(CheckBenchmarkConfig, [f"benchmark={name}", "datasets_root=/data"]).benchmark
    assert benchmark.name == name
    assert [value for value in asdict(benchmark).values() if value == "???"] == []
    assert getattr(benchmark, "radius_m", 25.0) == 25.0


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["benchmark=msls_val", "benchmark.subtask=dusk"], ["benchmark.subtask", "all, s2w, w2s, o2n, n2o, d2n, n2d"]),
        (["benchmark=msls_val", "benchmark.cities=[]"], ["benchmark.cities=[]: expected one or more cities"]),
        (["benchmark=msls_val", "benchmark.cities=[sf,sf]"], ["benchmark.cities=[sf,sf]: the same city is given"]),
        (["benchmark=nordland_2760", "benchmark.tolerance_frames=-1"], ["benchmark.tolerance_frames=-1: expected 0"]),
        (["benchmark=nordland_2760", "benchmark.frames_per_query=0"], ["benchmark.frames_per_query=0: expected"]),
        (["benchmark=pitts30k_val", "benchmark.radius_m=-1"], ["benchmark.radius_m=-1.0: expected"]),
        (["benchmark=toy_city", "datasets_root=''"], ["datasets_root is empty: expected a value"]),
    ],
)
def test_mistakes_in_public_benchmarks(arguments: list[str], parts: list[str]) -> None:
    root = [] if arguments[-1].startswith("datasets_root") else ["datasets_root=/data"]
    message = mistake("output=/o", *arguments, *root)
    assert [part for part in parts if part not in message] == [], message


def _leaves(config: type, prefix: str = "") -> list[str]:
    hints = get_type_hints(config)
    names: list[str] = []
    for item in fields(config):
        kind: Any = hints[item.name]
        if not is_dataclass(kind):
            names.append(prefix + item.name)
        elif kind is not BenchmarkConfig:
            names += _leaves(kind, f"{prefix}{item.name}.")  # type: ignore[arg-type]
    return names


@pytest.mark.slow
@pytest.mark.parametrize("job", list(JOBS))
def test_help_explains_every_key(job: type) -> None:
    lines = help_text(job).splitlines()
    explained = {
        line.split(" = ")[0].strip(): following.strip()
        for line, following in itertools.pairwise(lines)
        if re.match(r"  \S+ = ", line)
    }
    expected = set(_leaves(job))
    section = "train.validation" if job in (TrainStageOneConfig, TrainStageTwoConfig) else "benchmark"
    has_benchmark = issubclass(job, BenchmarkJobConfig)
    if has_benchmark:
        layouts = FoldersConfig, ToyCityConfig, MslsConfig, NordlandConfig, PittsburghConfig
        expected |= {key for layout in layouts for key in _leaves(layout, f"{section}.")}
    assert set(explained) == expected
    assert [key for key, doc in explained.items() if not doc or " = " in doc.split(" ")[0]] == []
    assert f"usage: pairvpr {JOBS[job]} " in lines[0]
    has_model = job not in (ExportWeightsConfig, CheckBenchmarkConfig, CalibrateConfig, ReportConfig)
    assert ("  model=  one of tiny, vitb, vitg, vitl, vits" in lines) == has_model
    assert any(line.startswith(f"  {section}=  one of amstertime, ") for line in lines) == has_benchmark
    assert (f"with {section}= pitts250k_test, pitts30k_test, pitts30k_val:" in lines) == has_benchmark
    assert ("  datasets_root = null" in lines) == has_benchmark
    assert ("  output = (required)" in lines) == (
        job not in (CheckBenchmarkConfig, PlanConfig, UpdateIndexConfig, ReportConfig, ServeConfig)
    )


# Method, section 2: width, blocks, heads, SwiGLU, millions of parameters in all.
SIZES = {
    "vits": (384, 12, 6, False, None),
    "vitb": (768, 12, 12, False, 201.9),
    "vitl": (1024, 24, 16, False, 420.0),
    "vitg": (1536, 40, 24, True, 1252.7),
}


@pytest.mark.parametrize("name", list(SIZES))
def test_models_have_the_shapes_of_the_method(name: str) -> None:
    model = load(BuildIndexConfig, ["database=/d", "output=/o", f"model={name}"]).model
    encoder, decoder = model.encoder, model.decoder
    embed_dim, depth, num_heads, swiglu, millions = SIZES[name]
    assert (encoder.embed_dim, encoder.depth, encoder.num_heads) == (embed_dim, depth, num_heads)
    assert encoder.ffn is (schema.Ffn.swiglu if swiglu else schema.Ffn.mlp)
    assert (encoder.num_registers, encoder.pretrain_image_size_px, encoder.pos_embed_antialias) == (4, 518, True)
    assert encoder.pos_embed_offset == 0
    assert (decoder.embed_dim, decoder.depth, decoder.num_heads) == (768, 12, 12)
    assert (model.name, model.image_size_px, model.patch_size_px, model.descriptor_dim) == (name, 322, 14, 512)
    assert model.num_patches == 529
    published = {"vitb": "B", "vitl": "L", "vitg": "G"}
    expected = f"hf://CSIRORobotics/Pair-VPR/pairvpr-vit{published[name]}.pth" if name in published else None
    assert model.weights == expected
    if millions is not None:
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in PairVPR(model).parameters())
        assert round(count / 1e6, 1) == millions


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ([], "index.path=INDEX and indices={NAME: INDEX}: neither is given"),
        (["index.path=a", "indices={b: c}"], "both are given"),
        (["indices={'../x': c}"], "names of letters, digits"),
        (["indices={a.b: c}"], "letters, digits"),
        (["indices={b: 1.10}"], "need quotation marks"),
        (["indices={b: {c: d}}"], "expected {NAME: TEXT, ...}"),
        (["indices=[b]"], "expected {NAME: TEXT, ...}"),
        (["indices=b"], "expected {NAME: TEXT, ...}"),
        (["index.path=a", "serve.host=0.0.0.0"], "serve.token_file=FILE, or serve.allow_anonymous=true"),
        (["index.path=a", "serve.haproxy=true", "serve.host=::1"], "expected one of 127.0.0.1, 0.0.0.0"),
        (["index.path=a", "serve.num_shard_parts=2"], "expected also serve.split=true"),
        (["index.path=a", "serve.batch_wait_s=0.01"], "expected also serve.split=true"),
        (["index.path=a", "serve.max_waiting=-1"], "expected 0 or more"),
        (["index.path=a", "serve.port=0"], "expected 1 to 65535"),
        (["index.path=a", "serve.max_replicas=1", "serve.num_replicas=2"], "at least serve.num_replicas=2"),
        (["index.path=a", "rerank.num_candidates=0"], "expected 1 or more"),
        (["index.path=a", "rerank.dense_features=store"], "expected cache or recompute"),
        (["index.path=a", "rerank.num_actors=2"], "serve.num_replicas"),
        (["index.path=a", "index.num_gpus_per_actor=1"], "a service searches on CPUs"),
    ],
)
def test_serve_refuses(line: list[str], words: str) -> None:
    with pytest.raises(UserError) as error:
        load(ServeConfig, line)
    assert words in str(error.value)


def test_serve_takes_several_indices() -> None:
    config = load(ServeConfig, ["indices={sf: /a/b, oslo: 's3://bucket/c'}", "serve.host=::1"])
    assert config.by_name == {"sf": "/a/b", "oslo": "s3://bucket/c"}
    assert load(ServeConfig, ["indices={b: '1.10'}"]).by_name == {"b": "1.10"}
    assert load(ServeConfig, ["index.path=/a"]).by_name == {"default": "/a"}
