"""Rows that are made together: a number, or `auto`, which is made one before there is a plan.

Float results vary with the batch, so its size is of the plan. Hence `auto` follows from what
every machine knows alike, the model's sizes and the settings, and from no look at a GPU: the driver
may have none, and a rerun elsewhere must find the same number.

Shapes: B rows of a batch, T condition tokens, L all tokens, l tokens of the largest stage, V
codebook size, C model width.
"""

from typing import Any

from ddray.config.generation import GenerateConfig
from ddray.config.sampling import SampleConfig

# What suits a CPU, where more rows are no faster.
_CPU_TRAJECTORIES, _CPU_IMAGES = 100, 64
# Of a GPU's memory; the rest is for its context, workspaces, what fragments, and a decoder's pass.
_SHARE = 0.6
# More images gain nothing: so many rows of one token read the weights often enough, and so many
# positions of a whole image are enough work for every multiprocessor.
_MOST_TRAJECTORIES, _MOST_POSITIONS = 512, 2**16
# Tensors that live at once, found by following them at published sizes
# (tests/core/sets/test_batch_size.py): of a position's width, and of
# float32 logits where they are filtered.
_HIDDEN, _LOGITS = 12, 6


def batch_size(config: SampleConfig | GenerateConfig, network: Any) -> int:
    """The number that a job's plan has.

    Args:
        config: the job.
        network: of its model, or of the same sizes; the meta device is enough.
    """
    if config.batch_size != "auto":
        return config.batch_size
    sampling = isinstance(config, SampleConfig)
    if not config.num_gpus:
        return _CPU_TRAJECTORIES if sampling else _CPU_IMAGES
    memory = _SHARE * config.gpu_gb * 1e9 * config.num_gpus
    memory -= sum(p.numel() for p in network.parameters()) * _itemsize(config)
    fits = int(memory / image_bytes(config, network))
    most = _MOST_TRAJECTORIES if sampling else _MOST_POSITIONS // sum(network.stages)
    # A power of two divides into shards of another without a short batch.
    return 1 << (max(1, min(fits, most)).bit_length() - 1)


def image_bytes(config: SampleConfig | GenerateConfig, network: Any) -> float:
    """Memory of a GPU that an image of a batch takes, about.

    Args:
        config: the job.
        network: as `batch_size` takes it.
    """
    sizes, item = network.config, _itemsize(config)
    width = getattr(sizes, "dim", None) or sizes.embed_dim
    condition, tokens = getattr(sizes, "cls_token_num", 1), sum(network.stages)
    if isinstance(config, GenerateConfig):
        # All positions at once; logits are read a few images at a time.
        hidden = (condition + tokens) * width * _HIDDEN * item
        return float(hidden + tokens * sizes.vocab_size * item)
    depth, largest = len(getattr(network, "layers", ()) or network.blocks), max(network.stages)
    # Guidance: every image is two rows of keys and values.
    cache = 2 * 2 * depth * (condition + tokens) * width * item
    hidden = 2 * max(condition, largest) * width * _HIDDEN * item
    return float(cache + hidden + largest * sizes.vocab_size * 4 * _LOGITS)


def _itemsize(config: SampleConfig | GenerateConfig) -> int:
    dtype = config.dtype if isinstance(config, SampleConfig) else config.student_dtype
    return 4 if dtype == "float32" else 2
