"""How good images are: features and the distances between them; a file a metric.

`measurement` is the way in: its table names every metric, and it makes them from features by
shards. `network` is what all feature networks have in common, `reference` reads the statistics of
real images. `fd_digits` is the network of grey digits.
"""

from ddray.metrics.frechet import frechet_distance

__all__ = ["frechet_distance"]
