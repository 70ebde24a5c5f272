"""KubeRay's API, ray.io/v1, as a JSON schema: every field that its Go types name, and no other.

Written from KubeRay's reference of its API. The published CRDs take 800 KB each, because each repeats Kubernetes' pod
template. Here that is an object like any other, whose content the tests hand to Kubernetes' own schema. PodMonitor is
the Prometheus operator's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jsonschema

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
SWITCH: Schema = {"type": "boolean"}
NUMBER: Schema = {"type": "integer", "minimum": 0}
OF_TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
ANY_OBJECT: Schema = {"type": "object"}
POD_TEMPLATE: Schema = {"type": "object", "required": ["spec"]}


def _object(fields: dict[str, Schema], *required: str) -> Schema:
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def _one_of(*values: str) -> Schema:
    return {"enum": list(values)}


AUTOSCALER = _object(
    {
        "version": _one_of("v1", "v2"),
        "upscalingMode": _one_of("Default", "Aggressive", "Conservative"),
        "idleTimeoutSeconds": NUMBER,
        "image": TEXT,
        "imagePullPolicy": _one_of("Always", "IfNotPresent", "Never"),
        **dict.fromkeys(("resources", "securityContext"), ANY_OBJECT),
        **{key: {"type": "array", "items": ANY_OBJECT} for key in ("env", "envFrom", "volumeMounts")},
    }
)
HEAD = _object(
    {
        "template": POD_TEMPLATE,
        "rayStartParams": OF_TEXTS,
        "headService": ANY_OBJECT,
        "enableIngress": SWITCH,
        "serviceType": _one_of("ClusterIP", "NodePort", "LoadBalancer"),
    },
    "template",
)
WORKERS = _object(
    {
        "groupName": TEXT,
        "template": POD_TEMPLATE,
        "rayStartParams": OF_TEXTS,
        "suspend": SWITCH,
        "scaleStrategy": ANY_OBJECT,
        **dict.fromkeys(("replicas", "minReplicas", "maxReplicas", "numOfHosts", "idleTimeoutSeconds"), NUMBER),
    },
    "groupName",
    "template",
    "minReplicas",
    "maxReplicas",
)
CLUSTER = _object(
    {
        "rayVersion": TEXT,
        "enableInTreeAutoscaling": SWITCH,
        "autoscalerOptions": AUTOSCALER,
        "authOptions": _object({"mode": _one_of("token", "disabled"), "secretName": TEXT}),
        "headGroupSpec": HEAD,
        "workerGroupSpecs": {"type": "array", "items": WORKERS},
        "headServiceAnnotations": OF_TEXTS,
        "gcsFaultToleranceOptions": ANY_OBJECT,
        "suspend": SWITCH,
        "managedBy": TEXT,
    },
    "headGroupSpec",
)
JOB = _object(
    {
        "entrypoint": {"type": "string", "minLength": 1},
        "rayClusterSpec": CLUSTER,
        "clusterSelector": OF_TEXTS,
        "metadata": OF_TEXTS,
        "submitterPodTemplate": POD_TEMPLATE,
        "submitterConfig": _object({"backoffLimit": NUMBER}),
        "submissionMode": _one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        "deletionStrategy": ANY_OBJECT,
        **dict.fromkeys(("runtimeEnvYAML", "jobId", "entrypointResources", "managedBy", "schedule"), TEXT),
        **{key: {"type": "number"} for key in ("entrypointNumCpus", "entrypointNumGpus")},
        **dict.fromkeys(("activeDeadlineSeconds", "backoffLimit", "ttlSecondsAfterFinished"), NUMBER),
        **dict.fromkeys(("shutdownAfterJobFinishes", "suspend"), SWITCH),
    }
)
SERVICE = _object(
    {
        "serveConfigV2": {"type": "string", "minLength": 1},
        "rayClusterConfig": CLUSTER,
        "serveService": ANY_OBJECT,
        "upgradeStrategy": ANY_OBJECT,
        "excludeHeadPodFromServeSvc": SWITCH,
        **dict.fromkeys(("serviceUnhealthySecondThreshold", "deploymentUnhealthySecondThreshold"), NUMBER),
    }
)
POD_MONITOR = _object(
    {
        "selector": _object({"matchLabels": OF_TEXTS, "matchExpressions": {"type": "array"}}),
        "namespaceSelector": ANY_OBJECT,
        "podMetricsEndpoints": {
            "type": "array",
            "minItems": 1,
            "items": _object(
                {
                    **dict.fromkeys(("port", "path", "scheme"), TEXT),
                    **{key: {"type": "string", "pattern": r"^\d+[smh]$"} for key in ("interval", "scrapeTimeout")},
                    "honorLabels": SWITCH,
                    "relabelings": {
                        "type": "array",
                        "items": _object(
                            {
                                "sourceLabels": {"type": "array", "items": TEXT},
                                **dict.fromkeys(("targetLabel", "regex", "replacement", "action", "separator"), TEXT),
                            }
                        ),
                    },
                }
            ),
        },
        "podTargetLabels": {"type": "array", "items": TEXT},
        "jobLabel": TEXT,
    },
    "selector",
    "podMetricsEndpoints",
)
KINDS = {
    ("ray.io/v1", "RayCluster"): CLUSTER,
    ("ray.io/v1", "RayJob"): JOB,
    ("ray.io/v1", "RayService"): SERVICE,
    ("monitoring.coreos.com/v1", "PodMonitor"): POD_MONITOR,
}


def check(document: dict[str, Any]) -> None:
    """Raise `jsonschema.ValidationError` unless it is one of `KINDS` with fields that exist; pod templates aside."""
    spec = KINDS[document["apiVersion"], document["kind"]]
    head = {"apiVersion": TEXT, "kind": TEXT, "metadata": _object({"name": TEXT, "labels": OF_TEXTS}, "name")}
    jsonschema.validate(document, _object({**head, "spec": spec}, "metadata", "spec"))


def cluster_of(document: dict[str, Any]) -> dict[str, Any]:
    """The RayClusterSpec in a RayCluster, RayJob or RayService."""
    spec = document["spec"]
    return {"RayCluster": spec, "RayJob": spec.get("rayClusterSpec"), "RayService": spec.get("rayClusterConfig")}[
        document["kind"]
    ]


def groups(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The head and each group of workers."""
    cluster = cluster_of(document)
    yield cluster["headGroupSpec"]
    yield from cluster["workerGroupSpecs"]
