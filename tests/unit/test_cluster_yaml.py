"""cluster.yaml is accepted by Ray and EC2's own schemas, and its nodes get exactly what the lock names.

Nothing here reaches AWS: whether the images, profiles and instance types exist is not checked.
"""

from __future__ import annotations

import copy
import re
import subprocess
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import pytest
import yaml
from botocore.validate import ParamValidator
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from ray._private.authentication.authentication_token_setup import _get_default_token_path
from ray.autoscaler._private.util import prepare_config, validate_config

REPOSITORY = Path(__file__).parents[2]
LOCK_PATH = "requirements/cluster.lock"
WORKERS = ("gpu_on_demand", "gpu_spot")
Config = dict[str, Any]

NODE_PYTHON = "3.11"
NODE_ENVIRONMENT = {
    **{name: str(value) for name, value in default_environment().items()},
    "python_version": NODE_PYTHON,
    "python_full_version": f"{NODE_PYTHON}.9",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
}


@pytest.fixture
def cluster() -> Config:
    return yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())


@pytest.fixture
def prepared(cluster: Config) -> Config:
    """The configuration as `ray up` completes it."""
    return prepare_config(cluster)


def check(cluster: Config) -> None:
    """Raise if Ray or EC2 would refuse `cluster`."""
    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    run_instances = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances")
    for name, node_type in prepared["available_node_types"].items():
        request = {**node_type["node_config"], "MinCount": 1, "MaxCount": 1}
        report = ParamValidator().validate(request, run_instances.input_shape)
        if report.has_errors():
            raise ValueError(f"{name}: {report.generate_report()}")


def on_node(command_path: str) -> str:
    """A path in a command, absolute, as the shell on a node would expand it."""
    return command_path.replace("~", "/home/ubuntu", 1)


# --- The configuration ---


def test_ray_and_ec2_accept_it(cluster: Config) -> None:
    check(cluster)


def misspell_top_level(cluster: Config) -> None:
    cluster["idle_timeout_minuts"] = cluster.pop("idle_timeout_minutes")


def misspell_node_type(cluster: Config) -> None:
    node_type = cluster["available_node_types"]["gpu_spot"]
    node_type["min_worker"] = node_type.pop("min_workers")


def misspell_head_type(cluster: Config) -> None:
    cluster["head_node_type"] = "haed"


def misspell_node_config(cluster: Config) -> None:
    node_config = cluster["available_node_types"]["gpu_on_demand"]["node_config"]
    node_config["InstanceTyp"] = node_config.pop("InstanceType")


def misspell_spot_option(cluster: Config) -> None:
    options = cluster["available_node_types"]["gpu_spot"]["node_config"]["InstanceMarketOptions"]
    options["MarketTyp"] = options.pop("MarketType")


def mistype_setup_commands(cluster: Config) -> None:
    cluster["setup_commands"] = "pip install ray"


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (misspell_top_level, jsonschema.ValidationError),
        (misspell_node_type, jsonschema.ValidationError),
        (misspell_head_type, ValueError),
        (misspell_node_config, ValueError),
        (misspell_spot_option, ValueError),
        (mistype_setup_commands, (jsonschema.ValidationError, TypeError)),
    ],
)
def test_mistakes_are_caught(
    cluster: Config,
    damage: Callable[[Config], None],
    error: type[Exception] | tuple[type[Exception], ...],
) -> None:
    damage(cluster)
    with pytest.raises(error):
        check(cluster)


def test_head_runs_no_work(prepared: Config) -> None:
    head = prepared["available_node_types"][prepared["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert head["max_workers"] == 0


def test_workers_scale_from_zero_on_demand_and_on_spot(prepared: Config) -> None:
    node_types = prepared["available_node_types"]
    assert set(node_types) == {prepared["head_node_type"], *WORKERS}
    assert all(node_types[name]["min_workers"] == 0 < node_types[name]["max_workers"] for name in WORKERS)
    assert "InstanceMarketOptions" not in node_types["gpu_on_demand"]["node_config"]
    assert node_types["gpu_spot"]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert prepared["idle_timeout_minutes"] > 0


def test_everything_mounted_exists(prepared: Config) -> None:
    sources = [source for source in prepared["file_mounts"].values() if not source.startswith("~")]
    missing = [source for source in sources if not (REPOSITORY / source).exists()]
    assert not missing


# --- The token ---


def test_token_goes_where_ray_looks_for_it(prepared: Config) -> None:
    place = _get_default_token_path().relative_to(Path.home())
    assert prepared["file_mounts"][f"/home/{prepared['auth']['ssh_user']}/{place}"] == f"~/{place}"
    assert "--dashboard-host=127.0.0.1" in prepared["head_start_ray_commands"][-1]


def test_every_shell_on_a_node_uses_the_token(prepared: Config, tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").touch()
    (tmp_path / ".bashrc").write_text("# as the image has it\n")

    def shell(command: str) -> str:
        environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
        return subprocess.run(
            ["bash", "-c", command], env=environment, check=True, capture_output=True, text=True
        ).stdout

    for command in prepared["initialization_commands"] * 2:
        shell(command)
    assert shell("source ~/.bashrc; echo $RAY_AUTH_MODE $PATH").split() == [
        "token",
        f"{tmp_path}/venv/bin:/usr/bin:/bin",
    ]
    assert (tmp_path / ".bashrc").read_text().count("RAY_AUTH_MODE") == 1
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o077 == 0


# --- What nodes install ---


@pytest.mark.parametrize("commands", ["head_setup_commands", "worker_setup_commands"])
def test_nodes_install_the_lock_and_nothing_else(prepared: Config, commands: str) -> None:
    installs = [command for command in prepared[commands] if re.search(r"\b(install|sync)\b", command)]
    tool, locked, project = installs
    assert re.search(r" uv==\S+$", tool)
    assert {"sync", "--require-hashes"} <= set(locked.split())
    assert prepared["file_mounts"][on_node(locked.split()[-1])] == LOCK_PATH
    assert "--no-deps" in project.split()
    assert any(f"venv --quiet --clear --python {NODE_PYTHON} " in command for command in prepared[commands])


@pytest.mark.parametrize("name", WORKERS)
def test_no_worker_type_has_its_own_setup(prepared: Config, name: str) -> None:
    own = {"initialization_commands", "worker_setup_commands", "docker"}
    assert not own & set(prepared["available_node_types"][name])


# --- The lock ---


@pytest.fixture(scope="module")
def locked() -> dict[str, Version]:
    """Every entry of the lock; fails on one that is not a pinned name with hashes."""
    text = (REPOSITORY / LOCK_PATH).read_text()
    entries = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    versions: dict[str, Version] = {}
    for entry in filter(str.strip, entries):
        match = re.fullmatch(r"([a-z0-9-]+)==(\S+)((?:\s+--hash=sha256:[0-9a-f]{64})+)\s*", entry)
        assert match, f"not a pinned requirement with hashes: {entry[:100]}"
        name = canonicalize_name(match[1])
        assert name not in versions, f"{name} is pinned twice"
        versions[name] = Version(match[2])
    return versions


def direct_requirements() -> list[Requirement]:
    """What the project with its extras `gpu` and `serve`, and the cluster, ask for by name."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = project["dependencies"] + extras["gpu"] + extras["serve"]
    cluster_input = (REPOSITORY / "requirements/cluster.in").read_text()
    lines += [line for raw in cluster_input.splitlines() if (line := raw.split("#")[0].strip())]
    return [Requirement(line) for line in lines]


def unmet(requirements: list[Requirement], locked: dict[str, Version]) -> list[str]:
    """Those of `requirements` that the lock lacks or pins out of range."""
    return [
        str(requirement)
        for requirement in requirements
        if (version := locked.get(canonicalize_name(requirement.name))) is None
        or not requirement.specifier.contains(version, prereleases=True)
    ]


def test_lock_meets_every_direct_requirement(locked: dict[str, Version]) -> None:
    requirements = direct_requirements()
    assert {"torch", "ray", "boto3", "prometheus-client"} <= {requirement.name for requirement in requirements}
    assert not unmet(requirements, locked)


def test_lock_meets_the_extras_of_ray(locked: dict[str, Version]) -> None:
    assert locked["ray"] == Version(metadata.version("ray")), "tests and cluster run different versions of Ray"
    extras = {extra for each in direct_requirements() if each.name == "ray" for extra in each.extras}
    assert {"data", "default", "serve", "train"} <= extras
    requirements = [
        requirement
        for requirement in map(Requirement, metadata.requires("ray") or [])
        for extra in ("", *extras)
        if requirement.marker is None or requirement.marker.evaluate({**NODE_ENVIRONMENT, "extra": extra})
    ]
    assert len(requirements) > len(extras)
    assert not unmet(requirements, locked)


def test_missing_and_outdated_pins_are_noticed() -> None:
    requirements = [Requirement("torch>=2.10"), Requirement("ray==2.60.*"), Requirement("numpy")]
    assert unmet(requirements, {"torch": Version("2.9"), "numpy": Version("2.0")}) == [
        "torch>=2.10",
        "ray==2.60.*",
    ]


def test_compiled_packages_share_one_cuda(locked: dict[str, Version]) -> None:
    libraries = [name for name in locked if name.startswith("nvidia-")]
    assert libraries
    assert all(name.endswith("-cu12") for name in libraries)


def test_exactly_one_faiss_with_gpu_support(locked: dict[str, Version]) -> None:
    builds = [name for name in locked if name.startswith("faiss")]
    assert len(builds) == 1
    assert builds[0].startswith("faiss-gpu")


def test_lock_names_no_package_index() -> None:
    text = (REPOSITORY / LOCK_PATH).read_text()
    assert "://" not in text
    assert "#    make lock" in text.splitlines()
