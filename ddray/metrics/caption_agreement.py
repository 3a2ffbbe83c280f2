"""How well images fit the captions that they were asked for by: similarity, and retrieval.

Retrieval asks which of a hundred captions is nearest to an image: its own, and 99 others of the
same set, drawn once for all. Chance is 0.01. Captions of one embedding, such as two spellings of
the same words, are one caption.

Shapes: N images, U different captions, D features of an embedding.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.errors import ConfigError

CHOICES = 100
_BLOCK = 100  # images: a hundred embeddings each, of CLIP 80 MB in float64

Embed = Callable[[Sequence[str]], Tensor]
"""Captions to embeddings float [U, D], which are compared with those of images by their angle."""


def caption_scores(images: Tensor, captions: Tensor) -> Tensor:
    """Score of each image and its caption: 100 times the cosine, negative ones 0.

    On embeddings of CLIP this is the CLIP score (Hessel et al., arXiv 2104.08718).

    Args:
        images: embeddings float [N, D].
        captions: embeddings float [N, D], in the order of the images.

    Returns:
        float64 [N] in [0, 100]; the metric is the mean.

    Raises:
        ConfigError: for other numbers of images and captions.
    """
    if images.shape != captions.shape:
        raise ConfigError(
            f"{len(captions)} captions of {captions.shape[-1]} features do not fit {len(images)} "
            f"images of {images.shape[-1]}"
        )
    return 100 * F.cosine_similarity(images.double(), captions.double()).clamp(min=0)


def retrieved(images: Tensor, captions: Tensor, own: Tensor) -> Tensor:
    """Whether each image is nearer to its own caption than to 99 others.

    Args:
        images: embeddings float [N, D].
        captions: embeddings float [U, D]; equal ones count as one caption.
        own: which of them is the image's, int64 [N].

    Returns:
        bool [N]. With fewer than a hundred different captions, of as many as there are.
    """
    captions, own = _different(captions, own)
    # Neighbours in the order of the captions may be variants of one another.
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(0))
    place = order.argsort()
    steps = torch.arange(min(CHOICES, len(captions)))
    found = []
    normal = F.normalize(captions.double(), dim=-1)
    for rows, mine in zip(images.split(_BLOCK), own.split(_BLOCK), strict=True):
        choices_NC = order[(place[mine][:, None] + steps) % len(captions)]
        likeness_NC = torch.einsum("nf,ncf->nc", rows.double(), normal[choices_NC])
        others = likeness_NC[:, 1:].amax(1) if len(steps) > 1 else torch.full((len(rows),), -1.0)
        found.append(likeness_NC[:, 0] > others)
    return torch.cat(found)


def _different(captions: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Each embedding once, in the order of the first ones, and which of them is each image's."""
    _, first, which = np.unique(captions.numpy(), axis=0, return_index=True, return_inverse=True)
    kept = np.sort(first)
    place = np.searchsorted(kept, first[which.reshape(-1)])
    return captions[kept], torch.from_numpy(place)[own]


class CaptionAgreement:
    """Embeddings of images and their captions, gathered shard by shard.

    Args:
        embed: of captions.
    """

    def __init__(self, embed: Embed):
        self._embed = embed
        self._rows: list[npt.NDArray[np.float32]] = []
        self._own: list[int] = []
        self._number: dict[str, int] = {}

    def add(self, rows_ND: npt.NDArray[np.float32], captions: Sequence[str]) -> None:
        """Take embeddings of images, and what each was asked for by."""
        self._rows.append(rows_ND)
        self._own += [self._number.setdefault(text, len(self._number)) for text in captions]

    def results(self) -> dict[str, float]:
        """Mean score in [0, 100], and the share of images that are retrieved in [0, 1]."""
        images, own = torch.from_numpy(np.concatenate(self._rows)), torch.tensor(self._own)
        captions = self._embed([*self._number]).cpu()
        return {
            "agreement": float(caption_scores(images, captions[own]).mean()),
            "retrieval": float(retrieved(images, captions, own).double().mean()),
        }
