"""What every node of a cluster says of itself: in full for `ddray doctor`, and before each job."""

import contextlib
import os
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddray import __version__
from ddray.config.doctor import DoctorConfig
from ddray.errors import ClusterError, StorageError, one_line
from ddray.runtime.cluster.capacity import node_labels, nodes_with, require, workable
from ddray.runtime.cluster.connection import connect, obeys_strangers
from ddray.runtime.cluster.machine import (
    Machine,
    Probe,
    differences,
    examine,
    mixture,
    shortcomings,
)
from ddray.storage import open_storage
from ddray.storage.base import temporary_name

_NODE_S = 180.0
_GB = 1e9
_OPEN = (
    "it asks for no token: whoever reaches its ports runs code on every node; start it with "
    "RAY_AUTH_MODE=token on all of them, and a token of `ray get-auth-token --generate`"
)


@dataclass(frozen=True)
class Patient:
    """A node, examined.

    Attributes:
        address: of the node.
        machine: what it said; None if it did not answer.
        errors: with which jobs fail, for people.
        warnings: that may explain a slow job.
        silent: whether it did not answer at all.
    """

    address: str
    machine: Machine | None
    errors: list[str]
    warnings: list[str]
    silent: bool = False


def preflight(
    num_cpus: float,
    num_gpus: float,
    node_pool: str | None,
    models: Sequence[str],
    probes: Sequence[Probe] = (),
) -> None:
    """Refuse a job whose nodes cannot do it, before it holds any GPU.

    Costs a few seconds on a cluster of several nodes, and nothing on one.

    Args:
        num_cpus: of a worker; nodes on which none fits are not asked.
        num_gpus: likewise.
        node_pool: label of the nodes on which they may run; None = any.
        models: names or URIs that the workers will load.
        probes: files that they must find, with what lies beside them.

    Raises:
        ClusterError: with the first node's first trouble.
    """
    import ray

    nodes = workable(num_cpus, num_gpus, node_pool)
    if [node["NodeID"] for node in nodes] == [ray.get_runtime_context().get_node_id()]:
        return
    patients = _examine(nodes, models, probes, bool(num_gpus))
    mixed = mixture(patient.machine for patient in patients if patient.machine)
    if mixed and num_gpus:
        print(f"ddray: {mixed}", file=sys.stderr, flush=True)
    for patient in patients:
        # A node that is silent may be one that was just taken away: no reason to stop.
        if patient.errors and not patient.silent:
            raise ClusterError(f"node {patient.address}: {patient.errors[0]}")


@contextlib.contextmanager
def probing(uris: Sequence[str]) -> Iterator[list[Probe]]:
    """Files for other machines to find, for as long as the context lasts.

    Raises:
        StorageError: if a location cannot be written, or a file there is replaced by one who must
            not.
    """
    stores, name = [open_storage(uri) for uri in uris], temporary_name()
    try:
        for storage in stores:
            storage.check_writable()
            storage.write(name, b"probe", if_absent=True)
            if storage.write(name, b"other", if_absent=True):
                raise StorageError(
                    f"{storage.uri} does not honour conditional writes (If-None-Match), by which "
                    "two writers of one set are kept apart; use a newer server"
                )
        yield [Probe(storage.uri, name) for storage in stores]
    finally:
        for storage in stores:
            with contextlib.suppress(StorageError):
                storage.delete(name)


def doctor(config: DoctorConfig) -> tuple[list[str], bool]:
    """Examine this machine, Ray, every node, and what jobs will read and write.

    Args:
        config: which models and locations.

    Returns:
        Lines for people, and whether all is well; warnings are well.

    Raises:
        ClusterError: Ray cannot start or be reached.
        StorageError: a location cannot be used from here.
    """
    with probing(config.uri) as probes, connect():
        import ray

        if config.node_pool is not None:
            require("the doctor", 1, 1, 0, config.wait_s, config.node_pool)
        nodes = nodes_with(node_labels(config.node_pool))
        patients = _examine(nodes, config.model, probes, use_gpu=True)
        total = ray.cluster_resources()
        is_open = obeys_strangers(ray.get_runtime_context().gcs_address)
        where = os.environ.get("RAY_ADDRESS") or "private, as RAY_ADDRESS is not set"
    lines = [
        f"Ray: {where}; nodes: {len(nodes)}, {total.get('CPU', 0):g} CPUs, "
        f"{total.get('GPU', 0):g} GPUs"
    ]
    lines.append(f"  ERROR {_OPEN}" if is_open else "  strangers are refused: it asks for a token")
    mixed = mixture(patient.machine for patient in patients if patient.machine)
    warnings = [*filter(None, (mixed, _readable_token()))]
    lines += [f"  warning: {warning}" for warning in warnings]
    for patient in patients:
        lines.append(_described(patient))
        lines += [f"  ERROR {error}" for error in patient.errors]
        lines += [f"  warning: {warning}" for warning in patient.warnings]
    for uri in config.uri:
        lines.append(f"{uri}: read, written and conditionally written")
    if not any(node["Resources"].get("CPU") for node in nodes):
        lines.append(
            "  warning: no worker is up, so none was looked at; --node-pool NAME brings one"
        )
    errors = is_open + sum(len(patient.errors) for patient in patients)
    number = len(warnings) + sum(len(patient.warnings) for patient in patients)
    lines.append(f"{errors} errors, {number} warnings" if errors or number else "all is well")
    return lines, errors == 0


def _readable_token() -> str:
    """A warning where others on this machine can read the token of clusters, or nothing."""
    if os.environ.get("RAY_AUTH_MODE") != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return ""
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    with contextlib.suppress(OSError):
        if stat.S_IMODE(file.stat().st_mode) & 0o077:
            return f"others on this machine can read {file}, and then run code as you: chmod 600"
    return ""


def _described(patient: Patient) -> str:
    machine = patient.machine
    if machine is None:
        return f"node {patient.address}"
    shm = f", /dev/shm {machine.shm_bytes / _GB:.1f} GB" if machine.shm_bytes is not None else ""
    gpus = [f"{name} ({size / _GB:.0f} GB)" for name, size in machine.gpus]
    return (
        f"node {patient.address} ({machine.name}): "
        + ", ".join(f"{name} {version}" for name, version in machine.versions.items())
        + f"; ddray from {machine.ddray_path}; {machine.cpus} CPUs, "
        + f"memory {machine.memory_bytes / _GB:.1f} GB{shm}, "
        + f"disk {1 - machine.free_disk:.0%} full, GPUs: {', '.join(gpus) or 'none'}"
    )


def _examine(
    nodes: Sequence[dict[str, Any]],
    models: Sequence[str],
    probes: Sequence[Probe],
    use_gpu: bool,
) -> list[Patient]:
    """Ask all nodes at the same time."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    temp = ray.get_runtime_context().get_temp_dir()
    task = ray.remote(num_cpus=0, max_retries=0)(examine)
    here, asked, began = examine(temp, use_gpu=False), [], time.time()
    for node in nodes:
        on_it = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked.append(task.options(scheduling_strategy=on_it).remote(temp, models, probes, use_gpu))
    ready, _ = ray.wait(asked, num_returns=len(asked), timeout=_NODE_S) if asked else ([], [])
    ended = time.time()
    patients = []
    for node, answer in zip(nodes, asked, strict=True):
        try:
            machine = ray.get(answer, timeout=0.1 if answer in ready else 0)
        except (
            ray.exceptions.GetTimeoutError,
            ray.exceptions.NodeDiedError,
            ray.exceptions.TaskUnschedulableError,
            ray.exceptions.WorkerCrashedError,
        ) as error:
            ray.cancel(answer, force=True)
            silent = f"it did not answer in {_NODE_S:g} s ({type(error).__name__})"
            patients.append(Patient(node["NodeManagerAddress"], None, [silent], [], silent=True))
            continue
        except ray.exceptions.RayError as error:
            # Such as an installation so old that it cannot be asked.
            said = one_line(getattr(error, "cause", None) or error)
            trouble = f"it cannot run ddray {__version__}: {said}; use one image for all"
            patients.append(Patient(node["NodeManagerAddress"], None, [trouble], []))
            continue
        # Asked at some time between: what lies within is no difference.
        skew_s = machine.clock_s - min(max(machine.clock_s, began), ended)
        errors, warnings = shortcomings(
            machine,
            cpus=node["Resources"].get("CPU", 0),
            gpus=node["Resources"].get("GPU", 0) if use_gpu else 0,
            object_store_bytes=node["Resources"].get("object_store_memory", 0),
            skew_s=skew_s,
        )
        errors += differences(here, machine)
        patients.append(Patient(node["NodeManagerAddress"], machine, errors, warnings))
    return patients
