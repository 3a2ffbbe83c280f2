"""What `ddray reference` can be told."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ddray.config.base import CountT, LocalFile, Location, PoolConfig, Workers


class ReferenceConfig(PoolConfig):
    """`ddray reference SOURCE`: statistics of real images, for others to be compared with."""

    EXAMPLE: ClassVar[str] = "ddray reference data/val --size 256 --out val-256.npz --workers 4"
    POSITIONAL: ClassVar[str] = "source"
    HEADINGS: ClassVar[Mapping[str, str]] = {
        "Images and output": "source",
        "Feature network": "network",
        "Files of images": "column",
        "What the file holds": "images",
        "Shards and batches": "shard_rows",
        "Workers": "workers",
        "Faults": "max_retries",
    }

    source: Location | None = Field(
        None,
        description="a folder of images, flat or by class; tars of WebDataset, Parquet files, a "
        "folder or a pattern of them; an .npz with arr_0; or a set of ddray's",
    )
    out: Location = Field("runs/reference.npz", description="URI of the file, an .npz")

    network: Literal["inception", "inception-tensorflow", "efficientnet", "dinov2", "clip"] = Field(
        "inception",
        description="whose features; inception resizes as pytorch-fid, inception-tensorflow as "
        "ADM's evaluator and torch-fidelity",
    )
    inception: Location | None = Field(
        None, description="weights of FID's network; absent = where PyTorch keeps downloads"
    )
    any_inception: bool = Field(False, description="take other weights, whose distance is no FID")
    weights: LocalFile | None = Field(
        None,
        description="of another network: a file of EfficientNet's, absent = of the package; the "
        "folder of DINOv2 or CLIP, as transformers has it",
    )

    column: str | None = Field(
        None, description="of images in Parquet, or ending of those in tars; absent = the only one"
    )
    size: CountT | None = Field(
        None, description="crop and resize files to so many pixels, as ADM does; absent = as is"
    )
    convert: bool = Field(False, description="take transparent, CMYK and 16-bit files, as RGB")
    skip_broken: bool = Field(False, description="leave out files that cannot be read")

    images: Annotated[int, Field(ge=0)] = Field(
        10_000,
        description="that stand in the file with their features, evenly spread over the source, "
        "for precision, recall and KID; 0 = none",
    )

    shard_rows: CountT = Field(500, description="images of a shard: what a crash can cost")
    batch_size: CountT = Field(100, description="images read together before their features")

    workers: Workers = Field((1, 1), description="actors, MIN:MAX; one needs no Ray")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.out.endswith(".npz"):
            raise ValueError(f"out={self.out} must end in .npz")
        is_inception = self.network.startswith("inception")
        if not is_inception and (self.inception is not None or self.any_inception):
            raise ValueError(f"network={self.network} takes weights, not inception")
        if is_inception and self.weights is not None:
            raise ValueError(f"network={self.network} takes inception=FILE, not weights")
        return self
