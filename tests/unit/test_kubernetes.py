"""deploy/kubernetes: Kubernetes' and KubeRay's schemas accept it, and every name in it is one that the code knows.

Nothing here reaches a cluster: kustomize is kubectl's own, and the schemas are packages.
"""

from __future__ import annotations

import copy
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.scripts.scripts import drain_node, start
from ray.serve.schema import ServeDeploySchema

import pairvpr
from pairvpr.cli import JOBS
from pairvpr.config.compose import load, load_evaluations
from pairvpr.config.schema import EvaluateConfig
from pairvpr.config.serve_schema import ServeConfig
from tests.support import kuberay

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy" / "kubernetes"
KUBERNETES = "1.37"
Document = dict[str, Any]
OVERLAYS = [f"{where}/{what}" for where in ("kind", "gpu") for what in ("cluster", "index", "evaluate", "service")]
JOB_OVERLAYS = [name for name in OVERLAYS if name.endswith(("index", "evaluate"))]


@cache
def _built(overlay: str) -> str:
    command = [str(Path(sys.executable).with_name("kubectl")), "kustomize", str(DEPLOY / overlay)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def built(overlay: str) -> list[Document]:
    """What `kubectl apply -k` would send."""
    return list(yaml.safe_load_all(_built(overlay)))


def check(document: Document) -> None:
    """Raise unless KubeRay's schema accepts the document, and Kubernetes' its pod templates."""
    kuberay.check(document)
    if "Ray" in document["kind"]:
        for group in kuberay.groups(document):
            pods = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pods"}}
            kubernetes_validate.validate(pods | {"template": group["template"]}, KUBERNETES, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_schemas_accept_it(overlay: str) -> None:
    (document,) = built(overlay)
    check(document)
    what = overlay.partition("/")[2]
    assert document["kind"] == {"cluster": "RayCluster", "service": "RayService"}.get(what, "RayJob")


def misspell_replicas(document: Document) -> None:
    group = kuberay.cluster_of(document)["workerGroupSpecs"][0]
    group["minReplica"] = group.pop("minReplicas")


def misspell_backoff(document: Document) -> None:
    document["spec"]["backOffLimit"] = document["spec"].pop("backoffLimit")


def write_a_number_as_text(document: Document) -> None:
    kuberay.cluster_of(document)["workerGroupSpecs"][0]["maxReplicas"] = "16"


def write_a_text_as_a_number(document: Document) -> None:
    kuberay.cluster_of(document)["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0


def misspell_a_toleration(document: Document) -> None:
    kuberay.cluster_of(document)["workerGroupSpecs"][0]["template"]["spec"]["tolerations"][0]["effects"] = "NoSchedule"


def misspell_a_mount(document: Document) -> None:
    container = kuberay.cluster_of(document)["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    container["volumeMount"] = container.pop("volumeMounts")


@pytest.mark.parametrize(
    "damage",
    [
        misspell_replicas,
        misspell_backoff,
        write_a_number_as_text,
        write_a_text_as_a_number,
        misspell_a_toleration,
        misspell_a_mount,
    ],
)
def test_mistakes_are_caught(damage: Callable[[Document], None]) -> None:
    (document,) = copy.deepcopy(built("gpu/evaluate"))
    damage(document)
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(document)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_images_are_those_of_the_dockerfile(overlay: str) -> None:
    targets = re.findall(r"^FROM base AS (\S+)$", (ROOT / "deploy/container/Dockerfile").read_text(), re.MULTILINE)
    assert targets == ["cpu", "gpu"]
    target = {"kind": "cpu", "gpu": "gpu"}[overlay.partition("/")[0]]
    (document,) = built(overlay)
    images = [group["template"]["spec"]["containers"][0]["image"] for group in kuberay.groups(document)]
    assert len(images) >= 2
    assert set(images) == {f"pairvpr:{pairvpr.__version__}-{target}"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_is_that_of_the_locks_and_its_options_exist(overlay: str) -> None:
    (document,) = built(overlay)
    version = kuberay.cluster_of(document)["rayVersion"]
    for lock in ("cluster", "cpu"):
        assert f"\nray=={version} \\\n" in (ROOT / f"requirements/{lock}.lock").read_text()
    known = {option.removeprefix("--") for parameter in start.params for option in parameter.opts}
    for group in kuberay.groups(document):
        assert set(group["rayStartParams"]) <= known


def entrypoint_of(overlay: str) -> tuple[str, Any]:
    """The job of an overlay and its settings, as Hydra composes them."""
    (document,) = built(overlay)
    python, option, module, *line = shlex.split(document["spec"]["entrypoint"])
    assert (python, option) == ("python", "-m")
    job = JOBS[module.removeprefix("ray_jobs.")]
    config = load_evaluations(line)[0] if job.config is EvaluateConfig else load(job.config, line)
    return job.name, config


@pytest.mark.parametrize("overlay", JOB_OVERLAYS)
def test_entry_points_are_jobs_with_settings_that_exist(overlay: str) -> None:
    name, config = entrypoint_of(overlay)
    assert name == {"index": "build_index", "evaluate": "evaluate"}[overlay.partition("/")[2]]
    assert config.cluster.address is None, "the job finds its cluster by RAY_ADDRESS"
    (document,) = built(overlay)
    assert document["spec"]["backoffLimit"] > 0
    assert document["spec"]["shutdownAfterJobFinishes"] is True


@pytest.mark.parametrize("overlay", [name for name in JOB_OVERLAYS if name.startswith("gpu")])
def test_the_cluster_can_grow_to_what_the_job_asks_for(overlay: str) -> None:
    """It starts without a node with CPUs, so the job must say what it wants (`runtime.plan_actors`)."""
    _, config = entrypoint_of(overlay)
    (document,) = built(overlay)
    workers = kuberay.cluster_of(document)["workerGroupSpecs"]
    most_gpus = 0
    for group in workers:
        assert group["minReplicas"] == group["replicas"] == 0
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        most_gpus += group["maxReplicas"] * int(limits["nvidia.com/gpu"])
    for settings in (config.describe, getattr(config, "rerank", config.describe)):
        assert settings.num_gpus_per_actor == 1
        assert 0 < settings.num_actors <= most_gpus
    assert config.index.memory_budget_gib is not None


def test_spot_nodes_are_tolerated_and_announce_their_end() -> None:
    (document,) = built("gpu/cluster")
    by_name = {group["groupName"]: group["template"]["spec"] for group in document["spec"]["workerGroupSpecs"]}
    spot = {toleration["key"] for toleration in by_name["gpu-spot"]["tolerations"]}
    on_demand = {toleration["key"] for toleration in by_name["gpu-on-demand"]["tolerations"]}
    assert on_demand == {"nvidia.com/gpu"}
    assert on_demand < spot


@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name.startswith("gpu")])
@pytest.mark.parametrize("exit_code", [0, 1])
def test_a_pod_that_ends_drains_its_node_and_waits(overlay: str, exit_code: int, tmp_path: Path) -> None:
    """Its command runs as bash runs it, with stubs for `ray` and `sleep`; Ray's own parser reads what `ray` got."""
    for name, code in (("ray", exit_code), ("sleep", 0)):
        (tmp_path / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/{name}.words\nexit {code}\n')
        (tmp_path / name).chmod(0o755)
    (document,) = built(overlay)
    _, *workers = kuberay.groups(document)
    for pods in (group["template"]["spec"] for group in workers):
        command = pods["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert command[:2] == ["bash", "-c"]
        shellcheck = [str(Path(sys.executable).with_name("shellcheck")), "--shell=bash", "-"]
        found = subprocess.run(shellcheck, input=command[2], capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stdout
        subprocess.run(command, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=True)
        job, *words = (tmp_path / "ray.words").read_text().splitlines()
        assert job == drain_node.name
        with drain_node.make_context("ray drain-node", words) as context:
            assert context.params["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
            seconds = context.params["deadline_remaining_seconds"]
        assert (tmp_path / "sleep.words").read_text() == f"{seconds}\n"
        assert seconds < pods["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name.endswith("service")])
def test_the_service_is_an_application_with_settings_that_exist(overlay: str) -> None:
    (document,) = built(overlay)
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(document["spec"]["serveConfigV2"])).applications
    module, name = application.import_path.split(":")
    assert callable(getattr(import_module(module), name))
    config = load(ServeConfig, [f"{key}={value}" for key, value in application.args.items()])
    assert config.serve.allow_anonymous is (config.serve.token_file is None) is overlay.startswith("kind")
    if config.serve.token_file is not None:
        for group in kuberay.groups(document):
            pods = group["template"]["spec"]
            (mount,) = (m for m in pods["containers"][0]["volumeMounts"] if m["name"] == "token")
            assert config.serve.token_file == f"{mount['mountPath']}/token"
            assert {"name": "token", "secret": {"secretName": "pairvpr-serve-token"}} in pods["volumes"]


def test_nothing_runs_as_root_and_the_head_runs_no_work() -> None:
    for overlay in OVERLAYS:
        (document,) = built(overlay)
        head, *_ = kuberay.groups(document)
        assert head["rayStartParams"]["num-cpus"] == "0"
        assert kuberay.cluster_of(document)["authOptions"] == {"mode": "token"}
        for group in kuberay.groups(document):
            pods = group["template"]["spec"]
            assert pods["securityContext"]["runAsUser"] == 1000
            assert pods["securityContext"]["runAsNonRoot"] is True
            assert pods["containers"][0]["securityContext"]["allowPrivilegeEscalation"] is False


def test_prometheus_finds_a_port_of_every_pod() -> None:
    dashboard, monitor = sorted(built("monitoring"), key=lambda document: document["kind"])
    kubernetes_validate.validate(dashboard, KUBERNETES, strict=True)
    check(monitor)
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    for overlay in OVERLAYS:
        for group in kuberay.groups(built(overlay)[0]):
            ports = group["template"]["spec"]["containers"][0]["ports"]
            assert {"name": endpoint["port"], "containerPort": 8080} in ports


def test_secrets_are_those_that_the_page_makes() -> None:
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    made = set(re.findall(r"create secret generic (\S+)", page))
    named = set(re.findall(r"secretName: (\S+)", "".join(map(_built, OVERLAYS))))
    named |= {
        source["secretRef"]["name"]
        for overlay in OVERLAYS
        for group in kuberay.groups(built(overlay)[0])
        for source in group["template"]["spec"]["containers"][0]["envFrom"]
    }
    assert named == made
