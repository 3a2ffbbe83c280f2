"""Job configurations: what each verb can be told, checked before anything starts.

A preset is overlaid by a YAML file, and that by `--set key.path=value` and the verb's flags.
Unknown keys are refused with the nearest known one. Imports ddray.errors; no torch, no ray.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ddray.errors import ConfigError, one_line

CountT = Annotated[int, Field(gt=0)]
SeedT = Annotated[int, Field(ge=0, lt=2**63)]


def _parse_workers(value: Any) -> Any:
    """A pair from "MIN:MAX", "N" or N."""
    if isinstance(value, str):
        value = value.split(":")
    if isinstance(value, int):
        value = (value, value)
    if isinstance(value, Sequence) and len(value) == 1:
        value = (value[0], value[0])
    return value


def _parse_list(value: Any) -> Any:
    """A list from "0,16", or from a single number."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    return value.split(",") if isinstance(value, str) else value


def _parse_off(value: Any) -> Any:
    """The word `off`, which YAML reads as a truth value."""
    return "off" if value is False else value


def _ordered_workers(workers: tuple[int, int]) -> None:
    if workers[0] > workers[1]:
        raise ValueError(f"workers {workers[0]}:{workers[1]} must be MIN:MAX")


Workers = Annotated[tuple[CountT, CountT], BeforeValidator(_parse_workers)]
Replicas = Annotated[tuple[Annotated[int, Field(ge=0)], CountT], BeforeValidator(_parse_workers)]
JumpStages = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), BeforeValidator(_parse_list)
]
Classes = Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_parse_list)]

Texts = Annotated[tuple[str, ...], BeforeValidator(_parse_list)]
Names = Annotated[Texts, Field(min_length=1)]

NodePool = Annotated[
    str | None, Field(description="label ddray.io/node-pool of the nodes to work on; absent = any")
]
WaitS = Annotated[
    Annotated[float, Field(ge=0)] | None,
    Field(
        description="for nodes that are not there yet; absent = 1800 where the cluster grows by "
        "itself, else 0"
    ),
]

_WEEK_S = 7 * 24 * 3600
# Images of one request to the service, which must be admitted whole.
MAX_IMAGES = 16


class Job(BaseModel):
    """Base of all job configurations: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PoolConfig(Job):
    """A pool of actors that each hold a model and write shards."""

    workers: Workers = Field((1, 2), description="actors, MIN:MAX")
    threads: CountT = Field(1, description="CPU threads of an actor; part of the plan")
    num_gpus: Annotated[float, Field(ge=0)] = Field(0, description="GPUs of an actor")
    max_retries: Annotated[int, Field(ge=0)] = Field(3, description="of a shard, after a crash")
    stall_timeout_s: CountT = Field(600, description="no shard for so long is an error")
    node_pool: NodePool = None
    wait_s: WaitS = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _ordered_workers(self.workers)
        if self.num_gpus > 1 and self.num_gpus % 1:
            raise ValueError(f"num_gpus={self.num_gpus:g} must be a part of one GPU, or whole ones")
        return self


class SampleConfig(PoolConfig):
    """`ddray sample`: a teacher's trajectories into a set of shards."""

    teacher: str = Field("digits-llamagen", description="bundled name or model folder")
    out: str = Field("runs/sample/trajectories", description="URI of the set")
    count: CountT = Field(2000, description="number of trajectories")
    classes: Classes = Field((), description="in turn, such as 1,5,7 or 0,0,1; absent = all")
    captions: str | None = Field(
        None, description="URI of a .parquet or .jsonl with index, caption and perhaps features"
    )
    text_encoder: str | None = Field(
        None, description="T5 for captions without features; absent = google/flan-t5-xl"
    )
    seed: SeedT = 0
    cfg: float | None = Field(None, description="guidance; absent = the teacher's default_cfg")
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    temperature: Annotated[float, Field(ge=0)] = 1.0
    solver: Literal["ab4", "ab2", "euler", "rk4", "exact"] = "ab4"
    num_evals: CountT | None = Field(None, description="absent = the default for this codebook")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    shard_rows: CountT = Field(500, description="rows of a shard: what a crash can cost")
    batch_size: CountT = Field(100, description="images sampled together; part of the plan")


class DistillConfig(Job):
    """`ddray distill`: a student from a set of trajectories."""

    data: str = Field("runs/sample/trajectories", description="URI of the trajectory set")
    out: str = Field("runs/distill", description="URI of the run; the student lies in OUT/student")
    teacher: str | None = Field(None, description="absent = the one named in the set")
    steps: CountT = 1000
    batch_size: CountT = Field(16, description="trajectories a step, over all workers")
    accumulation: CountT = Field(1, description="micro batches that a worker cuts its part into")
    workers: Workers = Field(
        (1, 1), description="N, or MIN:MAX: go on with fewer where nodes are lost"
    )
    threads: CountT = Field(2, description="CPU threads of a worker")
    use_gpu: bool = False
    node_pool: NodePool = None
    wait_s: WaitS = None
    zero: Annotated[int, Field(ge=0, le=3)] = Field(0, description="DeepSpeed ZeRO stage")
    offload_optimizer: bool = Field(False, description="ZeRO: optimizer and its weights on the CPU")
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the forward pass; weights stay float32"
    )
    activation_checkpointing: bool = Field(
        False, description="compute blocks again in the backward pass instead of keeping them"
    )
    compile: bool = Field(False, description="torch.compile; worth it on GPUs")
    schedule: JumpStages | None = Field(
        None, description="stages at which the student jumps; absent = 0 and a third or half"
    )
    lr: Annotated[float, Field(gt=0)] = 4e-3
    warmup: Annotated[float, Field(ge=0, le=1)] = Field(0.05, description="share of the steps")
    decay: Annotated[float, Field(gt=0, le=1)] = Field(0.3, description="share, at the end")
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.998
    logits_weight: Annotated[float, Field(ge=0)] = 1.0
    code_weight: Annotated[float, Field(ge=0)] = 0.1
    code_precision: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="say of the code head in reading tokens; absent = 8, 0 for scales",
    )
    init: str | None = Field(None, description="student folder to start from; absent = the teacher")
    score_weight: Annotated[float, Field(ge=0)] = Field(
        0.0, description="of the teacher's judgement of the student's own sequences; 0 = off"
    )
    score_start: Annotated[int, Field(ge=0)] = Field(
        60, description="steps in which the imitator alone learns"
    )
    imitator_lr: Annotated[float, Field(gt=0)] = 1e-3
    adversary_weight: Annotated[float, Field(ge=0)] = Field(
        0.0, description="of the discriminator of latents; 0 = off"
    )
    adversary_start: Annotated[int, Field(ge=0)] = Field(
        300, description="steps in which the discriminator alone learns"
    )
    adversary_lr: Annotated[float, Field(gt=0)] = 1e-3
    adversary_penalty: Annotated[float, Field(ge=0)] = Field(
        0.1, description="on the slope of the discriminator at real samples (R1)"
    )
    adversary_width: CountT = Field(64, description="channels of the discriminator")
    perceptual: Annotated[Literal["off", "tokenizer", "lpips"], BeforeValidator(_parse_off)] = (
        Field("off", description="distance of decoded images: tokenizer (its encoder), lpips")
    )
    perceptual_weight: Annotated[float, Field(gt=0)] = 1.0
    perceptual_weights_file: str | None = Field(
        None, description="of LPIPS: backbone and heads, see docs/distilling.md"
    )
    seed: SeedT = 0
    checkpoint_every: CountT = 500
    keep_checkpoints: CountT = 2
    log_every: CountT = 20
    evaluate_every: Annotated[int, Field(ge=0)] = Field(
        0, description="steps; a multiple of checkpoint_every; 0 = never"
    )
    evaluate_count: Annotated[int, Field(ge=10)] = Field(2000, description="images of each")
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
    buffer_shards: CountT = Field(1, description="shards whose rows are mixed, in each lane")
    follow: bool = Field(False, description="train while the set is still being sampled")
    stall_timeout_s: CountT = Field(600, description="follow: no shard for so long is an error")
    fresh: bool = Field(False, description="forget an earlier run at this URI")
    allow_partial: bool = Field(False, description="train on a set that is not complete")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _ordered_workers(self.workers)
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
        if (self.perceptual == "lpips") != (self.perceptual_weights_file is not None):
            raise ValueError(
                f"perceptual={self.perceptual} with perceptual_weights_file="
                f"{self.perceptual_weights_file}: lpips needs the file, the others have none"
            )
        if self.schedule is None:
            return self
        if list(self.schedule) != sorted(set(self.schedule)):
            raise ValueError(f"schedule={[*self.schedule]} must increase")
        if self.schedule[0] != 0:
            raise ValueError(f"schedule={[*self.schedule]} must begin with 0, the jump from noise")
        return self


class GenerateConfig(PoolConfig):
    """`ddray generate`: images in bulk from a student."""

    student: str = Field("digits-llamagen-dd", description="bundled name or student folder")
    out: str = Field("runs/generate", description="URI of the image set")
    count: CountT = 1000
    classes: Classes = Field((), description="in turn, such as 1,5,7 or 0,0,1; absent = all")
    captions: str | None = Field(
        None, description="URI of a .parquet or .jsonl with index, caption and perhaps features"
    )
    text_encoder: str | None = Field(
        None, description="T5 for captions without features; absent = google/flan-t5-xl"
    )
    seed: SeedT = 0
    schedule: str | None = Field(None, description='such as "0" or "0,16"; absent = one jump')
    format: Literal["parquet", "webdataset", "images"] = "parquet"
    content: Literal["images", "tokens"] = Field("images", description="tokens: in Parquet alone")
    image_format: Literal["png", "webp"] = Field("png", description="of the images")
    quality: Annotated[int, Field(ge=1, le=100)] | None = Field(
        None, description="of WebP with loss; absent = without loss"
    )
    statistics: bool = Field(False, description="features' mean and covariance, for FID and kin")
    engine: Literal["serve", "data"] = Field(
        "data", description="a Ray Data pool of students, or replicas of Ray Serve"
    )
    encoders: CountT = Field(1, description="threads of a worker that compress images")
    shard_rows: CountT = 500
    batch_size: CountT = 64

    @model_validator(mode="after")
    def _writable(self) -> Self:
        if self.content == "tokens":
            if self.format != "parquet":
                raise ValueError(f"content=tokens is written as parquet, not as {self.format}")
            if self.image_format != "png" or self.statistics:
                raise ValueError("content=tokens has no images: no image_format, no statistics")
        if self.quality is not None and self.image_format != "webp":
            raise ValueError(
                f"quality={self.quality} is of image_format=webp; {self.image_format} has no loss"
            )
        return self


class EvaluateConfig(Job):
    """`ddray evaluate`: a student beside its teacher."""

    student: str = "digits-llamagen-dd"
    teacher: str | None = Field(None, description="absent = the one named in the student's config")
    data: str | None = Field(None, description="trajectory set, for its rows of the table")
    out: str = "runs/evaluate"
    count: CountT = Field(5000, description="images of every generator")
    seed: SeedT = 1_000_003
    cfg: float | None = Field(None, description="guidance; absent = the teacher's default_cfg")
    batch_size: CountT = 200
    threads: CountT | None = Field(
        None, description="on a cluster; absent = 1, elsewhere all cores"
    )
    node_pool: NodePool = None
    wait_s: WaitS = None
    speed_batches: Annotated[tuple[CountT, ...], BeforeValidator(_parse_list)] = (1, 8, 64)
    speed_seconds: Annotated[float, Field(gt=0)] = Field(1.0, description="timed for each figure")
    transport_count: CountT = Field(400, description="images of the transport's comparison")


class ServeConfig(Job):
    """`ddray serve`: students behind HTTP."""

    student: Names = Field(
        ("digits-llamagen-dd",), description="bundled name or folder; several with commas"
    )
    teacher: bool | None = Field(
        None, description="load the teachers too, to compare; absent = of bundled students"
    )
    text_encoder: str | None = Field(
        None, description="T5 for students that take captions; absent = google/flan-t5-xl"
    )
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = Field(
        None, description="for Prometheus, of a Ray that this command starts"
    )
    replicas: Replicas = Field(
        (1, 1), description="N, or MIN:MAX to grow with the load; 0:N sleeps"
    )
    ingress_replicas: CountT = Field(1, description="processes that take requests")
    threads: CountT = Field(1, description="CPU threads of a replica")
    num_gpus: Annotated[float, Field(ge=0)] = Field(0, description="GPUs of a replica")
    node_pool: NodePool = None
    wait_s: WaitS = None
    models_per_replica: CountT = Field(4, description="students in memory; the rest on demand")
    max_batch_size: CountT = Field(64, description="images of a batch")
    batch_wait_s: Annotated[float, Field(ge=0)] = Field(
        0.0, description="how long an idle replica waits for a fuller batch"
    )
    rows: CountT | None = Field(None, description="of a forward pass; absent = 8, on a GPU 16")
    max_ongoing_requests: CountT | None = Field(
        None, description="of a replica; absent = two batches of single images"
    )
    max_images: CountT | None = Field(
        None, description="admitted at a time; absent = eight batches a replica"
    )
    target_ongoing_requests: Annotated[float, Field(gt=0)] | None = Field(
        None, description="of a replica, above which there will be more; absent = a quarter batch"
    )
    upscale_delay_s: Annotated[float, Field(ge=0)] = 5.0
    downscale_delay_s: Annotated[float, Field(ge=0)] = 120.0
    request_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    api_keys_file: str | None = Field(
        None, description="one key a line; absent = DDRAY_API_KEYS, or no keys"
    )
    cors_origins: Texts = Field((), description="of pages elsewhere that may call; with commas")
    images_uri: str | None = Field(None, description="s3:// prefix for response_format=url")
    url_expires_s: CountT = Field(3600, description="for how long a link is good; at most a week")
    access_log: bool = Field(True, description="one JSON line a request, in Serve's log")

    @property
    def ongoing_limit(self) -> int:
        """Requests that a replica takes at a time: one batch while another is under way."""
        return self.max_ongoing_requests or 2 * self.max_batch_size

    @property
    def admission_limit(self) -> int:
        """Images that are admitted at a time, by all ingress replicas together."""
        whole = MAX_IMAGES * self.ingress_replicas
        return self.max_images or max(8 * self.max_batch_size * self.replicas[1], whole)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.replicas[0] > self.replicas[1] or self.replicas[1] < 1:
            raise ValueError(f"replicas={self.replicas[0]}:{self.replicas[1]} must be MIN:MAX")
        if self.ongoing_limit < self.max_batch_size:
            raise ValueError(
                f"max_ongoing_requests={self.ongoing_limit} is below max_batch_size="
                f"{self.max_batch_size}: batches would never fill"
            )
        if self.admission_limit < max(self.max_batch_size, MAX_IMAGES * self.ingress_replicas):
            raise ValueError(
                f"max_images={self.max_images} is below max_batch_size={self.max_batch_size} or "
                f"the {MAX_IMAGES} images of one request to each of {self.ingress_replicas} "
                "ingress_replicas"
            )
        if self.images_uri is not None and not self.images_uri.startswith("s3://"):
            raise ValueError(f"images_uri={self.images_uri!r} must be s3://: links are made by S3")
        if self.url_expires_s > _WEEK_S:
            raise ValueError(f"url_expires_s={self.url_expires_s} is more than a week, {_WEEK_S}")
        return self


class DoctorConfig(Job):
    """`ddray doctor`: whether this machine and every node of the cluster can do the work."""

    model: Texts = Field(
        ("digits-llamagen",), description="names or folders that every node must read; with commas"
    )
    uri: Texts = Field((), description="locations that every node must read and write; with commas")
    node_pool: NodePool = None
    wait_s: WaitS = None


class QuickstartConfig(Job):
    """`ddray quickstart`: all of it; `out`, `teacher` and `seed` override those of the parts."""

    teacher: str = "digits-llamagen"
    out: str = "runs/quickstart"
    seed: SeedT = 0
    sample: SampleConfig = SampleConfig()
    distill: DistillConfig = DistillConfig()
    generate: GenerateConfig = GenerateConfig()
    evaluate: EvaluateConfig = EvaluateConfig()


JobT = TypeVar("JobT", bound=Job)


def load_config(
    kind: type[JobT],
    *,
    preset: Mapping[str, Any] | None = None,
    file: str | Path | None = None,
    settings: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> JobT:
    """Merge preset < file < `--set` < flags and check the result.

    Args:
        kind: the verb's config class.
        preset: values of a named preset.
        file: YAML file.
        settings: "key.path=value" strings; values are read as YAML.
        flags: values of the verb's own flags.

    Returns:
        The resolved config.

    Raises:
        ConfigError: one line that names the key, the value and what is allowed.
    """
    merged: dict[str, Any] = {}
    _overlay(merged, preset or {})
    if file is not None:
        _overlay(merged, _read_yaml(file))
    for setting in settings:
        _overlay(merged, _read_setting(setting))
    _overlay(merged, flags or {})
    try:
        return kind.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_first_problem(error, kind)) from None


class _Yaml(yaml.SafeLoader):
    """YAML without base-60 numbers: in YAML 1.1, 1:2 would be the integer 62."""


_Yaml.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if not tag.endswith((":int", ":float"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?\d+$"), [*"-+0123456789"])
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.\d*|\.?\d+)([eE][-+]?\d+)?$"),
    [*"-+.0123456789"],
)


def _overlay(target: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(target.get(key), dict):
            _overlay(target[key], value)
        elif isinstance(value, Mapping):
            target[key] = {}
            _overlay(target[key], value)
        else:
            target[key] = value


def _read_yaml(file: str | Path) -> dict[str, Any]:
    try:
        values = yaml.load(Path(file).read_text(), _Yaml)
    except OSError as error:
        raise ConfigError(f"--config {file}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file} is not YAML: {one_line(error)}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"--config {file} must hold keys and values, not {type(values).__name__}")
    return values


def _read_setting(setting: str) -> dict[str, Any]:
    path, equals, text = setting.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {setting!r} is not of the form key.path=value")
    try:
        value: Any = yaml.load(text, _Yaml)
    except yaml.YAMLError:
        value = text
    for key in reversed(keys):
        value = {key: value}
    return dict(value)


def _first_problem(error: ValidationError, kind: type[Job]) -> str:
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"]]
    where = ".".join(location)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(kind, location[:-1])
        near = difflib.get_close_matches(location[-1], known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        return f"unknown key {where!r}; {hint}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "value_error" and not where:
        return message
    return f"{where}={problem['input']!r}: {message[0].lower()}{message[1:]}"


def _known_keys(kind: type[BaseModel], path: Sequence[str]) -> list[str]:
    for part in path:
        inner = kind.model_fields[part].annotation if part in kind.model_fields else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        kind = inner
    return sorted(kind.model_fields)
