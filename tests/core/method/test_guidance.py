"""Facts about guidance, filters and the draw: as naive Python does, at ties, in distribution."""

import math

import pytest
import torch

from ddray.errors import ConfigError
from ddray.method.guidance import (
    check_filters,
    classifier_free_guidance,
    draw,
    filter_logits,
    likeliest,
    top_k_filter,
    top_p_filter,
)
from tests.core.tiny import assert_golden, chi_square_p_value, golden

INF = math.inf


def naive_filter(logits, temperature, top_k, top_p):
    """The filters as one would write them on paper, one row of Python floats at a time."""
    row = [x / max(temperature, 1e-5) for x in logits]
    if 0 < top_k < len(row):
        kth = sorted(row, reverse=True)[top_k - 1]
        row = [x if x >= kth else -INF for x in row]
    if top_p < 1:
        total = sum(math.exp(x - max(row)) for x in row)
        before = 0.0
        for i in sorted(range(len(row)), key=lambda i: -row[i]):
            mass = math.exp(row[i] - max(row)) / total
            row[i] = row[i] if before <= top_p else -INF
            before += mass
    return row


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 5, 39, 40, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
def test_filters_do_what_naive_python_does(temperature, top_k, top_p):
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(3)) * 2
    expected = [naive_filter(row, temperature, top_k, top_p) for row in logits.tolist()]
    actual = filter_logits(logits, temperature, top_k, top_p)
    torch.testing.assert_close(actual, torch.tensor(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["k7", "p9", "k12p8T13", "none"])
def test_filters_match_upstream(name):
    config, tensors = golden("lg_filter")
    settings = {"temperature": 1.0, **config["settings"][name]}
    filtered = filter_logits(tensors["in/logits"], **settings)
    assert_golden(filtered, tensors[f"out/{name}.filtered"])
    assert_golden(filtered.softmax(-1), tensors[f"out/{name}.probs"])


def test_ties_at_the_kth_value_all_survive():
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 0.0])
    kept = top_k_filter(logits, 2).isfinite()
    assert kept.tolist() == [False, True, True, True, True, False]


def test_the_first_entry_that_crosses_p_is_kept():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert top_p_filter(logits, 0.6).isfinite().tolist() == [True, True, False, False]
    assert top_p_filter(logits, 0.79).isfinite().tolist() == [True, True, False, False]
    assert top_p_filter(logits, 0.81).isfinite().tolist() == [True, True, True, False]


def test_top_p_keeps_the_likeliest_entry_however_small_p_is():
    assert top_p_filter(torch.tensor([0.1, 0.2, 0.0]), 1e-9).isfinite().tolist() == [
        False,
        True,
        False,
    ]


def test_temperature_comes_before_top_p():
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    assert filter_logits(logits, 1.0, 0, 0.55).isfinite().sum() == 2
    assert filter_logits(logits, 0.5, 0, 0.55).isfinite().sum() == 1


def test_top_p_counts_the_mass_that_top_k_left():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # 0.4 of everything is 0.57 of what top-2 leaves: it alone crosses 0.5 only after the cut.
    assert filter_logits(logits, 1.0, 0, 0.5).isfinite().sum() == 2
    assert filter_logits(logits, 1.0, 2, 0.5).isfinite().sum() == 1


def test_filters_leave_their_input_alone():
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    filter_logits(logits, 0.7, 3, 0.5)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_filtered_logits_are_float32(dtype):
    assert filter_logits(torch.zeros(2, 4, dtype=dtype), 0.5, 2, 0.9).dtype == torch.float32


def test_guidance_is_linear_between_null_and_conditional():
    conditional, null = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(classifier_free_guidance(conditional, null, 1.0), conditional)
    torch.testing.assert_close(classifier_free_guidance(conditional, null, 0.0), null)
    expected = null + 3.5 * (conditional - null)
    torch.testing.assert_close(classifier_free_guidance(conditional, null, 3.5), expected)


def test_draw_is_the_inverse_of_the_cumulative_distribution():
    logits = torch.tensor([0.2, 0.0, 0.5, 0.3]).log().expand(8, 4)
    uniform = [1e-9, 0.19, 0.21, 0.5, 0.69, 0.71, 0.99, 1 - 2**-53]
    tokens = draw(logits, torch.tensor(uniform, dtype=torch.float64))
    assert tokens.tolist() == [0, 0, 2, 2, 2, 3, 3, 3]
    assert tokens.dtype == torch.int64


def test_draw_follows_the_distribution_and_never_takes_a_removed_entry():
    p = torch.tensor([0.0, 0.4, 0.0, 0.05, 0.3, 0.25, 0.0])
    generator = torch.Generator().manual_seed(5)
    uniform = torch.rand(100_000, generator=generator, dtype=torch.float64)
    counts = draw(p.log().expand(len(uniform), -1), uniform).bincount(minlength=len(p))
    assert chi_square_p_value(counts, p) > 0.01


def test_the_extreme_uniforms_stay_inside_the_kept_entries():
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(2000, 300, generator=generator) * 3
    logits[:, :7] = logits[:, -7:] = -INF
    for extreme, edge in ((2.0**-53, 7), (1 - 2.0**-53, 292)):
        tokens = draw(logits, torch.full((2000,), extreme, dtype=torch.float64))
        assert logits.gather(1, tokens[:, None]).isfinite().all()
        assert (tokens == edge).double().mean() > 0.9


def test_draw_keeps_leading_dimensions():
    uniform = torch.full((2, 3), 0.5, dtype=torch.float64)
    assert draw(torch.zeros(2, 3, 5), uniform).tolist() == [[2, 2, 2], [2, 2, 2]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((-0.1, 0, 1.0), "temperature must be >= 0, got -0.1"),
        ((math.nan, 0, 1.0), "temperature must be >= 0, got nan"),
        ((1.0, -1, 1.0), r"top_k must be an integer >= 0 \(0 = off\), got -1"),
        ((1.0, 0, 0.0), r"top_p must be in \(0, 1\] \(1 = off\), got 0.0"),
        ((1.0, 0, 1.1), r"top_p must be in \(0, 1\] \(1 = off\), got 1.1"),
        ((1.0, 0, math.nan), "top_p must be in .* got nan"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        check_filters(*settings)


def test_temperature_zero_is_greedy():
    kept = filter_logits(torch.tensor([1.0, 1.01, 0.0]), 0.0, 0, 1.0).softmax(-1)
    assert kept.tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("vocab_size", [1, 100, 128, 384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_likeliest_token_is_the_first_of_the_largest(vocab_size, dtype):
    generator = torch.Generator().manual_seed(vocab_size)
    # Few values: most rows have several of the largest.
    scores = torch.randint(8, (40, 3, vocab_size), generator=generator).to(dtype)
    scores[5] = -torch.inf
    scores[6, :, vocab_size // 2] = torch.nan
    assert torch.equal(likeliest(scores), scores.argmax(-1))
    assert torch.equal(likeliest(scores[:, 0].T.contiguous().T), scores[:, 0].argmax(-1))
    assert likeliest(scores[:0]).shape == (0, 3)
