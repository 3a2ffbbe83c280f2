"""How good images are: features and the distances between them; a file a metric.

`ddray.evaluation.evaluate` takes them, `ddray.evaluation.report` shows them.
"""

from ddray.metrics.frechet import frechet_distance

__all__ = ["frechet_distance"]
