"""The plan of an image set: every setting that decides its bytes, and its size.

Pure values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, get_args

from ddray.errors import ConfigError
from ddray.sets.labels import check_rule
from ddray.sets.plan import SetPlan

Encoding = Literal["parquet", "webdataset", "images", "flat", "npz", "coco", "geneval"]
Content = Literal["images", "tokens"]
ImageFormat = Literal["png", "webp"]
Compression = Literal["small", "fast"]

IN_FILES = frozenset({"images", "flat", "coco", "geneval"})
"""Encodings whose images are files, listed by their shards."""
OF_CAPTIONS = frozenset({"coco", "geneval"})


@dataclass(frozen=True, kw_only=True)
class ImagePlan(SetPlan):
    """Everything that determines the rows of an image set, and how they are written.

    Attributes:
        student: Zoo name or path; it may change, the weights may not.
        student_fingerprint: sha256 of the student's weights.
        schedule: As given to `Student.generate`.
        encoding: What a shard is: a Parquet file, a tar, or a list of files in folders by class
            (images), in one (flat, coco) or by prompt (geneval). Of npz: Parquet, and all pixels in
            one array beside them.
        content: Images, or their tokens.
        image_format: Of the images.
        quality: Of lossy WebP, 1 to 100; None is lossless.
        class_names: A name for each class, or empty; new in format 2.
        dtype: Of the student, such as `float32`.
        compression: Of the files: small, or fast, which takes a fraction of the time for the same
            pixels in other bytes.
        decode_dtype: Of its decoder; of sets that were begun before it was a setting, float32.
        samples_per_prompt: Images of each prompt, of geneval.
        labels: How classes follow from the index: `balanced`, `random` or `in-order:M`; see
            `ddray.sets.labels`.
    """

    KIND: ClassVar[str] = "images"
    WHAT: ClassVar[str] = "image set"
    ROWS: ClassVar[str] = "images"
    SHOWN: ClassVar[tuple[str, ...]] = (
        *("student", "conditioning", "num_classes", "labels", "seed", "schedule", "encoding"),
        "content",
        *("image_format", "quality", "compression", "dtype", "decode_dtype"),
        *("threads", "batch_size", "shard_rows", "vocab_size"),
    )
    MADE_BY: ClassVar[str] = "ddray generate"
    MODEL: ClassVar[str] = "student"
    TEXTS: ClassVar[tuple[str, ...]] = (
        "student",
        "student_fingerprint",
        "tokenizer_fingerprint",
        "noise_scheme",
        "schedule",
        "dtype",
        "decode_dtype",
        "labels",
    )
    NOT_HASHED: ClassVar[frozenset[str]] = frozenset({"student", "count", "earlier_counts"})
    JOINED_LATER: ClassVar[frozenset[str]] = frozenset(
        {"class_names", "compression", "dtype", "decode_dtype", "labels", "samples_per_prompt"}
    )
    FORMATS: ClassVar[tuple[int, ...]] = (1, 2)
    LEAST: ClassVar[dict[str, int]] = {**SetPlan.LEAST, "samples_per_prompt": 1}

    student: str
    student_fingerprint: str
    schedule: str
    encoding: Encoding
    content: Content
    image_format: ImageFormat
    quality: int | None
    class_names: tuple[str, ...] = ()
    compression: Compression = "small"
    dtype: str = "float32"
    decode_dtype: str = "float32"
    labels: str = "balanced"
    samples_per_prompt: int = 1
    format: int = 2

    @property
    def label_rule(self) -> str:
        """See `SetPlan`."""
        return self.labels

    def shown(self) -> dict[str, Any]:
        """See `SetPlan`: a set of captions has no labels."""
        shown = super().shown()
        if self.conditioning == "text":
            del shown["labels"]
        return shown

    @property
    def data_files(self) -> str:
        """Pattern of the files that hold the rows; see `SetPlan`."""
        patterns = {
            "webdataset": "shards/*.tar",
            "geneval": f"images/**/*.{self.image_format}",
            **dict.fromkeys(IN_FILES - {"geneval"}, "images/**"),
        }
        return patterns.get(self.encoding, super().data_files)

    @property
    def load_options(self) -> dict[str, Any]:
        """See `SetPlan`: only folders by class name classes."""
        folders_are_classes = self.encoding == "images" and self.conditioning == "class"
        in_files = self.data_files.startswith("images/")
        return {"drop_labels": True} if in_files and not folders_are_classes else {}

    def in_format(self, number: int) -> Self:
        """Return the plan as a set of another format has it: format 1 knows no class names."""
        names = () if number == 1 else self.class_names
        return replace(self, format=number, class_names=names)

    def _check_settings(self) -> None:
        for name, choice in (
            ("encoding", Encoding),
            ("content", Content),
            ("image_format", ImageFormat),
            ("compression", Compression),
        ):
            if getattr(self, name) not in get_args(choice):
                raise ConfigError(
                    f"plan: {name}={getattr(self, name)!r} must be one of "
                    f"{', '.join(get_args(choice))}"
                )
        self._check_class_names()
        self._check_prompts()
        check_rule(self.labels)
        if self.labels != "balanced" and self.conditioning == "text":
            raise ConfigError(
                f"plan: labels={self.labels!r} is of classes, but the student takes captions"
            )
        if self.content == "tokens" and self.compression != "small":
            raise ConfigError(f"plan: compression={self.compression!r} is of images alone")
        if self.content == "tokens" and self.encoding != "parquet":
            raise ConfigError(f"plan: content='tokens' lies in Parquet, not in {self.encoding!r}")
        if self.encoding == "npz" and (self.image_format, self.quality) != ("png", None):
            raise ConfigError("plan: encoding='npz' holds pixels, which takes image_format='png'")
        if self.quality is None:
            return
        if self.image_format != "webp" or self.content == "tokens":
            raise ConfigError(f"plan: quality={self.quality!r} is of lossy WebP images alone")
        if isinstance(self.quality, bool) or self.quality not in range(1, 101):
            raise ConfigError(f"plan: quality={self.quality!r} must be an integer from 1 to 100")

    def _check_prompts(self) -> None:
        if self.encoding in OF_CAPTIONS and self.conditioning == "class":
            raise ConfigError(
                f"plan: encoding={self.encoding!r} is of captions, but the student takes classes"
            )
        if self.encoding in OF_CAPTIONS and self.image_format != "png":
            raise ConfigError(f"plan: encoding={self.encoding!r} takes image_format='png'")
        if self.samples_per_prompt != 1 and self.encoding != "geneval":
            raise ConfigError(
                f"plan: samples_per_prompt={self.samples_per_prompt} is of encoding='geneval' alone"
            )
        if self.count % self.samples_per_prompt:
            raise ConfigError(
                f"plan: count={self.count} must be a multiple of {self.samples_per_prompt}, the "
                "samples_per_prompt"
            )

    def _check_class_names(self) -> None:
        names = self.class_names
        if not isinstance(names, (tuple, list)) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"plan: class_names={names!r} must be a tuple of texts")
        if names and (self.format == 1 or len(names) != self.num_classes):
            raise ConfigError(
                f"plan: there are {len(names)} class_names; a set of format {self.format} and "
                f"{self.num_classes} classes has {0 if self.format == 1 else self.num_classes}"
            )
        self._set("class_names", tuple(names))
