"""What `ddray encode` can be told."""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from ddray.config.base import (
    Clean,
    CountT,
    EncoderName,
    Location,
    PoolConfig,
    SeedT,
    SkipBadCaptions,
)


class EncodeConfig(PoolConfig):
    """`ddray encode CAPTIONS`: their features, for sets that are made of them again and again."""

    EXAMPLE: ClassVar[str] = "ddray encode captions.parquet --count 100000 --out runs/captions"
    POSITIONAL: ClassVar[str] = "captions"
    HEADINGS: ClassVar[Mapping[str, str]] = {
        "Captions and output": "captions",
        "Encoder": "text_encoder",
        "Shards and batches": "shard_rows",
        "Workers": "workers",
        "Faults": "max_retries",
    }

    captions: Location | None = Field(None, description="as of `ddray sample`, without features")
    caption_column: str | None = Field(None, description="as of `ddray sample`")
    skip_bad_captions: SkipBadCaptions = False
    clean: Clean = "off"
    seed: SeedT = Field(0, description="of which caption of several is taken")
    out: Location = Field(
        "runs/encode", description="URI of the folder; its shards/ are what --captions takes"
    )
    count: CountT = Field(2000, description="number of captions")

    text_encoder: EncoderName = Field(
        "google/flan-t5-xl", description="bundled name, folder, or name on the Hugging Face Hub"
    )
    length: CountT = Field(120, description="positions of a caption, at most; the rest is cut")

    shard_rows: CountT = Field(1000, description="captions of a shard: what a crash can cost")
    batch_size: CountT = Field(256, description="captions encoded together")
