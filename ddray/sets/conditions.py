"""What the rows of a set are asked for by, in the form that models take.

Classes follow from the plan; captions lie in the set, with their features or for an encoder.
Sampling, distillation and bulk generation read them here.

Shapes: N rows, B batch, T caption positions, D feature width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ddray.config.evaluation import EvaluateConfig
from ddray.config.generation import GenerateConfig
from ddray.errors import ConfigError, ShardError
from ddray.method.model import Model
from ddray.method.teacher import AskedFor
from ddray.sets.captions import padded, read_captions
from ddray.sets.sharded_set import ShardedSet
from ddray.storage.caption_cleaning import clean_llamagen
from ddray.storage.caption_file import CaptionFile
from ddray.text.encoder import TextEncoder, TimedEncoder
from ddray.text.loading import check_text_encoder, load_text_encoder, own_captions, own_encoder


@dataclass(frozen=True)
class Conditions:
    """Conditions of N rows.

    Attributes:
        label: class ids int32 [N], or captions, an object array [N].
        features: of captions, float32 [T, D] a row; None for classes, or where `encode` is.
        encode: makes features of captions; None for classes, or where they are given.
    """

    label: npt.NDArray[np.int32] | npt.NDArray[np.object_]
    features: Sequence[npt.NDArray[np.float32]] | None = None
    encode: TextEncoder | None = None

    def of(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> AskedFor:
        """Class ids int64 [B], or features [B, T, D] and their mask [B, T], of some of the rows."""
        if self.encode is not None:
            return self.encode([self.label[row] for row in rows])
        if self.features is not None:
            features_BTD, mask_BT = padded([self.features[row] for row in rows])
            return torch.from_numpy(features_BTD), torch.from_numpy(mask_BT)
        return torch.from_numpy(self.label[np.asarray(rows)].astype(np.int64))


class TakesCaptions(Protocol):
    """What of a job's config names its captions."""

    @property
    def captions(self) -> str | None:
        """URI of the file."""

    @property
    def caption_column(self) -> str | None:
        """Where they stand in it."""

    @property
    def skip_bad_captions(self) -> bool:
        """Whether broken rows are left out."""

    @property
    def clean(self) -> str:
        """The rules that they go through first, or off."""

    @property
    def seed(self) -> int:
        """By which one of several captions is drawn."""

    @property
    def text_encoder(self) -> str | None:
        """Of captions without features."""


class NamesEncoder(Protocol):
    """What of a plan names its encoder."""

    @property
    def text_encoder(self) -> str:
        """Empty where there is none."""


def open_captions(config: TakesCaptions, model: Model) -> CaptionFile | None:
    """The captions that a job gives to its model; None for a model of classes.

    A bundled model comes with captions of its own: an evaluation takes those that it never saw.

    Raises:
        ConfigError: if the job's conditions are not those that the model takes.
        StorageError: if the file cannot be read.
    """
    if model.conditioning == "class":
        for name in ("captions", "caption_column", "skip_bad_captions", "clean", "text_encoder"):
            if getattr(config, name) not in (None, False, "off"):
                raise ConfigError(
                    f"{name}={getattr(config, name)!r}, but {model.name} is conditioned on classes"
                )
        return None
    held_out = isinstance(config, EvaluateConfig)
    uri = config.captions or own_captions(model.config, held_out=held_out)
    if uri is None:
        raise ConfigError(
            f"{model.name} is conditioned on captions; give --captions FILE, Parquet or JSON "
            "lines with index, caption and perhaps features, or a file of prompts"
        )
    sizes = model.model.config
    return caption_file(config, uri, length=sizes.cls_token_num, width=sizes.caption_dim)


def caption_file(config: TakesCaptions, uri: str, *, length: int, width: int) -> CaptionFile:
    """A file of captions as a job reads it.

    Args:
        config: of the job.
        uri: of the file.
        length: as `CaptionFile`.
        width: as `CaptionFile`.

    Raises:
        ConfigError: as `CaptionFile`.
        StorageError: if it cannot be read.
    """
    return CaptionFile(
        uri,
        length=length,
        width=width,
        column=config.caption_column,
        each=config.images_per_prompt if isinstance(config, GenerateConfig) else 1,
        seed=config.seed,
        skip_bad=config.skip_bad_captions,
        clean=clean_llamagen if config.clean == "llamagen" else None,
    )


def encoder_name(
    config: TakesCaptions, captions: CaptionFile | None, model: Mapping[str, Any]
) -> str:
    """What a plan says of its text encoder: a folder where all workers look for it, or a name.

    Args:
        config: of the job.
        captions: that it was given; None where the model takes none.
        model: config of the model, which knows what it was trained with.

    Raises:
        ConfigError: if an encoder is given for captions that come with features.
    """
    if captions is None:
        return ""
    if captions.has_features:
        if config.text_encoder is not None:
            raise ConfigError(
                f"text_encoder={config.text_encoder!r}, but {captions.uri} has features already"
            )
        return ""
    return config.text_encoder or own_encoder(model)


def check_encoder(plan: NamesEncoder, model: Model) -> None:
    """Refuse a plan whose encoder is not here, or does not fit the model.

    Raises:
        ConfigError: without the extra `text`, or for another width.
        CheckpointError: if the encoder cannot be loaded.
    """
    if plan.text_encoder:
        check_text_encoder(plan.text_encoder, model.name, model.model.config.caption_dim)


def load_encoder(plan: NamesEncoder, model: Model) -> TextEncoder | None:
    """The plan's text encoder on the model's device; None where it has none.

    Raises:
        ConfigError: without the extra `text`.
        CheckpointError: if it cannot be loaded.
    """
    if not plan.text_encoder:
        return None
    length = model.model.config.cls_token_num
    return load_text_encoder(plan.text_encoder, length=length, device=model.device)


def load_timed_encoder(plan: NamesEncoder, model: Model) -> TimedEncoder | None:
    """As `load_encoder`, for a worker that says how long it has encoded; it waits for its device.

    Raises:
        ConfigError: as `load_encoder`.
        CheckpointError: as `load_encoder`.
    """
    encode = load_encoder(plan, model)
    return None if encode is None else TimedEncoder(encode)


def read_conditions(
    rows: ShardedSet[Any, Any], shards: Sequence[int], encode: TextEncoder | None
) -> Conditions:
    """Conditions of all rows of some shards, one after the other.

    Args:
        rows: the set.
        shards: which of its shards.
        encode: what `load_encoder` gave.

    Raises:
        ShardError: if captions are missing or damaged.
        StorageError: if they cannot be read.
    """
    plan = rows.plan
    ranges = [plan.shard_range(k) for k in shards]
    if plan.conditioning == "class":
        return Conditions(plan.label(np.concatenate(ranges)))
    parts = [
        read_captions(rows.storage, k, len(index)) for k, index in zip(shards, ranges, strict=True)
    ]
    label = np.array([text for part in parts for text in part.captions], dtype=object)
    if plan.text_encoder:
        return Conditions(label, encode=encode)
    features = [matrix for part in parts for matrix in part.features or ()]
    if len(features) != len(label):
        raise ShardError(f"captions in {rows.uri} lack the features that its plan tells of")
    return Conditions(label, features)
