"""Inception Score: how sure a classifier is of each image, and how many classes it sees in all.

Salimans et al., arXiv 1606.03498: exp(mean KL(p(class | image) || p(class))), the mean over splits
of the images. What is published under the name differs by the splits (docs/evaluating.md).

Shapes: N images, C classes, S splits.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddray.errors import ConfigError

_ADM_SPLIT = 5000
_FIDELITY_SPLITS, _FIDELITY_SEED = 10, 2020


def adm_splits(count: int) -> npt.NDArray[np.int64]:
    """The split of every image as ADM's evaluator has it: 5000 in a row, the last one shorter.

    Args:
        count: N.

    Returns:
        int64 [N].
    """
    return np.arange(count) // _ADM_SPLIT


def fidelity_splits(count: int) -> npt.NDArray[np.int64]:
    """The split of every image as torch-fidelity has it: ten equal ones, shuffled by a fixed seed.

    Args:
        count: N >= 10.

    Returns:
        int64 [N].

    Raises:
        ConfigError: for fewer images than splits.
    """
    if count < _FIDELITY_SPLITS:
        raise ConfigError(f"{_FIDELITY_SPLITS} splits need at least as many images, got {count}")
    splits = np.empty(count, np.int64)
    order = np.random.RandomState(_FIDELITY_SEED).permutation(count)
    bounds = [k * count // _FIDELITY_SPLITS for k in range(_FIDELITY_SPLITS + 1)]
    for k in range(_FIDELITY_SPLITS):
        splits[order[bounds[k] : bounds[k + 1]]] = k
    return splits


SPLITS = {"adm": adm_splits, "torch-fidelity": fidelity_splits}


@dataclass(frozen=True)
class ScoreSums:
    """What an Inception Score needs of images, in float64; sums of parts are those of the whole.

    Attributes:
        counts: int64 [S], images of each split.
        probabilities: float64 [S, C], sum of p.
        negentropies: float64 [S], sum of p log p.
    """

    counts: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float64]
    negentropies: npt.NDArray[np.float64]

    @classmethod
    def of(cls, logits: Tensor, splits: npt.NDArray[np.int64], num_splits: int) -> "ScoreSums":
        """Sums of logits [N, C].

        Args:
            logits: float [N, C].
            splits: int64 [N], the split that each image is in.
            num_splits: S.
        """
        log_p = logits.double().cpu().log_softmax(1)
        p = log_p.exp()
        of_row = (p * log_p).sum(1)
        counts = np.bincount(splits, minlength=num_splits)
        probabilities = np.zeros((num_splits, p.shape[1]))
        negentropies = np.zeros(num_splits)
        for k in np.unique(splits):
            rows = torch.from_numpy(splits == k)
            probabilities[k] = p[rows].sum(0).numpy()
            negentropies[k] = float(of_row[rows].sum())
        return cls(counts, probabilities, negentropies)

    def __add__(self, other: "ScoreSums") -> "ScoreSums":
        """Sums of both."""
        return ScoreSums(
            self.counts + other.counts,
            self.probabilities + other.probabilities,
            self.negentropies + other.negentropies,
        )

    def score(self) -> float:
        """The Inception Score, from 1 to C.

        Raises:
            ConfigError: if a split has no images.
        """
        if not self.counts.all():
            raise ConfigError(
                f"{int((self.counts == 0).sum())} of {len(self.counts)} splits of the Inception "
                "Score have no images"
            )
        marginal = self.probabilities / self.counts[:, None]
        # A class whose probability underflows everywhere adds nothing: the limit of q log q.
        logs = np.log(marginal, where=marginal > 0, out=np.zeros_like(marginal))
        divergence = self.negentropies / self.counts - (marginal * logs).sum(1)
        return float(np.exp(divergence).mean())
