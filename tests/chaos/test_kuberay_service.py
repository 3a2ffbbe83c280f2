"""The Serve config of cluster/kuberay/service.yaml, on nodes as KubeRay makes them."""

import pytest
import ray
import yaml
from ray import serve
from ray._private.state import actors
from ray.cluster_utils import Cluster
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from ddray.runtime.cluster.capacity import NODE_POOL_LABEL
from tests.chaos.ray_head import free_port
from tests.core.deployment.kuberay import service
from tests.patience import wait_until

pytestmark = pytest.mark.chaos


@pytest.mark.parametrize("cluster", [0], indirect=True)
def test_fronts_and_students_are_on_two_nodes_and_none_on_the_head(cluster: Cluster) -> None:
    labels = {NODE_POOL_LABEL: "serving"}
    size = {"num_cpus": 4, "object_store_memory": 100 * 2**20}
    workers = [cluster.add_node(**size, labels=labels).node_id for _ in range(2)]
    cluster.wait_for_nodes()
    config = yaml.safe_load(service()["spec"]["serveConfigV2"])
    config["http_options"] |= {"host": "127.0.0.1", "port": free_port()}
    (application,) = config["applications"]
    small = {"student": ["digits-llamagen-dd"], "num_gpus": 0, "api_keys_file": None}
    application["args"] |= small
    try:
        serve.start(http_options=config["http_options"])
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config))
        wait_until(lambda: _status(application["name"]) == "RUNNING", "service")
        places = sorted(
            (actor["ActorClassName"].split(":")[-1], actor["Address"]["NodeID"])
            for actor in actors().values()
            if actor["State"] == "ALIVE" and actor["ActorClassName"].startswith("ServeReplica")
        )
    finally:
        serve.shutdown()
    assert ray.get_runtime_context().get_node_id() not in workers
    assert places == sorted((what, node) for what in ("ingress", "students") for node in workers)


def _status(application: str) -> str | None:
    found = serve.status().applications.get(application)
    return found.status if found else None
