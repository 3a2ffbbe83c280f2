"""Looking at a set: what it holds, whether it is whole, moving aside what is not.

Shapes: N rows, V codes.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from ddray.errors import ConfigError, ShardError
from ddray.progress import Progress
from ddray.sets.captions import read_captions
from ddray.sets.images.image_set import ImageSet
from ddray.sets.images.plan import ImagePlan
from ddray.sets.images.shard import ImageRows
from ddray.sets.makers import makers_of
from ddray.sets.plan import SetPlan
from ddray.sets.sharded_set import VerifyReport, manifest_kind, shard_name
from ddray.sets.trajectories.shard import Rows
from ddray.sets.trajectories.trajectory_set import TrajectorySet

# Missing shards that are named.
_NAMED = 10
# Shards are read for statistics until they hold so many rows, or are so many.
_ROWS_LOOKED_AT, _SHARDS_LOOKED_AT = 20_000, 64


AnySet = TrajectorySet | ImageSet


def open_set(uri: str) -> AnySet:
    """Open a set of either kind.

    Raises:
        ShardError: if there is no set.
        StorageError: if it cannot be read.
    """
    if manifest_kind(uri) == ImagePlan.KIND:
        return ImageSet.open(uri)
    return TrajectorySet.open(uri)


def describe(uri: str) -> dict[str, Any]:
    """Plan, progress, size, label balance and token statistics of a set, as JSON values.

    Lists the storage and reads some shards of tokens, at most 64, chosen at random by the plan
    hash. Where these are all, labels are counted in them; else by the plan, whose function of the
    index they are.

    Raises:
        ShardError: if there is no set.
        StorageError: if it cannot be read.
    """
    opened = open_set(uri)
    plan, found = opened.plan, opened.listing()
    rows = sum(len(plan.shard_range(k)) for k in found.sizes)
    size = sum(found.sizes.values())
    told = {
        "uri": opened.uri,
        "plan_hash": plan.hash,
        **plan.shown(),
        "stages": len(plan.stages),
        "tokens_per_row": plan.num_tokens,
        "rows": rows,
        "rows_planned": plan.count,
        "shards": len(found.sizes),
        "shards_planned": plan.num_shards,
        "shards_missing": len(found.missing),
        "first_missing": found.missing[:_NAMED],
        "unexpected_files": len(found.unexpected),
        "bytes": size,
        "bytes_per_row": round(size / rows, 1) if rows else None,
        "made_by": [asdict(maker) for maker in makers_of(opened.storage)] or "unknown",
    }
    if isinstance(opened, ImageSet):
        return {**told, **_planned_labels(plan, found.sizes)}
    ratio = round(size / rows / plan.num_tokens / 2, 4) if rows else None
    return {**told, "ratio_to_2_bytes_per_token": ratio, **_contents(opened, list(found.sizes))}


def _contents(trajectories: TrajectorySet, shards: list[int]) -> dict[str, Any]:
    """Statistics of the rows of some of the shards that are there."""
    plan, num_rows, num_sound = trajectories.plan, 0, 0
    codes_V = np.zeros(plan.vocab_size, np.int64)
    classes = np.zeros(plan.num_classes, np.int64)
    damaged: dict[int, str] = {}
    for k in plan.random_choice().permutation(shards)[:_SHARDS_LOOKED_AT].tolist():
        if num_rows >= _ROWS_LOOKED_AT:
            break
        try:
            index, label, tokens = trajectories.read_shard(k)
        except ShardError as error:
            damaged[k] = str(error)
            continue
        num_rows, num_sound = num_rows + len(index), num_sound + 1
        codes_V += np.bincount(tokens.ravel(), minlength=plan.vocab_size)
        if plan.conditioning == "class":
            classes += np.bincount(label, minlength=plan.num_classes)
    labels = {"labels": _balance(classes, "in the shards")}
    if num_sound + len(damaged) < len(shards) or plan.conditioning == "text":
        labels = _planned_labels(plan, (k for k in shards if k not in damaged))
    return {
        "damaged": {shard_name(k): reason for k, reason in damaged.items()},
        **labels,
        "tokens": {"rows_looked_at": num_rows, **_usage(codes_V)} if num_rows else None,
    }


def _planned_labels(plan: SetPlan, shards: Iterable[int]) -> dict[str, Any]:
    """How often each class is in some shards by the plan; a set of captions has none."""
    if plan.conditioning == "text":
        return {"labels": None}
    return {"labels": _balance(_planned_classes(plan, shards), "by the plan")}


def _planned_classes(plan: SetPlan, shards: Iterable[int]) -> npt.NDArray[np.int64]:
    """Rows of each class in some shards, int64 [num_classes]."""
    classes = np.zeros(plan.num_classes, np.int64)
    for k in shards:
        label_N = plan.label(np.asarray(plan.shard_range(k)))
        classes += np.bincount(label_N, minlength=plan.num_classes)
    return classes


def _balance(classes: npt.NDArray[np.int64], counted: str) -> dict[str, Any] | None:
    present = np.flatnonzero(classes)
    if not len(present):
        return None
    least, most = present[classes[present].argmin()], present[classes[present].argmax()]
    return {
        "counted": counted,
        "classes_present": len(present),
        "least_frequent": {"class": int(least), "rows": int(classes[least])},
        "most_frequent": {"class": int(most), "rows": int(classes[most])},
    }


def _usage(codes_V: npt.NDArray[np.int64]) -> dict[str, Any]:
    """How evenly the codes are used; the entropy is that of one token, log2(V) at most."""
    share = codes_V[codes_V > 0] / codes_V.sum()
    most = int(codes_V.argmax())
    return {
        "codes_used": len(share),
        "codes": len(codes_V),
        "entropy_bits": round(float(-(share * np.log2(share)).sum()) + 0.0, 3),
        "entropy_bits_if_even": round(float(np.log2(len(codes_V))), 3),
        "most_frequent_code": most,
        "its_share": round(float(share.max()), 4),
    }


def verify(uri: str) -> list[str]:
    """Read every shard; what is wrong, a line each.

    Raises:
        ShardError: if there is no set.
        StorageError: if it cannot be read.
    """
    opened = open_set(uri)
    report, captions = examine(opened)
    return [
        *(f"missing: {opened.shard_name(k)}" for k in report.missing),
        *(f"missing: {name}" for name in opened.lacking()),
        *(f"damaged: {opened.shard_name(k)}: {reason}" for k, reason in report.damaged.items()),
        *(f"does not belong: {name}" for name in report.unexpected),
        *(f"captions of shard {k}: {reason}" for k, reason in captions.items()),
    ]


def examine(opened: AnySet) -> tuple[VerifyReport, dict[int, str]]:
    """Read every shard once, with its captions in a text set; progress goes to stderr.

    Returns:
        The report of `ShardedSet.verify`, and shard -> reason where the captions of a sound
        shard are missing, damaged or not the shard's.

    Raises:
        StorageError: if the set cannot be read.
    """
    captions: dict[int, str] = {}

    def compare(k: int, rows: Rows | ImageRows) -> None:
        label = rows.label if isinstance(rows, ImageRows) else rows[1]
        try:
            asked = read_captions(opened.storage, k, len(label))
            if list(asked.captions) != label.tolist():
                captions[k] = "they are not those of the shard's rows"
        except ShardError as error:
            captions[k] = str(error)

    report = verified(opened, compare if opened.plan.conditioning == "text" else None)
    return report, captions


def verified(opened: AnySet, look: Callable[[int, Any], None] | None = None) -> VerifyReport:
    """The report of `ShardedSet.verify`, with its progress on stderr."""
    with Progress("verify", opened.plan.num_shards, "shards") as bar:
        bar.begin()
        return opened.verify(bar.advance_to, look)


def trainable_shards(
    trajectories: TrajectorySet, *, allow_partial: bool = False, follow: bool = False
) -> list[int]:
    """Read the whole set and say which of its shards can be trained on.

    Args:
        trajectories: the set.
        allow_partial: take what is sound, and leave the rest.
        follow: shards may still be missing, but none may be damaged.

    Returns:
        The sound shards, in order.

    Raises:
        ConfigError: for both at once: what is missing cannot be left out and waited for.
        ShardError: if anything else is missing or damaged, or nothing is sound.
        StorageError: if the set cannot be read.
    """
    if allow_partial and follow:
        raise ConfigError(
            "allow_partial leaves missing shards out, follow waits for them: not both"
        )
    report, captions = examine(trajectories)
    damaged = {**captions, **report.damaged}
    if damaged and not allow_partial:
        k, reason = min(damaged.items())
        raise ShardError(
            f"{trajectories.uri} has {len(damaged)} damaged of {report.num_shards} shards, first "
            f"{shard_name(k)}: {reason}; run `ddray inspect {trajectories.uri} --repair` and "
            "`ddray sample`, or train on the sound ones with --allow-partial"
        )
    if report.missing and not (allow_partial or follow):
        raise ShardError(
            f"{trajectories.uri} lacks {len(report.missing)} of {report.num_shards} shards; finish "
            "it with `ddray sample`, train on what is there with --allow-partial, or as they come "
            "with --follow"
        )
    absent = {*report.missing, *damaged}
    sound = [k for k in range(report.num_shards) if k not in absent]
    if not sound and not follow:
        raise ShardError(f"{trajectories.uri} holds no sound shard to train on")
    return sound


def quarantine(opened: AnySet, report: VerifyReport) -> list[str]:
    """Move what a report calls damaged or unexpected to quarantine/; what was moved, a line each.

    Raises:
        StorageError: if it cannot be moved.
    """
    names = [*map(opened.shard_name, report.damaged), *report.unexpected]
    return [f"{name} moved to {opened.quarantine(name)}" for name in names]
