"""What is asked of an image, as the user that it runs as: alone, and as nodes of a cluster.

Nodes are started by the lines that KubeRay's operator writes (1.7, pod.go) and that `ray up` types
(Ray 2.60, command_runner.py), with the arguments of our own files; neither of the two is here.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from cluster.image.engines import Container, ImageError

ROOT = Path(__file__).resolve().parents[2]
# Only what hangs takes longer.
PATIENCE_S = 3600.0
_END, _TRIES = "--end-of-answer--", 3
# Any will do on nodes that nobody else reaches.
_TOKEN = "0123456789abcdef" * 2
_TOOLS = ("ddray", "ray", "rsync", "ssh", "wget", "ps", "g++")
# For each of the nodes, which share one machine.
_RESOURCES = {"CPU": 2, "GPU": 0, "object_store_memory": 300 * 2**20}
_ASK_AGENT = (
    "wget --tries 1 -T 2 -q -O- http://localhost:52365/api/local_raylet_healthz | grep success"
)
_ASK_HEAD = "wget --tries 1 -T 10 -q -O- http://localhost:8265/api/gcs_healthz | grep success"


class NodeEndedError(ImageError):
    """A node that should have stayed; what it printed."""


def ask(
    container: Container, *argv: str, environment: dict[str, str] | None = None, given: str = ""
) -> str:
    """What a command in a container prints; it may run more than once.

    Raises:
        ImageError: If it fails.
    """
    # On a busy machine what is printed in buildah's chroot is lost, once in some fifty times, and
    # nothing says so.
    marked = ("sh", "-c", f'"$@" && echo {_END}', "sh", *argv)
    for _ in range(_TRIES):
        done = subprocess.run(
            container.command(*marked, environment=environment),
            input=given,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        if done.returncode:
            told = (done.stdout + done.stderr).strip()[-3000:]
            status = f"exit status {done.returncode}"
            raise ImageError(f"`{' '.join(argv)}` ended with {status}:\n{told}")
        answer, end, _ = done.stdout.rpartition(f"{_END}\n")
        if end:
            return answer
    raise ImageError(f"`{' '.join(argv)}`: its output was lost, {_TRIES} times")


# Alone


def user(one: Container) -> str:
    """Who it is, and whether a login shell finds what others call."""
    script = f"id -u; stat -c %a ~/.ray; command -v {' '.join(_TOOLS)}"
    uid, mode, *paths = ask(one, "bash", "--login", "-c", script).split()
    if (uid, mode) != ("1000", "700") or len(paths) != len(_TOOLS):
        raise ImageError(f"uid {uid}, mode {mode} of ~/.ray, and of {_TOOLS} only {paths}")
    return f"uid {uid}; {', '.join(_TOOLS)} are there"


def packages(one: Container) -> str:
    """No package wants what another one's version is not; no package is there twice."""
    told = ask(one, "pip", "check").strip()
    listed = "import importlib.metadata as m; print(*[d.name for d in m.distributions()])"
    names = ask(one, "python", "-c", listed).lower().split()
    if twice := {name for name in names if names.count(name) > 1}:
        raise ImageError(f"there twice: {', '.join(sorted(twice))}")
    return f"{len(names)} packages: {told}"


def command_line(one: Container) -> str:
    told = ask(one, "ddray", "--help")
    return told.strip().splitlines()[0]


def doctor(one: Container) -> str:
    return ask(one, "ddray", "doctor").strip().splitlines()[-1]


def quickstart(one: Container) -> str:
    """Teacher to report, on the CPU."""
    ask(one, "ddray", "quickstart", "--preset", "tiny", "--out", "/tmp/quickstart")
    return ask(one, "du", "-sh", "/tmp/quickstart/report.html").split()[0] + " of report"


# As nodes


def kuberay(nodes: list[Container]) -> str:
    """Head and worker as the operator starts them, its probes, and the doctor on the two."""
    cluster = yaml.safe_load((ROOT / "cluster/kuberay/base/raycluster.yaml").read_text())
    spec = cluster["spec"]
    (pool,) = [group for group in spec["workerGroupSpecs"] if group["groupName"] == "cpu"]
    head, worker = nodes
    variables = {
        "RAY_CLUSTER_NAME": cluster["metadata"]["name"],
        "RAY_PORT": "6379",
        "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
        "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_AUTH_MODE": spec["authOptions"]["mode"],
        "RAY_AUTH_TOKEN": _TOKEN,
    }
    # What the worker's first container, wait-gcs-ready, does.
    wait = ("ray", "health-check", "--address", f"{head.address}:6379")
    kept: list[subprocess.Popen[str]] = []
    for node, group in ((head, spec["headGroupSpec"]), (worker, pool)):
        ip = "127.0.0.1" if node is head else head.address
        own = {"RAY_ADDRESS": f"{ip}:6379", "FQ_RAY_IP": ip}
        own["RAY_NODE_TYPE_NAME"] = group.get("groupName", "headgroup")
        line = f"ulimit -n 65536; {operator_command(group, head.address)}"
        kept.append(_start(node, "/bin/bash", "-c", "--", line, environment=variables | own))
        _until(lambda: ask(worker, *wait, environment=variables), kept)
    _until(lambda: ask(head, "bash", "-c", f"{_ASK_AGENT} && {_ASK_HEAD}"), kept)
    _until(lambda: ask(worker, "bash", "-c", _ASK_AGENT), kept)
    _refuses_strangers(worker, head.address)
    local = variables | {"RAY_ADDRESS": "127.0.0.1:6379"}
    return _doctor(nodes, kept, local, "--node-pool", "cpu")


def operator_command(group: dict[str, Any], head: str) -> str:
    """`ray start` for a group of a RayCluster, as the operator writes it.

    CPUs and memory, which it takes from the pod's limits, are what one machine has for two nodes.
    """
    given = {"metrics-export-port": "8080", "dashboard-agent-listen-port": "52365", "block": "true"}
    given |= {"num-cpus": str(_RESOURCES["CPU"]), "memory": str(2**31)}
    given |= {"object-store-memory": str(_RESOURCES["object_store_memory"])}
    is_head = "groupName" not in group
    if is_head:
        # Its autoscaler is a container of its own.
        given |= {"dashboard-host": "0.0.0.0", "no-monitor": "true"}
    else:
        given["address"] = f"{head}:6379"
    if labels := group.get("labels"):
        given["labels"] = ",".join(f"{name}={value}" for name, value in labels.items())
    flags = [
        f" --{name} " if value == "true" else f" --{name}={value} "
        for name, value in sorted((given | group["rayStartParams"]).items())
    ]
    return f"ray start {'--head ' if is_head else ''}{''.join(flags)}"


def ray_up(file: str) -> Callable[[list[Container]], str]:
    """Head and worker by the commands of a file for `ray up`, and the doctor on the two."""

    def check(nodes: list[Container]) -> str:
        config = yaml.safe_load((ROOT / file).read_text())
        head, worker = nodes
        # Which would start machines: here there are none to start.
        alone = {"cluster_name": "image", "max_workers": 0, "provider": {"type": "readonly"}}
        for node in nodes:
            token = "umask 077; cat > ~/.ray/auth_token"
            ask(node, "bash", "-c", token, given=_TOKEN)
        ask(head, "bash", "-c", "cat > ~/ray_bootstrap_config.yaml", given=json.dumps(alone))
        variables = dict(
            re.findall(r"--env (\w+)=(\S+)", " ".join(config["docker"]["run_options"]))
        )
        variables.pop("RAY_object_spilling_directory", None)  # a disk of the machine
        kept: list[subprocess.Popen[str]] = []
        for node, kind in ((head, "head"), (worker, "worker")):
            cpus = 0 if node is head else _RESOURCES["CPU"]
            own = {"RAY_OVERRIDE_RESOURCES": json.dumps(_RESOURCES | {"CPU": cpus})}
            own |= {"RAY_HEAD_IP": head.address}
            lines = [f"({line})" for line in config[f"{kind}_start_ray_commands"]]
            # A shell each in Ray. Here one for all, which stays: in a chroot they end with it.
            before = "source ~/.bashrc; export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore"
            line = " && ".join([before, *lines, "touch /tmp/started", "sleep infinity"])
            shell = ("bash", "--login", "-c", "-i", line)
            kept.append(_start(node, *shell, environment=variables | own))
            _until(functools.partial(ask, node, "test", "-e", "/tmp/started"), kept)
        return _doctor(nodes, kept, variables | {"RAY_ADDRESS": "auto"})

    return check


def _doctor(
    nodes: list[Container],
    kept: list[subprocess.Popen[str]],
    environment: dict[str, str],
    *flags: str,
) -> str:
    """The doctor's word on a cluster, once both have joined."""
    count = "import ray; ray.init(log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))"

    def both() -> None:
        told = ask(nodes[0], "python", "-c", count, environment=environment)
        if told.split()[-1] != "2":
            raise ImageError(f"of two nodes {told.split()[-1]} joined")

    _until(both, kept)
    told = ask(nodes[0], "ddray", "doctor", *flags, environment=environment)
    if nodes[1].address not in told:  # the head is in no pool
        raise ImageError(f"the doctor did not see {nodes[1].address}:\n{told}")
    return told.strip().splitlines()[-1]


def _refuses_strangers(node: Container, head: str) -> None:
    code = f"wget --server-response -O- http://{head}:8265/api/jobs/ 2>&1 | grep HTTP/1.1"
    if "401" not in (told := ask(node, "bash", "-c", code)):
        raise ImageError(f"who has no token is answered {told}")


def _start(node: Container, *argv: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        node.command(*argv, environment=environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _until(condition: Callable[[], object], needed: list[subprocess.Popen[str]]) -> None:
    """Ask again until it does not fail, as long as these run.

    Raises:
        NodeEndedError: If one of them no longer does.
        ImageError: As at last, if it goes on to fail.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            condition()
            return
        except ImageError:
            for process in needed:
                if process.poll() is not None:
                    raise NodeEndedError(process.communicate()[0][-3000:]) from None
            if time.monotonic() > deadline:
                raise
        time.sleep(1)


ALONE: dict[str, Callable[[Container], str]] = {
    "user and tools": user,
    "pip check": packages,
    "ddray --help": command_line,
    "ddray doctor": doctor,
    "quickstart, tiny": quickstart,
}
TOGETHER: dict[str, Callable[[list[Container]], str]] = {
    "KubeRay's commands": kuberay,
    "ray up: ray-cluster.yaml": ray_up("ray-cluster.yaml"),
    "ray up: on-premise.yaml": ray_up("cluster/on-premise.yaml"),
}
