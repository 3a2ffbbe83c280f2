"""Features of captions in shards, made once for sets that are made of them again and again.

The texts are cut to `captions/captions-0000k.parquet`, as for any set, and shard k holds the same
rows with features, in the form that a file of captions has: `shards/` is given to `--captions`.

Shapes: T caption positions (each row its own), D feature width.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy.typing as npt

from ddray.errors import ConfigError, ShardError, one_line
from ddray.file_kind import json_value
from ddray.sets.captions import Cut, ShardCaptions, caption_parquet, cut_captions, read_captions
from ddray.sets.sharded_set import MANIFEST, SHARDS, shard_name
from ddray.storage import open_storage
from ddray.storage.base import NotFoundError, Storage
from ddray.storage.caption_file import CaptionFile
from ddray.storage.run_folder import write_json
from ddray.text.encoder import TextEncoder

Features = list[npt.NDArray[Any]]
"""Of some captions, float16 [T, D] each."""


@dataclass(frozen=True)
class EncodingPlan(Cut):
    """What decides the bytes, but the captions themselves.

    Attributes:
        text_encoder: name or folder.
        length: positions of a caption, at most.
        batch_size: captions of a call.
        threads: of a worker's CPU.
    """

    text_encoder: str
    length: int
    batch_size: int
    threads: int

    def batches(self, k: int) -> list[range]:
        """Rows of shard k that are encoded together, counted from its first."""
        rows = len(self.shard_range(k))
        return [
            range(start, min(start + self.batch_size, rows))
            for start in range(0, rows, self.batch_size)
        ]


class CaptionFeatures:
    """The shards of one plan at one URI. Pickles, so that Ray can ship it.

    Attributes:
        plan: the plan.
        storage: where they lie.
    """

    def __init__(self, storage: Storage, plan: EncodingPlan):
        self.storage, self.plan = storage, plan

    @classmethod
    def create(cls, uri: str, plan: EncodingPlan, captions: CaptionFile) -> "CaptionFeatures":
        """Begin, or go on with what is there.

        Raises:
            ConfigError: for captions that do not fit, or others or another plan at the URI.
            ShardError: if captions that are there are damaged.
            StorageError: if the URI cannot be written, or the captions not read.
        """
        storage = open_storage(uri)
        storage.check_writable()
        begun, fields = _manifest(storage), asdict(plan)
        if begun and begun != fields:
            others = [
                f"{name}={begun.get(name)!r}" for name in fields if begun.get(name) != fields[name]
            ]
            raise ConfigError(
                f"{storage.uri} was begun with {', '.join(others)}; give the same, or choose "
                "another URI"
            )
        captions.check(plan.count)
        cut_captions(captions, storage, plan)
        write_json(storage, MANIFEST, fields)
        return cls(storage, plan)

    @classmethod
    def open(cls, uri: str) -> "CaptionFeatures":
        """What `create` left.

        Raises:
            ShardError: if there is none.
            StorageError: if it cannot be read.
        """
        storage = open_storage(uri)
        try:
            return cls(storage, EncodingPlan(**_manifest(storage)))
        except TypeError as error:
            raise ShardError(
                f"no features of captions at {storage.uri}; run `ddray encode` first"
            ) from error

    def missing(self) -> list[int]:
        """Shards that are still to be made, by listing the storage.

        Raises:
            StorageError: if it cannot be listed.
        """
        there = self.storage.list(SHARDS)
        return [k for k in range(self.plan.num_shards) if shard_name(k) not in there]

    def texts(self, k: int) -> list[str]:
        """Captions of shard k.

        Raises:
            ShardError: if they are missing or damaged.
            StorageError: if they cannot be read.
        """
        return [*read_captions(self.storage, k, len(self.plan.shard_range(k))).captions]

    def write_shard(self, k: int, captions: Sequence[str], features: Features) -> None:
        """Commit shard k: it is there whole, or not at all.

        Raises:
            StorageError: if it cannot be written.
        """
        data = caption_parquet(self.plan.shard_range(k)[0], ShardCaptions(captions, features))
        self.storage.write(shard_name(k), data)


def encoded(encode: TextEncoder, captions: Sequence[str]) -> Features:
    """Features of some captions, without the padding.

    Raises:
        ConfigError: if they are too large for float16.
    """
    features_BTD, mask_BT = encode(captions)
    half_BTD = features_BTD.half()
    if not half_BTD.isfinite().all():
        raise ConfigError(
            "features are too large for float16: let the encoder work beside the models, which "
            "take captions without features"
        )
    rows = zip(half_BTD.cpu().numpy(), mask_BT.sum(1).tolist(), strict=True)
    return [row_TD[:length].copy() for row_TD, length in rows]


def _manifest(storage: Storage) -> dict[str, Any]:
    """Fields of the plan at a storage; {} where there is none.

    Raises:
        ShardError: if it is no JSON object.
    """
    try:
        values = json_value(storage.read(MANIFEST))
    except NotFoundError:
        return {}
    except ValueError as error:
        raise ShardError(f"{storage.join(MANIFEST)} is damaged: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ShardError(f"{storage.join(MANIFEST)} is no JSON object")
    return values
