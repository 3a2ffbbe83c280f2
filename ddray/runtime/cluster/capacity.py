"""Whether the nodes of a cluster hold what a job asks for, and waiting for those it can get."""

import time
from collections.abc import Sequence
from typing import Any

from ddray.errors import ClusterError

NODE_POOL_LABEL = "ddray.io/node-pool"
"""Ray label by which the cluster files name their kinds of nodes, and jobs choose one."""

# Ray counts resources in parts of so many and cuts off what is smaller: seven sevenths fit (tried).
_UNITS = 10_000
# A spot machine with a fresh disk and an image of several GB to fetch.
_GROWING_WAIT_S = 1800.0
_LOOK_EVERY_S = 2.0


def node_labels(node_pool: str | None) -> dict[str, str]:
    """What Ray calls a label selector: the labels of the nodes of a pool, or of any node."""
    return {NODE_POOL_LABEL: node_pool} if node_pool else {}


def require(
    what: str,
    workers: int,
    num_cpus: float,
    num_gpus: float,
    wait_s: float | None = None,
    node_pool: str | None = None,
    beside: tuple[float, float] | None = None,
) -> None:
    """Refuse a job that the cluster cannot run, at once or after a wait for nodes.

    A cluster that grows by itself is told what is wanted for as long as this waits.

    Args:
        what: the job, for people.
        workers: how many must fit at the same time.
        num_cpus: of a worker.
        num_gpus: of a worker.
        wait_s: for nodes; None = half an hour where the cluster grows by itself, else not at all.
        node_pool: label of the nodes that count; None = all.
        beside: CPUs and GPUs of one more process, which must fit at the same time.

    Raises:
        ClusterError: with what is asked for and what there is.
    """
    labels = node_labels(node_pool)
    if _room(num_cpus, num_gpus, labels, beside) >= workers:
        return
    if wait_s is None:
        wait_s = _GROWING_WAIT_S if _autoscaler_state() is not None else 0.0
    on = f" on nodes with the label {NODE_POOL_LABEL}={node_pool}" if node_pool else ""
    asked = f"{what} asks for {workers} workers of {num_cpus:g} CPUs and {num_gpus:g} GPUs"
    if beside:
        asked += f" beside one of {beside[0]:g} CPUs and {beside[1]:g} GPUs"
    asked += on

    def refusal(how: str) -> ClusterError:
        return ClusterError(
            f"{asked}, {how} {_there(num_cpus, num_gpus, labels, beside)}; "
            "ask for fewer or smaller workers, or a larger cluster"
        )

    if not wait_s:
        raise refusal("but")
    sizes = [(num_cpus, num_gpus)] * workers + ([beside] if beside else [])
    kind = "GPU" if any(gpus for _, gpus in sizes) else "CPU"
    deadline = time.monotonic() + wait_s
    demand = _Demand(sizes, labels)
    try:
        while _room(num_cpus, num_gpus, labels, beside) < workers:
            if demand.is_beyond_reach() and not _busy(labels, kind):
                raise refusal("more than this cluster can grow to; now")
            if time.monotonic() >= deadline:
                raise refusal(f"but after {wait_s:g} s")
            time.sleep(min(_LOOK_EVERY_S, wait_s))
    finally:
        # From here on it is the job itself that holds the nodes.
        demand.withdraw()


class _Demand:
    """Resources asked of a cluster that grows: as a placement group, which ends with its driver.

    `ray.autoscaler.sdk.request_resources` would outlive a driver that is killed, and hold nodes
    that nobody uses; and two jobs would overwrite each other's.
    """

    def __init__(self, sizes: Sequence[tuple[float, float]], labels: dict[str, str]):
        from ray.util.placement_group import placement_group

        names = ("CPU", "GPU")
        bundles = [{n: part for n, part in zip(names, size, strict=True) if part} for size in sizes]
        selectors = [labels] * len(bundles) if labels else None
        self._group = placement_group(bundles, bundle_label_selector=selectors)  # type: ignore[arg-type]

    def is_beyond_reach(self) -> bool:
        """Whether the autoscaler says that no nodes which it may still start would do."""
        state, name = _autoscaler_state(), self._group.id.hex()
        groups = state.infeasible_gang_resource_requests if state is not None else ()
        return any(group.details.startswith(name) for group in groups)

    def withdraw(self) -> None:
        from ray.util.placement_group import remove_placement_group

        remove_placement_group(self._group)


def _autoscaler_state() -> Any:
    """What the cluster's autoscaler said last; None where none runs."""
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    reply = GetClusterStatusReply()
    address = ray.get_runtime_context().gcs_address
    reply.ParseFromString(GcsClient(address).get_cluster_status())
    state = reply.autoscaling_state
    return state if state.autoscaler_state_version else None


def _busy(labels: dict[str, str], name: str) -> bool:
    """Whether anybody uses such nodes: then they may become free."""
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    return any(
        free.get(node["NodeID"], {}).get(name, 0) < node["Resources"].get(name, 0)
        for node in nodes_with(labels)
    )


def nodes_with(labels: dict[str, str]) -> list[dict[str, Any]]:
    """Nodes that are alive and have these labels, as `ray.nodes` tells of them."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    return [node for node in alive if labels.items() <= node["Labels"].items()]


def _there(
    num_cpus: float,
    num_gpus: float,
    labels: dict[str, str],
    beside: tuple[float, float] | None = None,
) -> str:
    """What there is, for people."""
    nodes = nodes_with(labels)
    cpus, gpus = (sum(n["Resources"].get(what, 0) for n in nodes) for what in ("CPU", "GPU"))
    return (
        f"the cluster has room for {_room(num_cpus, num_gpus, labels, beside)}: {cpus:g} CPUs and "
        f"{gpus:g} GPUs on {len(nodes)} such nodes"
    )


def most_of(
    workers: int, num_cpus: float, num_gpus: float, node_pool: str | None
) -> tuple[float, float]:
    """CPUs and GPUs of as many nodes as so many workers need, by the largest node there is.

    Where a library asks for whole nodes of every kind, this is what it may ask for at most.
    """
    nodes = workable(num_cpus, num_gpus, node_pool)
    if not nodes:  # all lost; others may come
        return workers * num_cpus, workers * num_gpus
    largest = max(nodes, key=lambda node: _fits(node, num_cpus, num_gpus))
    needed = -(-workers // _fits(largest, num_cpus, num_gpus))
    has = largest["Resources"]
    return needed * has.get("CPU", 0), needed * has.get("GPU", 0)


def _room(
    num_cpus: float,
    num_gpus: float,
    labels: dict[str, str],
    beside: tuple[float, float] | None = None,
) -> int:
    """How many workers fit at the same time, and one process of another size."""
    nodes = nodes_with(labels)
    fits = [_fits(node, num_cpus, num_gpus) for node in nodes]
    if beside is None:
        return sum(fits)
    # It is to stand where it costs the fewest workers.
    costs = [
        fit - _fits(_without(node, *beside), num_cpus, num_gpus)
        for node, fit in zip(nodes, fits, strict=True)
        if _fits(node, *beside)
    ]
    return sum(fits) - min(costs) if costs else 0


def _without(node: dict[str, Any], num_cpus: float, num_gpus: float) -> dict[str, Any]:
    """A node with that much taken."""
    has = node["Resources"]
    left = {"CPU": has.get("CPU", 0) - num_cpus, "GPU": has.get("GPU", 0) - num_gpus}
    return {**node, "Resources": left}


def _fits(node: dict[str, Any], num_cpus: float, num_gpus: float) -> int:
    """How many workers fit on a node: each lies on one, and a part of a GPU on one GPU."""
    has = node["Resources"]
    cpus, gpus = _units(has.get("CPU", 0)), _units(has.get("GPU", 0))
    fits = cpus // max(1, _units(num_cpus))
    asked = _units(num_gpus)
    if asked >= _UNITS:
        return min(fits, gpus // asked)
    if asked:
        return min(fits, gpus // _UNITS * (_UNITS // asked) + gpus % _UNITS // asked)
    return fits


def _units(amount: float) -> int:
    """An amount of a resource as Ray counts it; binary fractions would not add up."""
    return int(amount * _UNITS + 1e-6)


def workable(num_cpus: float, num_gpus: float, node_pool: str | None) -> list[dict[str, Any]]:
    """Nodes on which a worker fits, as `ray.nodes` tells of them."""
    nodes = nodes_with(node_labels(node_pool))
    return [node for node in nodes if _fits(node, num_cpus, num_gpus)]
