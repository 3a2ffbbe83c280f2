"""The Kubernetes manifests: valid, in the files and as overlays make them, and true to the rest."""

import json
import math
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

import ddray
from ddray.config.loading import load_config
from ddray.config.serving import ServeConfig
from tests.core.deployment.kuberay import (
    BUILDS,
    KUBERAY,
    OWN_CLUSTER,
    QUEUE,
    ROOT,
    SCHEMA,
    Document,
    build,
    build_with,
    cluster,
    groups,
    job,
    job_with_cluster,
    of_kind,
    pool_of,
    problems,
    ray_specs,
    read,
    service,
    templates,
    walk,
)
from tests.core.deployment.test_dashboard import DASHBOARDS

README = (ROOT / "cluster" / "README.md").read_text("utf-8")
GUIDE = (ROOT / "docs" / "cluster.md").read_text("utf-8")
POOL = "ddray.io/node-pool"
PLACEHOLDER = "registry.example.com/ddray"
FILES = sorted(
    [
        *(
            path
            for folder in ("base", "jobs")
            for path in (KUBERAY / folder).glob("*.yaml")
            if path.name != "kustomization.yaml"
        ),
        KUBERAY / "overlays" / "dev" / "digits.yaml",
        KUBERAY / "service.yaml",
        KUBERAY / "monitoring.yaml",
    ]
)
STAGES = ["distill", "evaluate", "generate", "pipeline", "sample"]
JOBS = [one for path in FILES for one in read(path) if one["kind"] == "RayJob"]


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


def images(documents: list[Document]) -> set[str]:
    return {
        container["image"]
        for document in documents
        for owner in walk(document)
        for container in owner.get("containers", [])
    }


@pytest.mark.slow
def test_images_have_the_tag_of_this_version() -> None:
    for document in [one for name in BUILDS for one in build(name)] + JOBS:
        for group, template in templates(document):
            for container in template["spec"]["containers"]:
                image, _, tag = container["image"].partition(":")
                if group == "ddray-redis":
                    assert image == "redis"
                    continue
                limits = container["resources"]["limits"]
                assert tag == ddray.__version__ + ("" if "nvidia.com/gpu" in limits else "-cpu")
                assert image in (PLACEHOLDER, "ddray")
    assert images(build("overlays/dev")) == {f"ddray:{ddray.__version__}-cpu"}


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
    assert len(README.splitlines()) <= 64
    for path in [*KUBERAY.rglob("*.yaml"), ROOT / "cluster" / "grafana"]:
        name = path.relative_to(ROOT / "cluster")
        told = [f"`{folder.as_posix()}/`" in README for folder in name.parents]
        assert name.as_posix() in README or any(told), name
    for name in re.findall(r"^\| `([\w./-]+)` \|", README, re.MULTILINE):
        if "/" in name:
            assert (ROOT / "cluster" / name).exists(), name


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
    # Without a name the claim waits for a default class, which EKS has not, and no head starts.
    assert redis["PersistentVolumeClaim"]["spec"]["storageClassName"] == "gp3"
    (container,) = pod["containers"]
    assert container["livenessProbe"] != container["readinessProbe"]
    version = Version(container["image"].removeprefix("redis:"))
    assert Version("7.4.6") <= version < Version("8"), "a hole open to all with the password"


@pytest.mark.parametrize("name", ["overlays/prod", "."])
def test_heads_may_know_where_charts_come_from(name: str, tmp_path: Path) -> None:
    documents = build_with("charts", name, tmp_path)
    assert [problem for document in documents for problem in problems(document)] == []
    (spec,), (before,) = ray_specs(documents), ray_specs(build(name))
    env = spec["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
    added = {entry["name"]: entry["value"] for entry in env[-3:]}
    del env[-3:]
    assert spec == before
    # As the chart calls them by the release and the namespace of the guide.
    chart = r"helm install (\w+) \S+/kube-prometheus-stack --namespace (\w+)"
    ((release, namespace),) = re.findall(chart, GUIDE)
    assert added == {
        "RAY_PROMETHEUS_HOST": f"http://{release}-kube-prometheus-prometheus.{namespace}.svc:9090",
        "RAY_GRAFANA_HOST": f"http://{release}-grafana.{namespace}.svc:80",
        "RAY_GRAFANA_IFRAME_HOST": "http://127.0.0.1:3000",
    }
    told = (KUBERAY / "components" / "charts" / "kustomization.yaml").read_text("utf-8")
    assert f"kubectl -n {namespace} port-forward svc/{release}-grafana 3000:80" in told
    ray = find_spec("ray")
    assert ray is not None and ray.origin is not None
    reader = Path(ray.origin).parent / "dashboard/modules/metrics/metrics_head.py"
    assert all(f'"{key}"' in reader.read_text("utf-8") for key in added)


@pytest.mark.parametrize("name", ["overlays/prod", "."])
def test_redis_may_be_somebody_elses(name: str, tmp_path: Path) -> None:
    documents = build_with("external-redis", name, tmp_path)
    assert [problem for document in documents for problem in problems(document)] == []
    assert "ddray-redis" not in {one["metadata"]["name"] for one in documents}
    (spec,) = ray_specs(documents)
    (before,) = ray_specs(build(name))
    options = spec["gcsFaultToleranceOptions"]
    assert options.pop("redisAddress").startswith("rediss://")
    del before["gcsFaultToleranceOptions"]["redisAddress"]
    assert spec == before


def test_an_ingress_leads_to_the_service_and_is_let_in(tmp_path: Path) -> None:
    documents = build_with("ingress", ".", tmp_path)
    assert [problem for document in documents for problem in problems(document)] == []
    (ingress,) = of_kind(documents, "Ingress")
    (ray_service,) = of_kind(documents, "RayService")
    (rule,) = ingress["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    # What KubeRay names the service before the nodes that answer.
    name = f"{ray_service['metadata']['name']}-serve-svc"
    assert path["backend"]["service"] == {"name": name, "port": {"name": "serve"}}
    ports = groups(ray_service["spec"]["rayClusterConfig"])[1]["template"]["spec"]["containers"][0]
    assert {"name": "serve", "containerPort": 8000} in ports["ports"]
    assert [rule["host"]] == ingress["spec"]["tls"][0]["hosts"]
    longest = yaml.safe_load(ray_service["spec"]["serveConfigV2"])["http_options"]
    (patience,) = ingress["metadata"]["annotations"].values()
    assert int(patience) > longest["request_timeout_s"]
    (label,) = (line for line in GUIDE.splitlines() if line.startswith("kubectl label namespace"))
    policies = of_kind(build("overlays/prod"), "NetworkPolicy")
    (policy,) = (one for one in policies if one["metadata"]["name"] == "ddray-serve")
    key, _, value = label.split()[-1].partition("=")
    assert {"matchLabels": {key: value}} == policy["spec"]["ingress"][0]["from"][0][
        "namespaceSelector"
    ]


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


def test_jobs_and_the_service_have_each_a_role_of_their_own() -> None:
    documents = build("overlays/prod")
    assert "000000000000" not in json.dumps(documents)
    roles = {
        one["metadata"]["name"]: one["metadata"]["annotations"]["eks.amazonaws.com/role-arn"]
        for one in of_kind(documents, "ServiceAccount")
    }
    # Strangers talk to the service, whose role may only read.
    assert roles.keys() == {"ddray", "ddray-serving"}
    for name, role in roles.items():
        assert re.fullmatch(rf"arn:aws:iam::\d{{12}}:role/{name}", role)
    for name, account in (("overlays/prod", "ddray"), (".", "ddray-serving")):
        (spec,) = ray_specs(build(name))
        for group in groups(spec):
            assert group["template"]["spec"]["serviceAccountName"] == account


def test_all_is_in_the_namespace_of_the_guide() -> None:
    for document in build("overlays/dev") + build("overlays/prod") + build("."):
        place = "name" if document["kind"] == "Namespace" else "namespace"
        assert document["metadata"][place] == "ddray"


def test_a_change_reaches_the_whole_cluster() -> None:
    # Else new workers alone get a new image. A service has a strategy of its own.
    assert cluster("base")["spec"]["upgradeStrategy"] == {"type": "Recreate"}


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
    assert application.keys() == {"name", "route_prefix", "import_path", "args", "deployments"}
    module, _, function = application["import_path"].partition(":")
    source = (ROOT / (module.replace(".", "/") + ".py")).read_text("utf-8")
    assert re.search(rf"^def {function}\(arguments: dict", source, re.MULTILINE)
    (front,) = application["deployments"]
    assert re.search(rf'^STUDENTS, _FRONT = "students", "{front["name"]}"$', source, re.MULTILINE)
    serve = load_config(ServeConfig, preset=application["args"])
    same = load_config(ServeConfig, file=ROOT / "jobs" / "configs" / "llamagen-b-serve.yaml")
    other = {"host", "port", "api_keys_file", "replicas"}
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
    assert [path.stem for path in FILES if path.parent.name == "jobs"] == STAGES
    assert [one["metadata"]["labels"] for one in build("jobs")] == [
        {"ddray.io/stage": stage} for stage in STAGES
    ]
    (base,) = {cluster(name)["metadata"]["name"] for name in BUILDS if name != "."}
    for stage in STAGES:
        found = job(stage)
        assert "submitterPodTemplate" in found["spec"]
        assert found["metadata"]["name"] == f"ddray-{stage}"
        assert found["spec"]["clusterSelector"] == {"ray.io/cluster": base}
        assert found["spec"]["backoffLimit"] == 0 and "submissionMode" in found["spec"]
        assert f"jobs/{stage}.yaml" in (KUBERAY / "jobs" / f"{stage}.yaml").read_text("utf-8")


@pytest.mark.parametrize("stage", OWN_CLUSTER)
def test_a_job_with_a_cluster_of_its_own_is_begun_again_by_kuberay(stage: str) -> None:
    found = job_with_cluster(stage)
    assert problems(found) == []
    plain, spec = job(stage), found["spec"]
    assert found["metadata"].pop("namespace") == "ddray"
    # Of the same name, so that the two are never there at a time.
    assert found["metadata"] == plain["metadata"]
    changed = {
        *("rayClusterSpec", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished"),
        *("clusterSelector", "deletionStrategy", "entrypoint"),
    }
    at = spec["submitterPodTemplate"]["spec"].pop("nodeSelector")
    assert at == {"karpenter.sh/capacity-type": "on-demand"}
    assert {k: v for k, v in spec.items() if k not in changed} == {
        k: v for k, v in plain["spec"].items() if k not in changed
    }
    assert spec["backoffLimit"] >= 3 and spec["shutdownAfterJobFinishes"]
    # GPUs wait no longer than it takes to look.
    assert spec["ttlSecondsAfterFinished"] <= 60
    # Its workers come back after the head, and nothing grows here that a job would wait for.
    assert spec["entrypoint"] == plain["spec"]["entrypoint"] + " --set wait_s=600"
    assert spec["submitterConfig"]["backoffLimit"] >= 2
    assert images([found]) == {f"{PLACEHOLDER}:{ddray.__version__}{end}" for end in ("", "-cpu")}


@pytest.mark.parametrize("stage", OWN_CLUSTER)
def test_the_cluster_of_a_job_is_that_of_prod_with_as_many_nodes_as_its_config_takes(
    stage: str,
) -> None:
    spec = job_with_cluster(stage)["spec"]["rayClusterSpec"]
    prod = cluster("overlays/prod")["spec"]
    (group,) = spec.pop("workerGroupSpecs")
    config = yaml.safe_load((ROOT / f"jobs/configs/llamagen-b-{stage}.yaml").read_text("utf-8"))
    assert group["groupName"] == config["node_pool"]
    gpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    workers = int(str(config["workers"]).rpartition(":")[2])
    assert group["replicas"] == math.ceil(workers * config.get("num_gpus", 1) / gpus)
    assert group | {"replicas": 0} == pool_of(prod, group["groupName"])
    assert spec == {key: prod[key] for key in ("authOptions", "headGroupSpec", "rayVersion")}


def test_kueue_may_keep_a_job_waiting(tmp_path: Path) -> None:
    (queued,) = build_with("queue", "own-cluster/sample", tmp_path)
    assert problems(queued) == []
    assert queued["metadata"]["labels"].pop(QUEUE)
    assert queued["spec"].pop("suspend") is True
    assert queued == job_with_cluster("sample")


@pytest.mark.parametrize("name", [*STAGES, "digits"])
def test_what_a_job_starts_is_in_the_image(name: str) -> None:
    digits = name == "digits"
    found = read(KUBERAY / "overlays/dev/digits.yaml")[0] if digits else job(name)
    stage = "pipeline" if digits else name
    model = "digits" if digits else "llamagen-b"
    config = f"jobs/configs/{model}-{stage}.yaml"
    assert found["spec"]["entrypoint"] == f"python jobs/{stage}.py --config {config}"
    # The digits read and write the disk of overlays/dev, whose node has another image.
    (image,) = images([found])
    assert image.startswith("ddray:" if digits else f"{PLACEHOLDER}:")
    for file in (f"jobs/{stage}.py", config):
        assert (ROOT / file).is_file(), file
    dockerfile = (ROOT / "cluster" / "Dockerfile").read_text("utf-8")
    assert "jobs /home/ray/jobs" in dockerfile and "WORKDIR /home/ray" in dockerfile


def test_the_evaluation_is_of_what_the_stages_of_the_pipeline_make() -> None:
    def config_of(stage: str) -> Document:
        (config,) = read(ROOT / job(stage)["spec"]["entrypoint"].split()[-1])
        return config

    pipeline = config_of("pipeline")
    assert config_of("distill") == read(ROOT / "jobs" / "configs" / pipeline["distill"])[0]
    evaluation = config_of("evaluate")
    assert evaluation["student"] == f"{config_of('distill')['out']}/student"
    assert evaluation["data"] == config_of("sample")["out"]


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


def test_grafana_gets_the_dashboards_as_they_are() -> None:
    (found,) = of_kind(build("."), "ConfigMap")
    assert found["data"] == {file.name: file.read_text("utf-8") for file in DASHBOARDS}
    assert found["metadata"]["labels"] == {"grafana_dashboard": "1"}
    assert build("../grafana")[0]["data"] == found["data"]
