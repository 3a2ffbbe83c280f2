"""The image and the files for `ray up` are valid, agree with the code, and hold what jobs ask for.

What Ray itself says of the files is asked in a subprocess: core tests import no Ray.
"""

import copy
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import yaml
from botocore.validate import ParamValidator

import ddray
from ddray.runtime.cluster.capacity import NODE_POOL_LABEL
from ddray.runtime.cluster.connection import CLUSTER_ENVIRONMENT
from tests.core.deployment.kuberay import cluster, quantity
from tests.core.deployment.machines import instance_types
from tests.paths import ROOT

DOCKERFILE = ROOT / "cluster" / "Dockerfile"
GROWING, SINGLE, ON_PREMISE = (
    "ray-cluster.yaml",
    "cluster/aws-single.yaml",
    "cluster/on-premise.yaml",
)
EFA = "cluster/aws-efa.yaml"
FILES = [GROWING, SINGLE, ON_PREMISE]
ON_AWS = [GROWING, SINGLE]
JOBS = sorted((ROOT / "jobs" / "configs").glob("*.yaml"))
ALL_YAML = [ROOT / GROWING, *sorted((ROOT / "cluster").rglob("*.yaml")), *JOBS]
IMAGE = "registry.example.com/ddray"

# Ray's schema, its defaults, and the image that either autoscaler would give to each type of node.
ASK_RAY = """
import json, sys
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
answers = {}
for name, config in json.load(sys.stdin).items():
    try:
        config = prepare_config(config)
        validate_config(config)
        of_type = AutoscalingConfig(config, skip_content_hash=True).get_docker_config
        config["images"] = {t: of_type(t)["image"] for t in config["available_node_types"]}
        answers[name] = config
    except Exception as error:
        answers[name] = f"{type(error).__name__}: {error}"
print(json.dumps(answers))
"""


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


def spoilt(name: str) -> dict[str, Any]:
    """A good file with one fault, to see that the fault is found."""
    config = load(GROWING)
    types = config["available_node_types"]
    match name:
        case "unknown key":
            config["dockers"] = {}
        case "unknown key of a type":
            types["cpu"]["label"] = {}
        case "fraction":
            types["cpu"]["resources"]["CPU"] = 0.5
        case "no such head":
            config["head_node_type"] = "nobody"
        case "no image for all":
            del config["docker"]["image"]
        case "more than there may be":
            types["cpu"]["min_workers"] = 100
    return config


SPOILT = {
    "unknown key": "ValidationError",
    "unknown key of a type": "ValidationError",
    "fraction": "ValidationError",
    "no such head": "head_node_type",
    "no image for all": "image",
    "more than there may be": "min_workers",
}


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    """What Ray makes of every file, or what it says against it."""
    configs = {name: load(name) for name in FILES} | {name: spoilt(name) for name in SPOILT}
    configs[EFA] = with_efa()
    done = subprocess.run(
        [sys.executable, "-c", ASK_RAY],
        input=json.dumps(configs),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FILES, EFA])
def test_ray_accepts_the_file_and_adds_nothing_to_install(answers, name):
    config = answers[name]
    assert isinstance(config, dict), config
    for commands in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert config[commands] == []
    for node_type in config["available_node_types"].values():
        assert not node_type.get("worker_setup_commands")


@pytest.mark.slow
@pytest.mark.parametrize("fault", SPOILT)
def test_ray_refuses_a_spoilt_file(answers, fault):
    assert isinstance(answers[fault], str)
    assert SPOILT[fault] in answers[fault]


def test_nodes_without_a_gpu_take_the_cpu_variant(answers):
    for name in ON_AWS:
        for kind, image in answers[name]["images"].items():
            gpus = answers[name]["available_node_types"][kind]["resources"]["GPU"]
            assert image == f"{IMAGE}:{ddray.__version__}" + ("" if gpus else "-cpu"), kind


# Machines and pools


def node_types(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from load(name)["available_node_types"].items()


@pytest.fixture(scope="module")
def run_instances() -> Any:
    """The shape of EC2's RunInstances, which Ray does not look at before it calls it."""
    model = botocore.session.get_session().get_service_model("ec2")
    return model.operation_model("RunInstances").input_shape


def faults_of(node_config: dict[str, Any], shape: Any) -> str:
    call = {"MinCount": 1, "MaxCount": 1, **node_config}
    return ParamValidator().validate(call, shape).generate_report()


@pytest.mark.parametrize("name", ON_AWS)
def test_ec2_knows_the_settings_of_the_machines(name, run_instances):
    for _, node_type in node_types(name):
        assert faults_of(node_type["node_config"], run_instances) == ""
    wrong = copy.deepcopy(node_type["node_config"])
    wrong["BlockDeviceMappings"][0]["Ebs"]["Size"] = 1
    assert "Size" in faults_of(wrong, run_instances)


def merged(base: Any, more: Any) -> Any:
    """A file with the keys of another one written into it."""
    if not isinstance(base, dict) or not isinstance(more, dict):
        return more
    return base | {key: merged(base.get(key), value) for key, value in more.items()}


def with_efa() -> dict[str, Any]:
    """What `EFA` tells its reader to make of the growing cluster."""
    return merged(load(GROWING), load(EFA))


def test_efa_is_for_the_training_pool_alone():
    options = with_efa()["available_node_types"]["training"]["docker"]["worker_run_options"]
    assert {"--env FI_PROVIDER=efa", "--env FI_EFA_USE_DEVICE_RDMA=1"} < {*options}
    # Nodes without EFA are as they were.
    assert "worker_run_options" not in str(load(GROWING))


@pytest.mark.parametrize("name", ON_AWS)
def test_resources_are_those_of_the_machines(name):
    machines, head = instance_types(), load(name)["head_node_type"]
    for kind, node_type in node_types(name):
        has, machine = node_type["resources"], machines[node_type["node_config"]["InstanceType"]]
        if name == GROWING and kind == head:
            assert (has["CPU"], has["GPU"]) == (0, 0)
        else:
            assert has["CPU"] == machine["VCpuInfo"]["DefaultVCpus"]
            assert has["GPU"] == sum(g["Count"] for g in machine.get("GpuInfo", {}).get("Gpus", []))
        # Ray gives the container a third of what is free for shared memory.
        assert (
            2**32 <= has["object_store_memory"] <= 0.3 * machine["MemoryInfo"]["SizeInMiB"] * 2**20
        )
    assert (
        machines[dict(node_types(GROWING))["head"]["node_config"]["InstanceType"]]["MemoryInfo"][
            "SizeInMiB"
        ]
        >= 16 * 1024
    )


def test_only_pools_that_can_be_interrupted_are_spot():
    spot = {
        kind: node_type["node_config"].get("InstanceMarketOptions") == {"MarketType": "spot"}
        for kind, node_type in node_types(GROWING)
    }
    assert spot == {
        "head": False, "sampling": True, "training": False, "cpu": True, "serving": False,
    }  # fmt: skip


def test_pools_are_named_by_the_label_that_jobs_choose_by():
    labels = {kind: node_type.get("labels", {}) for kind, node_type in node_types(GROWING)}
    pools = ("sampling", "training", "cpu", "serving")
    assert labels == {"head": {}} | {pool: {NODE_POOL_LABEL: pool} for pool in pools}
    workers = load(ON_PREMISE)["worker_start_ray_commands"][-1]
    assert f"--labels={NODE_POOL_LABEL}=training " in workers
    most = sum(node_type.get("max_workers", 0) for _, node_type in node_types(GROWING))
    assert load(GROWING)["max_workers"] == most


def workers_of(job: dict[str, Any]) -> tuple[int, int]:
    """The least and the most workers of a job, or replicas of a service."""
    least, _, most = str(job.get("workers", job.get("replicas", 1))).partition(":")
    return int(least), int(most or least)


def room(types: dict[str, Any], job: dict[str, Any]) -> int:
    """How many workers of a job the nodes of its pool hold when all are up."""
    cpus = job.get("threads", 1)
    gpus = job.get("num_gpus", int(job.get("use_gpu", False)))
    pool, total = job.get("node_pool"), 0
    for node_type in types.values():
        has = node_type["resources"]
        if pool is None or node_type.get("labels", {}).get(NODE_POOL_LABEL) == pool:
            fits = min(has["CPU"] // cpus, has["GPU"] // gpus if gpus else has["CPU"])
            total += int(fits) * node_type.get("max_workers", 1)
    return total


def on_kubernetes() -> dict[str, Any]:
    """The pools of overlays/prod, written as the node types of `ray up`."""
    types = {}
    for group in cluster("overlays/prod")["spec"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        types[group["groupName"]] = {
            "resources": {
                "CPU": quantity(limits["cpu"]),
                "GPU": quantity(limits.get("nvidia.com/gpu", 0)),
            },
            "labels": group["labels"],
            "max_workers": group["maxReplicas"],
        }
    return types


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_the_cluster_holds_what_the_job_asks_for(path):
    job = yaml.safe_load(path.read_text())
    least, most = workers_of(job)
    assert room(dict(node_types(GROWING)), job) >= most
    assert room(on_kubernetes(), job) >= most
    # Written for eight GPUs, it runs on the one machine too, where there are no pools.
    if least <= 8:
        assert room(dict(node_types(SINGLE)), job | {"node_pool": None}) >= least


def test_a_job_that_does_not_fit_is_noticed():
    types = dict(node_types(GROWING))
    job = {"workers": "1:64", "threads": 4, "num_gpus": 1, "node_pool": "sampling"}
    assert workers_of(job) == (1, 64)
    assert room(types, job) == 64
    assert room(types, job | {"node_pool": "samplign"}) == 0
    assert room(types, job | {"node_pool": "cpu"}) == 0
    assert room(types, job | {"num_gpus": 0.5}) == 8 * 16
    assert room(types, {"use_gpu": True, "threads": 100, "node_pool": "training"}) == 8
    assert room(types, {"node_pool": None, "threads": 16}) == 8 * 12 + 8 * 12 + 4


@pytest.mark.parametrize("name", ON_AWS)
def test_objects_spill_to_the_machines_own_disks(name):
    options = [option.split() for option in load(name)["docker"]["run_options"]]
    (spill,) = [one.split("=") for flag, one in options if one.startswith("RAY_object_spilling")]
    (volume,) = [one.split(":") for flag, one in options if flag == "--volume"]
    assert spill == ["RAY_object_spilling_directory", volume[1]]
    # Where AWS's machine images mount the disks; made for the user whom the container runs as.
    assert volume[0].startswith("/opt/dlami/nvme/")
    made = load(name)["initialization_commands"][-1]
    assert made.endswith(f'sudo install -d -o "$USER" {volume[0]}')
    ray = Path(str(importlib.util.find_spec("ray").origin)).parent
    assert f'"{spill[0]}"' in (ray / "_private" / "node.py").read_text()


@pytest.mark.parametrize("name", ON_AWS)
@pytest.mark.parametrize(
    ("registry", "login"),
    [
        (
            "111122223333.dkr.ecr.eu-west-1.amazonaws.com",
            "login --username AWS --password-stdin 111122223333.dkr.ecr.eu-west-1.amazonaws.com: "
            "ecr get-login-password --region eu-west-1",
        ),
        ("ghcr.io/me", None),
    ],
)
def test_machines_log_in_to_a_registry_of_amazons(name, registry, login, tmp_path):
    for tool, does in (("aws", 'echo "$@"'), ("docker", 'echo "$@: $(cat)" > login')):
        (tmp_path / tool).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / tool).chmod(0o755)
    (command,) = [one for one in load(name)["initialization_commands"] if "ecr" in one]
    own = command.replace(IMAGE.partition("/")[0], registry)
    path = f"{tmp_path}:/usr/bin:/bin"
    subprocess.run(["bash", "-c", own], cwd=tmp_path, env={"PATH": path}, check=True)
    said = tmp_path / "login"
    assert (said.read_text().strip() if said.exists() else None) == login


# Who may come in


@pytest.mark.parametrize("name", ON_AWS)
def test_nobody_is_let_in_by_default(name):
    for _, node_type in node_types(name):
        config = node_type["node_config"]
        assert config["LaunchTemplate"]  # has the security group; else Ray opens port 22 to all
        assert config["IamInstanceProfile"]["Name"]  # else Ray makes a role that may do anything
        assert config["MetadataOptions"]["HttpTokens"] == "required"
        # Else Ray takes an image of 2022, whose driver knows no CUDA 13.
        assert re.match(r"(ami-|resolve:ssm:/aws/service/deeplearning/)", config["ImageId"])
        for disk in config["BlockDeviceMappings"]:
            assert disk["Ebs"]["Encrypted"]
            assert disk["Ebs"]["VolumeType"] == "gp3"


@pytest.mark.parametrize("name", FILES)
def test_ray_asks_for_the_token_and_shows_its_dashboard_to_nobody(name):
    config = load(name)
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    head = config["head_start_ray_commands"][-1].split()
    for argument in (
        "--dashboard-host=127.0.0.1",
        "--disable-usage-stats",
        "--metrics-export-port=8080",
        "--autoscaling-config=~/ray_bootstrap_config.yaml",
    ):
        assert argument in head
    if name == ON_PREMISE:
        assert {"--num-cpus=0", "--num-gpus=0"} <= set(head)
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert commands == [] or commands[0] == "ray stop"


SECRET = re.compile(
    r"\b(AKIA|ASIA)[A-Z0-9]{16}\b|secret_access_key|aws_credentials:|BEGIN [A-Z ]*PRIVATE|"
    r"\b[0-9a-f]{64}\b|(password|token)\s*[:=]\s*[\"']?\w{16,}",
    flags=re.IGNORECASE,
)


@pytest.mark.parametrize("name", [*FILES, "cluster/Dockerfile", ".dockerignore"])
def test_no_file_holds_a_key(name):
    assert not SECRET.search((ROOT / name).read_text())
    assert SECRET.search("AKIA" + "ABCDEFGHIJKLMNOP")
    assert SECRET.search("token: " + "0" * 32)


# Names and comments


@pytest.mark.parametrize("path", ALL_YAML, ids=lambda path: str(path.relative_to(ROOT)))
def test_comments_are_indented_as_what_stands_before_or_after(path):
    before, waiting = 0, []
    for line in [*path.read_text("utf-8").splitlines(), "end"]:
        text = line.lstrip()
        indent = len(line) - len(text)
        if text.startswith("#"):
            waiting.append((indent, line))
        elif text:
            assert [one for at, one in waiting if at not in (before, indent)] == []
            before, waiting = indent, []


@pytest.mark.parametrize("name", FILES)
def test_placeholders_are_listed_at_the_head(name):
    text = (ROOT / name).read_text()
    head = text[: text.index("\ncluster_name:")]
    assert all(not line or line.startswith("#") for line in head.splitlines())
    listed = head[head.index("What is yours here") :]
    rest = yaml.safe_dump(load(name))
    used = re.findall(
        r"registry\.example\.com/ddray|us-west-2|192\.0\.2\.\d+|~/\.ssh/\w+",
        rest,
    )
    assert IMAGE in used
    # Ids are of one account: what has one is named by the stack instead.
    assert re.findall(r"\b(?:\d{12}|(?:sg|subnet|lt|vpc|ami|cr)-[0-9a-f]{8,})\b", rest) == []
    assert [value for value in set(used) if value not in listed] == []


@pytest.mark.parametrize("name", [*FILES, "cluster/Dockerfile"])
def test_images_have_this_version_and_paths_exist(name):
    text = (ROOT / name).read_text()
    tags = set(re.findall(re.escape(IMAGE) + r":(\S+)", text))
    assert tags
    assert tags <= {ddray.__version__, f"{ddray.__version__}-cpu"}
    paths = set(re.findall(r"(?<![\w./~-])(?:cluster|ddray|docs|jobs)/[\w./-]*\w", text))
    assert paths
    paths |= {f"jobs/{path}" for path in re.findall(r"(?<![\w./-])configs/[\w.-]*\w", text)}
    assert [path for path in paths if not (ROOT / path).exists()] == []


# The image


def instructions() -> list[tuple[str, str]]:
    """Every instruction of the Dockerfile with its arguments, continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line]


def arguments(instruction: str) -> list[str]:
    return [rest for name, rest in instructions() if name == instruction]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_the_image_sets_what_the_code_would_set_for_a_ray_of_its_own():
    environment = dict(pair.split("=", 1) for line in arguments("ENV") for pair in line.split())
    wanted = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "HOME": "/home/ray",
        "NVIDIA_VISIBLE_DEVICES": "all",
        "NVIDIA_DRIVER_CAPABILITIES": "compute,utility",
    }
    assert environment == CLUSTER_ENVIRONMENT | wanted


def test_the_base_image_has_the_python_of_the_pins():
    assert arguments("FROM")[0] == "${BASE} AS base"
    (base,) = [rest for rest in arguments("ARG") if rest.startswith("BASE=")]
    version = re.fullmatch(r"BASE=python:(\d+\.\d+)\.\d+-slim-bookworm", base)
    assert version is not None
    pinned_for = re.search(r"CPython (\d+\.\d+)", (ROOT / "constraints.txt").read_text())
    assert pinned_for is not None
    assert version.group(1) == pinned_for.group(1)
    bases = [stage.split()[0] for stage in arguments("FROM")]
    assert bases == ["${BASE}", "scratch", "base", "dependencies", "base"]
    assert f"python{version.group(1)}" in " ".join(arguments("RUN"))


def test_every_package_of_the_image_is_pinned_by_the_constraints():
    installs = [line for line in arguments("RUN") if "pip install" in line]
    assert len(installs) == 3
    assert all("--constraint constraints.txt" in line for line in installs)
    assert installs[0].endswith("pip install --constraint constraints.txt uv")
    assert {"uv", "ray", "torch", "torchvision", "triton", "setuptools"} <= set(pins())
    # So that no version stands here a second time.
    assert not re.search(r"\b(uv|ray|torch)==", " ".join(installs))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert re.findall(r"--extra (\w+)", installs[1]) == ["teachers", "hub", "text"]
    assert {"teachers", "hub", "text"} <= set(extras)
    assert "editable" not in " ".join(installs)


def test_no_package_is_there_twice_or_wants_another() -> None:
    stages = "\n".join(f"{name} {rest}" for name, rest in instructions()).split("FROM ")
    # /usr/local of one stage is laid over another's, which removes nothing: so before both.
    base = next(stage for stage in stages if stage.startswith("${BASE} AS base"))
    assert re.search(r"RUN pip uninstall --yes .*\bsetuptools wheel$", base, re.MULTILINE)
    assert arguments("RUN")[-1].split("&&")[-1].strip() == "pip check"


def test_only_what_ought_to_compile_is_compiled() -> None:
    (line,) = [rest for rest in arguments("RUN") if "compileall" in rest]
    skipped = re.search(r" -x '([^']+)'", line)
    assert skipped
    for path in ("site-packages/torch/__init__.py", "lib2to3/tests/data/bom.py", "test/bad.py"):
        assert re.search(skipped[1], f"/usr/local/lib/python3.11/{path}")
    for path in ("os.py", "asyncio/base_events.py", "unittest/mock.py", "doctest.py"):
        assert not re.search(skipped[1], f"/usr/local/lib/python3.11/{path}")


def test_nothing_is_copied_but_what_docker_is_shown():
    shown = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert all((ROOT / path).exists() for path in shown)
    sources = set()
    for line in arguments("COPY"):
        if not line.startswith("--from="):
            words = [word for word in line.split() if not word.startswith("--")]
            sources |= set(words[:-1])
    assert sources == shown


def test_the_image_runs_as_ray_and_starts_what_it_is_told():
    assert [rest for rest in arguments("ARG") if rest == "RAY_UID=1000"]
    assert arguments("USER") == ["$RAY_UID"]
    assert arguments("WORKDIR")[-1] == "/home/ray"
    assert arguments("ENTRYPOINT") == []
    (label,) = arguments("LABEL")
    assert f'org.opencontainers.image.version="{ddray.__version__}"' in label


def hadolint(*args: str, **options: Any) -> str:
    command = [str(Path(sys.executable).parent / "hadolint"), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, **options).stdout


def test_hadolint_has_nothing_to_say():
    assert hadolint(str(DOCKERFILE)) == ""
    assert "DL3007" in hadolint("-", input="FROM python:latest\n")
