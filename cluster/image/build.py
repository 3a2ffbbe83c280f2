"""Build the image of cluster/Dockerfile with what is there, and try it as clusters would.

    make image                                  # for nodes with GPUs
    make image VARIANT=cpu                      # for heads, and nodes without
    make image ARGS="--tag registry.example.com/ddray:0.1.0"
    make image ARGS=--try-only                  # of an image that is there

With Docker, or with buildah as root where no Docker answers; x86-64, 40 GB of free disk, a quarter
of an hour. What cannot be fetched here is stood in for, and named: such an image is a trial of all
the rest, and not for clusters.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import ddray
from cluster.image.checks import ALONE, ROOT, TOGETHER, NodeEndedError, ask
from cluster.image.engines import Container, Engine, ImageError, Order, find_engine
from cluster.image.stand_ins import build_base, pack_torchvision

Check = Callable[[list[Container]], str]

DOCKERFILE = ROOT / "cluster" / "Dockerfile"
LARGEST = {"gpu": 7e9, "cpu": 3.5e9}
"""Bytes that a variant may have, all layers unpacked."""
_STARTS = 3
_TRIAL = "a trial, not for clusters: "
_PACKAGES = "/usr/local/lib/python3.11/site-packages"


def build(engine: Engine, variant: str, image: str, wheels: Path | None) -> list[str]:
    """Build a variant under a name.

    Args:
        engine: that builds.
        variant: "gpu" or "cpu".
        image: its name.
        wheels: folder with a CPU build of torch, where PyTorch's own index does not answer.

    Returns:
        What is other than the Dockerfile says, a line each.

    Raises:
        ImageError: If it cannot be built here.
    """
    defaults = dict(re.findall(r"^ARG (\w+)=(\S+)", DOCKERFILE.read_text(), flags=re.MULTILINE))
    torch = "cpu" if variant == "cpu" else defaults["TORCH_BACKEND"]
    indexes = {name: os.environ.get(name, "") for name in ("PIP_INDEX_URL", "UV_DEFAULT_INDEX")}
    indexes["UV_DEFAULT_INDEX"] = indexes["UV_DEFAULT_INDEX"] or indexes["PIP_INDEX_URL"]
    arguments = {name: value for name, value in indexes.items() if value}
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="ddray-wheels-") as name:
        contexts: dict[str, Path] = {}
        if not _answers(torch):
            if variant == "cpu":
                notes += _collect_wheels(wheels, Path(name))
                contexts["wheels"] = Path(name)
                arguments["UV_FIND_LINKS"] = "/wheels"
            else:
                notes.append(f"torch is the build of the package index, not PyTorch's {torch}")
            torch = ""
        arguments["TORCH_BACKEND"] = torch
        if not engine.fetch(defaults["BASE"]):
            arguments["BASE"] = build_base(engine)
            base = f"the base is Debian with this machine's Python, not {defaults['BASE']}"
            notes.append(_TRIAL + base)
        engine.build(Order(DOCKERFILE, ROOT, image, arguments, contexts))
    return notes


def _pin(name: str) -> str:
    found = re.search(rf"^{name}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found
    return found[1]


def _answers(backend: str) -> bool:
    """Whether PyTorch's own index has the pinned torch for us."""
    uv = [shutil.which("uv") or str(Path(sys.executable).with_name("uv")), "pip", "compile"]
    asked = subprocess.run(
        [*uv, "--quiet", "--no-deps", "--torch-backend", backend, "-"],
        input=f"torch=={_pin('torch')}",
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.returncode == 0


def _collect_wheels(wheels: Path | None, folder: Path) -> list[str]:
    """CPU builds into a folder; what stands in for one that is nowhere."""
    notes = []
    for name in ("torch", "torchvision"):
        wanted = f"{name}-{_pin(name)}+cpu-cp311-*x86_64.whl"
        if found := sorted(wheels.glob(wanted)) if wheels else []:
            shutil.copy(found[-1], folder)
        elif name == "torchvision":
            pack_torchvision(folder)
            notes.append(f"{_TRIAL}torchvision is without its operators, not its CPU build")
        else:
            raise ImageError(
                f"no CPU build of torch is to be had: PyTorch's own index does not answer, and "
                f"no {wanted} is in {wheels or 'a folder that --wheels names'}"
            )
    return notes


def try_out(engine: Engine, image: str, checks: Mapping[str, Check], number: int) -> list[bool]:
    """Every check on so many new containers of an image; a line for each is printed.

    As a kubelet does, it begins again where a node ended by itself: Ray gives its processes 30 s to
    find each other, too few on a busy machine.
    """
    outcomes = []
    for name, check in checks.items():
        begun = time.monotonic()
        told, well = "", False
        for _ in range(_STARTS):
            try:
                with engine.containers(image, number) as containers:
                    told, well = check(containers), True
            except (ImageError, subprocess.TimeoutExpired) as error:
                told = str(error)
                if isinstance(error, NodeEndedError):
                    continue
            break
        seconds = time.monotonic() - begun
        print(f"{name:26}{'ok' if well else 'FAILED':8}{seconds:6.0f} s  {told}", flush=True)
        outcomes.append(well)
    return outcomes


def _sizes(variant: str, size: float, one: Container) -> str:
    """What the image takes, and its largest packages.

    Raises:
        ImageError: If that is more than a variant may.
    """
    script = f"du --bytes --max-depth=1 {_PACKAGES} | sort --numeric-sort | tail -n 7 | tac"
    lines = [line.split() for line in ask(one, "bash", "-c", script).splitlines()[1:]]
    parts = ", ".join(f"{path.rsplit('/', 1)[-1]} {int(b) / 1e9:.1f}" for b, path in lines)
    if size > LARGEST[variant]:
        most = LARGEST[variant] / 1e9
        raise ImageError(f"{size / 1e9:.2f} GB are more than {most} GB: {parts}")
    return f"{size / 1e9:.2f} GB: {parts}"


def _of_one(check: Callable[[Container], str]) -> Check:
    return lambda containers: check(containers[0])


def main() -> int:
    """Build and try; 1 if a check failed, 2 if there is no image."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", choices=sorted(LARGEST), default="gpu", help="default: gpu")
    parser.add_argument("--tag", help="the image's name; default: ddray:VERSION, or ...-cpu")
    parser.add_argument("--try-only", action="store_true", help="an image that is there: no build")
    parser.add_argument("--store", type=Path, help="folder of buildah's images; default: its own")
    parser.add_argument(
        "--wheels",
        type=Path,
        default=os.environ.get("PIP_FIND_LINKS"),
        help="folder with CPU builds of torch, where PyTorch's index does not answer "
        "(default: PIP_FIND_LINKS)",
    )
    given = parser.parse_args()
    suffix = "-cpu" if given.variant == "cpu" else ""
    image = given.tag or f"localhost/ddray:{ddray.__version__}{suffix}"
    begun = time.monotonic()
    try:
        engine = find_engine(given.store)
        notes = [] if given.try_only else build(engine, given.variant, image, given.wheels)
        size = engine.size(image)
    except ImageError as error:
        print(f"make image: {error}", file=sys.stderr)
        return 2
    print(f"\n{image} by {engine.name}, after {time.monotonic() - begun:.0f} s")
    print("".join(f"{note}\n" for note in notes))
    alone = {"size": _of_one(functools.partial(_sizes, given.variant, size))}
    alone |= {name: _of_one(check) for name, check in ALONE.items()}
    well = try_out(engine, image, alone, 1)
    well += try_out(engine, image, TOGETHER, 2)
    print(f"\n{sum(well)} of {len(well)} checks passed")
    return 0 if all(well) else 1


if __name__ == "__main__":
    sys.exit(main())
