"""A student beside its teacher: quality against real digits, speed, and how exact the transport is.

Every figure is measured here, with its protocol. Plain torch. The page that shows the result is
made in ddray.evaluation.report.

Shapes: N images, L tokens, V codebook size, E code width.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddray.config.base import decoder_dtype, reserved_device
from ddray.config.evaluation import EvaluateConfig
from ddray.config.sampling import SampleConfig
from ddray.errors import ConfigError
from ddray.method.flow import Transport
from ddray.method.guidance import draw
from ddray.method.schedule import Schedule, num_steps, parse_schedule
from ddray.method.seeding import noise, uniforms
from ddray.method.student import Student
from ddray.method.teacher import Teacher
from ddray.metrics.digits import load_digits, reference_digits
from ddray.metrics.fd_digits import DigitsMetric, makes_digits
from ddray.models.zoo import METRIC_FOLDER, load_student, load_teacher
from ddray.progress import Progress
from ddray.sets.batch_size import batch_size
from ddray.sets.trajectories.trajectory_set import TrajectorySet

PICTURE_COLUMNS = 10

# What a decoder makes of so many images fits into a CPU's caches.
_DECODE = 64

RECONSTRUCTION = "tokenizer reconstruction"
AUTOREGRESSIVE = "teacher, autoregressive"
TRANSPORTED = "teacher, by transport"
NAIVE = "independent tokens"


def student_name(schedule: Schedule) -> str:
    """Name of a student's row."""
    steps = num_steps(schedule)
    return f"student, {steps} step{'s' if steps > 1 else ''}"


def _kind(generator: str) -> str:
    """What a row is of, by its name."""
    kinds = {
        RECONSTRUCTION: "reconstruction",
        AUTOREGRESSIVE: "teacher",
        TRANSPORTED: "transport",
        NAIVE: "independent",
    }
    return kinds.get(generator, "student")


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured.

    Attributes:
        quality: rows with generator, steps, fd_digits, class_accuracy, ratio (of fd_digits to the
            teacher's).
        speed: rows with generator and images/s by batch size.
        transport: agreement of the default transport with the exact map, and what it costs.
        pictures: images [10, 1, 28, 28] of every generator, same classes and noise.
        classes: of these images.
        protocol: sentences that say how the figures came about.
        seconds: what it took.
    """

    quality: list[dict[str, Any]]
    speed: list[dict[str, Any]]
    transport: dict[str, Any]
    pictures: list[tuple[str, Tensor]]
    protocol: list[str]
    classes: tuple[int, ...] = tuple(range(PICTURE_COLUMNS))
    seconds: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def columns(self) -> tuple[str, ...]:
        """What stands above the pictures: their classes."""
        return tuple(map(str, self.classes))

    @property
    def shown(self) -> list[tuple[str, npt.NDArray[np.float32]]]:
        """The pictures as arrays."""
        return [(name, images.numpy()) for name, images in self.pictures]

    def summary(self) -> dict[str, Any]:
        """Everything but the pictures, as JSON values."""
        largest = max(
            (key for key in self.speed[0] if key.startswith("batch_")),
            key=lambda key: int(key.removeprefix("batch_")),
        )
        seconds = {row["generator"]: 1 / row[largest] for row in self.speed}
        quality = [
            {
                **row,
                "kind": _kind(row["generator"]),
                "settings": {},
                "seconds_per_image": seconds.get(row["generator"]),
                "warnings": [],
            }
            for row in self.quality
        ]
        shown = ("student", "teacher", "count", "seed", "cfg", "dtype", "num_gpus")
        return {
            "quality": quality,
            "leading": "fd_digits",
            "speed": self.speed,
            "transport": self.transport,
            "worst_classes": {},
            "published": [],
            "protocol": self.protocol,
            "settings": {key: self.settings[key] for key in shown if key in self.settings},
            "seconds": round(self.seconds, 1),
        }


def in_batches(
    make: Callable[[Tensor, Tensor], Tensor],
    labels: Tensor,
    index: Tensor,
    batch_size: int,
    label: str,
) -> Tensor:
    """Apply make(labels, index) batch by batch, with progress."""
    parts = []
    with Progress(label, len(labels), "images") as bar:
        bar.begin()
        for rows in zip(labels.split(batch_size), index.split(batch_size), strict=True):
            parts.append(make(*rows))
            bar.advance_to(bar.done + len(rows[0]))
    return torch.cat(parts)


def independent_tokens(
    known: tuple[Tensor, Tensor], labels: Tensor, index: Tensor, seed: int, vocab_size: int
) -> Tensor:
    """The naive one-step baseline: tokens from the teacher's marginals by position and class.

    Args:
        known: classes [M] and tokens [M, L] that the teacher made; their counts are the marginals.
        labels: classes wanted [N].
        index: sample indices [N].
        seed: of the draws.
        vocab_size: V.

    Returns:
        int64 tokens [N, L].

    Raises:
        ConfigError: for a class that the teacher made nothing of.
    """
    known_labels, known_tokens = known
    unknown = sorted({*labels.tolist()} - {*known_labels.tolist()})
    if unknown:
        raise ConfigError(f"there are no trajectories of class {unknown[0]} to count tokens in")
    uniform_NL = uniforms(seed, index, known_tokens.shape[1])
    tokens = torch.empty(uniform_NL.shape, dtype=torch.long)
    for digit in labels.unique():
        sequences = known_tokens[known_labels == digit]
        counts_LV = torch.zeros(known_tokens.shape[1], vocab_size)
        counts_LV.scatter_add_(1, sequences.T, torch.ones(sequences.T.shape))
        rows = (labels == digit).nonzero().squeeze(1)
        logits = counts_LV.log()[None].expand(len(rows), -1, -1)
        tokens[rows] = draw(logits, uniform_NL[rows])
    return tokens


def _load(config: EvaluateConfig) -> tuple[Student, Teacher, DigitsMetric]:
    device = reserved_device(config.num_gpus)
    dtypes = {"dtype": config.dtype, "decode_dtype": decoder_dtype(config.dtype)}
    student = load_student(config.student, device=device, **dtypes)
    name = config.teacher or student.config.get("teacher")
    if not name:
        raise ConfigError(f"{config.student} does not name its teacher; give teacher=")
    teacher = load_teacher(name, device=device, **dtypes)
    if student.tokenizer.fingerprint != teacher.tokenizer.fingerprint:
        raise ConfigError(f"{config.student} and {name} have different tokenizers")
    if not makes_digits(teacher):
        raise ConfigError(
            f"{name} does not make grey 28x28 digits of ten classes; fd_digits is defined on those"
        )
    return student, teacher, DigitsMetric(METRIC_FOLDER)


class Evaluator:
    """Generators of one student and its teacher, and the measurements on them.

    Args:
        config: the job.
    """

    def __init__(self, config: EvaluateConfig):
        self.config = config
        self.student, self.teacher, self.metric = _load(config)
        self.cfg = self.teacher.default_cfg if config.cfg is None else config.cfg
        stages = len(self.student.stages)
        trained = tuple(self.student.config.get("schedule", (0,)))
        prefixes = [trained[:n] for n in range(1, len(trained) + 1)]
        self.schedules = [parse_schedule(prefix, stages) for prefix in prefixes]
        self.trajectories = self._trajectories()
        # A set may lack classes, or be too short to have them all, and so may few images: then
        # nothing is asked for them.
        self.cycle = torch.arange(min(self.teacher.num_classes, config.count))
        if self.trajectories is not None:
            plan = self.trajectories.plan
            turn = min(len(plan.classes) or plan.num_classes, plan.count)
            self.cycle = torch.from_numpy(plan.label(np.arange(turn))).long()
        self.index = torch.arange(config.count)
        self.labels = self.labels_of(config.count)

    @property
    def dtype(self) -> str:
        """That the networks run in."""
        return str(next(self.student.model.parameters()).dtype).removeprefix("torch.")

    def _trajectories(self) -> TrajectorySet | None:
        """The set for the rows of the table that need one; None where none is given."""
        if self.config.data is None:
            return None
        trajectories = TrajectorySet.open(self.config.data)
        teacher, dtype = self.teacher, trajectories.plan.dtype
        if dtype != self.dtype:  # a fingerprint is of the weights in the dtype that computes
            teacher = load_teacher(teacher.name, device="cpu", dtype=dtype)
        if trajectories.plan.teacher_fingerprint != teacher.fingerprint:
            raise ConfigError(f"{self.config.data} was not sampled from {self.teacher.name}")
        if trajectories.plan.count < 2:
            raise ConfigError(
                f"{self.config.data} has one row, and a Frechet distance needs at least 2 images"
            )
        return trajectories

    def labels_of(self, count: int) -> Tensor:
        """The first classes that images are asked for by, int64 [count]: all in turn."""
        return self.cycle[torch.arange(count) % len(self.cycle)]

    def autoregressive(self, labels: Tensor, index: Tensor) -> Tensor:
        """Tokens by plain sampling."""
        return self.teacher.sample(labels, cfg=self.cfg, seed=self.config.seed, index=index)

    def transported(self, labels: Tensor, index: Tensor) -> Tensor:
        """Tokens by transport of the noise the student gets."""
        return self.teacher.trajectories(labels, index, cfg=self.cfg, seed=self.config.seed)

    def jump(self, schedule: Schedule) -> Callable[[Tensor, Tensor], Tensor]:
        """Codes by the student along a schedule."""
        stages = [step for step in schedule if isinstance(step, int)]
        return lambda labels, index: self.student.generate(
            labels, index=index, seed=self.config.seed, schedule=stages
        )

    @cached_property
    def known(self) -> tuple[Tensor, Tensor]:
        """Classes and tokens the teacher made by transport: the set's first rows, or fresh ones."""
        trajectories = self.trajectories
        if trajectories is None:
            tokens = in_batches(
                self.transported, self.labels, self.index, self.config.batch_size, TRANSPORTED
            )
            return self.labels, tokens.cpu()
        # The naive baseline gets all the rows there are: its marginals should not be noisy.
        _, labels, stored = trajectories.rows(0, trajectories.plan.count)
        return torch.from_numpy(labels).long(), torch.from_numpy(stored.astype("int64"))

    def quality(self) -> list[dict[str, Any]]:
        """One row a generator: Frechet distance, class accuracy, ratio to the teacher."""
        config = self.config
        rows: list[dict[str, Any]] = []

        def judge(name: str, steps: int | None, content: Tensor, labels: Tensor) -> None:
            images = torch.cat([self.teacher.decode(part) for part in content.split(_DECODE)])
            row = {"generator": name, "steps": steps, "images": len(labels)}
            rows.append({**row, **self.metric(images.cpu(), labels)})

        known = self.known
        try:
            # Other augmentations than the reference has: its own images would flatter.
            digits = reference_digits(load_digits()[1], copies=2, seed=1)
        except ConfigError:
            # Without the real digits this row alone is missing: the other statistics are bundled.
            pass
        else:
            # No more of them than of other images, and of the same classes: they lie in order.
            asked = torch.isin(digits.labels, self.cycle)
            every = max(1, int(asked.sum()) // config.count)
            images, labels = digits.images[asked][::every], digits.labels[asked][::every]
            tokens = [self.teacher.encode(part).cpu() for part in images.split(250)]
            judge(RECONSTRUCTION, None, torch.cat(tokens), labels)
            used = len(torch.cat(tokens).unique())
            rows[-1]["codes_used"] = used / len(self.teacher.codebook)
        make = (self.autoregressive, self.labels, self.index, config.batch_size, AUTOREGRESSIVE)
        judge(AUTOREGRESSIVE, len(self.teacher.stages), in_batches(*make), self.labels)
        count = min(config.count, len(known[0]))
        judge(TRANSPORTED, len(self.teacher.stages), known[1][:count], known[0][:count])
        for schedule in self.schedules:
            name = student_name(schedule)
            codes = in_batches(
                self.jump(schedule), self.labels, self.index, config.batch_size, name
            )
            judge(name, num_steps(schedule), codes, self.labels)
        vocab_size = len(self.teacher.codebook)
        naive = independent_tokens(known, self.labels, self.index, config.seed, vocab_size)
        judge(NAIVE, 1, naive, self.labels)
        base = next(row["fd_digits"] for row in rows if row["generator"] == AUTOREGRESSIVE)
        return [{**row, "ratio": row["fd_digits"] / base} for row in rows]

    def speed(self) -> list[dict[str, Any]]:
        """Images/s of every generator at each batch size, classes to pixels, in this process."""
        makers: list[tuple[str, int, Callable[[Tensor, Tensor], Tensor]]] = [
            (AUTOREGRESSIVE, len(self.teacher.stages), self.autoregressive),
            (TRANSPORTED, len(self.teacher.stages), self.transported),
            *((student_name(s), num_steps(s), self.jump(s)) for s in self.schedules),
        ]
        rows: list[dict[str, Any]] = [{"generator": name, "steps": n} for name, n, _ in makers]
        timed = Progress("speed", len(self.config.speed_batches) * len(makers), "figures")
        with timed as bar:
            for size in self.config.speed_batches:
                for row, (_, _, make) in zip(rows, makers, strict=True):
                    row[f"batch_{size}"] = self._rate(make, size)
                    bar.advance_to(bar.done + 1)
        return rows

    def _rate(self, make: Callable[[Tensor, Tensor], Tensor], size: int) -> float:
        """Images/s: the median of at least three runs after a warm-up."""
        labels, index = self.labels_of(size), torch.arange(size)
        times: list[float] = []
        began = time.perf_counter()
        while len(times) < 4 or time.perf_counter() - began < self.config.speed_seconds:
            start = time.perf_counter()
            self.teacher.decode(make(labels, index)).cpu()  # a device works on behind the call
            times.append(time.perf_counter() - start)
        return size / statistics.median(times[1:])

    def transport(self) -> dict[str, Any]:
        """Agreement of the default transport with the exact map under the teacher's distributions.

        Also its cost: the time of trajectories over that of plain sampling of the same images,
        alternated.
        """
        count = self.config.transport_count
        labels, index = self.labels_of(count), torch.arange(count)
        shape = (self.teacher.num_tokens, self.teacher.codebook.shape[1])
        agree = total = 0
        default, exact = Transport(self.teacher.codebook), Transport(self.teacher.codebook, "exact")
        for rows in zip(labels.split(50), index.split(50), strict=True):
            logits = self.teacher.guided_logits(rows[0], self.transported(*rows), self.cfg)
            start = noise(self.config.seed, rows[1], shape, logits.device).flatten(0, 1)
            same = default(start, logits.flatten(0, 1)) == exact(start, logits.flatten(0, 1))
            agree, total = agree + int(same.sum()), total + len(same)
        return {
            "solver": default.solver,
            "num_evals": default.num_evals,
            "tokens": total,
            "agreement": agree / total,
            "cost_ratio": self._transport_cost(),
        }

    def _transport_cost(self) -> float:
        """Time of trajectories over that of plain sampling, in turn, as an actor runs them."""
        actor = SampleConfig()
        rows = batch_size(actor, self.teacher.model)
        labels, index = self.labels[:rows], self.index[:rows]
        threads = torch.get_num_threads()
        torch.set_num_threads(actor.threads)
        try:
            ratios = []
            for _ in range(5):
                start = time.perf_counter()
                self.autoregressive(labels, index).cpu()
                middle = time.perf_counter()
                self.transported(labels, index).cpu()
                ratios.append((time.perf_counter() - middle) / (middle - start))
        finally:
            torch.set_num_threads(threads)
        return statistics.median(ratios)

    def pictures(self) -> list[tuple[str, Tensor]]:
        """One image a class of every generator; transport and student start from the same noise."""
        labels, index = self.labels_of(PICTURE_COLUMNS), torch.arange(PICTURE_COLUMNS)
        rows = [
            (AUTOREGRESSIVE, self.autoregressive(labels, index)),
            (TRANSPORTED, self.transported(labels, index)),
            *((student_name(s), self.jump(s)(labels, index)) for s in self.schedules),
            (
                NAIVE,
                independent_tokens(
                    self.known, labels, index, self.config.seed, len(self.teacher.codebook)
                ),
            ),
        ]
        return [(name, self.teacher.decode(content).cpu()) for name, content in rows]

    def protocol(self) -> list[str]:
        """How the figures came about."""
        config, card = self.config, self.metric.card
        present = sorted({*self.cycle.tolist()})
        turn = "classes in turn"
        if len(present) < self.teacher.num_classes:
            reason = "for so few images" if self.trajectories is None else "as the set has them"
            turn = (
                f"classes {', '.join(map(str, present))} in turn, {reason} (the "
                "reference has all ten, so distances are larger; ratios compare like with like)"
            )
        return [
            f"{config.count} images of every generator, {turn}, seed {config.seed}, "
            f"indices 0 to {config.count - 1}; teacher {self.teacher.name} at guidance "
            f"{self.cfg:g}, top_k off, top_p off, temperature 1; student by argmax of its logits "
            f"head, weighed with its code head at precision {self.student.code_precision:g}.",
            "fd_digits: Frechet distance between 64 features of the bundled digit classifier "
            f"(weights {self.metric.fingerprint[:12]}, {card['held_out_accuracy']:.1%} right on "
            "held-out digits) for the generated images and for 1000 held-out MNIST digits in 5 "
            f"fixed augmentations ({self.metric.reference.count} images). It is not FID. Two "
            "disjoint halves of the held-out digits are "
            f"{card['fd_digits_of_disjoint_halves']:.2f} apart.",
            "class_accuracy: share of images that the classifier takes for the class asked for.",
            f"{NAIVE}: each token drawn alone from the teacher's frequencies at its position and "
            "class.",
            f"{RECONSTRUCTION}: of the held-out digits in 2 other augmentations.",
            f"Transport: tokens equal to the float64 map's, in {config.transport_count} images of "
            "the teacher; its cost is the time of trajectories over that of plain sampling of the "
            "same images, in turn, at an actor's default batch and threads.",
            f"Speed: from class ids to pixels in one process with {torch.get_num_threads()} "
            f"threads on {self.teacher.device.type}, {self.dtype}; median of repeated runs after a "
            "warm-up.",
        ]


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Measure a student beside its teacher.

    Args:
        config: the job.

    Returns:
        Quality, speed, transport figures and pictures.

    Raises:
        ConfigError: for models that do not belong together or do not make digits.
    """
    started = time.monotonic()
    evaluator = Evaluator(config)
    return Evaluation(
        quality=evaluator.quality(),
        speed=evaluator.speed(),
        transport=evaluator.transport(),
        pictures=evaluator.pictures(),
        classes=tuple(evaluator.labels_of(PICTURE_COLUMNS).tolist()),
        protocol=evaluator.protocol(),
        seconds=time.monotonic() - started,
        settings=config.model_dump(mode="json"),
    )
