"""What `ddray sample` can be told."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ddray.config.base import AutoCount, CountT, GpuGigabytes, Location, ModelName, SetConfig


class SampleConfig(SetConfig):
    """`ddray sample`: a teacher's trajectories into a set of shards."""

    EXAMPLE: ClassVar[str] = "ddray sample --count 10000 --out runs/digits --workers 1:2"
    HEADINGS: ClassVar[Mapping[str, str]] = {
        "Data and output": "teacher",
        "Classes or captions": "classes",
        "Sampling": "cfg",
        "Shards and batches": "shard_rows",
        "Workers and memory": "workers",
        "Faults": "max_retries",
    }

    teacher: ModelName = Field("digits-llamagen", description="bundled name or model folder")
    out: Location = Field("runs/sample/trajectories", description="URI of the set")
    count: CountT = Field(2000, description="number of trajectories")
    cfg: float | None = Field(None, description="guidance; absent = the teacher's default_cfg")
    top_k: Annotated[int, Field(ge=0)] = Field(0, description="codes kept; 0 = off")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="mass kept; 1 = off; absent = the teacher's default_top_p, or 1"
    )
    temperature: Annotated[float, Field(ge=0)] = Field(1.0, description="divides the logits")
    solver: Literal["ab4", "ab2", "euler", "rk4", "exact"] = Field(
        "ab4", description="of the transport"
    )
    num_evals: CountT | None = Field(None, description="absent = the default for this codebook")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the teacher"
    )
    shard_rows: CountT = Field(500, description="rows of a shard: what a crash can cost")
    batch_size: AutoCount = Field(
        "auto",
        description="images sampled together; part of the plan; auto = 100 on CPUs, on GPUs what "
        "fits, and of a set that is there its own",
    )
    gpu_gb: GpuGigabytes = 24
