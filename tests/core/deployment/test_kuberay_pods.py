"""The pods: that nodes have room for them, where they may stand, and what they may do."""

import re
from pathlib import Path

import pytest
import yaml

from tests.core.deployment.kuberay import (
    BUILDS,
    KUBERAY,
    OWN_CLUSTER,
    ROOT,
    Document,
    build,
    cluster,
    groups,
    of_kind,
    pool_of,
    quantity,
    ray_specs,
    read,
    service,
    templates,
)
from tests.core.deployment.machines import allocatable, instance_types

CAPACITY = "karpenter.sh/capacity-type"
OWN_CLUSTERS = [f"own-cluster/{stage}" for stage in OWN_CLUSTER]
README = (ROOT / "cluster" / "README.md").read_text("utf-8")


# Room


def asked(*pods: Document) -> dict[str, float]:
    """Sums of what pods ask for; huge pages are taken from the memory."""
    total = {"cpu": 0.0, "memory": 0.0, "nvidia.com/gpu": 0.0}
    for pod in pods:
        for container in pod["spec"]["containers"]:
            for name, value in container["resources"]["requests"].items():
                key = "memory" if name.startswith("hugepages-") else name
                total[key] = total.get(key, 0) + quantity(value)
    return total


def fits(wanted: dict[str, float], instance_type: str) -> bool:
    """With a twentieth of CPUs and memory to spare, for the daemons of others."""
    has = allocatable(instance_type)
    shares = {"cpu": 0.95, "memory": 0.95}
    return all(amount <= shares.get(name, 1) * has.get(name, 0) for name, amount in wanted.items())


def named_machines() -> dict[str, list[str]]:
    """The instance types that the README names for each pool, and for heads."""
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \| (`[^|]*`) \|", README, re.MULTILINE)
    return {pool: re.findall(r"`([\w.-]+)`", cell) for pool, cell in rows}


def test_a_machine_has_what_eks_leaves_of_it() -> None:
    large, small = allocatable("m7i.4xlarge"), allocatable("m7i.2xlarge")
    assert (round(1000 * large["cpu"]), round(1000 * small["cpu"])) == (15890, 7910)
    # 234 and 58 pods.
    assert large["memory"] == (0.925 * 65536 - 2829 - 100) * 2**20
    assert small["memory"] == (0.925 * 32768 - 893 - 100) * 2**20
    assert fits({"cpu": 15, "memory": 2**30, "nvidia.com/gpu": 0}, "m7i.4xlarge")
    assert not fits({"cpu": 15.5, "memory": 2**30, "nvidia.com/gpu": 0}, "m7i.4xlarge")
    assert not fits({"cpu": 1, "memory": 56 * 2**30, "nvidia.com/gpu": 0}, "m7i.4xlarge")
    assert not fits({"cpu": 1, "memory": 2**30, "nvidia.com/gpu": 1}, "m7i.4xlarge")
    assert not fits({"cpu": 1, "memory": 2**30, "example.com/card": 1}, "m7i.4xlarge")
    assert fits({"vpc.amazonaws.com/efa": 32}, "p5.48xlarge")
    assert fits({"vpc.amazonaws.com/efa": 4}, "p4de.24xlarge")
    assert not fits({"vpc.amazonaws.com/efa": 5}, "p4de.24xlarge")


@pytest.mark.parametrize("name", ["overlays/prod", "."])
def test_pods_fit_on_every_machine_that_is_named_for_their_pool(name: str) -> None:
    (spec,) = ray_specs(build(name))
    for group in spec["workerGroupSpecs"]:
        assert named_machines()[group["groupName"]]
        for instance_type in named_machines()[group["groupName"]]:
            assert fits(asked(group["template"]), instance_type), instance_type


def test_pods_with_efa_fit_on_the_machines_that_are_named_for_it() -> None:
    (row,) = re.findall(r"^\| `kuberay/overlays/efa/` .*", README, re.MULTILINE)
    wanted = asked(pool_of(cluster("overlays/efa")["spec"], "training")["template"])
    fitting = [one for one in named_machines()["training"] if fits(wanted, one)]
    assert fitting and fitting == re.findall(r"`(\w+\.\w+)`", row)


@pytest.mark.parametrize("name", ["overlays/prod", "."])
def test_a_head_fits_with_redis_on_its_machine(name: str) -> None:
    (spec,) = ray_specs(build(name))
    (redis,) = of_kind(build("base"), "Deployment")
    autoscaler = {"spec": {"containers": [spec["autoscalerOptions"]]}}
    wanted = asked(spec["headGroupSpec"]["template"], autoscaler, redis["spec"]["template"])
    (instance_type,) = named_machines()["head"]
    assert fits(wanted, instance_type)


def test_trainings_have_gpus_of_80_gb() -> None:
    for instance_type in named_machines()["training"]:
        (gpu,) = instance_types()[instance_type]["GpuInfo"]["Gpus"]
        assert gpu["MemoryInfo"]["SizeInMiB"] >= 80 * 1024


def test_every_machine_that_is_named_is_one_of_ec2s() -> None:
    files = [ROOT / "ray-cluster.yaml", *(ROOT / "cluster").rglob("*.*")]
    written = [path for path in files if path.is_file() and "__pycache__" not in path.parts]
    text = "\n".join(path.read_text("utf-8") for path in written)
    named = set(re.findall(r"\b[a-z]+\d[\w-]*\.(?:\d*x?large|metal)\b", text))
    assert {one for pool in named_machines().values() for one in pool} < named
    assert named <= {*instance_types()}


@pytest.mark.parametrize("name", BUILDS)
def test_pods_are_sized_so_that_they_live(name: str) -> None:
    (spec,) = ray_specs(build(name))
    sizes = [spec["autoscalerOptions"]["resources"]]
    for group in groups(spec):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        sizes.append(container["resources"])
        shm = next(volume for volume in pod["volumes"] if volume["name"] == "shm")["emptyDir"]
        assert shm["medium"] == "Memory"
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        # Ray's object store (ray_constants): else it lies on disk, or the node does not start.
        memory = quantity(container["resources"]["limits"]["memory"])
        assert min(0.3 * memory, 200e9) <= quantity(shm["sizeLimit"]) < memory
        assert pod["terminationGracePeriodSeconds"] >= 60
        assert not container.keys() & {"livenessProbe", "readinessProbe", "command"}
        assert pod["securityContext"]["runAsNonRoot"]
    assert all(size["requests"] == size["limits"] for size in sizes)
    head = spec["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    limits = head["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert quantity(limits["memory"]) >= 8 * 2**30
    assert spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["version"] == "v2"
    assert spec["authOptions"] == {"mode": "token"}


def test_pools_are_of_the_machines_that_they_are_for() -> None:
    spec = cluster("base")["spec"]
    gpus = {}
    for group in spec["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        limits = pod["containers"][0]["resources"]["limits"]
        gpus[group["groupName"]] = int(limits.get("nvidia.com/gpu", 0))
        tolerated = {toleration["key"] for toleration in pod.get("tolerations", [])}
        assert ("nvidia.com/gpu" in tolerated) == ("nvidia.com/gpu" in limits)
        assert ("ddray.io/spot" in tolerated) == (group["groupName"] in ("sampling", "cpu"))
        assert group["minReplicas"] == group["replicas"] == 0
    assert gpus == {"sampling": 8, "training": 8, "cpu": 0, "serving": 1}


# Where they stand


def test_nothing_in_prod_is_on_spot_machines_but_what_loses_little() -> None:
    found = {
        (document["kind"], of, template["spec"].get("nodeSelector", {}).get(CAPACITY))
        for name in ("overlays/prod", ".", "jobs", *OWN_CLUSTERS)
        for document in build(name)
        for of, template in templates(document)
    }
    capacity = {(kind, of): at for kind, of, at in found}
    assert len(capacity) == len(found)
    assert capacity == {
        ("RayCluster", "head"): "on-demand",
        ("RayCluster", "sampling"): "spot",
        ("RayCluster", "training"): "on-demand",
        ("RayCluster", "cpu"): None,
        ("RayCluster", "serving"): "on-demand",
        ("RayJob", "submitter"): "on-demand",
        ("RayJob", "head"): "on-demand",
        ("RayJob", "sampling"): "spot",
        ("RayJob", "training"): "on-demand",
        ("RayService", "head"): "on-demand",
        ("RayService", "serving"): "on-demand",
        ("Deployment", "ddray-redis"): "on-demand",
    }


@pytest.mark.parametrize("path", sorted((KUBERAY / "jobs").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_job_of_a_file_by_itself_stays_off_nodes_with_a_taint(path: Path) -> None:
    for _, template in [found for one in read(path) for found in templates(one)]:
        assert "tolerations" not in template["spec"]


@pytest.mark.parametrize("name", [*BUILDS, "jobs", *OWN_CLUSTERS])
def test_no_autoscaler_moves_drivers_submitters_or_a_training(name: str) -> None:
    held = {"karpenter.sh/do-not-disrupt", "cluster-autoscaler.kubernetes.io/safe-to-evict"}
    documents = build(name)
    for document in of_kind(documents, "RayCluster") + of_kind(documents, "RayJob"):
        for of, template in templates(document):
            notes = template.get("metadata", {}).get("annotations", {})
            if of in ("head", "training", "submitter"):
                assert [notes[key] for key in sorted(held)] == ["false", "true"]
            else:
                assert not held & notes.keys()


def takes(rule: Document, pods: list[int], node: int) -> bool:
    """Whether a node may have another pod, by how many each eligible one has.

    As Kubernetes describes a constraint: its skew is against the node that has the fewest, or
    against none where there are fewer nodes than minDomains.
    """
    fewest = min(pods) if len(pods) >= rule.get("minDomains", 1) else 0
    return pods[node] + 1 - fewest <= rule["maxSkew"]


def test_pods_of_the_service_are_apart_and_there_are_two() -> None:
    spec = service()["spec"]
    group = pool_of(spec["rayClusterConfig"], "serving")
    assert group["minReplicas"] == group["replicas"] == 2
    labels = {
        **group["template"]["metadata"]["labels"],
        **group["labels"],
        "ray.io/group": "serving",
    }
    rules = group["template"]["spec"]["topologySpreadConstraints"]
    assert [(one["topologyKey"], one["whenUnsatisfiable"]) for one in rules] == [
        ("kubernetes.io/hostname", "DoNotSchedule"),
        ("topology.kubernetes.io/zone", "ScheduleAnyway"),
    ]
    for rule in rules:
        assert rule["labelSelector"]["matchLabels"].items() <= labels.items()
        assert (rule["maxSkew"], rule["matchLabelKeys"]) == (1, ["ray.io/cluster"])
    by_node = rules[0]
    assert takes(by_node, [0], 0)
    assert not takes(by_node, [1], 0)
    assert takes(by_node, [1, 0], 1) and not takes(by_node, [1, 0], 0)
    # One of two is lost: the other's node does not take its pod.
    assert takes(by_node, [1, 1], 0) and not takes(by_node, [1], 0)
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    (front,) = application["deployments"]
    # Of num_cpus 0 it would stand on the head too, which has none to give.
    assert front["max_replicas_per_node"] == 1 and front["ray_actor_options"]["num_cpus"] > 0
    assert application["args"]["ingress_replicas"] <= group["minReplicas"]


# What they may do


@pytest.mark.parametrize("name", [*BUILDS, "jobs"])
def test_pods_are_such_that_the_namespace_takes_them(name: str) -> None:
    """Kubernetes' pod security standard `restricted`, as far as our pods have its fields."""
    (namespace,) = of_kind(build("base"), "Namespace")
    assert namespace["metadata"]["labels"] == {"pod-security.kubernetes.io/enforce": "restricted"}
    found = [template["spec"] for one in build(name) for _, template in templates(one)]
    assert found
    for pod in found:
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC", "initContainers"}
        for volume in pod.get("volumes", []):
            assert volume.keys() & {"emptyDir", "persistentVolumeClaim", "secret", "configMap"}
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert not any("hostPort" in port for port in container.get("ports", []))
    for spec in ray_specs(build(name)):
        assert spec["autoscalerOptions"]["securityContext"] == context


@pytest.mark.parametrize("name", [*BUILDS, "jobs"])
def test_no_pod_sees_gpus_that_are_not_its_own(name: str) -> None:
    dockerfile = (ROOT / "cluster" / "Dockerfile").read_text("utf-8")
    assert "NVIDIA_VISIBLE_DEVICES=all" in dockerfile
    void = {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"}
    containers = [spec["autoscalerOptions"] for spec in ray_specs(build(name))]
    for _, template in [found for one in build(name) for found in templates(one)]:
        containers += template["spec"]["containers"]
    for container in containers:
        if not container.get("image", "").startswith("redis:"):
            # The device plugin says which, where there are some; a value here would win over it.
            gpus = "nvidia.com/gpu" in container["resources"]["limits"]
            assert (void in container.get("env", [])) != gpus
