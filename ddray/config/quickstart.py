"""What `ddray quickstart` can be told: its own keys, and those of its parts."""

from collections.abc import Mapping
from typing import ClassVar, Self

from pydantic import Field, model_validator

from ddray.config.base import Job, Location, ModelName, SeedT
from ddray.config.distillation import DistillConfig
from ddray.config.evaluation import EvaluateConfig
from ddray.config.generation import GenerateConfig
from ddray.config.sampling import SampleConfig


class QuickstartConfig(Job):
    """`ddray quickstart`: all of it; `out`, `teacher` and `seed` override those of the parts."""

    EXAMPLE: ClassVar[str] = "ddray quickstart --teacher digits-var --preset tiny"
    HEADINGS: ClassVar[Mapping[str, str]] = {"Data and output": "teacher"}

    teacher: ModelName = Field("digits-llamagen", description="bundled teacher")
    out: Location = Field("runs/quickstart", description="folder of everything that is made")
    seed: SeedT = Field(0, description="of the trajectories and of the training")
    sample: SampleConfig = SampleConfig()
    distill: DistillConfig = DistillConfig()
    generate: GenerateConfig = GenerateConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _can_be_evaluated(self) -> Self:
        if self.sample.count < 2:
            raise ValueError(
                f"sample.count={self.sample.count}: the evaluation needs at least 2 trajectories"
            )
        if self.distill.objective != "distilled":
            raise ValueError(
                f"distill.objective={self.distill.objective}: a quickstart makes a student; train "
                "this one by `ddray distill`"
            )
        return self
