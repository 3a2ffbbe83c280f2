"""What a machine says of itself and can reach, and what of it would spoil a job.

A cluster is sound if each of its machines is, and if they agree.
"""

import hashlib
import importlib.metadata
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import ddray
from ddray.errors import DDRayError, one_line
from ddray.runtime.cluster.limits import usable_cpus, usable_memory
from ddray.storage import open_storage

_PACKAGES = ("ray", "torch", "deepspeed", "pyarrow", "numpy")
_COMMAND_S = 120.0
# Ray stops writing at 95 % of a disk, which takes spilled objects and logs.
_LEAST_FREE_DISK = 0.05
_SKEW_S = 5.0
# Ray counts logical CPUs, and somewhat more of them than there are is often meant.
_MOST_CPUS_A_CPU = 3
_GB = 1e9


@dataclass(frozen=True)
class Probe:
    """A file that every machine must find.

    Attributes:
        uri: where.
        name: of the file.
        writable: whether they must be able to write beside it.
    """

    uri: str
    name: str
    writable: bool = True


@dataclass(frozen=True)
class Machine:
    """What one machine has, as it is asked.

    Attributes:
        name: host name.
        versions: of Python, ddray, and the packages that must agree.
        ddray_path: folder of the package that would run.
        ddray_code: digest of its files.
        memory_bytes: of the whole machine, or of the container.
        shm_bytes: size of /dev/shm; None where there is none.
        free_disk: share of the disk of Ray's folder that is free, 0 to 1.
        clock_s: its time, seconds since 1970.
        gpus: (name, bytes) of each GPU that its driver lists.
        usable_gpus: how many PyTorch can use; None if that was not asked.
        cpus: processors of the machine, or what the container gets of them.
        troubles: what it cannot reach, for people.
    """

    name: str
    versions: dict[str, str]
    ddray_path: str
    ddray_code: str
    memory_bytes: int
    shm_bytes: int | None
    free_disk: float
    clock_s: float
    gpus: list[tuple[str, int]]
    usable_gpus: int | None
    cpus: int
    troubles: list[str] = field(default_factory=list)


def examine(
    temp_folder: str,
    models: Sequence[str] = (),
    probes: Sequence[Probe] = (),
    use_gpu: bool = True,
) -> Machine:
    """Look at the machine that this runs on.

    Args:
        temp_folder: where Ray keeps what it spills.
        models: names, or URIs of model folders, that it must be able to read.
        probes: files that it must find.
        use_gpu: whether its GPUs, if it has any, are to compute.
    """
    gpus = _gpus()
    return Machine(
        name=socket.gethostname(),
        versions=versions(),
        ddray_path=str(Path(ddray.__file__).parent),
        ddray_code=_code(),
        memory_bytes=usable_memory(),
        cpus=usable_cpus(),
        shm_bytes=shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None,
        free_disk=_free(temp_folder),
        clock_s=time.time(),
        gpus=gpus,
        usable_gpus=_usable_gpus() if gpus and use_gpu else None,
        troubles=[*_unreadable(models, gpus if use_gpu else []), *_unshared(probes)],
    )


def versions() -> dict[str, str]:
    """Versions that all machines of a cluster must share."""
    found = {"python": "{}.{}.{}".format(*sys.version_info[:3]), "ddray": ddray.__version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def differences(here: Machine, there: Machine) -> list[str]:
    """What two machines do not agree on, for people.

    Of Python, Ray asks for the same minor version; of packages, tokens depend on the release, of
    which nodes with and without GPUs may have different builds.
    """
    found = []
    for name, version in here.versions.items():
        other = there.versions.get(name, "missing")
        if _release(name, version) != _release(name, other):
            found.append(f"{name} is {other} there and {version} here; use one image for all")
    if not found and here.ddray_code != there.ddray_code:
        found.append(
            f"ddray {ddray.__version__} differs in its files: {there.ddray_path} there, "
            f"{here.ddray_path} here; use one image, or submit with one working directory"
        )
    return found


def mixture(machines: Iterable[Machine]) -> str | None:
    """What follows from GPUs of several models, for people; None where there is one at most.

    The bits of a product depend on the model.
    """
    models = sorted({name for machine in machines for name, _ in machine.gpus})
    if len(models) < 2:
        return None
    return (
        f"GPUs of {len(models)} models ({', '.join(models)}): rows of one set would differ in a "
        "few tokens by the machine that made them; name a pool of one model by --node-pool"
    )


def _release(name: str, version: str) -> str:
    """What of a version must be the same."""
    minor = name == "python"
    return ".".join(version.split(".")[:2]) if minor else version.partition("+")[0]


def shortcomings(
    machine: Machine, *, cpus: float, gpus: float, object_store_bytes: float, skew_s: float
) -> tuple[list[str], list[str]]:
    """What is wrong with a machine.

    Args:
        machine: as it said.
        cpus: that Ray counts on it.
        gpus: likewise.
        object_store_bytes: of Ray there.
        skew_s: how much its clock differs from the driver's at least.

    Returns:
        Errors, with which jobs fail; and warnings.
    """
    errors, warnings = list(machine.troubles), []
    if gpus > len(machine.gpus):
        errors.append(
            f"Ray counts {gpus:g} GPUs and the driver lists {len(machine.gpus)}; "
            "start Ray with the right --num-gpus, and containers with their GPUs"
        )
    elif machine.usable_gpus is not None and machine.usable_gpus < gpus:
        errors.append(
            f"PyTorch {machine.versions.get('torch')} can use {machine.usable_gpus} of "
            f"{gpus:g} GPUs; its build and the driver's version must fit"
        )
    if cpus > _MOST_CPUS_A_CPU * machine.cpus:
        warnings.append(
            f"Ray counts {cpus:g} CPUs and {machine.cpus} can be used, so workers wait for each "
            "other; give its container more, or start Ray with the right --num-cpus"
        )
    if machine.shm_bytes is not None and machine.shm_bytes < object_store_bytes:
        warnings.append(
            f"/dev/shm has {machine.shm_bytes / _GB:.1f} GB and Ray's objects may take "
            f"{object_store_bytes / _GB:.1f}, so they go to disk; give containers a larger one"
        )
    if machine.free_disk < _LEAST_FREE_DISK:
        warnings.append(
            f"the disk of Ray's folder is {1 - machine.free_disk:.0%} full; at 95% Ray stops "
            "writing there"
        )
    if abs(skew_s) > _SKEW_S:
        warnings.append(f"its clock differs by {skew_s:.0f} s; S3 refuses 900, so set up NTP")
    return errors, warnings


@cache
def _code() -> str:
    """Digest of ddray's own files."""
    root, digest = Path(ddray.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _free(folder: str) -> float:
    usage = shutil.disk_usage(folder if os.path.isdir(folder) else "/")
    return usage.free / usage.total


def _gpus() -> list[tuple[str, int]]:
    """As the driver lists them, whatever is visible to this process."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(
            command, capture_output=True, text=True, timeout=_COMMAND_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    lines = [line.rpartition(",") for line in listed.stdout.splitlines() if "," in line]
    return [(name.strip(), _mebibytes(size)) for name, _, size in lines]


def _mebibytes(size: str) -> int:
    """In bytes; 0 where the GPU shares the machine's memory and tells none."""
    try:
        return int(float(size) * 2**20)
    except ValueError:
        return 0


def _usable_gpus() -> int:
    """How many PyTorch finds, in a process that sees them all."""
    # Without a context PyTorch counts by NVML, for which any driver is new enough.
    hidden = ("CUDA_VISIBLE_DEVICES", "PYTORCH_NVML_BASED_CUDA_CHECK")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    code = "import torch.cuda as c; print(c.device_count() if c.is_available() else 0)"
    command = [sys.executable, "-c", code]
    try:
        counted = subprocess.run(
            command, capture_output=True, text=True, timeout=_COMMAND_S, env=environment, check=True
        )
        return int(counted.stdout.split()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return 0


def _unreadable(models: Sequence[str], gpus: list[tuple[str, int]]) -> list[str]:
    """Models that cannot be had here, or are too large."""
    from ddray.models.zoo import resolve

    troubles = []
    for model in models:
        try:
            where: Any = resolve(model)
            if isinstance(where, dict):
                troubles.append(f"{model} is a set of sizes without weights; give a model folder")
                continue
            sizes = open_storage(str(where)).list()
        except DDRayError as error:
            troubles.append(f"cannot read {model}: {one_line(error)}")
            continue
        needed = sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
        limits = [("memory", float(usable_memory()))]
        told = [size for _, size in gpus if size]
        if told:  # where weights may be half of what they are in the file
            limits.append(("GPU memory", 2.0 * min(told)))
        for what, has in limits:
            if needed > has:
                troubles.append(
                    f"{model} has {needed / _GB:.1f} GB of weights and there are "
                    f"{has / _GB:.1f} GB of {what}"
                )
    return troubles


def _unshared(probes: Sequence[Probe]) -> list[str]:
    """Locations that are not the same here as where the probes were written, or not writable."""
    troubles = []
    for probe in probes:
        try:
            storage = open_storage(probe.uri)
            if not storage.exists(probe.name):
                troubles.append(
                    f"{probe.uri} is another folder there than on the driver's node; use a shared "
                    "file system, or s3://"
                )
            elif probe.writable:
                storage.check_writable()
        except DDRayError as error:
            troubles.append(f"cannot use {probe.uri}: {one_line(error)}")
    return troubles
