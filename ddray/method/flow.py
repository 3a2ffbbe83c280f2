"""Transport: the deterministic flow-matching map that carries Gaussian noise to one token.

Liu et al., "Distilled Decoding" (arXiv 2412.17153), section 3. For one token with probabilities p
over the codes c_1..c_V, flow matching between N(0, I) and the mixture sum_j p_j delta(c_j) has the
posterior mean as its velocity field. With lambda = t / (1 - t) and y = x / (1 - t) the
probability-flow ODE is free of singularities:

    dy / dlambda = softmax_j( log p_j + lambda y.c_j - lambda^2 |c_j|^2 / 2 ) C,      y(0) = noise,

and as lambda grows the softmax collapses on one code, the token. One evaluation is one attention of
y over the codebook: two matrix products and a softmax. Scaling the codebook scales the grid;
shifting it changes nothing.

Shapes: N rows (any number of tokens), V codebook size, E code width.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddray.errors import ConfigError
from ddray.method.fused import can_fuse
from ddray.method.guidance import likeliest

Velocity = Callable[[float, Tensor, Tensor], Tensor]
"""velocity(lambda, y, out) -> dy / dlambda, written to out, which has the shape of y."""

# The posterior is decided once lambda times the distance between neighbouring codes is this large:
# measured, 3 / 5 / 8 give 94.5 / 99.1 / 100.0 % of the tokens of a longer solve.
_DECIDED = 8.0
_DECIDED_EXACT = 16.0
# The grid must also decide between codes that lie closer than most, or the likelier of two close
# codes takes all their mass; the closest percent of a codebook may be near-copies.
_CLOSEST_SHARE = 0.01
# Where the grid turns from uniform to geometric, in units of 1 / rms code.
_TURN = 0.25

# Weights below this change no sum. Left alone they would become denormal numbers as the posterior
# collapses, which a CPU multiplies at a tenth of its speed.
_NEGLIGIBLE = math.exp(-64)

# Rows are solved in blocks whose [rows, V] logits stay in cache and are never larger than this.
_BLOCK_ELEMENTS = 2**20

# What the fused kernel can carry; wider codes do not fit its registers.
_FUSED_SOLVERS, _FUSED_WIDTH = ("euler", "ab2", "ab4"), 64

# Order of the multistep methods; RK4 takes four evaluations a step.
_ORDERS = {"euler": 1, "ab2": 2, "ab4": 4, "exact": 4}

# Evaluations for each factor e between the ends of the grid: what 99.7 % agreement with the exact
# map takes (benchmarks/bench_transport.py). Euler does not reach it; it is there to compare with.
_EVALS_PER_FOLD = {"euler": 10.0, "ab2": 16.0, "ab4": 5.0, "rk4": 9.0, "exact": 60.0}

# Among many codes more are in the running for longer.
_MANY_CODES, _MANY = 1024, 1.2

SOLVERS = tuple(_EVALS_PER_FOLD)
"""Names accepted as `solver`. "exact" is the fourth-order method, float64, on a fine, long grid."""


class Grid(NamedTuple):
    """lambda(u) = low (e^(span u) - 1) for u in [0, 1]: uniform near zero, then geometric.

    Attributes:
        low: where it turns from one to the other.
        span: e-folds it covers.
    """

    low: float
    span: float

    def at(self, u: float) -> float:
        """The lambda of a grid coordinate."""
        return self.low * math.expm1(self.span * u)

    @classmethod
    def of(cls, codebook_VE: Tensor, decided: float, closest_share: float) -> "Grid":
        """The grid of a codebook: it ends at `decided` / distance of its closest codes.

        Args:
            codebook_VE: float64 [V, E], centred.
            decided: lambda times distance at which the posterior counts as collapsed.
            closest_share: share of the codes that may have a closer neighbour than the grid
                resolves.
        """
        rms = float(codebook_VE.square().sum(-1).mean().sqrt()) or 1.0
        distance = _neighbour_distances(codebook_VE) if len(codebook_VE) > 1 else codebook_VE[0, :0]
        # Equal codes are not exactly 0 apart once squares have been subtracted from one another.
        apart = distance[distance > 1e-6 * rms].sort().values
        closest = float(apart[int(closest_share * (len(apart) - 1))]) if len(apart) else rms
        low = _TURN / rms
        return cls(low, math.log1p(decided / closest / low))


def multistep_weights(grid: Grid, steps: int, order: int) -> Tensor:
    """Weights of the latest velocities in each step of an Adams-Bashforth method on the grid.

    The posterior mean changes smoothly in the grid's coordinate u, and lambda(u) is known: so the
    polynomial through the latest velocities is taken in u and integrated against the exact
    lambda'(u). At order 2 on a logarithmic grid this is the scheme of DPM-Solver++(2M) (arXiv
    2211.01095); Adams-Bashforth in lambda needs about twice the evaluations for the same tokens.

    Returns:
        float64 [steps, order]; the velocity of step i stands in column i mod order, so that a ring
        of the latest ones needs no reordering. Columns not filled yet weigh nothing.
    """
    nodes, quadrature = np.polynomial.legendre.leggauss(8)
    weights = np.zeros((steps, order))
    for step in range(steps):
        latest = range(max(step - order + 1, 0), step + 1)
        u = step + (nodes + 1) / 2
        slope = grid.low * grid.span * np.exp(grid.span * u / steps) * quadrature / (2 * steps)
        for this in latest:
            basis = np.prod([(u - i) / (this - i) for i in latest if i != this] or [u**0], axis=0)
            weights[step, this % order] = slope @ basis
    return torch.from_numpy(weights)


def adams_bashforth(velocity: Velocity, start: Tensor, grid: Grid, weights: Tensor) -> Tensor:
    """Explicit multistep integration along the grid; one evaluation a step.

    Args:
        velocity: the right-hand side.
        start: state at lambda = 0; not changed.
        grid: where the steps lie.
        weights: [steps, order], from `multistep_weights`, in the state's dtype and device.

    Returns:
        The state at the end of the grid.
    """
    steps, order = weights.shape
    y = start.clone(memory_format=torch.contiguous_format)
    ring = y.new_zeros(order, *y.shape)
    slots, slopes_by_column, flat = ring.unbind(), ring.flatten(1).T, y.view(-1)
    for step in range(steps):
        velocity(grid.at(step / steps), y, slots[step % order])
        flat.addmv_(slopes_by_column, weights[step])
    return y


def rk4(velocity: Velocity, y: Tensor, grid: Grid, steps: int) -> Tensor:
    """The classical Runge-Kutta method along the grid; four evaluations a step."""
    y = y.contiguous()
    for here, there in pairwise(grid.at(i / steps) for i in range(steps + 1)):
        step, middle = there - here, (here + there) / 2
        k1, k2, k3, k4 = (torch.empty_like(y) for _ in range(4))
        velocity(here, y, k1)
        velocity(middle, y + k1 * (step / 2), k2)
        velocity(middle, y + k2 * (step / 2), k3)
        velocity(there, y + k3 * step, k4)
        y = y + (k1 + 2 * k2 + 2 * k3 + k4) * (step / 6)
    return y


def _neighbour_distances(codes_VE: Tensor) -> Tensor:
    """Distance of every code to the nearest other code, float64 [V]."""
    num_codes = len(codes_VE)
    square_V = codes_VE.square().sum(-1)
    rows = max(1, _BLOCK_ELEMENTS // num_codes)
    # One buffer for all blocks: V^2 distances pass through it, and are never held.
    block = codes_VE.new_empty(rows, num_codes)
    nearest_V = torch.empty_like(square_V)
    for start in range(0, num_codes, rows):
        part = codes_VE[start : start + rows]
        squared = torch.addmm(square_V, part, codes_VE.T, alpha=-2.0, out=block[: len(part)])
        squared.diagonal(start).fill_(math.inf)
        torch.amin(squared, -1, out=nearest_V[start : start + len(part)])
    return (nearest_V + square_V).clamp_min_(0).sqrt_()


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Products and convolutions of a device in true float32, whatever the process prefers.

    That is without TF32, which is cuDNN's default for convolutions, without bfloat16, and without
    autocast, which the meta device has not.
    """
    kind = device.type if torch.amp.is_autocast_available(device.type) else "cpu"
    mkldnn: Any = torch.backends.mkldnn  # the stubs lack these
    cudnn: Any = torch.backends.cudnn
    backends = (torch.backends.cuda.matmul, mkldnn.matmul, cudnn.conv)
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast(kind, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


class Transport:
    """The map noise -> token of one codebook, with its grid and keys made once.

    Where the codebook lies on a GPU, the multistep methods run as one kernel
    (ddray/method/flow_triton.py; attribute `fused`). The torch operations here are its reference.

    Args:
        codebook_VE: float [V, E].
        solver: one of `SOLVERS`.
        num_evals: velocity evaluations; None = the default for this codebook. RK4: four a step.

    Raises:
        ConfigError: for an unknown solver, too few evaluations, or a codebook that is not a finite
            [V, E] tensor.
    """

    def __init__(self, codebook_VE: Tensor, solver: str = "ab4", num_evals: int | None = None):
        if solver not in SOLVERS:
            raise ConfigError(f"solver={solver!r} is unknown; choose one of {', '.join(SOLVERS)}")
        if codebook_VE.dim() != 2 or not codebook_VE.numel():
            raise ConfigError(f"codebook must be [V, E] and not empty, got {[*codebook_VE.shape]}")
        if not bool(codebook_VE.isfinite().all()):
            raise ConfigError("codebook holds values that are not finite")
        exact = solver == "exact"
        # A shift of the codebook changes no token; centred codes lose fewer digits.
        codes = codebook_VE.double()
        codes = codes - codes.mean(0)
        self.solver, self.dtype = solver, torch.float64 if exact else torch.float32
        self.grid = Grid.of(
            codes, *((_DECIDED_EXACT, 0.0) if exact else (_DECIDED, _CLOSEST_SHARE))
        )
        per_step = 4 if solver == "rk4" else 1
        if num_evals is None:
            per_fold = _EVALS_PER_FOLD[solver] * (_MANY if len(codes) > _MANY_CODES else 1)
            num_evals = per_step * math.ceil(per_fold * self.grid.span / per_step)
        if num_evals < per_step or num_evals % per_step:
            rule = f"a positive multiple of {per_step}"
            raise ConfigError(f"num_evals={num_evals} does not suit solver={solver!r}; give {rule}")
        self.num_evals = num_evals
        self._steps = num_evals // per_step
        order = _ORDERS.get(solver, 1)
        weights = multistep_weights(self.grid, self._steps, order)
        self._weights = weights.to(codes.device, self.dtype)
        lambdas = [self.grid.at(i / self._steps) for i in range(self._steps + 1)]
        self._lambdas = torch.tensor(lambdas, dtype=self.dtype, device=codes.device)
        self.fused = (
            codes.is_cuda
            and solver in _FUSED_SOLVERS
            and codes.shape[1] <= _FUSED_WIDTH
            and can_fuse(codes.device)
        )
        self.codes_EV = codes.to(self.dtype).T.contiguous()
        # [C, |c|^2 / 2]: with the query [y, -lambda] the exponent is lambda times one matrix
        # product, added to log p.
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
        if self.fused:
            from ddray.method import flow_triton

            return flow_triton.solve(
                noise_NE, logits_NV, self.keys_FV, self._lambdas, self._weights
            )
        rows = max(1, _BLOCK_ELEMENTS // self.codes_EV.shape[1])
        with full_float32(noise_NE.device), torch.no_grad():
            tokens = [
                self._solve(noise.to(self.dtype), logits.to(self.dtype))
                for noise, logits in zip(noise_NE.split(rows), logits_NV.split(rows), strict=True)
            ]
        return torch.cat(tokens)

    def _solve(self, noise_NE: Tensor, logits_NV: Tensor) -> Tensor:
        # The state is code-major: a product with one long and one short side is several times as
        # fast on a CPU when the short one comes first.
        query_FN = noise_NE.new_empty(len(self.keys_FV), len(noise_NE))
        exponent_NV, weights_NV = torch.empty_like(logits_NV), torch.empty_like(logits_NV)
        # At a hundred rows the overhead of an operation is half its cost: views are made once.
        query_NF, weights_VN = query_FN.T, weights_NV.T
        query_y, query_lam = query_FN[:-1], query_FN[-1]

        def exponent(lam: float, y_EN: Tensor) -> Tensor:
            query_y.copy_(y_EN)
            query_lam.fill_(-lam)
            return torch.addmm(logits_NV, query_NF, self.keys_FV, alpha=lam, out=exponent_NV)

        def velocity(lam: float, y_EN: Tensor, out: Tensor) -> Tensor:
            torch.softmax(exponent(lam, y_EN), -1, out=weights_NV)
            weights_NV.clamp_min_(_NEGLIGIBLE)
            return torch.mm(self.codes_EV, weights_VN, out=out)

        if self.solver == "rk4":
            y_EN = rk4(velocity, noise_NE.T, self.grid, self._steps)
        else:
            y_EN = adams_bashforth(velocity, noise_NE.T, self.grid, self._weights)
        return likeliest(exponent(self.grid.at(1.0), y_EN))


def transport(
    noise: Tensor,
    logits: Tensor,
    codebook: Tensor,
    *,
    solver: str = "ab4",
    num_evals: int | None = None,
) -> Tensor:
    """Carry noise to tokens: the deterministic map of Distilled Decoding.

    See arXiv 2412.17153, section 3. Over standard normal noise the token is distributed as
    softmax(logits).

    Args:
        noise: float [..., E].
        logits: float [..., V], unnormalised log probabilities; -inf removes a code.
        codebook: float [V, E].
        solver: "ab4" (default), "ab2", "euler", "rk4", or "exact" (float64 reference).
        num_evals: velocity evaluations; None = the default for this codebook.

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
    if not noise.numel():
        return torch.empty(noise.shape[:-1], dtype=torch.long, device=noise.device)
    peak = logits.amax(-1)
    if not bool(peak.isfinite().all()):
        bad = int((~peak.isfinite()).sum())
        raise ConfigError(f"{bad} rows of logits have no finite maximum (NaN, +inf or all -inf)")
    if not bool(noise.isfinite().all()):
        raise ConfigError("noise holds values that are not finite")
    return solve(noise.reshape(-1, width), logits.reshape(-1, vocab_size)).reshape(noise.shape[:-1])
