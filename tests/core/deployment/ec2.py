"""EC2's own description of its instance types, as moto keeps it."""

import functools
import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any


@functools.cache
def instance_types() -> dict[str, Any]:
    """What DescribeInstanceTypes would say of each, by its name."""
    folder = Path(str(importlib.util.find_spec("moto").origin)).parent
    path = folder / "ec2" / "resources" / "instance_types.json.gz"
    return json.loads(gzip.decompress(path.read_bytes()))
