"""Transport: the deterministic flow-matching map that carries Gaussian noise to one token.

Liu et al., "Distilled Decoding" (arXiv 2412.17153), section 3. For one token with probabilities p over the codes
c_1..c_V, flow matching between N(0, I) and the mixture sum_j p_j delta(c_j) has the posterior mean as its velocity
field. With lambda = t / (1 - t) and y = x / (1 - t) the probability-flow ODE is free of singularities:

    dy / dlambda = softmax_j( log p_j + lambda y.c_j - lambda^2 |c_j|^2 / 2 ) C,      y(0) = noise,

and as lambda grows the softmax collapses on one code, the token. One evaluation is one attention of y over the
codebook: two matrix products and a softmax. Scaling the codebook scales the grid; shifting it changes nothing.
Imports only ddray.errors.

Shapes: N rows (any number of tokens), V codebook size, E code width.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from ddray.errors import ConfigError

Velocity = Callable[[float, Tensor], Tensor]
"""velocity(lambda, y [N, E]) -> dy / dlambda [N, E]."""

# The posterior is decided once lambda times the distance between neighbouring codes is this large: measured,
# 3 / 5 / 8 give 94.5 / 99.1 / 100.0 % of the tokens of a longer solve.
_DECIDED = 8.0

# Rows are solved in blocks whose [rows, V] logits stay in cache and never exceed this many elements.
_BLOCK_ELEMENTS = 2**20


def euler(velocity: Velocity, y_NE: Tensor, grid: list[float]) -> Tensor:
    """First-order explicit steps; one evaluation a step."""
    for here, there in pairwise(grid):
        y_NE = torch.add(y_NE, velocity(here, y_NE), alpha=there - here)
    return y_NE


def ab2(velocity: Velocity, y_NE: Tensor, grid: list[float]) -> Tensor:
    """Adams-Bashforth of order two on a non-uniform grid; one evaluation a step."""
    previous: Tensor | None = None
    last_step = 0.0
    for here, there in pairwise(grid):
        step = there - here
        slope = velocity(here, y_NE)
        if previous is None:
            y_NE = torch.add(y_NE, slope, alpha=step)
        else:
            extrapolation = 0.5 * step / last_step
            y_NE = torch.add(y_NE, slope, alpha=step * (1 + extrapolation))
            y_NE = y_NE.sub_(previous, alpha=step * extrapolation)
        previous, last_step = slope, step
    return y_NE


def rk4(velocity: Velocity, y_NE: Tensor, grid: list[float]) -> Tensor:
    """The classical Runge-Kutta method of order four; four evaluations a step."""
    for here, there in pairwise(grid):
        step, middle = there - here, (here + there) / 2
        k1 = velocity(here, y_NE)
        k2 = velocity(middle, y_NE + k1 * (step / 2))
        k3 = velocity(middle, y_NE + k2 * (step / 2))
        k4 = velocity(there, y_NE + k3 * step)
        y_NE = y_NE + (k1 + 2 * k2 + 2 * k3 + k4) * (step / 6)
    return y_NE


_SOLVERS = {"euler": euler, "ab2": ab2, "rk4": rk4, "exact": rk4}
SOLVERS = tuple(_SOLVERS)
"""Names accepted as `solver`. "exact" is RK4 in float64 on a fine grid: the map that the others approximate."""

_EXACT_EVALS = 1600


def default_num_evals(solver: str, vocab_size: int) -> int:
    """Evaluations that reach 99.7 % agreement with the float64 map (benchmarks/bench_transport.py)."""
    if solver == "exact":
        return _EXACT_EVALS
    return 24 if vocab_size <= 512 else 40 if vocab_size <= 8192 else 56


def lambda_grid(codebook_VE: Tensor, num_steps: int, decided: float = _DECIDED) -> list[float]:
    """The solver's grid: uniform near zero, geometric at the end (lambda = lo sinh(u asinh(hi / lo))).

    Args:
        codebook_VE: float [V, E].
        num_steps: number of intervals.
        decided: the grid ends at `decided` / median distance of a code to its nearest neighbour.

    Returns:
        num_steps + 1 increasing values from 0.
    """
    codes = codebook_VE.double()
    codes = codes - codes.mean(0)
    low = 1 / max(float(codes.square().sum(-1).mean().sqrt()), 1e-12)
    high = decided / _median_neighbour_distance(codes)
    span = math.asinh(high / low)
    return [low * math.sinh(span * i / num_steps) for i in range(num_steps + 1)]


def _median_neighbour_distance(codes_VE: Tensor) -> float:
    """Median over all codes of the distance to the nearest other code."""
    if len(codes_VE) == 1:
        return 1.0
    nearest = []
    rows = max(1, _BLOCK_ELEMENTS // len(codes_VE))
    for start in range(0, len(codes_VE), rows):
        distance = torch.cdist(codes_VE[start : start + rows], codes_VE)
        distance.diagonal(start).fill_(math.inf)
        nearest.append(distance.min(-1).values)
    every = torch.cat(nearest)
    median = float(every.median())
    # A codebook of mostly equal codes has a median of zero; its distinct codes still need a finite grid.
    return (
        median if median > 0 else float(every[every > 0].min()) if bool((every > 0).any()) else 1.0
    )


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Matrix products in true float32 (TF32 and bfloat16 shortcuts off), whatever the process prefers."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Transport:
    """The map noise -> token of one codebook, with its grid and keys made once.

    Args:
        codebook_VE: float [V, E].
        solver: one of `SOLVERS`.
        num_evals: velocity evaluations; None = the default for this V. RK4 takes four a step.

    Raises:
        ConfigError: for an unknown solver, too few evaluations, or a codebook that is not finite [V, E].
    """

    def __init__(self, codebook_VE: Tensor, solver: str = "ab2", num_evals: int | None = None):
        if solver not in SOLVERS:
            raise ConfigError(f"solver={solver!r} is unknown; choose one of {', '.join(SOLVERS)}")
        if codebook_VE.dim() != 2 or not bool(codebook_VE.isfinite().all()):
            raise ConfigError(
                f"codebook must be a finite [V, E] tensor, got {[*codebook_VE.shape]}"
            )
        self.solver = solver
        self.num_evals = num_evals or default_num_evals(solver, len(codebook_VE))
        per_step = 4 if solver in ("rk4", "exact") else 1
        if self.num_evals < per_step or self.num_evals % per_step:
            rule = f"a positive multiple of {per_step}"
            raise ConfigError(f"num_evals={num_evals} does not suit solver={solver!r}; give {rule}")
        exact = solver == "exact"
        self.dtype = torch.float64 if exact else torch.float32
        self.grid = lambda_grid(
            codebook_VE, self.num_evals // per_step, 2 * _DECIDED if exact else _DECIDED
        )
        # A shift of the codebook changes no token; centred codes lose fewer digits.
        codes = codebook_VE.double()
        codes = codes - codes.mean(0)
        self.codes_VE = codes.to(self.dtype)
        # [C, |c|^2 / 2]: with the query [lambda y, -lambda^2] the exponent is one matrix product added to log p.
        half_square = codes.square().sum(-1, keepdim=True) / 2
        self.keys_FV = torch.cat((codes, half_square), -1).to(self.dtype).T.contiguous()

    def __call__(self, noise_NE: Tensor, logits_NV: Tensor) -> Tensor:
        """Carry rows of noise to tokens.

        Args:
            noise_NE: float [N, E], standard normal.
            logits_NV: float [N, V], unnormalised log probabilities; -inf removes a code.

        Returns:
            int64 [N].
        """
        rows = max(1, _BLOCK_ELEMENTS // len(self.codes_VE))
        with full_float32(), torch.no_grad(), torch.autocast(noise_NE.device.type, enabled=False):
            tokens = [
                self._solve(noise.to(self.dtype), logits.to(self.dtype))
                for noise, logits in zip(noise_NE.split(rows), logits_NV.split(rows), strict=True)
            ]
        return torch.cat(tokens)

    def _solve(self, noise_NE: Tensor, logits_NV: Tensor) -> Tensor:
        query_NF = torch.empty(len(noise_NE), self.keys_FV.shape[0]).to(noise_NE)
        posterior_NV = torch.empty_like(logits_NV)

        def exponent(lam: float, y_NE: Tensor) -> Tensor:
            torch.mul(y_NE, lam, out=query_NF[:, :-1])
            query_NF[:, -1] = -lam * lam
            return torch.addmm(logits_NV, query_NF, self.keys_FV, out=posterior_NV)

        def velocity(lam: float, y_NE: Tensor) -> Tensor:
            torch.softmax(exponent(lam, y_NE), -1, out=posterior_NV)
            return posterior_NV @ self.codes_VE

        y_NE = _SOLVERS[self.solver](velocity, noise_NE, self.grid)
        return exponent(self.grid[-1], y_NE).argmax(-1)


def transport(
    noise: Tensor,
    logits: Tensor,
    codebook: Tensor,
    *,
    solver: str = "ab2",
    num_evals: int | None = None,
) -> Tensor:
    """Carry noise to tokens: the deterministic map of Distilled Decoding (arXiv 2412.17153, section 3).

    Over standard normal noise the token is distributed as softmax(logits).

    Args:
        noise: float [..., E].
        logits: float [..., V], unnormalised log probabilities; -inf removes a code.
        codebook: float [V, E].
        solver: "ab2" (default), "euler", "rk4", or "exact" (float64 reference).
        num_evals: velocity evaluations; None = the default for this V.

    Returns:
        int64 token ids [...].

    Raises:
        ConfigError: if shapes do not fit, a row has no finite logit, or the solver is unknown.
    """
    vocab_size, width = codebook.shape if codebook.dim() == 2 else (-1, -1)
    if noise.shape != (*logits.shape[:-1], width) or logits.shape[-1] != vocab_size:
        raise ConfigError(
            f"shapes do not fit: noise {[*noise.shape]}, logits {[*logits.shape]}, codebook "
            f"{[*codebook.shape]}; expected [..., E], [..., V], [V, E]"
        )
    solve = Transport(codebook, solver, num_evals)
    peak = logits.amax(-1)
    if not bool(peak.isfinite().all()):
        bad = int((~peak.isfinite()).sum())
        raise ConfigError(f"{bad} rows of logits have no finite maximum (NaN, +inf or all -inf)")
    if not bool(noise.isfinite().all()):
        raise ConfigError("noise holds values that are not finite")
    return solve(noise.reshape(-1, width), logits.reshape(-1, vocab_size)).reshape(noise.shape[:-1])
