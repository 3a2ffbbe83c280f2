"""The files of cluster/eks: a node for every pod of cluster/kuberay, and what stands beside."""

import functools
import json
import re
from typing import Any

import pytest
import yaml

from tests.core.deployment.cloudformation import resources, statements
from tests.core.deployment.kuberay import (
    BUILDS,
    Document,
    build,
    of_kind,
    pool_of,
    problems,
    templates,
)
from tests.core.deployment.test_kuberay_pods import asked, fits
from tests.paths import ROOT

EKS = ROOT / "cluster" / "eks"
POOL = "ddray.io/node-pool"
GPU = "nvidia.com/gpu"
# Of no cloud, and a piece that is built into others.
ON_EKS = [name for name in BUILDS if name not in ("overlays/dev", "base")]


@functools.cache
def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((EKS / name).read_text("utf-8"))


def node_groups() -> list[dict[str, Any]]:
    return load("cluster.yaml")["managedNodeGroups"]


def types_of(group: dict[str, Any]) -> list[str]:
    return group.get("instanceTypes") or [group["instanceType"]]


def pods(name: str) -> list[Document]:
    """Templates of a build."""
    return [template for document in build(name) for _, template in templates(document)]


def tolerates(tolerations: list[dict[str, Any]], taint: dict[str, Any]) -> bool:
    return any(
        told["key"] == taint["key"]
        and told.get("effect", taint["effect"]) == taint["effect"]
        and (told.get("operator") == "Exists" or told.get("value") == taint["value"])
        for told in tolerations
    )


def may_stand_on(spec: Document, group: dict[str, Any]) -> bool:
    """By labels and taints."""
    return spec.get("nodeSelector", {}).items() <= group["labels"].items() and all(
        tolerates(spec.get("tolerations", []), taint) for taint in group.get("taints", [])
    )


@pytest.mark.parametrize("name", [*ON_EKS, "jobs"])
def test_there_is_a_group_for_every_pod_and_no_other_takes_it(name: str) -> None:
    found = pods(name)
    assert found
    for pod in found:
        spec = pod["spec"]
        groups = [group for group in node_groups() if may_stand_on(spec, group)]
        wanted = spec.get("nodeSelector", {}).get(POOL, "heads")
        assert [group["name"] for group in groups] == [wanted], spec
        for instance_type in types_of(groups[0]):
            assert fits(asked(pod), instance_type), instance_type
        # Machines with GPUs are for those who use them.
        tainted = GPU in {taint["key"] for taint in groups[0].get("taints", [])}
        assert tainted == (asked(pod)[GPU] > 0)


def test_a_pod_that_has_no_node_is_noticed() -> None:
    groups = {group["name"]: group for group in node_groups()}
    gpu = {"key": GPU, "operator": "Exists", "effect": "NoSchedule"}
    spot = {"key": "ddray.io/spot", "operator": "Exists", "effect": "NoSchedule"}
    sampling: Document = {"nodeSelector": {POOL: "sampling"}, "tolerations": [gpu, spot]}
    assert may_stand_on(sampling, groups["sampling"])
    assert not may_stand_on(sampling, groups["training"])
    assert not may_stand_on(sampling | {"tolerations": [gpu]}, groups["sampling"])
    assert not may_stand_on({}, groups["serving"])
    assert may_stand_on({}, groups["heads"])


def test_groups_grow_as_far_as_their_pools_and_cost_nothing_before() -> None:
    groups = {group["name"]: group for group in node_groups()}
    (cluster,) = of_kind(build("overlays/prod"), "RayCluster")
    most = {one["groupName"]: one["maxReplicas"] for one in cluster["spec"]["workerGroupSpecs"]}
    heads = groups.pop("heads")
    assert heads["minSize"] == heads["desiredCapacity"] == 2
    assert {name: group["maxSize"] for name, group in groups.items()} == most
    for name, group in groups.items():
        assert group["minSize"] == group["desiredCapacity"] == 0
        assert group["propagateASGTags"]
        spot = group.get("spot", False)
        assert spot == ("ddray.io/spot" in {taint["key"] for taint in group["taints"]})
        assert group["labels"]["karpenter.sh/capacity-type"] == ("spot" if spot else "on-demand")
        assert group["labels"][POOL] == name
    # Gradients cross no zone, and a disk does not either.
    for group in (heads, groups["training"]):
        (zone,) = group["availabilityZones"]
        assert zone in load("cluster.yaml")["availabilityZones"]
    # Without a role of its own a pod has none.
    assert all(group["disablePodIMDS"] for group in node_groups())


def test_gpus_are_told_of_on_every_machine_that_has_some() -> None:
    plugin = load("nvidia-device-plugin.yaml")
    (term,) = plugin["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    (rule,) = term["matchExpressions"]
    assert (rule["key"], rule["operator"]) == (POOL, "In")
    with_gpus = [
        group for group in node_groups() if GPU in {t["key"] for t in group.get("taints", [])}
    ]
    assert {group["name"] for group in with_gpus} == set(rule["values"])
    for group in with_gpus:
        assert all(tolerates(plugin["tolerations"], taint) for taint in group["taints"])


def test_a_group_that_has_efa_by_its_comments_takes_the_pods_of_efa() -> None:
    text = (EKS / "cluster.yaml").read_text("utf-8")
    key = r"efaEnabled: |tags:$|  k8s\.io/cluster-autoscaler/"
    text, number = re.subn(rf"^    # (?={key})", "    ", text, flags=re.MULTILINE)
    (group,) = [
        one for one in yaml.safe_load(text)["managedNodeGroups"] if one["name"] == "training"
    ]
    assert number == 4 and group["efaEnabled"] is True
    (cluster,) = of_kind(build("overlays/efa"), "RayCluster")
    pod = pool_of(cluster["spec"], "training")["template"]
    (container,) = pod["spec"]["containers"]
    # CPUs, memory and GPUs the autoscaler knows of each type of machine.
    unknown = container["resources"]["requests"].keys() - {"cpu", "memory", GPU}
    template = "k8s.io/cluster-autoscaler/node-template/resources/"
    assert group["tags"] == {
        template + name: container["resources"]["requests"][name] for name in unknown
    }
    assert all(fits(asked(pod), instance_type) for instance_type in types_of(group))
    plugin = load("efa-device-plugin.yaml")
    assert plugin["nodeSelector"].items() <= group["labels"].items()
    assert may_stand_on({"tolerations": plugin["tolerations"]}, group)


def test_pods_may_do_what_machines_of_ray_up_may() -> None:
    accounts = {
        (one["metadata"]["namespace"], one["metadata"]["name"]): one
        for one in load("cluster.yaml")["iam"]["serviceAccounts"]
    }
    rights = {}
    for name in ("WritesData", "ReadsData"):
        policy = resources("IAM::ManagedPolicy")[name]["PolicyDocument"]
        rights[name] = [set(statement["Action"]) for statement in statements(policy)]
    told = {}
    for name in ("ddray", "ddray-serving"):
        policy = accounts["ddray", name]["attachPolicy"]
        told[name] = [set(statement["Action"]) for statement in statements(policy)]
        places = [statement["Resource"] for statement in statements(policy)]
        assert places == [["arn:aws:s3:::YOUR+BUCKET"], ["arn:aws:s3:::YOUR+BUCKET/*"]]
        assert accounts["ddray", name]["roleName"] == name
    assert told == {"ddray": rights["WritesData"], "ddray-serving": rights["ReadsData"]}
    # The manifests name these roles, for these accounts.
    for document in of_kind(build("overlays/prod"), "ServiceAccount"):
        name = document["metadata"]["name"]
        role = document["metadata"]["annotations"]["eks.amazonaws.com/role-arn"]
        assert role.endswith(f":role/{accounts['ddray', name]['roleName']}")
    # Roles of one account must not share a name.
    roles = {role["RoleName"] for role in resources("IAM::Role").values()}
    assert not roles & {one.get("roleName") for one in accounts.values()}


def test_what_is_installed_beside_it_fits_the_cluster() -> None:
    cluster, scaler = load("cluster.yaml"), load("cluster-autoscaler.yaml")
    assert scaler["autoDiscovery"]["clusterName"] == cluster["metadata"]["name"]
    assert scaler["awsRegion"] == cluster["metadata"]["region"]
    account = scaler["rbac"]["serviceAccount"]
    made = {one["metadata"]["name"]: one for one in cluster["iam"]["serviceAccounts"]}
    assert not account["create"] and made[account["name"]]["wellKnownPolicies"] == {
        "autoScaler": True
    }
    addons = {addon["name"]: addon for addon in cluster["addons"]}
    network = json.loads(addons["vpc-cni"]["configurationValues"])
    assert network == {"enableNetworkPolicy": "true"}
    storage = load("storageclass.yaml")
    assert problems(storage) == []
    assert storage["provisioner"] == "ebs.csi.aws.com" and "aws-ebs-csi-driver" in addons
    for claim in of_kind(build("overlays/prod"), "PersistentVolumeClaim"):
        default = storage["metadata"]["annotations"]["storageclass.kubernetes.io/is-default-class"]
        assert claim["spec"].get("storageClassName", storage["metadata"]["name"]) == "gp3"
        assert default == "true"
