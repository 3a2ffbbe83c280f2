"""What making a set of either kind takes: fields of its plan, its captions, the plan's weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from ddray.config.generation import GenerateConfig
from ddray.config.sampling import SampleConfig
from ddray.errors import ShardError
from ddray.method.model import Model
from ddray.method.seeding import SCHEME
from ddray.sets.batch_size import batch_size
from ddray.sets.captions import cut_captions
from ddray.sets.card import write_card
from ddray.sets.conditions import check_encoder, encoder_name
from ddray.sets.plan import SetPlan
from ddray.sets.sharded_set import ShardedSet
from ddray.storage import open_storage
from ddray.storage.caption_file import CaptionFile
from ddray.storage.run_folder import CONFIG_FILE, write_json

SetT = TypeVar("SetT", bound=ShardedSet[Any, Any])


def planned_fields(
    config: SampleConfig | GenerateConfig, model: Model, captions: CaptionFile | None
) -> dict[str, Any]:
    """The fields that all plans have, for a job and its model."""
    return {
        "tokenizer_fingerprint": model.tokenizer.fingerprint,
        "conditioning": model.conditioning,
        "num_classes": model.num_classes,
        "seed": config.seed,
        "noise_scheme": SCHEME,
        "threads": config.threads,
        "count": config.count,
        "shard_rows": config.shard_rows,
        "batch_size": batch_size(config, model.model),
        "stages": model.stages,
        "vocab_size": len(model.codebook),
        "classes": config.classes,
        "text_encoder": encoder_name(config, captions, model.config),
    }


def require_planned(model: Model, name: str, network: str, plan: SetPlan) -> None:
    """Refuse a model of other weights than the plan's.

    Args:
        model: that was loaded.
        name: that the plan has for it.
        network: fingerprint of the network in the plan.
        plan: of the set.

    Raises:
        ShardError: with what differs.
    """
    for what, here, there in (
        ("network", model.fingerprint, network),
        ("tokenizer", model.tokenizer.fingerprint, plan.tokenizer_fingerprint),
    ):
        if here != there:
            raise ShardError(
                f"{name} has another {what} here (sha256 {here[:12]}) than in the plan "
                f"({there[:12]}); restore the weights that the set was made with"
            )


def create_set(
    kind: type[SetT],
    config: SampleConfig | GenerateConfig,
    plan: SetPlan,
    model: Model,
    captions: CaptionFile | None,
) -> SetT:
    """Make the set of a job, or find it, with its captions, its config and its card beside it.

    Raises:
        ConfigError: another plan at the URI, or captions or an encoder that do not fit.
        StorageError: the URI cannot be written, or the captions not read.
    """
    storage = open_storage(config.out)
    plan = _as_it_was_begun(kind, config, plan)
    if captions is not None:
        check_encoder(plan, model)
        captions.check(plan.count)
        # Before the set is made or grows: captions that are refused leave it as it was.
        cut_captions(captions, storage, kind.planned(config.out, plan))
    made = kind.create(config.out, plan)
    write_json(storage, CONFIG_FILE, config.model_dump(mode="json"))
    write_card(storage, made.plan, model.config)
    return made


def _as_it_was_begun(
    kind: type[SetT], config: SampleConfig | GenerateConfig, plan: SetPlan
) -> SetPlan:
    """The plan, with what the set that is there found where the job leaves it open.

    The batch size of `auto`, and the blocks of labels `in-order`, which follow from the first
    count.
    """
    in_order = isinstance(config, GenerateConfig) and config.labels == "in-order"
    if config.batch_size != "auto" and not in_order:
        return plan
    try:
        begun = kind.open(config.out).plan
    except ShardError:  # none, or one that is refused where it is taken up
        return plan
    if config.batch_size == "auto":
        plan = replace(plan, batch_size=begun.batch_size)
    if in_order and begun.label_rule.startswith("in-order"):
        plan = replace(plan, labels=begun.label_rule)  # type: ignore[call-arg]
    return plan
