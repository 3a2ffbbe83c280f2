"""`make image`: what it asks an engine for, and what it says where something cannot be had.

That images are built and pass the checks is seen by tests/chaos/test_image.py.
"""

import contextlib
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cluster.image import build, engines, stand_ins
from cluster.image.checks import NodeEndedError, ask, operator_command
from cluster.image.engines import Container, ImageError, Order
from tests.paths import ROOT

# A container that is this machine.
HERE = Container("127.0.0.1", ("env",), ())


class Recorder:
    """An engine that builds nothing."""

    name = "recorder"

    def __init__(self, fetched: bool = True) -> None:
        self.fetched = fetched
        self.arguments: dict[str, str] = {}
        self.wheels: set[str] = set()

    def fetch(self, image: str) -> bool:
        return self.fetched or image == stand_ins.BASE

    def build(self, order: Order) -> None:
        self.arguments = dict(order.arguments)
        self.wheels = {path.name for one in order.contexts.values() for path in one.iterdir()}

    def size(self, image: str) -> float:
        return 1e9

    @contextlib.contextmanager
    def containers(self, image: str, number: int) -> Iterator[list[Container]]:
        yield [HERE] * number


@pytest.fixture(autouse=True)
def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own index does not answer, and no other is named."""
    monkeypatch.setattr(build, "_answers", lambda backend: False)
    for name in ("PIP_INDEX_URL", "UV_DEFAULT_INDEX"):
        monkeypatch.delenv(name, raising=False)


def wheel(folder: Path, name: str) -> None:
    version = build._pin(name)
    path = folder / f"{name}-{version}+cpu-cp311-cp311-manylinux_2_28_x86_64.whl"
    path.write_bytes(b"")


@pytest.mark.parametrize(("variant", "backend"), [("gpu", "cu130"), ("cpu", "cpu")])
def test_what_can_be_fetched_is_not_stood_in_for(
    variant: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_answers", lambda asked: asked == backend)
    engine = Recorder()
    assert build.build(engine, variant, "x", None) == []
    assert engine.arguments == {"TORCH_BACKEND": backend}


def test_a_mirror_of_pip_is_one_of_uv_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example.com")
    engine = Recorder()
    (note,) = build.build(engine, "gpu", "x", None)
    assert note == "torch is the build of the package index, not PyTorch's cu130"
    mirror = dict.fromkeys(("PIP_INDEX_URL", "UV_DEFAULT_INDEX"), "https://mirror.example.com")
    assert engine.arguments == mirror | {"TORCH_BACKEND": ""}


def test_wheels_of_a_folder_take_the_place_of_an_index(tmp_path: Path) -> None:
    for name in ("torch", "torchvision"):
        wheel(tmp_path, name)
    engine = Recorder()
    assert build.build(engine, "cpu", "x", tmp_path) == []
    assert engine.arguments == {"TORCH_BACKEND": "", "UV_FIND_LINKS": "/wheels"}
    assert engine.wheels == {path.name for path in tmp_path.iterdir()}


def test_a_trial_says_what_is_not_the_real_thing(tmp_path: Path) -> None:
    wheel(tmp_path, "torch")
    engine = Recorder(fetched=False)
    notes = build.build(engine, "cpu", "x", tmp_path)
    assert all(note.startswith("a trial, not for clusters: t") for note in notes)
    assert [note.split(": ")[1].split()[0] for note in notes] == ["torchvision", "the"]
    assert engine.arguments["BASE"] == stand_ins.BASE
    assert any("+stand.in" in name for name in engine.wheels)


def test_without_a_cpu_build_of_torch_one_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "find_engine", lambda store: Recorder())
    given = ["build.py", "--variant=cpu", f"--wheels={tmp_path}"]
    monkeypatch.setattr(sys, "argv", given)
    assert build.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("make image: no CPU build of torch is to be had")
    assert "+cpu-cp311-" in line


def test_without_an_engine_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ImageError, match="no Docker engine answers here, and there is no buildah"):
        engines.find_engine()


def test_the_stand_in_of_torchvision_is_a_wheel_without_libraries(tmp_path: Path) -> None:
    path = stand_ins.pack_torchvision(tmp_path)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        info = path.name.split("-cp311")[0] + ".dist-info"
        assert f"Version: {path.name.split('-')[1]}\n" in archive.read(f"{info}/METADATA").decode()
        record = archive.read(f"{info}/RECORD").decode().splitlines()
        assert "define(" in archive.read("torchvision/extension.py").decode()
    assert {line.split(",")[0] for line in record} == set(names)
    assert not [name for name in names if ".so" in name]


def test_the_operator_starts_what_the_manifest_says() -> None:
    spec = yaml.safe_load((ROOT / "cluster/kuberay/base/raycluster.yaml").read_text())["spec"]
    head = operator_command(spec["headGroupSpec"], "10.0.0.1").split()
    assert head[:3] == ["ray", "start", "--head"]
    assert {"--block", "--num-cpus=0", "--no-monitor", "--dashboard-host=0.0.0.0"} <= set(head)
    worker = operator_command(spec["workerGroupSpecs"][0], "10.0.0.1").split()
    assert {"--address=10.0.0.1:6379", "--labels=ddray.io/node-pool=sampling"} <= set(worker)
    assert "--head" not in worker


def test_a_check_that_fails_is_told_and_a_node_that_ended_is_started_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tries = []

    def ends_once(nodes: list[Container]) -> str:
        tries.append(nodes)
        if len(tries) == 1:
            raise NodeEndedError("30 s")
        return "two nodes"

    def fails(nodes: list[Container]) -> str:
        raise ImageError("no such thing")

    assert build.try_out(Recorder(), "x", {"joins": ends_once, "breaks": fails}, 2) == [True, False]
    joins, breaks = capsys.readouterr().out.splitlines()
    assert joins.startswith("joins ")
    assert joins.endswith("ok           0 s  two nodes")
    assert "FAILED" in breaks
    assert breaks.endswith("no such thing")


def test_an_image_may_be_only_so_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_PACKAGES", str(ROOT / "ddray"))
    assert build._sizes("cpu", 3.4e9, HERE).startswith("3.40 GB: ")
    with pytest.raises(ImageError, match=r"3\.60 GB are more than 3\.5 GB"):
        build._sizes("cpu", 3.6e9, HERE)


def test_an_answer_that_was_lost_is_asked_for_again(tmp_path: Path) -> None:
    loses = tmp_path / "loses"
    loses.write_text('#!/bin/sh\n"$@" > /dev/null\n')
    loses_once = tmp_path / "loses-once"
    asked = tmp_path / "asked"
    loses_once.write_text(
        f'#!/bin/sh\n[ -e {asked} ] && exec "$@"\ntouch {asked}\n"$@" > /dev/null\n'
    )
    for script in (loses, loses_once):
        script.chmod(0o755)
    once, always = (Container("", (str(script),), ()) for script in (loses_once, loses))
    assert ask(once, "cat", given="it's\nthere") == "it's\nthere"
    with pytest.raises(ImageError, match="`echo there`: its output was lost, 3 times"):
        ask(always, "echo", "there")
    with pytest.raises(ImageError, match=r"`false` ended with exit status 1"):
        ask(HERE, "false")
