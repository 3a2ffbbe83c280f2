"""What this process may use of its machine: a container is told less than the machine has.

Python, PyTorch and psutil tell of the whole machine. What a cgroup grants, of version 1 or 2, and
the processors that the process may run on, count here.
"""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def usable_cpus() -> int:
    """Whole processors that this process gets at the same time, at least 1."""
    try:
        processors = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        processors = os.cpu_count() or 1
    return max(1, int(min([processors, *cpu_quotas(_ROOT, _OWN)])))


def usable_memory() -> int:
    """Bytes of the machine; of the container where that has less."""
    return min([int(psutil.virtual_memory().total), *memory_limits(_ROOT, _OWN)])


def cap_threads() -> None:
    """Leave PyTorch no more threads than processors: it counts those of the whole machine."""
    import torch

    if torch.get_num_threads() > usable_cpus():
        torch.set_num_threads(usable_cpus())


def cpu_quotas(root: Path, own: Path) -> list[float]:
    """Processors that each cgroup around a process grants; none where they are not limited.

    Args:
        root: where cgroups are mounted.
        own: file that names the cgroups of the process.
    """
    found = []
    for folder in _folders("cpu", root, own):
        quota, period = (_words(folder / "cpu.max") + ["", ""])[:2]
        if not period:
            quota, period = (
                " ".join(_words(folder / f"cpu.cfs_{name}_us")) for name in ("quota", "period")
            )
        # "max" and -1 are no limit.
        if quota.isdigit() and period.isdigit() and int(quota) and int(period):
            found.append(int(quota) / int(period))
    return found


def memory_limits(root: Path, own: Path) -> list[int]:
    """Bytes that each cgroup around a process grants; arguments as for `cpu_quotas`."""
    limits = [
        " ".join(_words(folder / name))
        for folder in _folders("memory", root, own)
        for name in ("memory.max", "memory.limit_in_bytes")
    ]
    return [int(limit) for limit in limits if limit.isdigit() and int(limit)]


def _folders(controller: str, root: Path, own: Path) -> Iterator[Path]:
    """The cgroup that holds a process to a resource, and those around it.

    In a container its path may be that of the host, which is not mounted: then the root is its own.
    """
    for line in _lines(own):
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if controllers and controller not in controllers.split(","):
            continue
        mounts = [root / controllers, root / controller] if controllers else [root]
        mount = next((folder for folder in mounts if folder.is_dir()), root)
        parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
        for depth in range(len(parts), -1, -1):
            yield mount.joinpath(*parts[:depth])


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except (OSError, ValueError):
        return []


def _words(file: Path) -> list[str]:
    return " ".join(_lines(file)).split()
