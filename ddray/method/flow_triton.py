"""The transport on a GPU as one kernel: rows go through all evaluations without leaving it.

A program owns a few rows, whose states and latest velocities stay on the chip from the noise to the
token: four with a warp each, or where there are few rows one with eight warps, so that they spread
over the chip. An evaluation reads the rows' logits once, and the codebook, which the L2 cache
holds; it writes nothing. The softmax is online, as in FlashAttention (Dao et al., arXiv
2205.14135), with a running maximum for each column of the chunk in place of one for each row: a
chunk then needs no exchange between threads, and columns are merged once an evaluation. Products
are float32 sums of multiply-adds: codes are too short for a tensor core to be worth its rounding.

`ddray.method.flow` is the reference, and imports this file when codes lie on a GPU. It needs
triton, which comes with torch for CUDA; TRITON_INTERPRET=1 runs it on a CPU.

Shapes: N rows of noise, R rows of a program, V codebook size, W codes of a chunk, E code width
(inside the kernel, padded with zeros to a power of two), F = E + 1, T steps, K order of the method.
Arrays of a chunk have three axes, [R, E, W], and those not named are one long: the compiler then
lays all of them out alike, and no chunk moves between layouts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddray.errors import ConfigError

_LANES = 32
_ROWS = 4  # of a program, and warps
# Up to so many rows a program has one, with so many warps. A GPU of a data centre has more than a
# hundred multiprocessors: four rows a program would leave three quarters of them idle. Of more rows
# each would read the codebook from the L2 cache alone, four times as often.
_FEW, _WARPS_OF_FEW = 128, 8
# Sums that a thread keeps, E for each of its columns. Compiled for compute capability 9.0 it takes
# at most 234 registers for widths up to this, and spills none.
_SUMS = 32
_MOST_COLUMNS = 4

_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _exponents(y_RE, lam, row_R, keys, code_W, vocab_size, width):
    """Exponents [R, 1, W] and codes [1, E, W] of a chunk; -inf and 0 past the codebook's end.

    `row_R` [R, 1, 1] points to the rows' first logits, and `keys` to [C, |c|^2 / 2], code-major.
    """
    axis_E = tl.arange(0, y_RE.shape[1])[None, :, None]
    inside_W = code_W < vocab_size
    codes_EW = tl.load(
        keys + axis_E * vocab_size + code_W, mask=(axis_E < width) & inside_W, other=0.0
    )
    half_square_W = tl.load(keys + width * vocab_size + code_W, mask=inside_W, other=0.0)
    logits_RW = tl.load(row_R + code_W, mask=inside_W, other=-float("inf")).to(tl.float32)
    product_RW = tl.sum(y_RE[:, :, None] * codes_EW, axis=1, keep_dims=True)
    return logits_RW + lam * (product_RW - lam * half_square_W), codes_EW


@triton.jit
def _velocity(
    y_RE, lam, row_R, keys, vocab_size, width,
    R: tl.constexpr, E: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """The posterior mean of the code, [R, E]: softmax over the codebook, chunk by chunk."""
    # A finite start: where a column has met only removed codes, -inf - -inf would be NaN.
    peak_RW = tl.full((R, 1, W), _LOWEST, tl.float32)
    mass_RW = tl.zeros((R, 1, W), tl.float32)
    sum_REW = tl.zeros((R, E, W), tl.float32)
    # Two stages: the next chunk is on its way while this one is summed.
    for start in tl.range(0, vocab_size, W, num_stages=2):
        code_W = (start + tl.arange(0, W))[None, None, :]
        exponent_RW, codes_EW = _exponents(y_RE, lam, row_R, keys, code_W, vocab_size, width)
        higher_RW = tl.maximum(peak_RW, exponent_RW)
        decay_RW = tl.exp(peak_RW - higher_RW)
        weight_RW = tl.exp(exponent_RW - higher_RW)
        mass_RW = mass_RW * decay_RW + weight_RW
        sum_REW = sum_REW * decay_RW + weight_RW * codes_EW
        peak_RW = higher_RW
    scale_RW = tl.exp(peak_RW - tl.max(peak_RW, axis=2, keep_dims=True))
    return tl.sum(sum_REW * scale_RW, axis=2) * (1.0 / tl.sum(mass_RW * scale_RW, axis=2))


@triton.jit
def _likeliest(y_RE, lam, row_R, keys, vocab_size, width, R: tl.constexpr, W: tl.constexpr):
    """The code of the largest exponent, [R]; of equal ones the first."""
    best_RW = tl.full((R, 1, W), -float("inf"), tl.float32)
    token_RW = tl.zeros((R, 1, W), tl.int32)
    for start in range(0, vocab_size, W):
        code_W = (start + tl.arange(0, W))[None, None, :]
        exponent_RW, _ = _exponents(y_RE, lam, row_R, keys, code_W, vocab_size, width)
        token_RW = tl.where(exponent_RW > best_RW, code_W, token_RW)
        best_RW = tl.maximum(best_RW, exponent_RW)
    is_best_RW = best_RW == tl.max(best_RW, axis=2, keep_dims=True)
    return tl.min(tl.where(is_best_RW, token_RW, vocab_size), axis=2).reshape(R)


@triton.jit
def transport_kernel(
    tokens, noise, logits, keys, lambdas, weights, rows, vocab_size, width, steps, logits_stride,
    K: tl.constexpr, R: tl.constexpr, E: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Tokens of R rows; arguments as those of `solve`."""
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    # Places past the last row repeat it, and write nothing.
    source_R = tl.minimum(row_R, rows - 1).to(tl.int64)
    logits_R = (logits + source_R * logits_stride)[:, None, None]
    axis_E, slot_K = tl.arange(0, E)[None, :], tl.arange(0, K)[:, None, None]
    y_RE = tl.load(noise + source_R[:, None] * width + axis_E, mask=axis_E < width, other=0.0)
    ring_KRE = tl.zeros((K, R, E), tl.float32)
    for step in range(steps):
        lam = tl.load(lambdas + step)
        velocity_RE = _velocity(y_RE, lam, logits_R, keys, vocab_size, width, R, E, W)
        ring_KRE = tl.where(slot_K == step % K, velocity_RE[None, :, :], ring_KRE)
        y_RE += tl.sum(ring_KRE * tl.load(weights + step * K + slot_K), axis=0)
    lam = tl.load(lambdas + steps)
    token_R = _likeliest(y_RE, lam, logits_R, keys, vocab_size, width, R, W)
    tl.store(tokens + row_R, token_R.to(tl.int64), mask=row_R < rows)


def tile(width: int, rows: int) -> dict[str, int]:
    """The kernel's compile-time sizes: rows R, padded width E and codes W of a chunk, warps.

    Args:
        width: of the codes.
        rows: of noise.
    """
    padded = triton.next_power_of_2(width)
    columns = min(max(_SUMS // padded, 1), _MOST_COLUMNS)
    of_program, warps = (1, _WARPS_OF_FEW) if rows <= _FEW and padded <= _SUMS else (_ROWS, _ROWS)
    codes = _LANES * columns * warps // of_program
    return {"R": of_program, "E": padded, "W": codes, "num_warps": warps}


def solve(
    noise_NE: Tensor, logits_NV: Tensor, keys_FV: Tensor, lambdas: Tensor, weights_TK: Tensor
) -> Tensor:
    """Carry rows of noise to tokens by an Adams-Bashforth method, everything on one device.

    Args:
        noise_NE: float [N, E].
        logits_NV: float [N, V], unnormalised log probabilities, of any floating type: it is read
            as it is; -inf removes a code.
        keys_FV: float32 [E + 1, V], contiguous: the centred codes, and half their squared norms.
        lambdas: float32 [T + 1]: where the steps begin, and the end of the grid.
        weights_TK: float32 [T, K], from `ddray.method.flow.multistep_weights`; K a power of two.

    Returns:
        int64 [N].

    Raises:
        ConfigError: if shapes do not fit, which the kernel would not notice.
    """
    (rows, width), (steps, order), vocab_size = noise_NE.shape, weights_TK.shape, keys_FV.shape[1]
    if logits_NV.shape != (rows, vocab_size) or len(keys_FV) != width + 1:
        raise ConfigError(
            f"shapes do not fit: noise {[*noise_NE.shape]}, logits {[*logits_NV.shape]}, codebook "
            f"{[vocab_size, len(keys_FV) - 1]}; expected [N, E], [N, V], [V, E]"
        )
    tokens_N = torch.empty(rows, dtype=torch.long, device=noise_NE.device)
    if not rows:
        return tokens_N
    logits_NV = logits_NV if logits_NV.stride(1) == 1 else logits_NV.contiguous()
    sizes = tile(width, rows)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(noise_NE):
        transport_kernel[(triton.cdiv(rows, sizes["R"]),)](
            tokens_N, noise_NE.float().contiguous(), logits_NV, keys_FV, lambdas, weights_TK,
            rows, vocab_size, width, steps, logits_NV.stride(0),
            K=order, **sizes,
        )  # fmt: skip
    return tokens_N
