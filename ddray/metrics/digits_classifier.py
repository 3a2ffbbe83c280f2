"""The small convolutional digit classifier whose features carry the metric `fd_digits`.

Shapes: N images of [1, 28, 28] in [0, 1].
"""

import torch.nn.functional as F
from torch import Tensor, nn

NUM_FEATURES = 64


class DigitsClassifier(nn.Module):
    """Three convolutions, a layer of 64 rectified features, ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 48, 3, padding=1)
        self.hidden = nn.Linear(48 * 9, NUM_FEATURES)
        self.classes = nn.Linear(NUM_FEATURES, 10)

    def features(self, images: Tensor) -> Tensor:
        """Rectified features, float [N, 64]."""
        x = F.max_pool2d(F.relu(self.conv1(images * 2 - 1)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.max_pool2d(F.relu(self.conv3(x)), 2)
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Class logits, float [N, 10]."""
        out: Tensor = self.classes(F.dropout(self.features(images), 0.3, self.training))
        return out
