"""What is seen of the rows beside their metrics: speed, pictures, how exact the transport is.

It takes a device for itself, after all images are made. Plain torch.

Shapes: B batch, C channels, H and W pixels.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddray.config.evaluation import EvaluateConfig
from ddray.config.sampling import SampleConfig
from ddray.evaluation.generators import Generators
from ddray.evaluation.plan import SOURCES, Generator
from ddray.method.flow import Transport
from ddray.method.seeding import noise
from ddray.progress import Progress
from ddray.sets.batch_size import batch_size

PICTURE_COLUMNS = 10


class Look:
    """Measurements on the generators of an evaluation, in this process.

    Args:
        config: the job.
        generators: its models.
    """

    def __init__(self, config: EvaluateConfig, generators: Generators):
        self._config, self._generators = config, generators
        shown = (*SOURCES, "reconstruction")
        self._rows = [g for g in generators.plan.generators if g.kind not in shown]

    def speed(self) -> list[dict[str, Any]]:
        """Images/s of every generator at each batch size, conditions to pixels."""
        rows: list[dict[str, Any]] = [{"generator": g.name, "steps": g.steps} for g in self._rows]
        sizes = self._config.speed_batches
        if not sizes:
            return []
        with Progress("speed", len(sizes) * len(rows), "figures") as bar:
            for size in sizes:
                for row, generator in zip(rows, self._rows, strict=True):
                    row[f"batch_{size}"] = self._rate(generator, size)
                    bar.advance_to(bar.done + 1)
        return rows

    def _rate(self, generator: Generator, size: int) -> float:
        """Images/s: the median of at least three runs after a warm-up."""
        asked, index = self._generators.asked(range(size)), torch.arange(size)
        times: list[float] = []
        began = time.perf_counter()
        while len(times) < 4 or time.perf_counter() - began < self._config.speed_seconds:
            start = time.perf_counter()
            # A device works on behind the call.
            self._generators.images(generator, asked, index).cpu()
            times.append(time.perf_counter() - start)
        return size / statistics.median(times[1:])

    def pictures(self) -> list[tuple[str, Tensor]]:
        """Images [10, C, H, W] of every row; transport and student start from the same noise."""
        count = min(PICTURE_COLUMNS, self._config.num_images)
        asked, index = self._generators.asked(range(count)), torch.arange(count)
        return [(g.name, self._generators.images(g, asked, index).cpu()) for g in self._rows]

    def columns(self, names: Sequence[str | None]) -> tuple[str, ...]:
        """What stands above the pictures: classes, by name where there are names, or captions."""
        count = min(PICTURE_COLUMNS, self._config.num_images)
        found = self._generators.told(range(count))
        return tuple(
            str((names[k] if isinstance(k, int) and k < len(names) else None) or k) for k in found
        )

    def transport(self) -> dict[str, Any] | None:
        """Agreement of the default transport with the exact map under the teacher's distributions.

        Also its cost: the time of trajectories over that of plain sampling of the same images,
        alternated. None where no row is the teacher's by transport.
        """
        rows = [g for g in self._rows if g.kind == "transport"]
        count, plan = self._config.transport_count, self._generators.plan
        if not rows or not count:
            return None
        teacher, cfg = self._generators.teacher, rows[0].settings["cfg"]
        shape = (teacher.num_tokens, teacher.codebook.shape[1])
        agree = total = 0
        default, exact = Transport(teacher.codebook), Transport(teacher.codebook, "exact")
        for first in range(0, count, 50):
            index = torch.arange(first, min(first + 50, count))
            asked = self._generators.asked(range(first, min(first + 50, count)))
            tokens = teacher.trajectories(asked, index, seed=plan.seed, cfg=cfg)
            logits = teacher.guided_logits(asked, tokens, cfg)
            start = noise(plan.seed, index, shape, logits.device).flatten(0, 1)
            same = default(start, logits.flatten(0, 1)) == exact(start, logits.flatten(0, 1))
            agree, total = agree + int(same.sum()), total + len(same)
        return {
            "solver": default.solver,
            "num_evals": default.num_evals,
            "images": count,
            "tokens": total,
            "agreement": agree / total,
            "cost_ratio": self._transport_cost(cfg),
        }

    def _transport_cost(self, cfg: float | None) -> float:
        """Time of trajectories over that of plain sampling, in turn, as an actor runs them."""
        actor, teacher = SampleConfig(), self._generators.teacher
        rows = min(batch_size(actor, teacher.model), self._config.num_images)
        asked, index = self._generators.asked(range(rows)), torch.arange(rows)
        seed, threads = self._generators.plan.seed, torch.get_num_threads()
        torch.set_num_threads(actor.threads)
        try:
            ratios = []
            for _ in range(5):
                start = time.perf_counter()
                teacher.sample(asked, cfg=cfg, seed=seed, index=index).cpu()
                middle = time.perf_counter()
                teacher.trajectories(asked, index, cfg=cfg, seed=seed).cpu()
                ratios.append((time.perf_counter() - middle) / (middle - start))
        finally:
            torch.set_num_threads(threads)
        return statistics.median(ratios)
