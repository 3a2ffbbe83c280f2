"""What Prometheus is told of a training."""

from collections.abc import Sequence
from typing import Any


class TrainingMetrics:
    """Metrics of a run that Ray exports, with the URI of the run's folder as their label.

    One worker notes them for all.

    Args:
        run: URI of the run's folder.
    """

    def __init__(self, run: str):
        from ray.util.metrics import Counter, Gauge

        tags = {"tag_keys": ("run",)}
        self._samples = Counter("ddray_train_samples_total", "Samples trained on.", **tags)
        self._step = Gauge("ddray_train_step", "The last step.", **tags)
        self._loss = Gauge("ddray_train_loss", "Loss of the log's last line.", **tags)
        for metric in (self._samples, self._step, self._loss):
            metric.set_default_tags({"run": run})

    def moved(self, step: int, samples: int, lines: Sequence[dict[str, Any]]) -> None:
        """Note a step, and the loss with every one: Ray drops a gauge that is not set again.

        Args:
            step: the last one.
            samples: that moved weights in it; none where it was skipped.
            lines: of the log so far.
        """
        self._step.set(step)
        if samples:
            self._samples.inc(samples)
        if lines:
            self._loss.set(lines[-1]["loss"])
