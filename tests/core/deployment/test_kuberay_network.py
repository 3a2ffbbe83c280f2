"""Who may connect to whom by the network policies, and which pods a drain must leave alone."""

import functools

from tests.core.deployment.kuberay import Document, build, cluster, groups, of_kind, service


def ray_pods(document: Document, spec: Document) -> list[Document]:
    """Labels and ports of a cluster's pods: ours, the group's and KubeRay's own."""
    name = document["metadata"]["name"] + ("-x7k2p" if document["kind"] == "RayService" else "")
    pods = []
    for group in groups(spec):
        head = "groupName" not in group
        labels = {
            **group["template"]["metadata"]["labels"],
            **group.get("labels", {}),
            "ray.io/cluster": name,
            "ray.io/node-type": "head" if head else "worker",
            "ray.io/group": group.get("groupName", "headgroup"),
        }
        ports = {
            p["name"]: p["containerPort"]
            for p in group["template"]["spec"]["containers"][0]["ports"]
        }
        pods.append({"labels": labels, "ports": ports})
    return pods


@functools.cache
def pods() -> dict[str, Document]:
    """One pod of each sort, of what base and the service bring."""
    found = {}
    for document, spec in (
        (cluster("base"), cluster("base")["spec"]),
        (service(), service()["spec"]["rayClusterConfig"]),
    ):
        for pod in ray_pods(document, spec):
            found[f"{document['metadata']['name']}/{pod['labels']['ray.io/group']}"] = pod
    (redis,) = of_kind(build("base"), "Deployment")
    found["redis"] = {
        "labels": redis["spec"]["template"]["metadata"]["labels"],
        "ports": {"redis": 6379},
    }
    found["submitter"] = {"labels": {"batch.kubernetes.io/job-name": "ddray-sample"}, "ports": {}}
    found["stranger"] = {"labels": {"app": "notebook"}, "ports": {}}
    return found


def selects(selector: Document, labels: Document) -> bool:
    for rule in selector.get("matchExpressions", []):
        value = labels.get(rule["key"])
        if value is None or (rule["operator"] == "In" and value not in rule["values"]):
            return False
        assert rule["operator"] in ("In", "Exists")
    return selector.get("matchLabels", {}).items() <= labels.items()


@functools.cache
def policies_of(name: str) -> list[Document]:
    return [policy["spec"] for policy in of_kind(build(name), "NetworkPolicy")]


def may_connect(peer: Document, target: Document, port: int) -> bool:
    """Whether the policies let a pod of this namespace, or a namespace with labels, in."""
    policies = [p for p in policies_of("base") if selects(p["podSelector"], target["labels"])]
    if not policies:
        return True
    for policy in policies:
        for rule in policy["ingress"]:
            if "ports" in rule and port not in {entry["port"] for entry in rule["ports"]}:
                continue
            for source in rule["from"]:
                ((where, selector),) = source.items()
                if (where == "namespaceSelector") == peer.get("namespace", False) and selects(
                    selector, peer["labels"]
                ):
                    return True
    return False


def namespace(key: str, value: str) -> Document:
    return {"namespace": True, "labels": {key: value}}


def test_policies_budgets_and_monitors_select_pods_that_there_are() -> None:
    documents = build("base") + build(".")
    selectors = {
        (one["kind"], one["metadata"]["name"]): one["spec"].get("podSelector")
        or one["spec"]["selector"]
        for kind in ("NetworkPolicy", "PodDisruptionBudget", "PodMonitor")
        for one in of_kind(documents, kind)
    }
    assert len(selectors) == 9
    for name, selector in selectors.items():
        selected = [sort for sort, pod in pods().items() if selects(selector, pod["labels"])]
        assert selected, name
        if name[0] == "PodMonitor":
            assert len(selected) >= 2
            assert all(pods()[sort]["ports"]["metrics"] == 8080 for sort in selected)
    (redis,) = of_kind(documents, "Service")
    assert selects({"matchLabels": redis["spec"]["selector"]}, pods()["redis"]["labels"])
    # Every peer of a policy is somebody, too.
    for policy in of_kind(documents, "NetworkPolicy"):
        for source in [s for rule in policy["spec"]["ingress"] for s in rule["from"]]:
            if "podSelector" in source:
                assert any(selects(source["podSelector"], p["labels"]) for p in pods().values())


def test_nobody_connects_but_who_must() -> None:
    every = pods()
    ray = {name: pod for name, pod in every.items() if "/" in name}
    heads = [name for name in ray if name.endswith("/headgroup")]
    operator = namespace("kubernetes.io/metadata.name", "kuberay-system")
    ingress = namespace("ddray.io/ingress", "true")
    monitoring = namespace("kubernetes.io/metadata.name", "monitoring")
    other = namespace("kubernetes.io/metadata.name", "default")
    for name, pod in ray.items():
        own = name.split("/")[0]
        for peer_name, peer in ray.items():
            assert may_connect(peer, pod, 12345) == (peer_name.split("/")[0] == own)
        for port in (6379, 8265, 10001, 8000, 8080, 12345):
            for peer in (every["stranger"], other):
                assert not may_connect(peer, pod, port)
            assert may_connect(every["submitter"], pod, port) == (name in heads and port == 8265)
            dashboard = name in heads and port == 8265
            assert may_connect(operator, pod, port) == (dashboard or port == 8000)
            assert may_connect(ingress, pod, port) == (port == 8000)
            assert may_connect(monitoring, pod, port) == (port == 8080)
    for name, peer in every.items():
        assert may_connect(peer, every["redis"], 6379) == (name in heads)


def test_budgets_keep_the_service_and_let_every_drain_through() -> None:
    least = {
        f"{name}/{group.get('groupName', 'headgroup')}": group.get("minReplicas", 1)
        for name, ray in (
            ("ddray", cluster("base")["spec"]),
            ("ddray-serving", service()["spec"]["rayClusterConfig"]),
        )
        for group in groups(ray)
    }
    covered = []
    for budget in of_kind(build("base"), "PodDisruptionBudget"):
        # Pods without a controller that Kubernetes knows have no percentages and no maxUnavailable.
        keep = budget["spec"]["minAvailable"]
        selector = budget["spec"]["selector"]
        for sort, pod in pods().items():
            if selects(selector, pod["labels"]):
                covered.append(sort)
                assert 1 <= keep < least[sort], "a node that is drained would wait for ever"
    assert covered == ["ddray-serving/serving"]
