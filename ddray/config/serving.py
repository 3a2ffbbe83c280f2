"""What `ddray serve` can be told."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Self

from pydantic import BeforeValidator, Field, model_validator

from ddray.config.base import (
    CountT,
    EncoderName,
    Job,
    LocalFile,
    Location,
    ModelNames,
    NetworkDtype,
    NodePool,
    Texts,
    WaitS,
    check_gpus,
    parse_pair,
)

Replicas = Annotated[tuple[Annotated[int, Field(ge=0)], CountT], BeforeValidator(parse_pair)]

Students = Annotated[ModelNames, Field(min_length=1)]

_WEEK_S = 7 * 24 * 3600

# Images of one request to the service, which must be admitted whole.
MAX_IMAGES = 16


class ServeConfig(Job):
    """`ddray serve`: students behind HTTP."""

    EXAMPLE: ClassVar[str] = "ddray serve --student digits-llamagen-dd,digits-var-dd --port 8000"
    HEADINGS: ClassVar[Mapping[str, str]] = {
        "Models": "student",
        "Address and access": "host",
        "Batches and limits": "max_batch_size",
        "Workers and memory": "replicas",
        "Autoscaling": "target_ongoing_requests",
    }

    student: Students = Field(
        ("digits-llamagen-dd",), description="bundled name or folder; several with commas"
    )
    teacher: bool | None = Field(
        None, description="load the teachers too, to compare; absent = of bundled students"
    )
    text_encoder: EncoderName | None = Field(
        None, description="for students that take captions; absent = the student's own"
    )
    host: str = Field("127.0.0.1", description="address to listen at; 0.0.0.0 = all")
    port: Annotated[int, Field(ge=1, le=65535)] = Field(8000, description="of HTTP")
    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = Field(
        None, description="for Prometheus, of a Ray that this command starts"
    )
    api_keys_file: LocalFile | None = Field(
        None,
        description="keys of at least 16 characters, one a line; absent = DDRAY_API_KEYS, or none",
    )
    cors_origins: Texts = Field((), description="of pages elsewhere that may call; with commas")
    images_uri: Location | None = Field(None, description="s3:// prefix for response_format=url")
    url_expires_s: CountT = Field(3600, description="for how long a link is good; at most a week")
    access_log: bool = Field(True, description="one JSON line a request, beside Serve's log")
    log_prompts: bool = Field(
        False, description="captions as they are in it, not their length and a short hash alone"
    )
    log_dir: LocalFile | None = Field(
        None,
        description="for Serve's log, of a Ray that this command starts; absent = ~/.local/state",
    )
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
    request_timeout_s: Annotated[float, Field(gt=0)] = Field(
        60.0, description="after which a request that is not answered is given up"
    )
    replicas: Replicas = Field(
        (1, 1), description="N, or MIN:MAX to grow with the load; 0:N sleeps"
    )
    ingress_replicas: CountT = Field(1, description="processes that take requests")
    threads: CountT = Field(1, description="CPU threads of a replica")
    num_gpus: Annotated[float, Field(ge=0)] = Field(0, description="GPUs of a replica")
    dtype: NetworkDtype = "auto"
    models_per_replica: CountT = Field(4, description="students in memory; the rest on demand")
    node_pool: NodePool = None
    wait_s: WaitS = None
    target_ongoing_requests: Annotated[float, Field(gt=0)] | None = Field(
        None, description="of a replica, above which there will be more; absent = a quarter batch"
    )
    upscale_delay_s: Annotated[float, Field(ge=0)] = Field(
        5.0, description="for how long the load must be high"
    )
    downscale_delay_s: Annotated[float, Field(ge=0)] = Field(
        120.0, description="for how long it must be low"
    )

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
        check_gpus(self.num_gpus)
        if self.log_prompts and not self.access_log:
            raise ValueError(
                "log_prompts=True is of the access log, which access_log=False turns off"
            )
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
