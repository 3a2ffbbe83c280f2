"""The plan of an image set: every setting that decides its bytes, and its size.

Pure values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from ddray.errors import ConfigError
from ddray.sets.plan import SetPlan

Encoding = Literal["parquet", "webdataset", "images"]
Content = Literal["images", "tokens"]
ImageFormat = Literal["png", "webp"]


@dataclass(frozen=True)
class ImagePlan(SetPlan):
    """Everything that determines the rows of an image set, and how they are written.

    Attributes:
        student: Zoo name or path; it may change, the weights may not.
        student_fingerprint: sha256 of the student's weights.
        tokenizer_fingerprint: sha256 of the tokenizer's weights.
        conditioning: `class` or `text`.
        num_classes: Classes of the student; 0 is allowed for text.
        seed: Of the noise, 0 <= seed < 2**63.
        noise_scheme: Name and version of the function from (seed, index) to noise.
        schedule: As given to `Student.generate`.
        encoding: What a shard is: a Parquet file, a tar, or a list of files.
        content: Images, or their tokens.
        image_format: Of the images.
        quality: Of lossy WebP, 1 to 100; None is lossless.
        threads: CPU threads of the student; BLAS results vary with it.
        count: Rows of the set.
        shard_rows: Rows of a shard.
        batch_size: Rows that the student takes at once; results vary with it.
        stages: Tokens of each AR step; their sum is L.
        vocab_size: V; token ids are below it.
        earlier_counts: Counts that the set had before it was extended. Bookkeeping of
            `ImageSet.create`: leave it empty.
        classes: Classes that are generated, in turn; one that stands twice comes twice as
            often. Empty is all, each once.
        text_encoder: Name or folder of what turns captions into features; empty where
            the features were given, and for classes.
    """

    KIND: ClassVar[str] = "images"
    WHAT: ClassVar[str] = "image set"
    MADE_BY: ClassVar[str] = "ddray generate"
    MODEL: ClassVar[str] = "student"
    TEXTS: ClassVar[tuple[str, ...]] = (
        "student",
        "student_fingerprint",
        "tokenizer_fingerprint",
        "noise_scheme",
        "schedule",
    )
    NOT_HASHED: ClassVar[frozenset[str]] = frozenset({"student", "count", "earlier_counts"})

    student: str
    student_fingerprint: str
    tokenizer_fingerprint: str
    conditioning: Literal["class", "text"]
    num_classes: int
    seed: int
    noise_scheme: str
    schedule: str
    encoding: Encoding
    content: Content
    image_format: ImageFormat
    quality: int | None
    threads: int
    count: int
    shard_rows: int
    batch_size: int
    stages: tuple[int, ...]
    vocab_size: int
    earlier_counts: tuple[int, ...] = field(default=(), compare=False)
    classes: tuple[int, ...] = ()
    text_encoder: str = ""

    def _check_settings(self) -> None:
        for name, choice in (
            ("encoding", Encoding),
            ("content", Content),
            ("image_format", ImageFormat),
        ):
            if getattr(self, name) not in get_args(choice):
                raise ConfigError(
                    f"plan: {name}={getattr(self, name)!r} must be one of "
                    f"{', '.join(get_args(choice))}"
                )
        if self.content == "tokens" and self.encoding != "parquet":
            raise ConfigError(f"plan: content='tokens' lies in Parquet, not in {self.encoding!r}")
        if self.quality is None:
            return
        if self.image_format != "webp" or self.content == "tokens":
            raise ConfigError(f"plan: quality={self.quality!r} is of lossy WebP images alone")
        if isinstance(self.quality, bool) or self.quality not in range(1, 101):
            raise ConfigError(f"plan: quality={self.quality!r} must be an integer from 1 to 100")
