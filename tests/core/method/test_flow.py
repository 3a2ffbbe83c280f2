"""Facts about transport: its marginal is p, it is the flow's map, and its solvers converge."""

import math

import pytest
import torch

import ddray
from ddray.errors import ConfigError
from ddray.method.flow import SOLVERS, Transport, multistep_weights, transport
from tests.core.tiny import LargestTensor, chi_square_p_value

INF = math.inf


def mixture(vocab_size, width, rows, seed=0):
    """Noise, logits (a row of their own each) and codes on the unit sphere, as LlamaGen's are."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(vocab_size, width, generator=generator)
    logits = 2 * torch.randn(rows, vocab_size, generator=generator)
    noise = torch.randn(rows, width, generator=generator)
    return noise, logits, torch.nn.functional.normalize(codes, dim=-1)


def agreement(a, b):
    return float((a == b).double().mean())


@pytest.mark.parametrize(("vocab_size", "width"), [(8, 4), (32, 4), (8, 1)])
def test_tokens_are_distributed_as_p(vocab_size, width):
    generator = torch.Generator().manual_seed(vocab_size + width)
    codes = torch.randn(vocab_size, width, generator=generator)
    if width == 1:  # the grid is made for neighbours at about the median distance
        codes = torch.arange(vocab_size)[:, None] + 0.3 * codes.clamp(-1, 1)
    logits = torch.randn(vocab_size, generator=generator)
    logits[1] = logits[4] = -INF
    noise = ddray.noise(2, range(100_000), (1, width))[:, 0]
    tokens = transport(noise, logits.expand(len(noise), -1), codes)
    counts = tokens.bincount(minlength=vocab_size)
    assert counts[1] == counts[4] == 0
    # Refused below 1 %: 100 000 draws would show a bias of half a percent of the mass.
    assert chi_square_p_value(counts, logits.softmax(-1)) > 0.01


@pytest.mark.parametrize("solver", SOLVERS)
def test_two_symmetric_codes_split_the_line_at_zero(solver):
    noise = torch.cat((torch.linspace(-3, -1e-3, 500), torch.linspace(1e-3, 3, 500)))[:, None]
    evals = 400 if solver == "exact" else None
    codes = torch.tensor([[-1.0], [1.0]])
    tokens = transport(noise, torch.zeros(len(noise), 2), codes, solver=solver, num_evals=evals)
    assert torch.equal(tokens, (noise[:, 0] > 0).long())


def test_on_a_line_the_map_is_the_quantile_map():
    # A flow on a line cannot cross itself, so it keeps the order: token j for Phi(noise) in the
    # j-th interval of p.
    p = torch.tensor([0.1, 0.35, 0.05, 0.3, 0.2], dtype=torch.float64)
    codes = torch.tensor([[-2.0], [-0.5], [0.0], [0.4], [3.0]])
    noise = torch.linspace(-3, 3, 1001)[:, None]
    quantile = torch.special.ndtr(noise[:, 0].double())
    borders = p.cumsum(0)[:-1]
    clear = (quantile[:, None] - borders).abs().amin(-1) > 0.005
    expected = torch.searchsorted(borders, quantile)
    logits = p.log().expand(len(noise), -1)
    exact = transport(noise, logits, codes, solver="exact", num_evals=400)
    assert torch.equal(exact[clear], expected[clear])
    assert agreement(transport(noise, logits, codes), expected) > 0.98


def test_the_map_is_the_flow_of_the_probability_path():
    """Against the ODE in t, whose velocity comes from autograd of log p_t by Tweedie's formula."""
    noise, logits, codes = mixture(6, 2, 300, seed=4)
    logits, codes = logits.double(), codes.double() * 1.5

    def velocity(t, x):
        x = x.detach().requires_grad_(True)
        distance = (x[:, None] - t * codes).square().sum(-1)
        log_density = torch.logsumexp(logits - distance / (2 * (1 - t) ** 2), -1)
        (score,) = torch.autograd.grad(log_density.sum(), x)
        mean_code = (x + (1 - t) ** 2 * score) / t
        return ((mean_code - x) / (1 - t)).detach()

    x, steps, t, last = noise.double(), 250, 1e-4, 0.97
    h = (last - t) / steps
    for _ in range(steps):
        k1 = velocity(t, x)
        k2 = velocity(t + h / 2, x + k1 * h / 2)
        k3 = velocity(t + h / 2, x + k2 * h / 2)
        k4 = velocity(t + h, x + k3 * h)
        x, t = x + h * (k1 + 2 * k2 + 2 * k3 + k4) / 6, t + h
    expected = torch.cdist(x / t, codes).argmin(-1)
    # The two start 1e-4 apart in t, which can move a noise that lies on a border.
    assert (
        agreement(transport(noise, logits, codes, solver="exact", num_evals=800), expected) > 0.99
    )


@pytest.fixture(scope="module")
def mixture_256():
    noise, logits, codes = mixture(256, 8, 2000, seed=1)
    exact = transport(noise, logits, codes, solver="exact", num_evals=400)
    return noise, logits, codes, exact


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["ab4", "ab2", "rk4"])
def test_the_default_agrees_with_the_exact_map(mixture_256, solver):
    noise, logits, codes, exact = mixture_256
    assert agreement(transport(noise, logits, codes, solver=solver), exact) >= 0.997


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "evals"), [("euler", (6, 24, 96)), ("ab2", (6, 12, 48)), ("ab4", (6, 12, 24))]
)
def test_more_evaluations_agree_more(mixture_256, solver, evals):
    noise, logits, codes, exact = mixture_256
    shares = [
        agreement(transport(noise, logits, codes, solver=solver, num_evals=n), exact) for n in evals
    ]
    assert shares[0] < shares[1] < shares[2]
    assert shares[2] > 0.98


@pytest.mark.slow
def test_euler_is_worse_than_ab2_at_the_same_cost(mixture_256):
    noise, logits, codes, exact = mixture_256
    euler, ab2 = (
        agreement(transport(noise, logits, codes, solver=solver, num_evals=24), exact)
        for solver in ("euler", "ab2")
    )
    assert euler < ab2


def test_the_scale_of_the_codebook_changes_no_token():
    noise, logits, codes = mixture(64, 4, 2000)
    tokens = transport(noise, logits, codes)
    for scale in (3.0, 0.01, 250.0):
        # The flow of other codes is another flow, but only in rounding: the grid scales along.
        assert agreement(transport(noise, logits, codes * scale), tokens) > 0.999


def test_a_shift_of_the_codebook_changes_no_token():
    noise, logits, codes = mixture(64, 4, 2000)
    shift = torch.tensor([5.0, -3.0, 0.5, 20.0])
    tokens = transport(noise, logits, codes)
    assert agreement(transport(noise, logits, codes + shift), tokens) > 0.999


def test_a_shift_of_the_logits_changes_no_token():
    noise, logits, codes = mixture(64, 4, 2000)
    shifted = logits + torch.linspace(-40, 40, 2000)[:, None]
    assert agreement(transport(noise, shifted, codes), transport(noise, logits, codes)) > 0.999


def test_one_code_takes_every_noise():
    noise, logits, codes = mixture(1, 4, 10)
    assert transport(noise, logits, codes).tolist() == [0] * 10


def test_one_finite_logit_takes_every_noise():
    noise, _, codes = mixture(16, 4, 100)
    logits = torch.full((100, 16), -INF)
    logits[:, 5] = -3.0
    assert transport(noise, logits, codes).tolist() == [5] * 100


def test_a_code_that_stands_twice_shares_its_mass():
    codes = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    noise = ddray.noise(8, range(50_000), (1, 2))[:, 0]
    logits = torch.tensor([0.25, 0.5, 0.25]).log().expand(len(noise), -1)
    second = (transport(noise, logits, codes) == 1).sum()
    counts = torch.stack((second, len(noise) - second))
    assert chi_square_p_value(counts, torch.tensor([0.5, 0.5])) > 0.01


def test_a_codebook_of_equal_codes_gives_a_finite_grid():
    codes = torch.ones(5, 3)
    assert math.isfinite(Transport(codes).grid.at(1.0))
    tokens = transport(torch.randn(4, 3), torch.zeros(4, 5), codes)
    assert tokens.min() >= 0 and tokens.max() < 5


def test_the_grid_begins_at_zero_and_increases():
    grid = Transport(mixture(64, 4, 1)[2]).grid
    values = [grid.at(i / 24) for i in range(25)]
    assert values[0] == 0
    assert all(a < b for a, b in zip(values, values[1:], strict=False))


@pytest.mark.parametrize("order", [1, 2, 4])
def test_the_weights_of_each_step_add_up_to_its_length(order):
    # A constant velocity is integrated exactly by every order.
    grid = Transport(mixture(64, 4, 1)[2]).grid
    lengths = [grid.at((i + 1) / 24) - grid.at(i / 24) for i in range(24)]
    weights = multistep_weights(grid, 24, order)
    torch.testing.assert_close(weights.sum(1), torch.tensor(lengths).double())


@pytest.mark.slow
def test_codes_much_closer_than_the_median_share_their_mass_as_p_says():
    codes = torch.tensor([[0.0], [0.01], [1.0], [2.0], [3.0], [4.0]])
    p = torch.tensor([0.25, 0.15, 0.15, 0.15, 0.15, 0.15])
    noise = ddray.noise(9, range(100_000), (1, 1))[:, 0]
    tokens = transport(noise, p.log().expand(len(noise), -1), codes)
    assert chi_square_p_value(torch.bincount(tokens, minlength=6), p) > 0.01


def test_leading_dimensions_are_kept():
    noise, logits, codes = mixture(16, 4, 24)
    flat = transport(noise, logits, codes)
    assert flat.dtype == torch.int64
    shaped = transport(noise.view(2, 3, 4, 4), logits.view(2, 3, 4, 16), codes)
    assert torch.equal(shaped, flat.view(2, 3, 4))
    assert transport(noise[0], logits[0], codes).shape == ()
    assert transport(noise[:0], logits[:0], codes).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_transport_runs_in_float32_whatever_it_is_given(dtype):
    noise, logits, codes = (x.to(dtype) for x in mixture(16, 4, 200))
    tokens = transport(noise, logits, codes)
    assert torch.equal(tokens, transport(noise.float(), logits.float(), codes.float()))


def test_inputs_are_left_alone():
    inputs = mixture(16, 4, 20)
    before = [x.clone() for x in inputs]
    for solver in ("ab4", "ab2", "euler", "rk4"):
        transport(*inputs, solver=solver)
    assert all(map(torch.equal, inputs, before))


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_process_precision_neither_matters_nor_changes(precision):
    noise, logits, codes = mixture(64, 8, 500)
    expected = transport(noise, logits, codes)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(transport(noise, logits, codes), expected)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_no_tensor_of_rows_times_codes_times_width_is_made():
    noise, logits, codes = mixture(1024, 8, 512)
    with LargestTensor() as watch:
        solve = Transport(codes, num_evals=4)
        solve(noise, logits)
    # Blocks have 2^20 elements at most; [N, V, E] would have four times that.
    assert watch.elements <= 2**20


def test_the_grid_of_a_large_codebook_takes_little_memory():
    with LargestTensor() as watch:
        Transport(torch.randn(8192, 4, generator=torch.Generator().manual_seed(0)))
    # All distances at once would be 64 times as many.
    assert watch.elements <= 2**20


def test_65536_codes_run_in_blocks():
    # Only the solve: the grid, a search over all pairs of codes, would take a minute here.
    noise, logits, codes = mixture(65536, 2, 20)
    solve = Transport(codes[:64], num_evals=2)
    solve.codes_EV = codes.T.contiguous()
    solve.keys_FV = torch.cat((codes, codes.square().sum(-1, keepdim=True) / 2), -1).T.contiguous()
    with LargestTensor() as watch:
        tokens = solve(noise, logits)
    assert tokens.shape == (20,)
    assert watch.elements <= logits.numel()


@pytest.mark.parametrize(
    ("noise", "logits", "codes"),
    [
        ((3, 4), (3, 7), (8, 4)),
        ((3, 5), (3, 8), (8, 4)),
        ((2, 4), (3, 8), (8, 4)),
        ((3, 4), (3, 1, 8), (8, 4)),
        ((3, 4), (3, 8), (4,)),
        ((3, 4), (3, 8), (1, 8, 4)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(noise, logits, codes):
    with pytest.raises(ConfigError, match="shapes do not fit: noise .* logits .* codebook"):
        transport(torch.zeros(noise), torch.zeros(logits), torch.zeros(codes))


def test_an_empty_codebook_is_refused():
    with pytest.raises(ConfigError, match="codebook"):
        transport(torch.zeros(3, 4), torch.zeros(3, 0), torch.zeros(0, 4))


@pytest.mark.parametrize("value", [math.nan, INF])
def test_logits_that_are_not_finite_are_refused(value):
    noise, logits, codes = mixture(8, 4, 3)
    logits[1, 2] = value
    with pytest.raises(ConfigError, match="1 rows of logits have no finite maximum"):
        transport(noise, logits, codes)


def test_a_row_without_any_code_is_refused():
    noise, logits, codes = mixture(8, 4, 3)
    logits[:2] = -INF
    with pytest.raises(ConfigError, match="2 rows of logits have no finite maximum"):
        transport(noise, logits, codes)


@pytest.mark.parametrize("value", [math.nan, INF, -INF])
def test_noise_and_codes_that_are_not_finite_are_refused(value):
    noise, logits, codes = mixture(8, 4, 3)
    with pytest.raises(ConfigError, match="noise holds values that are not finite"):
        transport(noise.fill_(value), logits, codes)
    codes[3, 1] = value
    with pytest.raises(ConfigError, match="codebook holds values that are not finite"):
        transport(torch.zeros(3, 4), logits, codes)


@pytest.mark.parametrize(
    ("solver", "evals", "message"),
    [
        ("heun", None, "solver='heun' is unknown; choose one of euler, ab2, ab4, rk4, exact"),
        ("ab2", 0, "num_evals=0 does not suit solver='ab2'; give a positive multiple of 1"),
        ("ab2", -1, "num_evals=-1 does not suit solver='ab2'"),
        ("rk4", 6, "num_evals=6 does not suit solver='rk4'; give a positive multiple of 4"),
        ("rk4", 0, "num_evals=0 does not suit solver='rk4'"),
    ],
)
def test_solvers_that_cannot_run_are_refused(solver, evals, message):
    noise, logits, codes = mixture(8, 4, 3)
    with pytest.raises(ConfigError) as caught:
        transport(noise, logits, codes, solver=solver, num_evals=evals)
    assert message in str(caught.value)
