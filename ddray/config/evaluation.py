"""What `ddray evaluate` can be told."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from ddray.config.base import (
    AutoCount,
    Classes,
    Clean,
    CountT,
    EncoderName,
    GpuGigabytes,
    Labels,
    Location,
    ModelName,
    NetworkDtype,
    PoolConfig,
    SeedT,
    SkipBadCaptions,
    Texts,
    Workers,
    decoder_dtype,
    parse_list,
)
from ddray.config.metrics import MetricsConfig

ROWS = ("reconstruction", "teacher", "transport", "student", "skip", "independent", "masked")
SWEPT: Mapping[str, Callable[[Any], Any]] = {
    "cfg": float,
    "top_k": int,
    "top_p": float,
    "temperature": float,
    "schedule": str,
}
_IMAGES = 5000


def _parse_off(value: Any) -> Any:
    """No sizes from `off`, which YAML reads as a truth value."""
    return () if value in ("off", False) else parse_list(value)


def _parse_schedules(value: Any) -> Any:
    """Schedules, which hold commas, from "0/0,80"."""
    return value.split("/") if isinstance(value, str) else value


def _parse_sweep(value: Any) -> Any:
    """Values by key from "cfg=1.0,1.5 top_k=0,900"."""
    if not isinstance(value, str):
        return value
    found = {}
    for part in value.split():
        key, equals, values = part.partition("=")
        if not equals or not values:
            raise ValueError(f'{part!r} must be KEY=VALUE,VALUE, as in "cfg=1.0,1.5 top_k=0,900"')
        # Schedules hold commas themselves.
        found[key] = values.split("/" if key == "schedule" else ",")
    return found


class EvaluateConfig(MetricsConfig, PoolConfig):
    """`ddray evaluate`: how good images are, of a student beside its teacher or of anyone."""

    EXAMPLE: ClassVar[str] = "ddray evaluate --student digits-var-dd --count 1000"
    HEADINGS: ClassVar[Mapping[str, str]] = {
        "Whose images": "student",
        "Real images and metrics": "reference",
        "Rows of the table": "rows",
        "Images": "count",
        "Files of images": "column",
        "Speed and transport": "speed_batches",
        "Shards and batches": "keep_features",
        "Workers": "workers",
        "Faults": "max_retries",
    }

    student: ModelName = Field("digits-llamagen-dd", description="bundled name or student folder")
    teacher: ModelName | None = Field(
        None, description="absent = the one named in the student's config"
    )
    masked: ModelName | None = Field(None, description="masked-decoding model, for its rows")
    data: Location | None = Field(None, description="trajectory set, for its rows of the table")
    samples: Location | None = Field(
        None,
        description="images of anyone in place of models: a folder, WebDataset tars, Parquet, an "
        ".npz with arr_0, or a set of ddray's",
    )
    out: Location = Field("runs/evaluate", description="URI of the report")

    rows: Texts = Field(
        (),
        description=f"of {', '.join(ROWS)}; absent = all that apply, of skip and masked if they "
        "are given",
    )
    schedules: Annotated[tuple[str, ...], BeforeValidator(_parse_schedules)] = Field(
        (),
        description='of the student, apart by "/", as in 0/0,80/0,teacher:60-80,80; absent = '
        "those it was trained for",
    )
    skip: Annotated[tuple[Annotated[int, Field(ge=2)], ...], BeforeValidator(parse_list)] = Field(
        (), description="last steps that the teacher makes in one, such as 2,3"
    )
    masked_steps: Annotated[tuple[CountT, ...], BeforeValidator(parse_list)] = Field(
        (1, 2, 4, 8), description="of the masked model"
    )
    sweep: Annotated[Mapping[str, tuple[Any, ...]], BeforeValidator(_parse_sweep)] = Field(
        {}, description='rows for each value, as in "cfg=1.0,1.5 top_k=0,900 schedule=0/0,80"'
    )
    cfg: float | None = Field(None, description="guidance; absent = the teacher's default_cfg")
    top_k: Annotated[int, Field(ge=0)] = Field(0, description="of the teacher; 0 = off")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="likewise; 1 = off; absent = the teacher's default_top_p, or 1"
    )
    temperature: Annotated[float, Field(gt=0)] = Field(1.0, description="likewise")
    dtype: NetworkDtype = "auto"

    count: Annotated[int, Field(ge=2)] | None = Field(
        None, description=f"images of every row; absent = {_IMAGES}, and all of samples"
    )
    seed: SeedT = Field(1_000_003, description="of noise and draws; no set should have it")
    labels: Labels = "balanced"
    classes: Classes = Field((), description="that images are asked for by; absent = all")
    captions: Location | None = Field(None, description="captions of a text model's images")
    caption_column: str | None = Field(None, description="as in ddray sample")
    skip_bad_captions: SkipBadCaptions = False
    clean: Clean = "off"
    text_encoder: EncoderName | None = Field(
        None, description="of captions without features; absent = the model's own"
    )

    column: str | None = Field(None, description="of images in Parquet; absent = the only one")
    size: CountT | None = Field(
        None, description="crop and resize files to so many pixels, as ADM does; absent = as is"
    )
    convert: bool = Field(False, description="take transparent, CMYK and 16-bit files, as RGB")
    skip_broken: bool = Field(False, description="leave out files that cannot be read")

    speed_batches: Annotated[tuple[CountT, ...], BeforeValidator(_parse_off)] = Field(
        (1, 8, 64), description="sizes of batches that are timed; off = no times"
    )
    speed_seconds: Annotated[float, Field(gt=0)] = Field(1.0, description="timed for each figure")
    transport_count: Annotated[int, Field(ge=0)] = Field(
        400, description="images of the transport's comparison; 0 = none"
    )

    keep_features: bool = Field(
        True,
        description="after the report, for further rows, images and metrics of the same layers; "
        "with Inception up to 20 kB an image and row",
    )
    shard_rows: CountT = Field(500, description="images of a shard: what a crash can cost")
    batch_size: AutoCount = Field(
        "auto", description="images made together; auto = 100 on CPUs, on GPUs what fits"
    )
    gpu_gb: GpuGigabytes = 24

    workers: Workers = Field((1, 1), description="actors, MIN:MAX; one needs no Ray")
    threads: CountT | None = Field(  # type: ignore[assignment]
        None,
        description="of a worker's CPU; part of what decides the last bits; absent = 1 on a "
        "cluster or of several workers, else all cores",
    )

    @property
    def num_images(self) -> int:
        """Of every row of a model."""
        return self.count or _IMAGES

    @property
    def student_schedules(self) -> tuple[str, ...]:
        """All that were given for the student."""
        return (*self.schedules, *self.sweep.get("schedule", ()))

    @property
    def sampling_sweep(self) -> Mapping[str, tuple[Any, ...]]:
        """What is swept of the teacher's sampling."""
        return {key: values for key, values in self.sweep.items() if key != "schedule"}

    @property
    def network_dtype(self) -> str:
        """The dtype that the plan has: known before any worker has seen its GPU."""
        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if self.num_gpus else "float32"

    @property
    def pixel_dtype(self) -> str:
        """Of the decoder."""
        return decoder_dtype(self.network_dtype)

    @field_validator("rows")
    @classmethod
    def _known_rows(cls, rows: tuple[str, ...]) -> tuple[str, ...]:
        for row in rows:
            if row not in ROWS:
                raise ValueError(f"{row!r} is not one of {', '.join(ROWS)}")
        return rows

    @field_validator("sweep")
    @classmethod
    def _known_sweep(cls, sweep: Mapping[str, tuple[Any, ...]]) -> Mapping[str, tuple[Any, ...]]:
        """Values as the keys of the teacher's sampling have them.

        Raises:
            ValueError: for another key, or a value that the key does not take.
        """
        found: dict[str, tuple[Any, ...]] = {}
        for key, values in sweep.items():
            if key not in SWEPT:
                raise ValueError(f"{key!r} cannot be swept; {', '.join(SWEPT)} can")
            try:
                found[key] = tuple(SWEPT[key](value) for value in values)
            except (TypeError, ValueError):
                raise ValueError(f"{key}={','.join(map(str, values))} are no numbers") from None
        return found

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.samples is not None and (self.rows or self.sweep or self.schedules or self.skip):
            raise ValueError("samples are judged as they are: no rows, schedules, skip or sweep")
        if "masked" in self.rows and self.masked is None:
            raise ValueError("rows has masked; give masked=MODEL, made by distill objective=masked")
        if "skip" in self.rows and not self.skip:
            raise ValueError("rows has skip; give skip=N,N")
        return self
