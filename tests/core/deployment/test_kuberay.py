"""The Kubernetes manifests: valid, in the files and as overlays make them, and true to the rest."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import ddray
from ddray.config.loading import load_config
from ddray.config.serving import ServeConfig
from tests.core.deployment.kuberay import (
    BUILDS,
    KUBERAY,
    ROOT,
    SCHEMA,
    Document,
    build,
    cluster,
    groups,
    job,
    of_kind,
    pool_of,
    problems,
    quantity,
    ray_specs,
    read,
    service,
    walk,
)

README = (ROOT / "cluster" / "README.md").read_text("utf-8")
POOL = "ddray.io/node-pool"
PLACEHOLDER = "registry.example.com/ddray"
FILES = sorted(
    [
        *(path for path in KUBERAY.glob("base/*.yaml") if path.name != "kustomization.yaml"),
        *KUBERAY.glob("jobs/*.yaml"),
        KUBERAY / "overlays" / "dev" / "digits.yaml",
        KUBERAY / "service.yaml",
        KUBERAY / "monitoring.yaml",
    ]
)
STAGES = ["distill", "evaluate", "generate", "pipeline", "sample"]


@pytest.mark.parametrize("name", BUILDS)
def test_what_kustomize_builds_is_valid(name: str) -> None:
    documents = build(name)
    assert documents
    assert [problem for document in documents for problem in problems(document)] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_file_is_valid_by_itself(path: Path) -> None:
    documents = read(path)
    assert documents
    assert [problem for document in documents for problem in problems(document)] == []


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
    ("spec/networkPolicy", {"mode": "DenyAll"}, "feature gate"),
    ("metadata/name", "ddray_jobs", "no DNS label"),
    ("metadata/title", "ddray", "unexpected"),
]
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
    ("metadata/name", "d" * 48, "too long"),
]
_WRONG_SERVICES: list[tuple[str, object, str]] = [
    ("spec/serveConfig", "", "unexpected"),
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
]


@pytest.mark.parametrize(
    ("kind", "path", "value", "told"),
    [
        (kind, *case)
        for kind, cases in (
            ("RayCluster", _WRONG_CLUSTERS),
            ("RayJob", _WRONG_JOBS),
            ("RayService", _WRONG_SERVICES),
            ("Deployment", _WRONG_REDIS),
        )
        for case in cases
    ],
)
def test_a_wrong_manifest_is_refused(kind: str, path: str, value: object, told: str) -> None:
    right = {
        "RayCluster": lambda: cluster("base"),
        "RayJob": lambda: job("sample"),
        "RayService": service,
        "Deployment": lambda: of_kind(build("base"), "Deployment")[0],
    }[kind]()
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


def images(documents: list[Document]) -> set[str]:
    return {
        container["image"]
        for document in documents
        for owner in walk(document)
        for container in owner.get("containers", [])
    }


@pytest.mark.slow
def test_images_have_the_tag_of_this_version() -> None:
    mine = {name: images(build(name)) - {"redis:7.4.2"} for name in BUILDS}
    assert mine["base"] == {f"{PLACEHOLDER}:{ddray.__version__}"}
    assert mine["overlays/dev"] == {f"ddray:{ddray.__version__}-cpu"}
    assert mine["overlays/prod"] == mine["base"]
    assert mine["."] == mine["base"], "the service and the cluster are of one image"


def test_ray_is_the_pinned_one() -> None:
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
        if not line.startswith("#")
    )
    for name in BUILDS:
        assert all(spec["rayVersion"] == pins["ray"] for spec in ray_specs(build(name)))
    kuberay = SCHEMA["$comment"].split(". ")[0].removeprefix("KubeRay ")
    rows = dict(re.findall(r"^\| (\w+) \| ([\d.]+) \|$", README, re.MULTILINE))
    python = (ROOT / "pyproject.toml").read_text("utf-8").partition('python_version = "')[2][:4]
    assert rows == {
        "KubeRay": kuberay,
        "Ray": pins["ray"],
        "Python": python,
        "ddray": ddray.__version__,
    }
    assert f"--version {kuberay}" in README


def test_pools_are_those_of_the_readme() -> None:
    rows = re.findall(r"^\| `(\w+)` \| .* \| 0\.\.(\d+) \|$", README, re.MULTILINE)
    spec = cluster("base")["spec"]
    found = [(group["groupName"], str(group["maxReplicas"])) for group in spec["workerGroupSpecs"]]
    assert found == rows and [name for name, _ in rows] == [
        "sampling",
        "training",
        "cpu",
        "serving",
    ]
    for name in BUILDS:
        for group in [g for spec in ray_specs(build(name)) for g in spec["workerGroupSpecs"]]:
            assert group["labels"] == {POOL: group["groupName"]}
            assert group["groupName"] in dict(rows)
            at = group["template"]["spec"].get("nodeSelector", {POOL: group["groupName"]})
            assert at[POOL] == group["groupName"]


def test_readme_names_every_file_and_only_those_that_there_are() -> None:
    assert len(README.splitlines()) <= 60
    for path in [*KUBERAY.rglob("*.yaml"), ROOT / "cluster" / "grafana"]:
        folder = path.parent.relative_to(ROOT / "cluster").as_posix()
        name = path.relative_to(ROOT / "cluster").as_posix()
        assert name in README or f"`{folder}/`" in README, name
    for name in re.findall(r"^\| `([\w./-]+)` \|", README, re.MULTILINE):
        if "/" in name:
            assert (ROOT / "cluster" / name).exists(), name


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
        assert ("ddray.io/spot" in tolerated) == (group["groupName"] == "sampling")
        assert group["minReplicas"] == group["replicas"] == 0
    assert gpus == {"sampling": 8, "training": 8, "cpu": 0, "serving": 1}
    cpus = pool_of(spec, "cpu")["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]
    assert cpus == "16"


def test_the_head_comes_back_by_redis() -> None:
    documents = build("base")
    redis = {one["kind"]: one for one in documents if one["metadata"]["name"] == "ddray-redis"}
    host, _, port = "ddray-redis:6379".partition(":")
    for spec in (cluster("base")["spec"], service()["spec"]["rayClusterConfig"]):
        options = spec["gcsFaultToleranceOptions"]
        assert options["redisAddress"] == f"{host}:{port}"
        reference = options["redisPassword"]["valueFrom"]["secretKeyRef"]
        pod = redis["Deployment"]["spec"]["template"]["spec"]
        assert pod["containers"][0]["env"][0]["valueFrom"]["secretKeyRef"] == reference
    assert redis["Service"]["spec"]["ports"][0]["port"] == int(port)
    assert redis["Deployment"]["spec"]["replicas"] == 1
    assert redis["Deployment"]["spec"]["strategy"] == {"type": "Recreate"}
    claim = pod["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert claim == redis["PersistentVolumeClaim"]["metadata"]["name"]


def test_secrets_are_referenced_and_the_command_that_makes_them_is_told() -> None:
    text = "\n".join(path.read_text("utf-8") for path in FILES)
    named = set()
    for document in [one for name in BUILDS for one in build(name)]:
        assert document["kind"] != "Secret"
        for owner in walk(document):
            if "secretKeyRef" in owner:
                named.add(owner["secretKeyRef"]["name"])
            if "secretName" in owner:
                named.add(owner["secretName"])
    assert named == {"ddray-redis", "ddray-api-keys"}
    for name in named:
        assert f"create secret generic {name} " in text


def test_dev_needs_no_gpu_no_redis_and_no_cloud() -> None:
    documents = build("overlays/dev")
    text = json.dumps(documents)
    for word in ("nvidia", "redis", "eks.amazonaws", "spot", "nodeSelector", PLACEHOLDER):
        assert word not in text, word
    (group,) = cluster("overlays/dev")["spec"]["workerGroupSpecs"]
    assert (group["groupName"], group["minReplicas"], group["maxReplicas"]) == ("cpu", 0, 2)


def test_prod_has_no_placeholder_left() -> None:
    documents = build("overlays/prod")
    text = json.dumps(documents)
    assert "000000000000" not in text
    (account,) = of_kind(documents, "ServiceAccount")
    role = account["metadata"]["annotations"]["eks.amazonaws.com/role-arn"]
    assert re.fullmatch(r"arn:aws:iam::\d{12}:role/[\w-]+", role)
    spec = cluster("overlays/prod")["spec"]
    for group in groups(spec):
        assert group["template"]["spec"]["serviceAccountName"] == account["metadata"]["name"]
    kinds = {
        name: pool_of(spec, name)["template"]["spec"]["nodeSelector"]["karpenter.sh/capacity-type"]
        for name in ("sampling", "training")
    }
    assert kinds == {"sampling": "spot", "training": "on-demand"}
    assert {one["metadata"]["namespace"] for one in documents + build(".")} == {"ddray"}


def test_efa_is_for_the_training_pool_alone_and_all_else_is_prod() -> None:
    plain, fast = cluster("overlays/prod")["spec"], cluster("overlays/efa")["spec"]
    spec = pool_of(fast, "training")["template"]["spec"]
    (container,) = spec["containers"]
    for told in container["resources"].values():
        assert told.pop("vpc.amazonaws.com/efa") == "32" and told.pop("hugepages-2Mi") == "5120Mi"
    told = {entry["name"]: entry["value"] for entry in container.pop("env")}
    assert told == {"FI_PROVIDER": "efa", "FI_EFA_USE_DEVICE_RDMA": "1"}
    (rule,) = spec.pop("affinity")["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert rule["topologyKey"] == "topology.kubernetes.io/zone"
    assert rule["labelSelector"] == {"matchLabels": {"ray.io/group": "training"}}
    assert fast == plain


def test_the_service_is_what_serving_takes() -> None:
    spec = service()["spec"]
    config = yaml.safe_load(spec["serveConfigV2"])
    assert config.keys() == {"http_options", "applications"}
    (application,) = config["applications"]
    assert application.keys() == {"name", "route_prefix", "import_path", "args"}
    module, _, function = application["import_path"].partition(":")
    source = (ROOT / (module.replace(".", "/") + ".py")).read_text("utf-8")
    assert re.search(rf"^def {function}\(arguments: dict", source, re.MULTILINE)
    serve = load_config(ServeConfig, preset=application["args"])
    same = load_config(ServeConfig, file=ROOT / "jobs" / "configs" / "llamagen-b-serve.yaml")
    other = {"host", "port", "api_keys_file"}
    assert serve.model_dump(exclude=other) == same.model_dump(exclude=other)
    grace = re.search(r"^_GRACE_S = ([\d.]+)$", source, re.MULTILINE)
    assert grace
    http = config["http_options"]
    assert http["request_timeout_s"] == serve.request_timeout_s + float(grace[1])
    group = pool_of(spec["rayClusterConfig"], "serving")
    assert (http["host"], http["port"]) == ("0.0.0.0", 8000)
    ports = group["template"]["spec"]["containers"][0]["ports"]
    assert {"name": "serve", "containerPort": http["port"]} in ports
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert serve.num_gpus == int(limits["nvidia.com/gpu"])
    assert serve.threads <= int(limits["cpu"])
    assert serve.replicas == (group["minReplicas"], group["maxReplicas"])
    assert spec["upgradeStrategy"] == {"type": "NewCluster"}
    assert spec["rayClusterDeletionDelaySeconds"] > http["request_timeout_s"]
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] > http["request_timeout_s"]


def test_the_service_finds_its_keys_on_every_node() -> None:
    spec = service()["spec"]
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    keys = Path(application["args"]["api_keys_file"])
    for group in groups(spec["rayClusterConfig"]):
        pod = group["template"]["spec"]
        mounts = {m["mountPath"]: m for m in pod["containers"][0]["volumeMounts"]}
        mount = mounts[str(keys.parent)]
        assert mount["readOnly"]
        (volume,) = [v for v in pod["volumes"] if v["name"] == mount["name"]]
        text = (KUBERAY / "service.yaml").read_text("utf-8")
        assert f"{volume['secret']['secretName']} --from-file={keys.name}=" in text


def test_there_is_a_job_for_every_stage() -> None:
    assert sorted(path.stem for path in KUBERAY.glob("jobs/*.yaml")) == STAGES
    (base,) = {cluster(name)["metadata"]["name"] for name in BUILDS if name != "."}
    for stage in STAGES:
        found = job(stage)
        assert found["metadata"]["name"] == f"ddray-{stage}"
        assert found["spec"]["clusterSelector"] == {"ray.io/cluster": base}
        assert found["spec"]["backoffLimit"] == 0 and "submissionMode" in found["spec"]
        assert f"jobs/{stage}.yaml" in (KUBERAY / "jobs" / f"{stage}.yaml").read_text("utf-8")


@pytest.mark.parametrize("name", [*STAGES, "digits"])
def test_what_a_job_starts_is_in_the_image(name: str) -> None:
    digits = name == "digits"
    found = read(KUBERAY / "overlays/dev/digits.yaml")[0] if digits else job(name)
    stage = "pipeline" if digits else name
    model = "digits" if digits or name == "evaluate" else "llamagen-b"
    config = f"jobs/configs/{model}-{stage}.yaml"
    assert found["spec"]["entrypoint"] == f"python jobs/{stage}.py --config {config}"
    for file in (f"jobs/{stage}.py", config):
        assert (ROOT / file).is_file(), file
    dockerfile = (ROOT / "cluster" / "Dockerfile").read_text("utf-8")
    assert "jobs /home/ray/jobs" in dockerfile and "WORKDIR /home/ray" in dockerfile


@pytest.mark.parametrize(
    "path", sorted((ROOT / "jobs" / "configs").glob("*.yaml")), ids=lambda path: path.stem
)
def test_configs_ask_for_pools_that_there_are(path: Path) -> None:
    pools = {group["groupName"] for group in cluster("base")["spec"]["workerGroupSpecs"]}
    (config,) = read(path)
    assert config.get("node_pool", "cpu") in pools


def test_dev_shares_the_folder_that_the_digits_configs_write_to() -> None:
    for group in groups(cluster("overlays/dev")["spec"]):
        pod = group["template"]["spec"]
        mounts = {m["name"]: m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
        assert any(v.get("persistentVolumeClaim") for v in pod["volumes"] if v["name"] == "runs")
        for path in (ROOT / "jobs" / "configs").glob("digits-*.yaml"):
            (config,) = read(path)
            if "out" in config:
                assert Path(mounts["runs"]) in Path(config["out"]).parents, path.name


def test_grafana_gets_the_dashboard_as_it_is() -> None:
    (found,) = of_kind(build("."), "ConfigMap")
    file = ROOT / "cluster" / "grafana" / "ddray-serving.json"
    assert found["data"] == {file.name: file.read_text("utf-8")}
    assert found["metadata"]["labels"] == {"grafana_dashboard": "1"}
    assert build("../grafana")[0]["data"] == found["data"]
