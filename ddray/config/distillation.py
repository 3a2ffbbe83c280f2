"""What `ddray distill` can be told."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ddray.config.base import (
    CountT,
    Job,
    LocalFile,
    Location,
    Locations,
    ModelName,
    NodePool,
    SeedT,
    Texts,
    WaitS,
    Workers,
    check_ordered,
    check_part_of_gpu,
    parse_list,
    parse_off,
)
from ddray.config.metrics import MetricsConfig

JumpStages = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), BeforeValidator(parse_list)
]


def _told(job: Job, key: str) -> str:
    """What a key or one below it says that is not its default, as "key=value"; else nothing."""
    value, default = getattr(job, key), type(job).model_fields[key].default
    if not isinstance(value, Job):
        return "" if value == default else f"{key}={value}"
    inner = (_told(value, name) for name in type(value).model_fields)
    return next((f"{key}.{told}" for told in inner if told), "")


class ScoreConfig(Job):
    """Score distillation: the teacher judges the student's own sequences."""

    weight: Annotated[float, Field(ge=0)] = Field(
        0.0, description="of the teacher's judgement of the student's own sequences; 0 = off"
    )
    start: Annotated[int, Field(ge=0)] = Field(
        60, description="steps in which the imitator alone learns"
    )
    imitator_lr: Annotated[float, Field(gt=0)] = Field(
        1e-3, description="rate of the imitator of the student"
    )


class AdversaryConfig(Job):
    """A discriminator tells the student's latents from the teacher's."""

    weight: Annotated[float, Field(ge=0)] = Field(
        0.0, description="of the discriminator of latents; 0 = off"
    )
    start: Annotated[int, Field(ge=0)] = Field(
        300, description="steps in which the discriminator alone learns"
    )
    lr: Annotated[float, Field(gt=0)] = Field(1e-3, description="rate of the discriminator")
    penalty: Annotated[float, Field(ge=0)] = Field(
        0.1, description="on the slope of the discriminator at real samples (R1)"
    )
    width: CountT = Field(64, description="channels of the discriminator")


class PerceptualConfig(Job):
    """The student's images are to look like the teacher's of the same noise."""

    distance: Annotated[Literal["off", "tokenizer", "lpips"], BeforeValidator(parse_off)] = Field(
        "off", description="of decoded images: tokenizer (its encoder), lpips"
    )
    weight: Annotated[float, Field(gt=0)] = Field(1.0, description="of the distance")
    weights_file: LocalFile | None = Field(
        None, description="of LPIPS: backbone and heads, see docs/distilling.md"
    )

    @model_validator(mode="after")
    def _weights_with_lpips(self) -> Self:
        if (self.distance == "lpips") != (self.weights_file is not None):
            raise ValueError(
                f"perceptual.distance={self.distance} with perceptual.weights_file="
                f"{self.weights_file}: lpips needs the file, the others have none"
            )
        return self


class MaskedConfig(Job):
    """Masked decoding, a baseline: `objective: masked` alone."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of a target that all tokens have alike"
    )
    cond_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="share of rows without their condition, for guidance"
    )


class CheckConfig(MetricsConfig):
    """By what a student in training is judged."""

    reference: Locations = Field(
        (),
        description="real images, as `ddray reference` leaves them in an .npz; absent = the "
        "held-out digits, or the teacher's trajectories",
    )
    metrics: Texts = Field(
        (),
        description="as of `ddray evaluate`; absent = fd_digits,class_accuracy of digits, else "
        "fid,is with a reference, and fd_codes without",
    )


class DistillConfig(Job):
    """`ddray distill`: a student from a set of trajectories."""

    EXAMPLE: ClassVar[str] = "ddray distill --data runs/digits --steps 3300 --schedule 0,20"
    HEADINGS: ClassVar[Mapping[str, str]] = {
        "Data and output": "data",
        "Length and rates": "steps",
        "Workers and memory": "workers",
        "Objective": "objective",
        "Checkpoints": "checkpoint_every",
        "Evaluation": "evaluate_every",
        "Faults": "max_failures",
    }
    MOVED: ClassVar[Mapping[str, str]] = {
        "score_weight": "score.weight",
        "score_start": "score.start",
        "imitator_lr": "score.imitator_lr",
        "adversary_weight": "adversary.weight",
        "adversary_start": "adversary.start",
        "adversary_lr": "adversary.lr",
        "adversary_penalty": "adversary.penalty",
        "adversary_width": "adversary.width",
        "perceptual": "perceptual.distance",
        "perceptual_weight": "perceptual.weight",
        "perceptual_weights_file": "perceptual.weights_file",
    }

    OF_STUDENTS: ClassVar[tuple[str, ...]] = (
        "init",
        "schedule",
        "logits_weight",
        "code_weight",
        "code_precision",
        "score",
        "adversary",
        "perceptual",
        "evaluate_every",
    )

    data: Location = Field("runs/sample/trajectories", description="URI of the trajectory set")
    out: Location = Field(
        "runs/distill", description="URI of the run; the student lies in OUT/student"
    )
    teacher: ModelName | None = Field(None, description="absent = the one named in the set")
    init: ModelName | None = Field(
        None, description="student folder to start from; absent = the teacher"
    )
    follow: bool = Field(False, description="train while the set is still being sampled")
    allow_partial: bool = Field(False, description="train on a set that is not complete")
    fresh: bool = Field(False, description="forget an earlier run at this URI")
    steps: CountT = Field(1000, description="updates of the weights")
    batch_size: CountT = Field(16, description="trajectories a step, over all workers")
    lr: Annotated[float, Field(gt=0)] = Field(4e-3, description="highest rate")
    warmup: Annotated[float, Field(ge=0, le=1)] = Field(0.05, description="share of the steps")
    decay: Annotated[float, Field(gt=0, le=1)] = Field(0.3, description="share, at the end")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="of AdamW")
    grad_clip: Annotated[float, Field(gt=0)] = Field(1.0, description="largest norm of a gradient")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.998, description="of the moving average of the weights, which is the student"
    )
    seed: SeedT = Field(0, description="of the order of the rows and of the jumps")
    workers: Workers = Field(
        (1, 1), description="N, or MIN:MAX: go on with fewer where nodes are lost"
    )
    threads: CountT = Field(2, description="CPU threads of a worker")
    use_gpu: bool = Field(False, description="one GPU a worker")
    node_pool: NodePool = None
    wait_s: WaitS = None
    accumulation: CountT = Field(1, description="micro batches that a worker cuts its part into")
    zero: Annotated[int, Field(ge=0, le=3)] = Field(0, description="DeepSpeed ZeRO stage, 0 to 3")
    offload_optimizer: bool = Field(False, description="ZeRO: optimizer and its weights on the CPU")
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the forward pass; weights stay float32"
    )
    activation_checkpointing: bool = Field(
        False, description="compute blocks again in the backward pass instead of keeping them"
    )
    compile: bool = Field(False, description="blocks by torch's compiler; worth it on GPUs")
    buffer_shards: CountT = Field(1, description="shards whose rows are mixed, in each lane")
    objective: Literal["distilled", "masked"] = Field(
        "distilled", description="distilled: a student; masked: a baseline, masked decoding"
    )
    schedule: JumpStages | None = Field(
        None, description="stages at which the student jumps; absent = 0 and a third or half"
    )
    logits_weight: Annotated[float, Field(ge=0)] = Field(
        1.0, description="of the cross entropy of tokens"
    )
    code_weight: Annotated[float, Field(ge=0)] = Field(
        0.1, description="of the distance of regressed codes"
    )
    code_precision: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="say of the code head in reading tokens; absent = 8, 0 for scales",
    )
    score: ScoreConfig = ScoreConfig()
    adversary: AdversaryConfig = AdversaryConfig()
    perceptual: PerceptualConfig = PerceptualConfig()
    masked: MaskedConfig = MaskedConfig()
    checkpoint_every: CountT = Field(500, description="steps between checkpoints")
    keep_checkpoints: CountT = Field(2, description="how many stay")
    log_every: CountT = Field(20, description="steps between lines of metrics.jsonl")
    evaluate_every: Annotated[int, Field(ge=0)] = Field(
        0, description="steps; a multiple of checkpoint_every; 0 = never"
    )
    evaluate_count: Annotated[int, Field(ge=10)] = Field(2000, description="images of each")
    evaluate_gpus: Annotated[float, Field(ge=0, le=1)] = Field(
        0, description="reserved for evaluations: 1, or a part of one; 0 = on a CPU"
    )
    evaluate: CheckConfig = CheckConfig()
    patience: Annotated[int, Field(ge=0)] = Field(
        0, description="stop after so many evaluations without a better one; 0 = never"
    )
    max_failures: Annotated[int, Field(ge=0)] = Field(2, description="restarts after lost workers")
    max_bad_steps: Annotated[int, Field(ge=0)] = Field(
        10, description="steps in a row that may be skipped for a loss that is not finite"
    )
    step_timeout_s: Annotated[float, Field(ge=5)] = Field(
        100, description="a worker whose step takes longer is restarted; the first may take tenfold"
    )
    stall_timeout_s: CountT = Field(600, description="follow: no shard for so long is an error")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_ordered(self.workers)
        check_part_of_gpu("evaluate_gpus", self.evaluate_gpus)
        for workers in range(self.workers[0], self.workers[1] + 1):
            if self.batch_size % (workers * self.accumulation):
                raise ValueError(
                    f"batch_size={self.batch_size} must be a multiple of workers={workers} times "
                    f"accumulation={self.accumulation}"
                )
        if self.offload_optimizer and not self.zero:
            raise ValueError("offload_optimizer needs zero=1, 2 or 3, not zero=0")
        if self.zero == 3 and self.compile:
            raise ValueError(
                "zero=3 gathers weights as it goes and cannot be combined with compile"
            )
        if self.evaluate_every % self.checkpoint_every:
            raise ValueError(
                f"evaluate_every={self.evaluate_every} must be a multiple of "
                f"checkpoint_every={self.checkpoint_every}: it is checkpoints that are evaluated"
            )
        if self.patience and not self.evaluate_every:
            raise ValueError(f"patience={self.patience} counts evaluations; set evaluate_every")
        if self.follow and self.allow_partial:
            raise ValueError(
                "follow waits for every shard and cannot be combined with allow_partial"
            )
        self._refuse_of_others()
        if self.schedule is None:
            return self
        if list(self.schedule) != sorted(set(self.schedule)):
            raise ValueError(f"schedule={[*self.schedule]} must increase")
        if self.schedule[0] != 0:
            raise ValueError(f"schedule={[*self.schedule]} must begin with 0, the jump from noise")
        return self

    def _refuse_of_others(self) -> None:
        """Refuse keys that are told something and mean nothing to the objective."""
        for key in ("masked",) if self.objective == "distilled" else self.OF_STUDENTS:
            told = _told(self, key)
            if told:
                raise ValueError(f"{told} does not apply to objective={self.objective}")
