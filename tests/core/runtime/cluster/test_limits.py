"""Facts about limits: a process counts what its cgroup grants, of both versions and all levels."""

import os
from pathlib import Path

import psutil
import pytest

from ddray.runtime.cluster.limits import cpu_quotas, memory_limits, usable_cpus, usable_memory


def _cgroups(folder: Path, own: str, files: dict[str, str]) -> tuple[Path, Path]:
    """A tree of cgroups, and what /proc says of a process in it."""
    for name, text in files.items():
        path = folder / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    (folder / "root").mkdir(exist_ok=True)
    (folder / "own").write_text(own + "\n")
    return folder / "root", folder / "own"


V1 = "4:memory:/docker/a\n2:cpu,cpuacct:/docker/a\n1:cpuset:/x\n0::/"


@pytest.mark.parametrize(
    ("own", "files", "cpus", "memory"),
    [
        ("0::/", {}, [], []),
        ("0::/", {"cpu.max": "max 100000", "memory.max": "max"}, [], []),
        ("0::/", {"cpu.max": "150000 100000", "memory.max": "1000"}, [1.5], [1000]),
        (
            "0::/kubepods/pod",
            {"kubepods/pod/cpu.max": "400000 100000", "kubepods/cpu.max": "200000 100000"},
            [4, 2],
            [],
        ),
        # The path is that of the host, and the container sees its own at the root.
        ("0::/kubepods/pod", {"cpu.max": "50000 100000", "memory.max": "7"}, [0.5], [7]),
        ("0::/../../a", {"cpu.max": "100000 50000"}, [2], []),
        (V1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, [], []),
        (
            V1,
            {
                "cpu,cpuacct/docker/a/cpu.cfs_quota_us": "250000",
                "cpu,cpuacct/docker/a/cpu.cfs_period_us": "100000",
                "memory/docker/a/memory.limit_in_bytes": "4096",
                "memory/memory.limit_in_bytes": "9223372036854771712",
            },
            [2.5],
            [4096, 9223372036854771712],
        ),
        ("nonsense", {"cpu.max": "x y", "memory.max": ""}, [], []),
    ],
)
def test_quotas_of_both_versions_and_of_all_levels_count(
    own: str, files: dict[str, str], cpus: list[float], memory: list[int], tmp_path: Path
) -> None:
    root, own_file = _cgroups(tmp_path, own, files)
    assert cpu_quotas(root, own_file) == cpus
    assert memory_limits(root, own_file) == memory


def test_where_there_are_no_cgroups_nothing_is_limited(tmp_path: Path) -> None:
    assert cpu_quotas(tmp_path / "none", tmp_path / "no") == []
    assert memory_limits(tmp_path / "none", tmp_path / "no") == []


@pytest.mark.parametrize(("quota", "cpus"), [("50000", 1), ("100000", 1), ("199000", 1)])
def test_a_part_of_a_processor_is_none_but_the_first(
    quota: str, cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, own = _cgroups(tmp_path, "0::/", {"cpu.max": f"{quota} 100000", "memory.max": "4096"})
    monkeypatch.setattr("ddray.runtime.cluster.limits._ROOT", root)
    monkeypatch.setattr("ddray.runtime.cluster.limits._OWN", own)
    assert usable_cpus() == cpus
    assert usable_memory() == 4096


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux alone")
def test_the_processors_that_a_process_may_run_on_count() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert 1 <= usable_cpus() <= len(before)
    assert 0 < usable_memory() <= psutil.virtual_memory().total
