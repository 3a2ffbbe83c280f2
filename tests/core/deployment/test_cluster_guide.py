"""docs/cluster.md: each command names what there is, and is one that would be understood."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ddray.cli import main
from ddray.models.catalog import PUBLISHED
from tests.paths import ROOT

GUIDE = ROOT / "docs" / "cluster.md"


def commands() -> list[str]:
    """Every line of every console block."""
    blocks = re.findall(r"^ *```console\n(.*?)^ *```", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    return [line.strip() for block in blocks for line in block.splitlines()]


def _of(*words: str) -> list[str]:
    found = [line for line in commands() if line.startswith(words)]
    assert found, words
    return found


@pytest.mark.parametrize("line", _of("ray job submit"))
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
                kubectl = Path(sys.executable).with_name("kubectl")
                subprocess.run(
                    [kubectl, "kustomize", ROOT / name[2]], check=True, capture_output=True
                )


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
        shown = yaml.safe_load(capsys.readouterr().out)
    (export,) = _of("ddray export")
    flags = shlex.split(export)
    assert flags[flags.index("--student") + 1] in PUBLISHED
    for flag in ("--checkpoint", "--tokenizer"):
        assert flags[flags.index(flag) + 1] in yaml.safe_dump(shown)


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
