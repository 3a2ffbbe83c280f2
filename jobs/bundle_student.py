"""Put a distilled student into the package: float16 weights, the same folder layout.

    python jobs/bundle_student.py SOURCE ddray/models/bundled/digits-llamagen-dd
    python jobs/bundle_student.py SOURCE CONTINUED ddray/models/bundled/emoji-llamagen-dd

Of several sources, trainings of which each went on from the one before, the mean of the weights is
taken (Izmailov et al., arXiv 1803.05407), and the config of the first.
"""

import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ddray.models.zoo import load_student
from ddray.storage.checkpoint import load_folder, save_folder


def mean(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of weights of the same names, float16."""
    return {
        name: torch.stack([state[name].float() for state in states]).mean(0).half()
        for name in states[0]
    }


def main(sources: Sequence[str], target: str) -> None:
    """Copy student folders into one with halved weights; the loader widens them again."""
    folders = [load_folder(source) for source in sources]
    config, _, tokenizer = folders[0]
    model = mean([state for _, state, _ in folders])
    save_folder(target, config, model=model, tokenizer=mean([tokenizer or {}]))
    print(f"{target}: {load_student(target).config['step']} steps")


if __name__ == "__main__":
    main(sys.argv[1:-1], sys.argv[-1])
