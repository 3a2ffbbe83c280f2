"""What `ddray doctor` can be told."""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from ddray.config.base import Job, Locations, ModelNames, NodePool, WaitS


class DoctorConfig(Job):
    """`ddray doctor`: whether this machine and every node of the cluster can do the work."""

    EXAMPLE: ClassVar[str] = "ddray doctor --model digits-var --uri s3://YOUR+BUCKET/runs"
    HEADINGS: ClassVar[Mapping[str, str]] = {"What to look at": "model"}

    model: ModelNames = Field(
        ("digits-llamagen",), description="names or folders that every node must read; with commas"
    )
    uri: Locations = Field(
        (), description="locations that every node must read and write; with commas"
    )
    node_pool: NodePool = None
    wait_s: WaitS = None
