"""Facts about random draws: the published generator, the normal law, one draw per (seed, index)."""

import itertools
import math

import pytest
import torch

import ddray
from ddray.errors import ConfigError
from ddray.method.seeding import NOISE_STREAM, TOKEN_STREAM, index_tensor, philox, uniforms

LARGEST = 2**63 - 1
ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, words):
    out = philox(tuple(torch.tensor([c]) for c in counter), key[1] << 32 | key[0])
    assert [int(word) for word in out] == words


def test_noise_has_the_moments_of_a_standard_normal():
    x = ddray.noise(3, range(500), (50, 8)).double().flatten()
    n = len(x)
    # Four standard errors of each moment.
    assert abs(x.mean()) < 4 / math.sqrt(n)
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96 / n)
    assert x.isfinite().all()
    assert x.abs().max() < 6.78


@pytest.mark.parametrize("component", range(4))
def test_noise_passes_kolmogorov_smirnov_in_every_word_of_a_block(component):
    x = ddray.noise(11, range(20_000), (1, 4))[:, 0, component].double().sort().values
    n = len(x)
    normal = torch.special.ndtr(x)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = max((steps[1:] - normal).max(), (normal - steps[:-1]).max())
    assert math.sqrt(n) * distance < 1.628  # the 1 % point of the Kolmogorov distribution


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (5, 3), (7, 1), (4, 4)])
def test_noise_is_bitwise_the_same_at_any_batch_size_and_order(shape):
    indices = [5, 0, 2**31, 2**32 - 1, 2**32, LARGEST - 1, LARGEST, 1]
    for seed in (0, 2**32, LARGEST):
        alone = {i: ddray.noise(seed, [i], shape)[0] for i in indices}
        for batch in (indices, indices[::-1], indices[2:5], [LARGEST, LARGEST, 0]):
            together = ddray.noise(seed, torch.tensor(batch), shape)
            assert together.shape == (len(batch), *shape)
            assert together.dtype == torch.float32
            for row, i in zip(together, batch, strict=True):
                assert torch.equal(row, alone[i])


def test_each_sample_may_have_a_seed_of_its_own():
    seeds, indices, shape = [0, LARGEST, 7, 2**32, 7], [3, 3, LARGEST, 0, 1], (5, 3)
    together = ddray.noise(seeds, indices, shape)
    for row, seed, index in zip(together, seeds, indices, strict=True):
        assert torch.equal(row, ddray.noise(seed, [index], shape)[0])
    with pytest.raises(ConfigError, match="2 seeds were given for 3 samples"):
        ddray.noise([1, 2], [1, 2, 3], shape)
    with pytest.raises(ConfigError, match=r"seed must be an integer from 0 .* got -1"):
        ddray.noise([1, -1], [1, 2], shape)


def test_a_shorter_sample_is_the_beginning_of_a_longer_one():
    longer = ddray.noise(1, [9], (5, 3)).flatten()
    assert torch.equal(ddray.noise(1, [9], (1, 7)).flatten(), longer[:7])


def test_neighbouring_seeds_and_indices_are_uncorrelated():
    size = 40_000
    rows = {
        (seed, index): ddray.noise(seed, [index], (size, 1)).flatten().double()
        for seed in (0, 1, 2**32, LARGEST)
        for index in (0, 1, 2**32, LARGEST)
    }
    for a, b in itertools.combinations(rows.values(), 2):
        assert abs(float((a * b).mean())) < 4.5 / math.sqrt(size)


def test_streams_for_noise_and_for_tokens_never_share_words():
    block, index = torch.arange(1000), torch.tensor(7)
    streams = [
        torch.stack(philox((block, index, torch.tensor(0), torch.tensor(stream)), 5))
        for stream in (NOISE_STREAM, TOKEN_STREAM)
    ]
    assert not (streams[0] == streams[1]).any()


def test_uniforms_fill_the_open_interval_evenly():
    u = uniforms(5, torch.arange(1000), 50)
    assert u.dtype == torch.float64
    assert u.shape == (1000, 50)
    assert u.min() > 0 and u.max() < 1
    ordered, n = u.flatten().sort().values, u.numel()
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max())
    assert math.sqrt(n) * distance < 1.628


def test_uniforms_belong_to_the_seed_and_the_index():
    index = torch.tensor([3, LARGEST, 0])
    together = uniforms(LARGEST, index, 9)
    for row, i in zip(together, index, strict=True):
        assert torch.equal(row, uniforms(LARGEST, i[None], 9)[0])
        assert torch.equal(row[:4], uniforms(LARGEST, i[None], 4)[0])


def test_the_numbers_of_the_scheme_never_change():
    expected = [
        [0.38040074706077576, -0.29627788066864014],
        [-0.2492334246635437, -1.00383722782135],
    ]
    # Within 1e-6: another machine's logarithm and cosine may differ in the last place.
    golden = torch.tensor([expected])
    torch.testing.assert_close(ddray.noise(1, [0], (2, 2)), golden, atol=1e-6, rtol=0)
    draws = torch.tensor([[0.0722035321214366, 0.06561895568428355, 0.23927699741674358]])
    torch.testing.assert_close(uniforms(1, torch.tensor([0]), 3), draws.double(), atol=1e-8, rtol=0)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64])
def test_a_seed_outside_int64_is_refused(seed):
    with pytest.raises(ConfigError, match=rf"seed must be an integer .* got {seed}"):
        ddray.noise(seed, [0], (1, 1))


def test_a_negative_index_is_refused():
    with pytest.raises(ConfigError, match="index must be >= 0, got -7"):
        ddray.noise(0, [3, -7], (1, 1))


@pytest.mark.parametrize("index", [[0.5], [[0]], torch.tensor(3)])
def test_an_index_that_is_no_list_of_integers_is_refused(index):
    with pytest.raises(ConfigError, match="index must be a 1-D list of integers"):
        index_tensor(index)


def test_an_index_beyond_int64_is_refused():
    with pytest.raises(ConfigError, match=r"index must hold integers below 2\^63"):
        ddray.noise(0, [2**63], (1, 1))


@pytest.mark.parametrize("seed", [1.5, "1"])
def test_a_seed_that_is_no_integer_is_refused(seed):
    with pytest.raises(ConfigError, match="seed must be an integer"):
        ddray.noise(seed, [0], (1, 1))
