"""Every random draw of ddray: a pure function of (seed, sample index).

It never depends on the worker, the batch or the order. A counter-based generator (Philox4x32-10;
Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in torch integer operations,
so that CPU and GPU agree.

Shapes: B batch, L tokens, E code width.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ddray.errors import ConfigError
from ddray.method.fused import can_fuse

SCHEME = "philox4x32-10/box-muller-f64/1"
"""Name of the noise scheme, in every manifest: a change of the numbers changes this name."""

# The fourth counter word says what a draw is for, so that different uses of one (seed, index) never
# share numbers.
NOISE_STREAM = 0
TOKEN_STREAM = 1
MASKED_STREAM = 2
MASK_STREAM = 3
LABEL_STREAM = 4

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def _multiply_32x32(a: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Split the 64-bit product of 32-bit words into its high and low halves."""
    # Halves of 16 bits keep every intermediate below 2^49: int64 never overflows.
    upper = a * (multiplier >> 16)
    lower = a * (multiplier & 0xFFFF)
    carry = upper + (lower >> 16)
    return carry >> 16, ((carry & 0xFFFF) << 16) | (lower & 0xFFFF)


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int | Tensor
) -> tuple[Tensor, ...]:
    """Philox4x32-10: four 32-bit random words for every counter.

    Args:
        counter: four int64 tensors that broadcast together, each holding one 32-bit counter word.
        seed: the 64-bit key, or an int64 tensor of keys that broadcasts with the counters.

    Returns:
        Four int64 tensors with values in [0, 2^32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(_ROUNDS):
        high0, low0 = _multiply_32x32(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply_32x32(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK32, (k1 + _KEY_STEPS[1]) & _MASK32
    return c0, c1, c2, c3


def index_tensor(
    index_B: Sequence[int] | Tensor, device: torch.device | str | None = None
) -> Tensor:
    """Sample indices as an int64 tensor [B], refused when negative.

    Raises:
        ConfigError: if an index is negative or not an integer.
    """
    # Looked at where they come from: on a GPU the host would wait for the answer.
    try:
        index = torch.as_tensor(index_B)
    except (ValueError, OverflowError, RuntimeError, TypeError) as error:
        raise ConfigError(f"index must hold integers below 2^63: {error}") from error
    if index.dtype == torch.uint64:
        index = index.view(torch.int64)
    if index.dim() != 1 or index.is_floating_point() or index.is_complex():
        raise ConfigError(
            f"index must be a 1-D list of integers, got {index.dtype} {[*index.shape]}"
        )
    if index.numel() and int(index.min()) < 0:
        raise ConfigError(f"index must be >= 0, got {int(index.min())}")
    return index.long().to(device)


def _check_seeds(seed: int | Sequence[int], samples: int) -> None:
    seeds = [*seed] if isinstance(seed, Sequence) else [seed]
    for value in seeds:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
            raise ConfigError(f"seed must be an integer from 0 to 2^63 - 1, got {value!r}")
    if isinstance(seed, Sequence) and len(seeds) != samples:
        raise ConfigError(f"{len(seeds)} seeds were given for {samples} samples")


def _words(
    seed: int | Sequence[int], index_B: Tensor, count: int, stream: int
) -> tuple[Tensor, ...]:
    """Four int64 tensors [B, count] of 32-bit words for the given samples."""
    _check_seeds(seed, len(index_B))
    key: int | Tensor
    if isinstance(seed, Sequence):
        key = torch.tensor([*seed], dtype=torch.int64, device=index_B.device)[:, None]
    else:
        key = seed
    block = torch.arange(count, device=index_B.device)[None, :]
    index = index_B[:, None]
    purpose = torch.full_like(block, stream)
    return philox((block, index & _MASK32, index >> 32, purpose), key)


def next_seed(seed: int) -> int:
    """The seed after this one, 0 after the last: both lie in [0, 2**63)."""
    return (seed + 1) % 2**63


def noise(
    seed: int | Sequence[int],
    index_B: Sequence[int] | Tensor,
    shape: tuple[int, int],
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal noise that belongs to the samples.

    Box-Muller in float64, rounded once to float32: the value of a sample does not depend on the
    batch it is in, and devices differ by less than 1e-6.

    Args:
        seed: run seed, any int64 >= 0; or one for each sample, as for requests that share a batch.
        index_B: sample indices [B], any int64 >= 0.
        shape: (L, E), the shape of one sample.
        device: where to draw; None = the CPU, or the device of `index_B` if it is a tensor.

    Returns:
        float32 [B, L, E].

    Raises:
        ConfigError: if a seed or an index is negative, or there are not as many seeds as samples.
    """
    return standard_normal(seed, index_tensor(index_B, device), shape)


def standard_normal(seed: int | Sequence[int], index: Tensor, shape: tuple[int, int]) -> Tensor:
    """`noise` of indices that were looked at, int64 [B], where they are.

    On a GPU the host would wait for another look; there it is one kernel, with the same numbers.
    """
    numbers = math.prod(shape)
    if can_fuse(index.device):
        from ddray.method import seeding_triton

        _check_seeds(seed, len(index))
        made = seeding_triton.noise(seed, index, numbers, NOISE_STREAM)
    else:
        made = normals(seed, index, numbers)
    return made.view(len(index), *shape)


def normals(seed: int | Sequence[int], index: Tensor, size: int) -> Tensor:
    """Standard normal numbers, float32 [B, size], by torch operations alone."""
    w0, w1, w2, w3 = _words(seed, index, -(-size // 4), NOISE_STREAM)
    # Half a step keeps the logarithm finite; |noise| <= sqrt(-2 ln 2^-33) = 6.77.
    radius = torch.stack((w0, w2), -1).double().add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = torch.stack((w1, w3), -1).double().mul_(2.0 * math.pi * 2.0**-32)
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), -1).float()
    return pairs.reshape(len(index), -1)[:, :size].contiguous()


def uniforms(seed: int, index_B: Tensor, count: int, stream: int = TOKEN_STREAM) -> Tensor:
    """Uniform draws; one a token for plain autoregressive sampling.

    Args:
        seed: run seed, any int64 >= 0.
        index_B: int64 sample indices [B].
        count: draws per sample.
        stream: what they are for.

    Returns:
        float64 [B, count] in (0, 1), with 52 random bits: the half step is exact, so 1 is never
        reached.
    """
    high, low, *_ = _words(seed, index_B, count, stream)
    return ((high << 20) | (low >> 12)).double().add_(0.5).mul_(2.0**-52)
