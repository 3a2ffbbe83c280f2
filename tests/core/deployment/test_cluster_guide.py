"""docs/cluster.md: each command names what there is, and is one that would be understood."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import botocore.session
import pytest
import yaml
from botocore import xform_name

from ddray.cli import main
from ddray.models.catalog import PUBLISHED
from tests.core.deployment.cloudformation import template
from tests.core.deployment.kuberay import build
from tests.core.deployment.machines import instance_types
from tests.core.deployment.test_eks import node_groups, types_of
from tests.paths import ROOT

GUIDE = ROOT / "docs" / "cluster.md"


def commands() -> list[str]:
    """Every line of every console block."""
    blocks = re.findall(r"^ *```console\n(.*?)^ *```", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    return [line.strip() for block in blocks for line in block.splitlines()]


def parts() -> dict[str, str]:
    """Text of every part, by its heading."""
    _, *found = re.split(r"^## (.*)\n", GUIDE.read_text(), flags=re.MULTILINE)
    return dict(zip(found[::2], found[1::2], strict=True))


def test_every_part_with_commands_begins_with_what_of_it_we_have_run() -> None:
    marks = {}
    for name, text in parts().items():
        if "```console" in text:
            quote = re.match(r"\n((?:> .*\n)+)", text)
            assert quote, f"{name}: nothing says whether its commands have been run"
            marks[name] = quote[1].replace("\n> ", " ")
            assert re.search(r"\*\*(Run|Not run|Not applied to a cluster) by us", marks[name]), name
    assert len(marks) >= 6
    tests = {
        word for mark in marks.values() for word in re.findall(r"`(?:\S+/)?(test_\w+.py)`", mark)
    }
    assert tests and all(any(ROOT.glob(f"tests/**/{test}")) for test in tests)


def _of(*words: str) -> list[str]:
    found = [line for line in commands() if line.startswith(words)]
    assert found, words
    return found


@pytest.mark.parametrize("line", _of("ray job submit", "ddray cluster submit"))
def test_a_job_of_the_guide_is_one_with_sound_flags(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options, _, entrypoint = line.partition(" -- ")
    assert "--working-dir jobs" in options
    monkeypatch.chdir(ROOT / "jobs")
    program, script, *arguments = shlex.split(entrypoint)
    if program == "ddray":
        arguments = [script, *arguments]
    else:
        assert program == "python"
        assert Path(script).is_file()
        verb = Path(script).stem
        if verb == "pipeline":
            done = subprocess.run([sys.executable, script, "--help"], capture_output=True)
            assert done.returncode == 0
            file = Path(arguments[arguments.index("--config") + 1])
            assert file.is_file()
            return
        arguments = [verb, *arguments]
        if arguments[-1] == "--dry-run" and "s3://" in Path(arguments[2]).read_text():
            arguments = [*arguments[:-1], "--teacher", "var-d20", "--dry-run"]
    if "--dry-run" not in arguments:
        arguments.append("--dry-run")
    assert main(arguments) == 0, capsys.readouterr().err


def test_files_for_ray_up_and_docker_and_kubectl_are_there() -> None:
    for line in _of("ray up", "ray down", "ray dashboard"):
        assert (ROOT / line.split()[-1]).is_file(), line
    for line in _of("docker build"):
        assert (ROOT / line.split("-f ")[1].split()[0]).is_file(), line
    for line in _of("kubectl"):
        if name := re.search(r" (-f|-k) (cluster/\S+)", line):
            assert (ROOT / name[2]).exists(), line
            if name[1] == "-k":
                assert build(str(ROOT / name[2])), line


def test_every_secret_that_pods_need_is_made_by_a_command_of_the_guide() -> None:
    made = {line.split()[6] for line in _of("kubectl -n ddray create secret generic")}
    text = "\n".join(path.read_text() for path in (ROOT / "cluster" / "kuberay").rglob("*.yaml"))
    named = set(re.findall(r"secretKeyRef:\s+name: (\S+)", text))
    named |= set(re.findall(r"secretName: (\S+?)\}", text))
    assert made == named


def test_models_and_files_of_the_guide_are_published_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for line in _of("ddray models show"):
        assert main(shlex.split(line)[1:]) == 0
    for export in _of("ddray export"):
        flags = shlex.split(export)
        name = flags[flags.index("--student") + 1]
        assert main(["models", "show", name]) == 0
        shown = yaml.safe_load(capsys.readouterr().out)
        for flag in ("--checkpoint", "--tokenizer"):
            assert f"'{flags[flags.index(flag) + 1]}'" in shown["load"]
        assert flags[flags.index("--out") + 1] == f"s3://YOUR+BUCKET/models/{name}"


@pytest.mark.parametrize(
    "model",
    [
        "llamagen-b",
        "llamagen-l",
        "llamagen-t2i-xl-256",
        "llamagen-t2i-xl-512",
        "var-d16",
        "var-d20",
    ],
)
def test_gpu_hours_are_those_of_a_dry_run_and_of_the_configs(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = model if model in PUBLISHED else f"{model}-256"
    hours = []
    for verb in ("sample", "distill"):
        config = ROOT / "jobs" / "configs" / f"{model}-{verb}.yaml"
        data = ["--data", os.devnull] if verb == "distill" else []
        assert main([verb, "--config", str(config), "--teacher", name, *data, "--dry-run"]) == 0
        found = re.search(r"gpu_hours: ([\d.]+) of H100s", capsys.readouterr().out)
        assert found
        hours.append(found[1])
        stated = re.search(r"# Expected: ([\d.]+) GPU hours of H100s", config.read_text())
        assert stated
        assert float(stated[1]) == pytest.approx(float(found[1]), rel=0.05)
    row = next(
        line for line in GUIDE.read_text().splitlines() if line.lower().startswith(f"| {model} ")
    )
    assert [cell.strip() for cell in row.split("|")][3:5] == hours


# AWS and EKS

# Of the command line of AWS alone, which is no package here.
NO_OPERATIONS = {"cloudformation deploy", "ecr get-login-password", "s3 rb"}
QUOTAS = {
    ("P", False): "L-417A185B",
    ("G", False): "L-DB2E81BA",
    ("G", True): "L-3819A6DF",
    ("M", False): "L-1216C47A",
    ("M", True): "L-34B43A08",
}


def test_quotas_are_what_full_pools_take() -> None:
    taken = dict.fromkeys(QUOTAS.values(), 0)
    for kind in yaml.safe_load((ROOT / "ray-cluster.yaml").read_text())[
        "available_node_types"
    ].values():
        machine = kind["node_config"]["InstanceType"]
        spot = "InstanceMarketOptions" in kind["node_config"]
        vcpus = instance_types()[machine]["VCpuInfo"]["DefaultVCpus"]
        taken[QUOTAS[machine[0].upper(), spot]] += vcpus * kind.get("max_workers", 1)
    rows = re.findall(r"^\| [^|]+ \| `(L-\w+)` \| (\d+) \|", GUIDE.read_text(), re.MULTILINE)
    assert {code: int(vcpus) for code, vcpus in rows} == taken


def test_quotas_of_eks_are_those_of_aws_but_for_the_two_that_are_told() -> None:
    text = GUIDE.read_text()
    rows = re.findall(r"^\| [^|]+ \| `(L-\w+)` \| (\d+) \|", text, re.MULTILINE)
    said = re.search(r"another quota: (\d+)\s+vCPUs .*? and (\d+) of", text, re.DOTALL)
    assert said
    others = {QUOTAS["G", False]: int(said[1]), QUOTAS["M", False]: int(said[2])}
    taken = dict.fromkeys(QUOTAS.values(), 0)
    for group in node_groups():
        # Any of its types may be all that there is: each has a quota for a group that is full.
        most: dict[str, int] = {}
        for machine in types_of(group):
            code = QUOTAS[machine[0].upper(), group.get("spot", False)]
            vcpus = instance_types()[machine]["VCpuInfo"]["DefaultVCpus"]
            most[code] = max(most.get(code, 0), vcpus * group["maxSize"])
        for code, vcpus in most.items():
            taken[code] += vcpus
    assert taken == {code: int(vcpus) for code, vcpus in rows} | others


def test_the_stack_takes_what_the_guide_gives_it() -> None:
    known = template()["Parameters"]
    (deploy,) = _of("aws cloudformation deploy")
    given = set(re.findall(r" (\w+)=", deploy.partition("--parameter-overrides")[2])) - {"Name"}
    needed = {name for name, told in known.items() if "Default" not in told}
    assert needed <= given <= set(known)
    others = set(re.findall(r"[` ]([A-Z][a-z]\w+)=[\w.]", GUIDE.read_text().replace(deploy, "")))
    assert {"SpotRole", "CapacityBlock", "ReservedMachines"} <= others - {"Name"} <= set(known)


@pytest.mark.slow
def test_commands_of_aws_are_operations_with_their_flags() -> None:
    session, told = botocore.session.get_session(), set()
    for command in re.findall(r"\baws [^|)\n]*", "\n".join(commands())):
        _, service, operation, *words = command.split()
        told.add(f"{service} {operation}")
        if f"{service} {operation}" in NO_OPERATIONS:
            continue
        model = session.get_service_model(service)
        (name,) = [one for one in model.operation_names if xform_name(one, "-") == operation]
        members = model.operation_model(name).input_shape.members
        flags = {word for word in words if word.startswith("--")}
        assert flags - {"--query", "--output"} <= {f"--{xform_name(one, '-')}" for one in members}
    assert told > NO_OPERATIONS


def test_own_names_are_written_by_the_command_of_the_guide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, upgrade = _of("ddray cluster config")
    monkeypatch.chdir(tmp_path)
    # As it stands there, it names no bucket.
    assert main(shlex.split(first)[1:]) == 2
    images = []
    for line in (first, upgrade):
        words = shlex.split(line.replace("YOUR+BUCKET", "mine"))
        assert main(words[1:]) == 0
        out = tmp_path / words[words.index("--out") + 1]
        images.append(yaml.safe_load((out / "ray-cluster.yaml").read_text())["docker"]["image"])
    (registry,) = {*_of("export REGISTRY=")}
    assert all(image.startswith(registry.partition("=")[2]) for image in images)
    assert images[0] != images[1]


def test_charts_and_clusters_are_made_and_ended_from_files_that_there_are() -> None:
    for line in _of("helm install", "eksctl"):
        for file in re.findall(r"--(?:values|config-file) (\S+)", line):
            assert (ROOT / file).is_file(), line
    repositories = {line.split()[3] for line in _of("helm repo add")}
    charts = {line.split()[3].partition("/")[0] for line in _of("helm install")}
    assert charts == repositories
    created, deleted = _of("eksctl create"), _of("eksctl delete")
    assert len(created) == len(deleted) == 1
    (operator,) = _of("helm install kuberay-operator")
    assert operator in (ROOT / "cluster" / "README.md").read_text()
