"""What `ddray evaluate` can be told."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Self

from pydantic import BeforeValidator, Field, model_validator

from ddray.config.base import (
    CountT,
    Job,
    Location,
    ModelName,
    NetworkDtype,
    NodePool,
    SeedT,
    WaitS,
    check_gpus,
    parse_list,
)


class EvaluateConfig(Job):
    """`ddray evaluate`: a student beside its teacher."""

    EXAMPLE: ClassVar[str] = "ddray evaluate --student digits-var-dd --count 1000"
    HEADINGS: ClassVar[Mapping[str, str]] = {
        "Data and output": "student",
        "Images": "count",
        "Speed and transport": "speed_batches",
        "Workers and memory": "threads",
    }

    student: ModelName = Field("digits-llamagen-dd", description="bundled name or student folder")
    teacher: ModelName | None = Field(
        None, description="absent = the one named in the student's config"
    )
    data: Location | None = Field(None, description="trajectory set, for its rows of the table")
    out: Location = Field("runs/evaluate", description="URI of the report")
    count: Annotated[int, Field(ge=2)] = Field(5000, description="images of every generator")
    seed: SeedT = Field(1_000_003, description="of the noise; no set should have it")
    cfg: float | None = Field(None, description="guidance; absent = the teacher's default_cfg")
    batch_size: CountT = Field(200, description="images made together")
    speed_batches: Annotated[tuple[CountT, ...], BeforeValidator(parse_list)] = Field(
        (1, 8, 64), description="sizes of batches that are timed"
    )
    speed_seconds: Annotated[float, Field(gt=0)] = Field(1.0, description="timed for each figure")
    transport_count: CountT = Field(400, description="images of the transport's comparison")
    threads: CountT | None = Field(
        None, description="on a cluster; absent = 1, elsewhere all cores"
    )
    num_gpus: Annotated[float, Field(ge=0)] = Field(0, description="1 = on a GPU; 0 = on CPUs")
    dtype: NetworkDtype = "auto"
    node_pool: NodePool = None
    wait_s: WaitS = None

    @model_validator(mode="after")
    def _on_one_gpu(self) -> Self:
        check_gpus(self.num_gpus)
        return self
