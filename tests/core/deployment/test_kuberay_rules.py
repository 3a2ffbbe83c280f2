"""What Kubernetes or KubeRay would refuse is refused by a message, whatever is wrong with it."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.core.deployment.kuberay import (
    QUEUE,
    Document,
    build,
    cluster,
    job,
    job_with_cluster,
    of_kind,
    problems,
    service,
)

POOL = "ddray.io/node-pool"

_DELETE = object()
_HEAD = "spec/headGroupSpec/template/spec/"
_WRONG_CLUSTERS: list[tuple[str, object, str]] = [
    ("spec/rayVerson", "2.60.0", "'rayVerson' was unexpected"),
    ("spec/autoscalerOptions/version", "v3", "not one of"),
    ("spec/autoscalerOptions/idleTimeout", 60, "unexpected"),
    ("spec/workerGroupSpecs/0/maxReplicas", "8", "not of type 'integer'"),
    ("spec/workerGroupSpecs/0/groupName", _DELETE, "'groupName' is a required property"),
    ("spec/workerGroupSpecs/0/minReplicas", 9, "minReplicas is above maxReplicas"),
    ("spec/workerGroupSpecs/0/labels", {POOL: "a b"}, "a label's value is none"),
    ("spec/workerGroupSpecs/0/template/spec/restartPolicy", "Always", "restartPolicy Never"),
    ("spec/workerGroupSpecs/0/template/spec/containers/0/image", _DELETE, "without an image"),
    ("spec/workerGroupSpecs/0/template/spec/containers", _DELETE, "'containers' is a required"),
    ("spec/workerGroupSpecs/0/template/spec/containers", [], "sampling: a pod without a container"),
    ("spec/workerGroupSpecs/0/template/spec", _DELETE, "sampling: a pod without a container"),
    (_HEAD + "containers/0/resources/limits/cpu", "four", "'four' does not match"),
    (_HEAD + "containers/0/resources/requests/memory", "16 Gi", "'16 Gi' does not match"),
    (_HEAD + "volumes/0/emptyDir/sizeLimit", "5GiB", "'5GiB' does not match"),
    ("spec/autoscalerOptions/resources/limits/memory", "", "'' does not match"),
    (_HEAD + "containers/0/volumeMount", [], "unexpected"),
    (_HEAD + "containers/0/ports/0/containerPort", "6379", "not of type 'integer'"),
    (_HEAD + "terminationGracePeriod", 30, "unexpected"),
    (_HEAD + "containers/0/env", [{"name": "REDIS_PASSWORD", "value": "x"}], "where Redis is"),
    (
        _HEAD + "containers/0/env",
        [{"name": "RAY_enable_autoscaler_v2", "value": "1"}],
        "autoscalerOptions.version says it",
    ),
    ("spec/headGroupSpec/rayStartParams/num-cpus", 0, "not of type 'string'"),
    ("spec/headGroupSpec/resources", {"CPU": "0"}, "both say what there is"),
    ("spec/headGroupSpec/rayStartParams/labels", "a=b", "not into rayStartParams"),
    ("spec/gcsFaultToleranceOptions/redisAdress", "x", "unexpected"),
    ("spec/gcsFaultToleranceOptions/storage", {"size": "1Gi"}, "storage is for rocksdb"),
    ("spec/authOptions/mode", "tokens", "not one of"),
    ("spec/rayVersion", "2.51.0", "needs rayVersion 2.52"),
    ("spec/rayVersion", "latest", "rayVersion: latest is no version"),
    ("spec/upgradeStrategy/type", "NewCluster", "not one of"),
    ("spec/networkPolicy", {"mode": "DenyAll"}, "feature gate"),
    ("metadata/name", "ddray_jobs", "no DNS label"),
    ("metadata/name", _DELETE, "no DNS label"),
    ("kind", "PullPolicy", "PullPolicy of ray.io/v1: no such kind"),
    ("apiVersion", _DELETE, "RayCluster of None: no such kind"),
    ("metadata/title", "ddray", "unexpected"),
]
_DELETED = {"policy": "DeleteSelf", "condition": {"jobStatus": "SUCCEEDED"}}
_WRONG_JOBS: list[tuple[str, object, str]] = [
    ("spec/entryPoint", "python x.py", "unexpected"),
    ("spec/submissionMode", "K8SJobMode", "not one of"),
    ("spec/backoffLimit", 3, "must be 0 with clusterSelector"),
    ("spec/backoffLimit", -1, "less than the minimum"),
    ("spec/ttlSecondsAfterFinished", 60, "needs shutdownAfterJobFinishes"),
    ("spec/clusterSelector", {"cluster": "ddray"}, "must have ray.io/cluster"),
    ("spec/clusterSelector", _DELETE, "one of rayClusterSpec and clusterSelector"),
    ("spec/shutdownAfterJobFinishes", True, "exclude each other"),
    ("spec/suspend", True, "suspend needs"),
    ("spec/deletionStrategy/deletionRules/0/policy", "DeleteCluster", "is not deleted"),
    ("spec/deletionStrategy/deletionRules/0/condition/ttl", 1, "unexpected"),
    ("spec/activeDeadlineSeconds", 0, "less than the minimum"),
    ("spec/runtimeEnvYAML", "- pip", "must be an object"),
    ("spec/runtimeEnvYAML", "{pip", "must be an object"),
    (
        "spec/submitterPodTemplate/spec/containers/0/image",
        _DELETE,
        "container without an image",
    ),
    ("spec/submitterPodTemplate/spec/containers/0/resources/limits/cpu", "x", "does not match"),
    ("metadata/name", "d" * 48, "too long"),
]
_OWN = "spec/rayClusterSpec/"
_WRONG_QUEUED: list[tuple[str, object, str]] = [
    ("spec/shutdownAfterJobFinishes", False, "Kueue wants shutdownAfterJobFinishes"),
    ("spec/shutdownAfterJobFinishes", False, "suspend needs a cluster of its own that is shut"),
    ("spec/clusterSelector", {"ray.io/cluster": "ddray"}, "Kueue leaves a job alone"),
    ("spec/deletionStrategy", {"deletionRules": [_DELETED]}, "exclude each other"),
    (_OWN + "enableInTreeAutoscaling", True, "Kueue takes no cluster that grows by itself"),
    (_OWN + "workerGroupSpecs/0/groupName", "head", "none called head"),
    (_OWN + "workerGroupSpecs/0/maxReplicas", _DELETE, "without an autoscaler minReplicas and"),
    (_OWN + "rayVersion", "2.51.0", "needs rayVersion 2.52"),
    ("spec/submissionMode", "SidecarMode", "SidecarMode has no submitter"),
]
_WRONG_SERVICES: list[tuple[str, object, str]] = [
    ("spec/serveConfig", "", "unexpected"),
    ("spec/serveConfigV2", "applications: [", "serveConfigV2 must be an object"),
    ("spec/upgradeStrategy/type", "RollingUpdate", "not one of"),
    ("spec/upgradeStrategy/type", "NewClusterWithIncrementalUpgrade", "clusterUpgradeOptions"),
    ("spec/rayClusterConfig/upgradeStrategy", {"type": "Recreate"}, "not to its cluster"),
    ("spec/rayClusterConfig/workerGroupSpecs/0/minReplicas", 9, "above maxReplicas"),
    ("spec/rayClusterConfig", _DELETE, "'rayClusterConfig' is a required property"),
    ("spec/rayClusterDeletionDelaySeconds", -1, "less than the minimum"),
]
_WRONG_REDIS: list[tuple[str, object, str]] = [
    ("spec/replica", 2, "unexpected"),
    ("spec/selector", _DELETE, "'selector' is a required property"),
    ("spec/template/spec/containers/0/resources/limits/memory", "2Gb", "'2Gb' does not match"),
    ("spec/template/spec/containers/0/env", [None], "None is not of type 'object'"),
]


def queued_job() -> Document:
    """One that waits in a queue of Kueue for a cluster of its own."""
    found = job_with_cluster("sample")
    found["metadata"]["labels"][QUEUE] = "ddray"
    found["spec"]["suspend"] = True
    return found


_RIGHT: dict[str, Callable[[], Document]] = {
    "RayCluster": lambda: cluster("base"),
    "RayJob": lambda: job("sample"),
    "queued RayJob": queued_job,
    "RayService": service,
    "Deployment": lambda: of_kind(build("base"), "Deployment")[0],
}


@pytest.mark.parametrize(
    ("kind", "path", "value", "told"),
    [
        (kind, *case)
        for kind, cases in (
            ("RayCluster", _WRONG_CLUSTERS),
            ("RayJob", _WRONG_JOBS),
            ("queued RayJob", _WRONG_QUEUED),
            ("RayService", _WRONG_SERVICES),
            ("Deployment", _WRONG_REDIS),
        )
        for case in cases
    ],
)
def test_a_wrong_manifest_is_refused(kind: str, path: str, value: object, told: str) -> None:
    right = _RIGHT[kind]()
    assert problems(right) == []
    wrong = copy.deepcopy(right)
    *parents, last = path.split("/")
    owner: Any = wrong
    for key in parents:
        owner = owner[int(key)] if isinstance(owner, list) else owner[key]
    if value is _DELETE:
        del owner[last]
    else:
        owner[last] = value
    assert told in "\n".join(problems(wrong))


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("500m", True), ("16Gi", True), ("0.5", True), (".5", True), ("1e3", True), ("5.", True),
        ("-1", True), (2, True), (0.5, True), ("100k", True),
        ("x", False), ("1 Gi", False), ("1GiB", False), ("1gi", False), ("1K", False), ("m", False),
        ("", False), ("1e", False), (True, False), ([], False),
    ],
)  # fmt: skip
def test_quantities_are_those_that_kubernetes_reads(text: object, read: bool) -> None:
    claim = of_kind(build("base"), "PersistentVolumeClaim")[0]
    claim["spec"]["resources"]["requests"]["storage"] = text
    assert (problems(claim) == []) == read


# As little as has every field that a rule looks at.
_POD: Document = {
    "spec": {
        "containers": [{"name": "ray", "image": "ray", "env": [{"name": "A", "value": "b"}]}],
        "restartPolicy": "Never",
    }
}
_CLUSTER: Document = {
    "rayVersion": "2.60.0",
    "enableInTreeAutoscaling": True,
    "authOptions": {"mode": "token"},
    "autoscalerOptions": {"version": "v2", "env": [{"name": "A", "value": "b"}]},
    "gcsFaultToleranceOptions": {"redisAddress": "redis:6379"},
    "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": _POD},
    "workerGroupSpecs": [
        {
            "groupName": "a",
            "minReplicas": 0,
            "maxReplicas": 1,
            "labels": {"a": "b"},
            "template": _POD,
        }
    ],
}
_SMALLEST: dict[str, Document] = {
    "Deployment": {
        "selector": {"matchLabels": {"a": "b"}},
        "template": {"spec": {"containers": [{"name": "redis", "image": "redis"}]}},
    },
    "RayCluster": _CLUSTER,
    "RayJob": {
        "entrypoint": "true",
        "backoffLimit": 1,
        "runtimeEnvYAML": "{}",
        "shutdownAfterJobFinishes": True,
        "deletionStrategy": {"onSuccess": {"policy": "DeleteNone"}, "onFailure": {}},
        "rayClusterSpec": {"headGroupSpec": {"template": _POD}},
        "submitterPodTemplate": _POD,
    },
    "RayService": {
        "serveConfigV2": "{}",
        "upgradeStrategy": {
            "type": "NewClusterWithIncrementalUpgrade",
            "clusterUpgradeOptions": {
                "stepSizePercent": 5,
                "intervalSeconds": 5,
                "gatewayClassName": "istio",
            },
        },
        "rayClusterConfig": {
            "enableInTreeAutoscaling": True,
            "headGroupSpec": {"headService": {"metadata": {}}, "template": _POD},
        },
    },
}


def mutants(document: Any) -> Iterator[Any]:
    """Copies, each with one value gone or replaced by another that is empty or of another type."""
    keys = [*document] if isinstance(document, dict) else [*range(len(document))]
    for key in keys:
        without = copy.copy(document)
        del without[key]
        yield without
        children = mutants(document[key]) if isinstance(document[key], dict | list) else iter(())
        for value in (None, "", "x", -1, [], [None], {}, {"x": "y"}, *children):
            changed = copy.copy(document)
            changed[key] = value
            yield changed


@pytest.mark.parametrize("kind", _SMALLEST)
def test_no_mutant_is_answered_by_a_crash(kind: str) -> None:
    metadata = {"name": "ddray", "annotations": {"a": "b"}}
    version = "apps/v1" if kind == "Deployment" else "ray.io/v1"
    right = {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": _SMALLEST[kind]}
    assert problems(right) == []
    refused = [bool(problems(mutant)) for mutant in mutants(right)]
    assert 0 < sum(refused) < len(refused)
