"""Machines of EC2, and what EKS leaves of one to pods."""

import functools
import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any


@functools.cache
def instance_types() -> dict[str, Any]:
    """What DescribeInstanceTypes says of each, as moto keeps it, by its name."""
    folder = Path(str(importlib.util.find_spec("moto").origin)).parent
    path = folder / "ec2" / "resources" / "instance_types.json.gz"
    return json.loads(gzip.decompress(path.read_bytes()))


def allocatable(instance_type: str) -> dict[str, float]:
    """What EKS leaves to pods of a machine: CPUs, bytes of memory, GPUs, network cards as EFA.

    Kept are kube-reserved as EKS's nodeadm computes it, the eviction threshold, and of memory what
    hypervisor and kernel take, for which Karpenter counts 7.5 %.
    """
    machine = instance_types()[instance_type]
    cpus = machine["VCpuInfo"]["DefaultVCpus"]
    shares = [0.06, 0.01, 0.005, 0.005] + [0.0025] * (cpus - 4)
    network = machine["NetworkInfo"]
    card = network["NetworkCards"][network["DefaultNetworkCardIndex"]]
    most_pods = card["MaximumNetworkInterfaces"] * (network["Ipv4AddressesPerInterface"] - 1) + 2
    seen_mib = machine["MemoryInfo"]["SizeInMiB"] * (1 - 0.075)
    return {
        "cpu": cpus - sum(shares[:cpus]),
        "memory": (seen_mib - (255 + 11 * most_pods) - 100) * 2**20,
        "nvidia.com/gpu": sum(gpu["Count"] for gpu in machine.get("GpuInfo", {}).get("Gpus", [])),
        "vpc.amazonaws.com/efa": network.get("EfaInfo", {}).get("MaximumEfaInterfaces", 0),
    }
