"""What all job configurations are made of: types of values, the base class, a pool of actors."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ddray.locations import absolute, hub_location, local_file, model_location

_LEAST_GPU = 1e-4

_LABELS = r"balanced|random|in-order(:[1-9][0-9]{0,17})?"

CountT = Annotated[int, Field(gt=0, lt=2**63)]

SeedT = Annotated[int, Field(ge=0, lt=2**63)]


def parse_pair(value: Any) -> Any:
    """A pair from "MIN:MAX", "N" or N."""
    if isinstance(value, str):
        value = value.split(":")
    if isinstance(value, int):
        value = (value, value)
    if isinstance(value, Sequence) and len(value) == 1:
        value = (value[0], value[0])
    return value


def parse_list(value: Any) -> Any:
    """A list from "0,16", or from a single number or path."""
    if isinstance(value, int | os.PathLike) and not isinstance(value, bool):
        return (value,)
    return value.split(",") if isinstance(value, str) else value


def parse_auto_count(value: Any) -> Any:
    """A number from 1 on, or the word `auto`."""
    if value == "auto":
        return value
    text = str(value).strip()
    if isinstance(value, bool) or not text.isdecimal() or not 0 < int(text) < 2**63:
        raise ValueError("must be auto, or a whole number from 1 on")
    return int(text)


def parse_labels(value: Any) -> Any:
    """A rule by which classes follow from the index."""
    if not isinstance(value, str) or not re.fullmatch(_LABELS, value):
        raise ValueError("must be balanced, random, in-order, or in-order:M for blocks of M images")
    return value


def parse_off(value: Any) -> Any:
    """The word `off`, which YAML reads as a truth value."""
    return "off" if value is False else value


def check_ordered(workers: tuple[int, int]) -> None:
    """Refuse a pair of numbers of workers that is not MIN:MAX."""
    if workers[0] > workers[1]:
        raise ValueError(f"workers {workers[0]}:{workers[1]} must be MIN:MAX")


def check_gpus(num_gpus: float) -> None:
    """Refuse a number of GPUs that Ray does not give to a worker."""
    if num_gpus > 1:
        raise ValueError(
            f"num_gpus={num_gpus:g} is more than one: a worker computes on one GPU, and the others "
            "would be idle; give 1, or a part of one, and more workers"
        )
    check_part_of_gpu("num_gpus", num_gpus)


def check_part_of_gpu(key: str, num_gpus: float) -> None:
    """Refuse a part of a GPU that is too small for Ray."""
    if 0 < num_gpus < _LEAST_GPU:
        raise ValueError(f"{key}={num_gpus:g} is less than Ray counts, {_LEAST_GPU:g}")


def reserved_device(num_gpus: float) -> str:
    """Where a worker computes: on the GPU that was reserved for it, or on its CPUs.

    Never on a GPU that is merely there: it may be another worker's.
    """
    return "cuda" if num_gpus else "cpu"


def decoder_dtype(dtype: str) -> str:
    """Of the decoder beside networks of a dtype: the same, but for float16, where it overflows."""
    return "float32" if dtype == "float16" else dtype


Dtype = Literal["auto", "float32", "bfloat16", "float16"]

NetworkDtype = Annotated[
    Literal["auto", "float32", "tf32", "bfloat16", "float16"],
    Field(
        description="of networks and decoder (of that never float16); auto = bfloat16 on a GPU "
        "that has it, else float32; tf32 is of GPUs"
    ),
]

Workers = Annotated[tuple[CountT, CountT], BeforeValidator(parse_pair)]

Classes = Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(parse_list)]

Labels = Annotated[
    str,
    BeforeValidator(parse_labels),
    Field(
        description="balanced: the classes in turn; random: drawn from seed and index; in-order: "
        "blocks of one class"
    ),
]

Texts = Annotated[tuple[str, ...], BeforeValidator(parse_list)]


def _spelled(spell: Callable[[str | os.PathLike[str]], str]) -> BeforeValidator:
    """Gives texts and paths their one spelling; what is neither is for pydantic to refuse."""
    return BeforeValidator(lambda v: spell(v) if isinstance(v, str | os.PathLike) else v)


# Every key that holds a location is of one of these types, so that a config is absolute from its
# creation on: workers run in other folders, and no shell has expanded what a file says.
Location = Annotated[str, _spelled(absolute)]

LocalFile = Annotated[str, _spelled(local_file)]

ModelName = Annotated[str, _spelled(model_location)]

EncoderName = Annotated[str, _spelled(hub_location)]

Locations = Annotated[tuple[Location, ...], BeforeValidator(parse_list)]

ModelNames = Annotated[tuple[ModelName, ...], BeforeValidator(parse_list)]

AutoCount = Annotated[int | Literal["auto"], BeforeValidator(parse_auto_count)]

GpuGigabytes = Annotated[
    float,
    Field(
        gt=0,
        description="memory of the smallest GPU that may work, for batch_size=auto; it is not "
        "looked at, so that every machine finds the same plan",
    ),
]

SkipBadCaptions = Annotated[
    bool,
    Field(description="leave broken rows out and count them; the index runs over those kept"),
]

Clean = Annotated[
    Literal["off", "llamagen"],
    BeforeValidator(parse_off),
    Field(description="rules that captions go through first; llamagen: those before its T5"),
]

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


class Job(BaseModel):
    """Base of all job configurations: immutable, unknown keys refused.

    Attributes:
        EXAMPLE: a command line of the verb, as its help shows it.
        POSITIONAL: a key that may be given without its flag.
        HEADINGS: of the help, in its order, each with the first of its keys; the keys that follow
            in the class belong to it too, up to the first one of another heading.
        MOVED: keys that have got another name or place, with the path that they have now.
    """

    EXAMPLE: ClassVar[str] = ""
    POSITIONAL: ClassVar[str] = ""
    HEADINGS: ClassVar[Mapping[str, str]] = {}
    MOVED: ClassVar[Mapping[str, str]] = {}

    # Defaults are checked like values: they hold relative locations.
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )


class PoolConfig(Job):
    """A pool of actors that each hold a model and write shards."""

    workers: Workers = Field((1, 2), description="actors, MIN:MAX")
    threads: CountT = Field(1, description="CPU threads of an actor; part of the plan")
    num_gpus: Annotated[float, Field(ge=0)] = Field(0, description="GPUs of an actor")
    node_pool: NodePool = None
    wait_s: WaitS = None
    max_retries: Annotated[int, Field(ge=0)] = Field(3, description="of a shard, after a crash")
    stall_timeout_s: CountT = Field(600, description="no shard for so long is an error")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        check_ordered(self.workers)
        check_gpus(self.num_gpus)
        return self


class SetConfig(PoolConfig):
    """A set that a pool fills: what its rows are asked for by."""

    classes: Classes = Field((), description="in turn, such as 1,5,7 or 0,0,1; absent = all")
    captions: Location | None = Field(
        None,
        description="URI of a .parquet or .jsonl with index, caption and perhaps features; of a "
        "file of prompts, .txt with one a line, .tsv, .csv, .jsonl or .parquet; of a folder of "
        "such files or a pattern of them; absent = a bundled model's own",
    )
    caption_column: str | None = Field(
        None,
        description="of a file of prompts, NAME or, of lists, NAME[I]; absent = caption, Caption, "
        "prompt, Prompt or TEXT",
    )
    skip_bad_captions: SkipBadCaptions = False
    clean: Clean = "off"
    text_encoder: EncoderName | None = Field(
        None, description="of captions without features; absent = the model's own"
    )
    seed: SeedT = Field(0, description="of the noise, and of which caption of several is taken")
