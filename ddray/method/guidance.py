"""From a teacher's logits to the distribution it samples from: guidance, temperature, top-k, top-p.

Pure functions of logits, in the order both families apply them.

Shapes: B batch, l tokens of this stage, V codebook size; `...` stands for any leading dimensions.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ddray.errors import ConfigError, is_integer

# Tokens are drawn for blocks of at most so many probabilities.
_BLOCK_ELEMENTS = 2**21
# Of so many codes the largest is looked for at once.
_CHUNK = 128


def classifier_free_guidance(conditional: Tensor, null: Tensor, scale: float) -> Tensor:
    """Guided logits in LlamaGen's convention: null + scale (conditional - null).

    Ho & Salimans, "Classifier-free diffusion guidance" (2022). Scale 1 is the conditional model.
    """
    return torch.lerp(null, conditional, scale)


def check_filters(temperature: float, top_k: int, top_p: float) -> None:
    """Refuse sampling settings that mean nothing.

    Raises:
        ConfigError: temperature < 0, top_k < 0, or top_p outside (0, 1].
    """
    if not temperature >= 0:
        raise ConfigError(f"temperature must be >= 0, got {temperature}")
    if not is_integer(top_k) or top_k < 0:
        raise ConfigError(f"top_k must be an integer >= 0 (0 = off), got {top_k}")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p must be in (0, 1] (1 = off), got {top_p}")


def top_k_filter(logits: Tensor, top_k: int) -> Tensor:
    """Set logits strictly below the k-th largest to -inf; ties with it all survive; 0 = off."""
    if top_k == 0 or top_k >= logits.shape[-1]:
        return logits
    kth = logits.topk(top_k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < kth, float("-inf"))


def top_p_filter(logits: Tensor, top_p: float) -> Tensor:
    """Keep the likeliest entries up to and including the one that crosses mass `top_p`; 1 = off."""
    if top_p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    mass_before = ordered.softmax(-1).cumsum(-1).roll(1, -1)
    mass_before[..., 0] = 0.0
    drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, mass_before > top_p)
    return logits.masked_fill(drop, float("-inf"))


def top_p_filter_from_below(logits: Tensor, top_p: float) -> Tensor:
    """VAR's rule: remove the least likely entries while their mass together is at most 1 - top_p.

    It differs from `top_p_filter` where the mass meets the limit exactly, and in which of several
    equal entries survive. The likeliest entry always does; 1 = off.
    """
    if top_p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1)
    drop = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
    drop[..., -1] = False
    drop = torch.zeros_like(drop).scatter(-1, order, drop)
    return logits.masked_fill(drop, float("-inf"))


def filter_logits(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    top_p_rule: Callable[[Tensor, float], Tensor] = top_p_filter,
) -> Tensor:
    """Temperature, then top-k, then top-p over what top-k left (both families' order).

    Args:
        logits: [..., V], any float dtype.
        temperature: > 0; values below 1e-5 count as 1e-5.
        top_k: number of entries kept, 0 = off.
        top_p: mass kept, 1 = off.
        top_p_rule: the family's.

    Returns:
        float32 [..., V] with -inf where an entry was removed.
    """
    logits = logits.float()
    if temperature != 1.0:
        logits = logits / max(temperature, 1e-5)
    return top_p_rule(top_k_filter(logits, top_k), top_p)


def likeliest(scores: Tensor) -> Tensor:
    """The token of the largest score, of equal ones the first.

    Args:
        scores: float [..., V].

    Returns:
        int64 [...].
    """
    if (
        scores.device.type != "cpu"
        or scores.shape[-1] % _CHUNK
        or not scores.numel()
        or torch.compiler.is_compiling()
    ):
        return scores.argmax(-1)
    # torch's argmax takes a CPU ten times as long as the largest values do: so first the chunk.
    chunks = scores.unflatten(-1, (-1, _CHUNK))
    chunk = chunks.amax(-1).argmax(-1, keepdim=True)
    place = chunk[..., None].expand(*chunk.shape, _CHUNK)
    return chunk[..., 0] * _CHUNK + chunks.gather(-2, place)[..., 0, :].argmax(-1)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token per row by the inverse of the cumulative distribution.

    One uniform number decides a token, so a draw costs the sample one random number, not V of them.

    Args:
        logits: float [..., V]; -inf entries are never drawn.
        uniform: float64 [...] in (0, 1).

    Returns:
        int64 [...].
    """
    # Blocks of rows, since a scale of VAR has many and float64 takes twice the room.
    vocab_size = logits.shape[-1]
    rows = max(1, _BLOCK_ELEMENTS // vocab_size)
    blocks = zip(
        logits.reshape(-1, vocab_size).split(rows), uniform.reshape(-1, 1).split(rows), strict=True
    )
    return torch.cat([_draw_rows(*block) for block in blocks]).reshape(uniform.shape)


def _draw_rows(logits_NV: Tensor, uniform_N1: Tensor) -> Tensor:
    # float64 sums: at V = 16384 a float32 running sum is off by more than the rarest tokens' mass.
    cumulative = torch.softmax(logits_NV, -1, dtype=torch.float64).cumsum_(-1)
    found = torch.searchsorted(cumulative, uniform_N1 * cumulative[:, -1:], right=True)
    # Past the end lies what a uniform number next to 1 rounds to, and what is not a number.
    return found.clamp_max_(logits_NV.shape[1] - 1)
