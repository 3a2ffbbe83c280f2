"""What `ddray generate` can be told."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ddray.config.base import (
    AutoCount,
    CountT,
    Dtype,
    GpuGigabytes,
    Labels,
    LocalFile,
    Location,
    ModelName,
    SetConfig,
    decoder_dtype,
)


def _parse_statistics(value: Any) -> Any:
    """A network's name, or a switch as it was when there was one extractor alone."""
    return {True: "auto", False: "off"}[value] if isinstance(value, bool) else value


Statistics = Annotated[
    Literal[
        "off",
        "auto",
        "digits",
        "inception",
        "inception-tensorflow",
        "efficientnet",
        "dinov2",
        "clip",
    ],
    BeforeValidator(_parse_statistics),
]


class GenerateConfig(SetConfig):
    """`ddray generate`: images in bulk from a student."""

    EXAMPLE: ClassVar[str] = "ddray generate --count 5000 --schedule 0,20 --format webdataset"
    HEADINGS: ClassVar[Mapping[str, str]] = {
        "Data and output": "student",
        "Classes or captions": "classes",
        "Generation": "schedule",
        "Format": "format",
        "Shards and batches": "shard_rows",
        "Workers and memory": "workers",
        "Engine": "engine",
        "Faults": "max_retries",
    }

    student: ModelName = Field("digits-llamagen-dd", description="bundled name or student folder")
    out: Location = Field("runs/generate", description="URI of the image set")
    count: CountT = Field(1000, description="number of images")
    labels: Labels = "balanced"
    schedule: str | None = Field(None, description='such as "0" or "0,16"; absent = one jump')
    format: Literal["parquet", "webdataset", "images", "flat", "npz", "coco", "geneval"] = Field(
        "parquet",
        description="parquet, webdataset (tar), images (folders by class), flat (one folder), npz "
        "(samples.npz for ADM's evaluator), coco, geneval (folders by prompt)",
    )
    samples_per_prompt: CountT | None = Field(
        None, description="images of each prompt, of format=geneval alone; absent = 4"
    )
    content: Literal["images", "tokens"] = Field("images", description="tokens: in Parquet alone")
    image_format: Literal["png", "webp"] = Field("png", description="of the images")
    quality: Annotated[int, Field(ge=1, le=100)] | None = Field(
        None, description="of WebP with loss; absent = without loss"
    )
    compression: Literal["small", "fast"] = Field(
        "small",
        description="of PNG and WebP; part of the plan; fast: the same pixels (of WebP with loss "
        "nearly) in a fraction of the time",
    )
    statistics: Statistics = Field(
        "off",
        description="a reference file of features: of a network, or (auto, the flag alone) of the "
        "bundled classifier of digits",
    )
    statistics_weights: LocalFile | None = Field(
        None,
        description="of its network: file of Inception or EfficientNet, folder of DINOv2 or CLIP; "
        "absent = where they lie by themselves",
    )
    any_inception: bool = Field(
        False, description="take a file of other weights than FID's; its distances are no FID"
    )
    dtype: Dtype = Field(
        "auto",
        description="of the student; part of the plan; auto = bfloat16 on GPUs, float32 on CPUs",
    )
    decode_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="of its decoder; part of the plan; auto = the same, but float32 for float16",
    )
    shard_rows: CountT = Field(500, description="images of a shard: what a crash can cost")
    batch_size: AutoCount = Field(
        "auto",
        description="images made together; part of the plan; auto = 64 on CPUs, on GPUs what fits, "
        "and of a set that is there its own",
    )
    gpu_gb: GpuGigabytes = 24
    engine: Literal["serve", "data"] = Field(
        "data", description="a Ray Data pool of students, or replicas of Ray Serve"
    )
    encoders: CountT | None = Field(
        None, description="threads of a worker that compress images; absent = its CPUs (threads)"
    )

    @property
    def student_dtype(self) -> str:
        """The dtype that the plan has: known before any worker has seen its GPU."""
        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if self.num_gpus else "float32"

    @property
    def images_per_prompt(self) -> int:
        """Rows of the set for each row of the captions."""
        return self.samples_per_prompt or 4 if self.format == "geneval" else 1

    @property
    def encoder_threads(self) -> int:
        """As many as the CPUs that a worker reserves, unless it is told."""
        return self.encoders or self.threads

    @property
    def pixel_dtype(self) -> str:
        """The dtype of the decoder that the plan has."""
        chosen = self.decode_dtype
        return decoder_dtype(self.student_dtype) if chosen == "auto" else chosen

    @model_validator(mode="after")
    def _measurable(self) -> Self:
        network = None if self.statistics in ("off", "auto", "digits") else self.statistics
        if self.statistics_weights is not None and network is None:
            raise ValueError(
                f"statistics_weights={self.statistics_weights!r} is of a feature network: name it "
                "by statistics"
            )
        if self.any_inception and not (network or "").startswith("inception"):
            raise ValueError("any_inception is of statistics=inception and inception-tensorflow")
        if network is not None and self.engine == "serve":
            raise ValueError(
                f"statistics={network} is made beside the student: take engine=data (replicas give "
                "pixels alone)"
            )
        return self

    @model_validator(mode="after")
    def _writable(self) -> Self:
        measured = self.statistics != "off"
        if self.content == "tokens":
            if self.format != "parquet":
                raise ValueError(f"content=tokens is written as parquet, not as {self.format}")
            if self.image_format != "png" or self.compression != "small" or measured:
                raise ValueError(
                    "content=tokens has no images: no image_format, no compression, no statistics"
                )
        if measured and self.count < 2:
            raise ValueError(f"statistics needs at least 2 images, not count={self.count}")
        if self.format == "npz" and (self.image_format != "png" or self.quality is not None):
            raise ValueError("format=npz holds pixels, not files: no image_format, no quality")
        if self.format in ("coco", "geneval") and self.image_format != "png":
            raise ValueError(f"format={self.format} is of PNG files, not of {self.image_format}")
        if self.samples_per_prompt is not None and self.format != "geneval":
            raise ValueError(
                f"samples_per_prompt={self.samples_per_prompt} is of format=geneval alone"
            )
        if self.count % self.images_per_prompt:
            raise ValueError(
                f"format=geneval makes {self.images_per_prompt} images of each prompt: "
                f"count={self.count} must be a multiple of that"
            )
        if self.quality is not None and self.image_format != "webp":
            raise ValueError(
                f"quality={self.quality} is of image_format=webp; {self.image_format} has no loss"
            )
        return self
