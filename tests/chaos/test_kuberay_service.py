"""The Serve config of cluster/kuberay/service.yaml, on nodes as KubeRay makes them."""

import contextlib
import functools
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray import serve
from ray._private.state import actors
from ray.cluster_utils import Cluster
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from ddray.runtime.cluster.capacity import NODE_POOL_LABEL
from tests.chaos.hosts import Host, hosts
from tests.chaos.network import Network, asking, head_on
from tests.chaos.ray_head import BIN, RayHead, end
from tests.chaos.service import RAW
from tests.core.deployment.kuberay import service
from tests.loopback import free_port
from tests.patience import PATIENCE_S, wait_until

pytestmark = pytest.mark.chaos


@pytest.mark.parametrize("cluster", [0], indirect=True)
def test_fronts_and_students_are_on_two_nodes_and_none_on_the_head(cluster: Cluster) -> None:
    labels = {NODE_POOL_LABEL: "serving"}
    size = {"num_cpus": 4, "object_store_memory": 100 * 2**20}
    workers = [cluster.add_node(**size, labels=labels).node_id for _ in range(2)]
    cluster.wait_for_nodes()
    config = small_config()
    config["http_options"] |= {"host": "127.0.0.1", "port": free_port()}
    name = config["applications"][0]["name"]
    try:
        serve.start(http_options=config["http_options"])
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config))
        wait_until(lambda: _status(name) == "RUNNING", "service")
        places = sorted(
            (actor["ActorClassName"].split(":")[-1], actor["Address"]["NodeID"])
            for actor in actors().values()
            if actor["State"] == "ALIVE" and actor["ActorClassName"].startswith("ServeReplica")
        )
    finally:
        serve.shutdown()
    assert ray.get_runtime_context().get_node_id() not in workers
    assert places == sorted((what, node) for what in ("ingress", "students") for node in workers)


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs redis-server")
def test_no_request_fails_while_a_head_is_lost_and_another_comes(tmp_path: Path) -> None:
    # As gcsFaultToleranceOptions has it: of all that a head knows, Redis keeps what Serve needs.
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(hosts(4))
        where, password = stack.enter_context(redis(made[3]))
        head = functools.partial(
            head_on,
            made[0],
            f"--redis-password={password}",
            port=free_port(),
            dashboard_port=free_port(),
            RAY_AUTH_TOKEN=secrets.token_hex(32),
            RAY_REDIS_ADDRESS=where,
            RAY_external_storage_namespace="ddray-serving",
            RAY_gcs_rpc_server_reconnect_timeout_s="600",
        )
        first = stack.enter_context(head())
        network = Network(first, made, [])
        for number, host in enumerate(made[1:3], 2):
            network.add_node(host, num_cpus=4, flags=("--labels", f"{NODE_POOL_LABEL}=serving"))
            stack.callback(end, network.nodes[-1])
            network.until_nodes(number)
        (tmp_path / "service.yaml").write_text(yaml.safe_dump(small_config()))
        serve_cli(first, made[0], "deploy", str(tmp_path / "service.yaml"))
        wait_until(lambda: "status: RUNNING" in serve_cli(first, made[0], "status"), "service")

        urls = [f"http://{host.address}:8000{RAW}" for host in made[1:3]]
        with asking(made[3], tmp_path, *urls) as told:
            wait_until(lambda: len(told()) >= 20, "answers")
            first.lose()
            lost = len(told())
            wait_until(lambda: len(told()) >= lost + 100, "answers without a head")
            second = stack.enter_context(head())
            wait_until(lambda: "status: RUNNING" in serve_cli(second, made[0], "status"), "service")
            again = len(told())
            wait_until(lambda: len(told()) >= again + 100, "answers of the new head's service")
            answers = told()
    assert set(answers) == {"answered"}


def small_config() -> dict[str, Any]:
    """That of the service, for a bundled student, without GPUs and keys."""
    config: dict[str, Any] = yaml.safe_load(service()["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    small = {"student": ["digits-llamagen-dd"], "num_gpus": 0, "threads": 1, "api_keys_file": None}
    application["args"] |= small
    return config


def serve_cli(head: RayHead, host: Host, *arguments: str) -> str:
    """`serve ...`, as KubeRay's operator talks to the dashboard; what it printed."""
    command = [*host.enter, str(BIN / "serve"), *arguments, "--address", head.dashboard]
    done = subprocess.run(
        command, env=head.environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    return done.stdout + done.stderr


@contextlib.contextmanager
def redis(host: Host) -> Iterator[tuple[str, str]]:
    """A Redis on a host; gives its address and password."""
    password = secrets.token_hex(16)
    command = [*host.enter, "redis-server", "--bind", host.address, "--requirepass", password]
    server = subprocess.Popen([*command, "--save", ""], stdout=subprocess.DEVNULL)
    asked = [*host.enter, "redis-cli", "-h", host.address, "ping"]
    try:
        # It asks for the password, then.
        wait_until(lambda: not subprocess.run(asked, capture_output=True).returncode, "Redis")
        yield f"{host.address}:6379", password
    finally:
        server.terminate()
        server.wait(timeout=PATIENCE_S)


def _status(application: str) -> str | None:
    found = serve.status().applications.get(application)
    return found.status if found else None
