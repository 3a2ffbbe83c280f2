"""The noise of samples in one kernel on a GPU; the torch operations of `seeding` take 240.

Philox4x32-10 and Box-Muller as there, number for number: 32-bit words in place of int64, float64 in
between, one rounding to float32.

Shapes: B samples, N numbers of a sample.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# Counters of a program: each makes four numbers.
_COUNTERS = 256


@triton.jit
def _round(c0, c1, c2, c3, k0, k1):
    high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
    high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
    return high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0


@triton.jit
def _pair(radius_word, angle_word):
    uniform = (radius_word.to(tl.float64) + 0.5) * 2.3283064365386963e-10
    radius = tl.sqrt(tl.log(uniform) * -2.0)
    angle = angle_word.to(tl.float64) * 1.4629180792671596e-09
    return (radius * tl.cos(angle)).to(tl.float32), (radius * tl.sin(angle)).to(tl.float32)


@triton.jit(do_not_specialize=["seed"])
def noise_kernel(
    out, index, seeds, seed, numbers, STREAM: tl.constexpr, OWN: tl.constexpr, C: tl.constexpr
):
    """Numbers of C counters of one sample.

    Args:
        out: float32 [B, N], contiguous.
        index: int64 [B].
        seeds: int64 [B], one for each sample; not read unless `OWN`.
        seed: of all samples.
        numbers: N.
        STREAM: what the numbers are for.
        OWN: whether each sample has its own seed.
        C: counters of a program.
    """
    sample = tl.program_id(0).to(tl.int64)
    counter = tl.program_id(1) * C + tl.arange(0, C)
    which = tl.load(index + sample)
    key = tl.load(seeds + sample) if OWN else seed.to(tl.int64)
    c0 = counter.to(tl.uint32)
    c1 = tl.zeros([C], tl.uint32) + (which & 0xFFFFFFFF).to(tl.uint32)
    c2 = tl.zeros([C], tl.uint32) + (which >> 32).to(tl.uint32)
    c3 = tl.zeros([C], tl.uint32) + STREAM
    k0 = (key & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(10):
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
        k0 += tl.full([], 0x9E3779B9, tl.uint32)
        k1 += tl.full([], 0xBB67AE85, tl.uint32)
    first, second = _pair(c0, c1)
    third, fourth = _pair(c2, c3)
    place = 4 * counter
    row = out + sample * numbers
    tl.store(row + place, first, mask=place < numbers)
    tl.store(row + place + 1, second, mask=place + 1 < numbers)
    tl.store(row + place + 2, third, mask=place + 2 < numbers)
    tl.store(row + place + 3, fourth, mask=place + 3 < numbers)


def noise(seed: int | Sequence[int], index_B: Tensor, numbers: int, stream: int) -> Tensor:
    """Standard normal numbers, float32 [B, N], as ddray.method.seeding.standard_normal has them.

    Args:
        seed: of all samples, or of each; looked at.
        index_B: int64 [B], looked at.
        numbers: N.
        stream: what they are for.
    """
    out = torch.empty(len(index_B), numbers, device=index_B.device)
    own = isinstance(seed, Sequence)
    seeds = torch.tensor([*seed], device=index_B.device) if isinstance(seed, Sequence) else index_B
    grid = (len(index_B), triton.cdiv(-(-numbers // 4), _COUNTERS))
    if not out.numel():
        return out
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(index_B):
        noise_kernel[grid](
            out, index_B.contiguous(), seeds, 0 if own else seed, numbers, stream, own, _COUNTERS
        )
    return out
