"""Reading and checking the Kubernetes manifests.

Fields of KubeRay are those of kuberay-schema.json, all others those of kubernetes_validate. That
file is written down anew from KubeRay's API reference, whose release it names at its head, and is
no copy of the CRDs: status, which is not ours to write, is left out, and types of Kubernetes are
references into kubernetes_validate, so that pods of a RayCluster are held to the same as any
others. The rules between fields are of KubeRay's operator
(ray-operator/controllers/ray/utils/validation.go), as far as its features are on by default.
"""

import copy
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from kubernetes_validate.utils import schema_contents
from packaging.version import InvalidVersion, Version
from referencing import Registry, Resource

from tests.paths import ROOT

KUBERAY = ROOT / "cluster" / "kuberay"
SCHEMA = json.loads(Path(__file__).with_name("kuberay-schema.json").read_text("utf-8"))
# An older one: what it takes, later ones take too.
KUBERNETES = "1.34"
BUILDS = ["base", "overlays/dev", "overlays/prod", "overlays/efa", "."]
"""Folders that kustomize builds, below cluster/kuberay; the last is the service and monitoring."""
OWN_CLUSTER = ["distill", "evaluate", "generate", "sample"]
"""Stages whose job may have a cluster of its own: folders below cluster/kuberay/own-cluster."""
QUEUE = "kueue.x-k8s.io/queue-name"
# libyaml's, where there is one: the dashboard is long.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DNS1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
# What KubeRay makes of a name, "-serve-svc", must fit into 63; a cluster that it names gets 6 more.
_LONGEST = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
_UNITS = {"m": 1e-3, "": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
# What Kubernetes reads as a number, which kubernetes_validate takes for any text.
_QUANTITY = r"^[+-]?(\d+\.?\d*|\.\d+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?\d+)?$"

Document = dict[str, Any]


@functools.cache
def _built(folder: Path) -> list[Document]:
    kubectl = Path(sys.executable).with_name("kubectl")
    done = subprocess.run(
        [kubectl, "kustomize", folder], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.load_all(done.stdout, _LOADER))


def build_with(component: str, name: str, folder: Path) -> list[Document]:
    """What comes of a folder of cluster/kuberay with one of its components.

    Args:
        component: folder below `components`.
        name: of the folder.
        folder: for the kustomization of the two.
    """
    kustomization = {
        "namespace": "ddray",
        "resources": [os.path.relpath(KUBERAY / name, folder)],
        "components": [os.path.relpath(KUBERAY / "components" / component, folder)],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return build(str(folder))


def build(name: str) -> list[Document]:
    """What `kubectl kustomize` makes of a folder."""
    return copy.deepcopy(_built((KUBERAY / name).resolve()))


def read(path: Path) -> list[Document]:
    return list(yaml.load_all(path.read_text("utf-8"), _LOADER))


def of_kind(documents: list[Document], kind: str) -> list[Document]:
    return [document for document in documents if document["kind"] == kind]


def cluster(build_name: str) -> Document:
    (found,) = of_kind(build(build_name), "RayCluster")
    return found


def service() -> Document:
    (found,) = read(KUBERAY / "service.yaml")
    return found


def job(stage: str) -> Document:
    (found,) = read(KUBERAY / "jobs" / f"{stage}.yaml")
    return found


def job_with_cluster(stage: str) -> Document:
    """The same with a cluster of its own."""
    (found,) = build(f"own-cluster/{stage}")
    return found


def ray_specs(documents: list[Document]) -> list[Document]:
    """Specs of all Ray clusters, those of services too."""
    services = [one["spec"]["rayClusterConfig"] for one in of_kind(documents, "RayService")]
    return [one["spec"] for one in of_kind(documents, "RayCluster")] + services


def groups(spec: Document) -> list[Document]:
    """The head's group, then those of workers."""
    return [spec["headGroupSpec"], *spec.get("workerGroupSpecs", [])]


def pool_of(spec: Document, name: str) -> Document:
    (found,) = [group for group in spec["workerGroupSpecs"] if group["groupName"] == name]
    return found


def quantity(text: str | int) -> float:
    """A number of Kubernetes: 500m, 8Gi."""
    match = re.fullmatch(r"(\d+)(m|[KMGT]i|)", str(text))
    assert match, text
    return int(match[1]) * _UNITS[match[2]]


def walk(value: object) -> Iterator[dict[str, Any]]:
    """Every object in a document."""
    if isinstance(value, dict):
        yield value
    for child in value.values() if isinstance(value, dict) else value:
        if isinstance(child, dict | list):
            yield from walk(child)


def templates(document: Document) -> Iterator[tuple[str, Document]]:
    """Templates of the pods that an object makes, each with the name of its group."""
    kind, spec = document["kind"], document.get("spec", {})
    if kind == "Deployment" and spec:
        yield document.get("metadata", {}).get("name", ""), spec["template"]
    if "submitterPodTemplate" in spec:
        yield "submitter", spec["submitterPodTemplate"]
    key = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}.get(kind)
    ray = spec if kind == "RayCluster" else spec.get(key, {})
    if ray:
        for group in groups(ray):
            yield group.get("groupName", "head"), group["template"]


@functools.cache
def _core() -> Document:
    """Schemas of Kubernetes itself: with its quantities as it reads them, and null for nothing."""
    folder = f"kubernetes-json-schema/v{KUBERNETES}.0-local-strict"
    core: Document = schema_contents(f"{folder}/_definitions.json", KUBERNETES)
    for schema in walk(core["$defs"]):
        if isinstance(schema.get("type"), list):
            schema["type"].remove("null")
    quantity = {"type": ["string", "number"], "pattern": _QUANTITY}
    core["$defs"]["io.k8s.apimachinery.pkg.api.resource.Quantity"] = quantity
    return core


@functools.cache
def _references() -> dict[tuple[str, str], str]:
    """Where the schema of each apiVersion and kind stands."""
    found = {}
    for name, schema in _core()["$defs"].items():
        for of in schema.get("x-kubernetes-group-version-kind", []):
            version = f"{of['group']}/{of['version']}".removeprefix("/")
            found[version, of["kind"]] = f"{_core()['$id']}#/$defs/{name}"
    for name, schema in SCHEMA["$defs"].items():
        if "kind" in schema.get("properties", {}):
            found[schema["properties"]["apiVersion"]["const"], name] = f"#/$defs/{name}"
    return found


@functools.cache
def _validator(reference: str) -> jsonschema.Draft202012Validator:
    registry = Resource.from_contents(_core()) @ Registry()
    schema = {"$defs": SCHEMA["$defs"], "$ref": reference}
    return jsonschema.Draft202012Validator(schema, registry=registry)


def problems(document: Document) -> list[str]:
    """What Kubernetes or KubeRay would have against an object."""
    document = _without_nulls(document)
    named = (str(document.get("apiVersion")), str(document.get("kind")))
    if named not in _references():
        return [f"{named[1]} of {named[0]}: no such kind"]
    errors = [
        f"{'/'.join(map(str, error.path))}: {error.message}"
        for error in _validator(_references()[named]).iter_errors(document)
    ]
    if errors:
        return errors
    metadata, kind = document.get("metadata", {}), named[1]
    name = metadata.get("name", "")
    if len(name) > _LONGEST.get(kind, 253) or not _DNS1035.fullmatch(name):
        errors.append(f"metadata/name: {name} is too long or no DNS label")
    for of, template in templates(document):
        containers = template.get("spec", {}).get("containers", [])
        if not containers:
            errors.append(f"{of}: a pod without a container")
        errors += [f"{of}: a container without an image" for c in containers if not c.get("image")]
    rules = {"RayCluster": cluster_rules, "RayJob": job_rules, "RayService": service_rules}
    if errors or kind not in rules:
        return errors
    errors = [*rules[kind](document["spec"], metadata.get("annotations", {}))]
    if kind == "RayJob" and QUEUE in metadata.get("labels", {}):
        errors += queue_rules(document["spec"])
    return errors


def _without_nulls(value: Any) -> Any:
    """As the API server reads it: a key without a value is not there."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def cluster_rules(spec: Document, annotations: Document) -> Iterator[str]:
    """Rules of ValidateRayClusterSpec, as far as the features are on by default."""
    head, scaler = spec["headGroupSpec"], spec.get("autoscalerOptions", {})
    environment = {e["name"] for e in head["template"]["spec"]["containers"][0].get("env", [])}
    started = head.get("rayStartParams", {})
    automatic = spec.get("enableInTreeAutoscaling", False)
    try:
        version = Version(spec.get("rayVersion", "0"))
    except InvalidVersion:
        yield f"rayVersion: {spec['rayVersion']} is no version"
        return
    second = (
        automatic and scaler.get("version", "v2" if version >= Version("2.47") else "v1") == "v2"
    )
    for group in groups(spec):
        name, start = group.get("groupName", "head"), group.get("rayStartParams", {})
        if group.get("resources") and start.keys() & {
            "num-cpus",
            "num-gpus",
            "memory",
            "resources",
        }:
            yield f"{name}: resources and rayStartParams both say what there is"
        if "labels" in start:
            yield f"{name}: labels belong to the group, not into rayStartParams"
        if not all(_LABEL_VALUE.fullmatch(value) for value in group.get("labels", {}).values()):
            yield f"{name}: a label's value is none"
        if second and group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            yield f"{name}: autoscaler v2 wants restartPolicy Never"
    for group in spec.get("workerGroupSpecs", []):
        name, least, most = group["groupName"], group.get("minReplicas"), group.get("maxReplicas")
        if not automatic and None in (least, most):
            yield f"{name}: without an autoscaler minReplicas and maxReplicas are needed"
        if (least or 0) > (2**31 - 1 if most is None else most):
            yield f"{name}: minReplicas is above maxReplicas"
        if (group.get("priority") or group.get("idleTimeoutSeconds") is not None) and not second:
            yield f"{name}: priority and idleTimeoutSeconds are for autoscaler v2"
        if group.get("priority") and version < Version("2.56"):
            yield f"{name}: priority needs Ray 2.56"
        if group.get("suspend"):
            yield f"{name}: suspend is not for users"
    if "RAY_enable_autoscaler_v2" in environment and (not automatic or "version" in scaler):
        yield "RAY_enable_autoscaler_v2: autoscalerOptions.version says it"
    if any(e["name"] == "KUBERAY_GEN_AUTOSCALER_START_CMD" for e in scaler.get("env", [])):
        yield "KUBERAY_GEN_AUTOSCALER_START_CMD is KubeRay's own"
    tolerant = spec.get("gcsFaultToleranceOptions")
    if tolerant is None:
        if "RAY_REDIS_ADDRESS" in environment and annotations.get("ray.io/ft-enabled") != "true":
            yield "RAY_REDIS_ADDRESS needs gcsFaultToleranceOptions"
    else:
        if annotations.get("ray.io/ft-enabled") or annotations.get(
            "ray.io/external-storage-namespace"
        ):
            yield "annotations and gcsFaultToleranceOptions both say where tables are kept"
        if environment & {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS"} or "redis-password" in started:
            yield "the head and gcsFaultToleranceOptions both say where Redis is"
        if tolerant.get("backend", "redis") == "redis" and "storage" in tolerant:
            yield "gcsFaultToleranceOptions: storage is for rocksdb"
        if tolerant.get("backend") == "rocksdb":
            yield "gcsFaultToleranceOptions: rocksdb needs a feature gate that is off"
    if "REDIS_USERNAME" in environment or "redis-username" in started:
        yield "a user of Redis belongs into gcsFaultToleranceOptions"
    yield from _auth_rules(spec.get("authOptions"), version)
    gates = spec.keys() & {"historyServerOptions", "networkPolicy", "tlsOptions"}
    yield from (f"{key}: needs a feature gate that is off" for key in sorted(gates))


def _auth_rules(auth: Document | None, version: Version) -> Iterator[str]:
    if auth is None:
        return
    if auth.get("mode", "token") == "token":
        if version < Version("2.52"):
            yield "authOptions: a token needs rayVersion 2.52"
        if auth.get("enableK8sTokenAuth") and (version < Version("2.55") or auth.get("secretName")):
            yield "authOptions: enableK8sTokenAuth needs Ray 2.55 and no secretName"
    elif auth.get("enableK8sTokenAuth"):
        yield "authOptions: enableK8sTokenAuth needs mode token"


def job_rules(spec: Document, annotations: Document) -> Iterator[str]:
    """Rules of ValidateRayJobSpec."""
    selector, mode = spec.get("clusterSelector"), spec.get("submissionMode", "K8sJobMode")
    shutdown, retries = spec.get("shutdownAfterJobFinishes", False), spec.get("backoffLimit", 0)
    strategy = spec.get("deletionStrategy", {})
    if not selector and "rayClusterSpec" not in spec:
        yield "one of rayClusterSpec and clusterSelector must be there"
    if spec.get("suspend") and (selector or not shutdown):
        yield "suspend needs a cluster of its own that is shut down after the job"
    if spec.get("ttlSecondsAfterFinished") and not shutdown:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if strategy.get("deletionRules") and shutdown:
        yield "deletionRules and shutdownAfterJobFinishes exclude each other"
    if selector:
        if not selector.get("ray.io/cluster"):
            yield "clusterSelector must have ray.io/cluster"
        if mode == "SidecarMode":
            yield "clusterSelector is not for SidecarMode"
        if retries:
            yield "backoffLimit must be 0 with clusterSelector"
        policies = {rule["policy"] for rule in strategy.get("deletionRules", [])}
        policies |= {strategy[k].get("policy") for k in ("onSuccess", "onFailure") if k in strategy}
        if policies & {"DeleteCluster", "DeleteWorkers"}:
            yield "a cluster that was selected is not deleted"
    if mode == "InteractiveMode" and retries:
        yield "backoffLimit must be 0 in InteractiveMode"
    if mode == "SidecarMode" and spec.keys() & {"submitterPodTemplate", "submitterConfig"}:
        yield "SidecarMode has no submitter"
    if not _holds_object(spec.get("runtimeEnvYAML", "{}")):
        yield "runtimeEnvYAML must be an object"
    if "rayClusterSpec" in spec:
        yield from cluster_rules(spec["rayClusterSpec"], annotations)


def queue_rules(spec: Document) -> Iterator[str]:
    """Rules of Kueue's webhook for a RayJob that names a queue, without elastic jobs (an alpha)."""
    ray = spec.get("rayClusterSpec")
    if spec.get("clusterSelector") or ray is None:
        yield "Kueue leaves a job alone that has no cluster of its own"
        return
    if not spec.get("shutdownAfterJobFinishes"):
        yield "Kueue wants shutdownAfterJobFinishes"
    if ray.get("enableInTreeAutoscaling"):
        yield "Kueue takes no cluster that grows by itself"
    names = [group["groupName"] for group in ray.get("workerGroupSpecs", [])]
    if len(names) > 7 or "head" in names:
        yield "Kueue takes seven groups of workers, none called head"


def _holds_object(text: str) -> bool:
    try:
        return isinstance(yaml.safe_load(text), dict)
    except yaml.YAMLError:
        return False


def service_rules(spec: Document, annotations: Document) -> Iterator[str]:
    """Rules of ValidateRayServiceSpec."""
    ray, strategy = spec["rayClusterConfig"], spec.get("upgradeStrategy", {})
    if not _holds_object(spec.get("serveConfigV2", "{}")):
        yield "serveConfigV2 must be an object"
    if ray.get("authOptions", {}).get("enableK8sTokenAuth"):
        yield "enableK8sTokenAuth is not for services"
    if "upgradeStrategy" in ray:
        yield "upgradeStrategy belongs to the service, not to its cluster"
    if ray["headGroupSpec"].get("headService", {}).get("metadata", {}).get("name"):
        yield "headService must not be named"
    if strategy.get("type") == "NewClusterWithIncrementalUpgrade":
        options = strategy.get("clusterUpgradeOptions")
        if options is None or not ray.get("enableInTreeAutoscaling"):
            yield "an incremental upgrade needs clusterUpgradeOptions and the autoscaler"
        elif options["stepSizePercent"] > options.get("maxSurgePercent", 100):
            yield "stepSizePercent is above maxSurgePercent"
    yield from cluster_rules(ray, annotations)
