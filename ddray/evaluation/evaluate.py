"""How good images are: a student beside its teacher and the baselines, or anyone's images.

An evaluation is prepared (`planning`), features are made shard by shard (`making`), and judged
(`judging`) and looked at (`look`) in the end. Here it happens in one process; on a cluster
`ddray.runtime.evaluating` has a pool make the features. Every figure comes with its protocol. The
page is made in `ddray.evaluation.report`.
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from threadpoolctl import threadpool_limits

from ddray import __version__
from ddray.config.base import reserved_device
from ddray.config.evaluation import EvaluateConfig
from ddray.evaluation.feature_set import FeatureSet
from ddray.evaluation.generators import Generators
from ddray.evaluation.judges import Judge, leading_of
from ddray.evaluation.judging import Judgement, add_ratio
from ddray.evaluation.look import Look
from ddray.evaluation.making import FeatureMaker, fill_here
from ddray.evaluation.plan import Generator
from ddray.evaluation.planning import Preparation
from ddray.evaluation.published_tables import published_rows
from ddray.evaluation.rows import NAIVE, RECONSTRUCTION
from ddray.metrics.fd_digits import DigitsNetwork
from ddray.metrics.frechet import FeatureStatistics
from ddray.models.zoo import METRIC_FOLDER
from ddray.storage import open_storage


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured.

    Attributes:
        summary: everything but the pictures, as JSON values; see docs/evaluating.md.
        pictures: float32 [10, C, H, W] in [0, 1] by row, same conditions and noise.
        columns: what the pictures show, each a class or caption.
    """

    summary: dict[str, Any]
    pictures: list[tuple[str, npt.NDArray[np.float32]]]
    columns: tuple[str, ...]

    @property
    def quality(self) -> list[dict[str, Any]]:
        """Rows of the table."""
        rows: list[dict[str, Any]] = self.summary["quality"]
        return rows


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Measure in this process.

    Args:
        config: the job.

    Returns:
        Quality, speed, transport figures and pictures.

    Raises:
        ConfigError: for models that do not belong together, metrics that cannot come out, images
            that cannot be judged.
        StorageError: if the URI cannot be written.
        DDRayError: for models, weights, references or images that cannot be read.
    """
    started = time.monotonic()
    open_storage(config.out).check_writable()
    device = reserved_device(config.num_gpus)
    prepared = Preparation(config, device)
    torch.set_num_threads(prepared.plan.threads)
    features = prepared.begin()
    generators = Generators(features, device, **prepared.models)
    fill_here("evaluation", features, FeatureMaker(features, device, generators))
    return conclude(config, features, prepared.judges, started, generators)


def conclude(
    config: EvaluateConfig,
    features: FeatureSet,
    judges: Sequence[Judge],
    started: float | None = None,
    generators: Generators | None = None,
) -> Evaluation:
    """Judge an evaluation whose features are all there, and look at its rows.

    Args:
        config: the job.
        features: of all images.
        judges: what was prepared.
        started: when the work began, by `time.monotonic`.
        generators: its models; None = loaded here.

    Raises:
        ConfigError: for images that cannot be judged.
        ShardError: if features are missing or damaged.
    """
    began = time.monotonic() if started is None else started
    device, plan = reserved_device(config.num_gpus), features.plan
    generators = generators or Generators(features, device)
    # NumPy takes as many threads as its process is given, whatever PyTorch is told.
    with threadpool_limits(plan.threads, user_api="blas"):
        judgement = Judgement(
            *(features, judges, generators),
            splits=config.splits,
            skip_broken=config.skip_broken,
            device=device,
        )
    look = Look(config, generators)
    published = _published(generators)
    models = plan.models and generators.model_of(plan.generators[-1])
    names = class_names(models.config, published) if models else []
    speed = look.speed()
    quality, leading = judgement.quality, leading_of(judges)
    add_ratio(quality, leading)
    _add_seconds(quality, speed)
    transport = look.transport() if models else None
    pictures = look.pictures() if models else []
    settings = settings_of(config, features, judges, judgement, device)
    summary = {
        "quality": quality,
        "leading": leading,
        "speed": speed,
        "transport": transport,
        "worst_classes": judgement.worst_classes(names),
        "published": published,
        "protocol": protocol_of(config, features, judges, judgement, transport, settings),
        "settings": settings,
        "seconds": round(time.monotonic() - began, 1),
    }
    shown = [(name, images.numpy()) for name, images in pictures]
    return Evaluation(summary, shown, look.columns(names) if models else ())


def class_names(config: Mapping[str, Any], published: Sequence[object]) -> list[str]:
    """Names of a model's classes: its own, or for a model of the catalog those of ImageNet."""
    names = config.get("class_names", ())
    if not names and published:
        from torchvision.models import ResNet18_Weights

        names = ResNet18_Weights.DEFAULT.meta["categories"]
    return [str(name) for name in names]


def _add_seconds(quality: list[dict[str, Any]], speed: Sequence[Mapping[str, Any]]) -> None:
    """Of an image, at the largest batch that was timed."""
    timed = {row["generator"]: row for row in speed}
    for row in quality:
        rates = timed.get(row["generator"], {})
        sizes = [int(key.removeprefix("batch_")) for key in rates if key.startswith("batch_")]
        row["seconds_per_image"] = 1 / rates[f"batch_{max(sizes)}"] if sizes else None


def _published(generators: Generators) -> list[dict[str, Any]]:
    roles = [role for role in ("teacher", "student") if role in generators.plan.models]
    found = (published_rows(getattr(generators, role).config) for role in roles)
    return next((rows for rows in found if rows), [])


def settings_of(
    config: EvaluateConfig,
    features: FeatureSet,
    judges: Sequence[Judge],
    judgement: Judgement,
    device: str,
) -> dict[str, Any]:
    """What two evaluations must share for their distances to be compared."""
    plan = features.plan
    shown = [row for row in plan.generators if row.kind != "reference"]
    found: dict[str, Any] = {"count": max(row.count for row in shown)}
    if plan.models:
        found |= {"labels": config.labels, "classes": len({*plan.classes}) or None}
        found |= {"seed": plan.seed, **plan.models}
        found |= {f"{role}_sha256": sha[:16] for role, sha in plan.fingerprints.items()}
        found |= {"dtype": plan.dtype, "decode_dtype": plan.decode_dtype}
    else:
        found |= {"samples": config.samples, "size": config.size, "convert": config.convert}
    first = judges[0]
    found |= {
        "network": ", ".join(judge.extractor.name for judge in judges),
        "extractor": ", ".join(judge.extractor.fingerprint[:16] for judge in judges),
        "reference": ", ".join(
            judge.reference.uri for judge in judges if judge.reference is not None
        ),
        "reference_images": next(iter(judgement.reference_images.values()), 0) or None,
        "reference_sha256": ", ".join(map(_digest, judgement.references.values())) or None,
        "resize": config.resize if "inception" in first.extractor.name else None,
        "splits": config.splits if "is" in first.metrics else None,
        "rounding": "nearest of 256 levels",
        "batch_size": plan.batch_size,
        "threads": plan.threads,
        "device": device,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "ddray_version": __version__,
    }
    return {name: value for name, value in found.items() if value is not None}


def _digest(statistics: FeatureStatistics) -> str:
    """The same for the same statistics, whichever file they come from."""
    data = statistics.mean.tobytes() + statistics.covariance.tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def protocol_of(
    config: EvaluateConfig,
    features: FeatureSet,
    judges: Sequence[Judge],
    judgement: Judgement,
    transport: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
) -> list[str]:
    """How the figures came about, in sentences."""
    plan = features.plan
    kinds = {row.kind for row in plan.generators}
    said = [_of_images(config, features)]
    said += [_of_judge(judge, config, judgement) for judge in judges]
    if any("class_accuracy" in judge.metrics for judge in judges):
        said.append(
            "class_accuracy: share of images that the classifier takes for the class asked for."
        )
    if "independent" in kinds:
        said.append(
            f"{NAIVE}: each token drawn alone from the teacher's frequencies at its position and "
            "class."
        )
    teachers = [row.name for row in plan.generators if row.kind == "teacher"]
    if len(teachers) > 1:
        said.append("Ratio: to the best of the teacher's rows.")
    if "skip" in kinds:
        said.append("Last steps in one: their tokens are drawn each by itself, in one pass.")
    if "reconstruction" in kinds:
        said.append(f"{RECONSTRUCTION}: of the held-out digits in 2 other augmentations.")
    if transport is not None:
        said.append(
            f"Transport: tokens equal to the float64 map's, in {transport['images']} images of the "
            "teacher; its cost is the time of trajectories over that of plain sampling of the same "
            "images, in turn, at an actor's default batch and threads."
        )
    if config.speed_batches and plan.models:
        said.append(
            f"Speed: from conditions to pixels in one process with {plan.threads} threads on "
            f"{settings['device']}, {plan.dtype}; median of repeated runs after a warm-up."
        )
    return said


def _of_images(config: EvaluateConfig, features: FeatureSet) -> str:
    plan = features.plan
    if not plan.models:
        row = next(g for g in plan.generators if g.kind == "samples")
        return (
            f"{row.count} images of {row.settings['source']}, rounded to 8 bits as they lie there."
        )
    row = plan.generators[-1]
    turn = "captions in their order"
    if plan.conditioning == "class":
        turn = _turn(config, plan.classes, row)
    sampling = next(
        (g.settings for g in plan.generators if g.kind in ("teacher", "transport")), None
    )
    told = "no teacher"
    if sampling:
        off = {"top_k": 0, "top_p": 1.0}
        filters = ", ".join(
            f"{key} {'off' if sampling[key] == none else format(sampling[key], 'g')}"
            for key, none in off.items()
        )
        told = (
            f"teacher {plan.models['teacher']} at guidance {sampling['cfg']:g}, {filters}, "
            f"temperature {sampling['temperature']:g}"
        )
    return (
        f"{row.count} images of every generator, {turn}, seed {plan.seed}, indices 0 to "
        f"{row.count - 1}; {told}; student by argmax of its logits head, weighed with its code "
        "head at its own precision."
    )


def _turn(config: EvaluateConfig, classes: Sequence[int], row: Generator) -> str:
    """Which classes, in which order."""
    present = sorted({*classes[: row.count]} if config.labels == "balanced" else {*classes})
    order = {"balanced": "in turn", "random": "drawn at random"}
    told = f"{len(present)} classes"
    if len(present) <= 20:
        told = f"classes {', '.join(map(str, present))}"
    return f"{told} {order.get(config.labels, 'one after the other')}"


def _of_judge(judge: Judge, config: EvaluateConfig, judgement: Judgement) -> str:
    """What a network's distances are between."""
    extractor, reference = judge.extractor, judge.reference
    if extractor.name == "digits":
        network = DigitsNetwork(METRIC_FOLDER)
        card = network.card
        return (
            "fd_digits: Frechet distance between 64 features of the bundled digit classifier "
            f"(weights {extractor.fingerprint[:12]}, {card['held_out_accuracy']:.1%} right on "
            "held-out digits) for the generated images and for 1000 held-out MNIST digits in 5 "
            f"fixed augmentations ({network.reference.statistics['pool'].count} images). It is not "
            "FID. Two disjoint halves of the held-out digits are "
            f"{card['fd_digits_of_disjoint_halves']:.2f} apart."
        )
    told = f"{', '.join(judge.metrics)}: features of {extractor.name} (weights "
    told += f"{extractor.fingerprint[:12]})"
    if extractor.any_weights and "inception" in extractor.name:
        told += ", which may not be those of FID"
    if reference is not None:
        images = judgement.reference_images[extractor.name]
        told += f"; reference {reference.uri}" + (f" ({images} images)" if images else "")
    if "is" in judge.metrics:
        splits = {"adm": "of 5000 in order", "torch-fidelity": "ten, shuffled"}[config.splits]
        told += f"; splits of the score: {splits}"
    return told + "."
