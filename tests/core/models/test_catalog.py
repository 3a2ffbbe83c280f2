"""Facts about the published models: their state dicts, and what ddray says of them."""

import json

import pytest
import torch

from ddray.models.catalog import PUBLISHED
from ddray.models.families import FAMILIES, empty_network, empty_tokenizer
from tests.core.tiny import GOLDEN

KEY_FILES = {
    **{
        f"llamagen-{size}-{pixels}": f"llamagen_c2i_{size.upper()}"
        for size in ("b", "l", "xl", "xxl", "3b")
        for pixels in (256, 384)
    },
    "llamagen-t2i-xl-256": "llamagen_t2i_XL",
    "llamagen-t2i-xl-512": "llamagen_t2i_XL",
    "llamagen-dd-b-256": "llamagen_dd_B",
    "llamagen-dd-l-256": "llamagen_dd_L",
    **{f"var-d{depth}": f"var_d{depth}" for depth in (16, 20, 24, 30, 36)},
    **{f"var-dd-d{depth}": f"var_dd_d{depth}" for depth in (16, 20, 24)},
}


def published_keys(name):
    return json.loads((GOLDEN / "keys" / f"{name}.json").read_text())


def described(module):
    return {
        name: [[*tensor.shape], str(tensor.dtype).removeprefix("torch.")]
        for name, tensor in module.state_dict().items()
    }


def test_every_published_model_has_a_key_file():
    assert set(KEY_FILES) == set(PUBLISHED)


@pytest.mark.parametrize("name", KEY_FILES)
def test_the_network_has_the_keys_shapes_and_dtypes_of_the_official_file(name):
    expected = published_keys(KEY_FILES[name])
    network = empty_network(PUBLISHED[name].config)
    assert all(tensor.is_meta for tensor in network.state_dict().values())
    assert described(network) == expected["keys"]
    assert sum(p.numel() for p in network.parameters()) == expected["num_parameters"]


@pytest.mark.parametrize(
    ("name", "keys"),
    [("llamagen-b-256", "llamagen_vq_16"), ("var-d16", "var_vqvae")],
)
def test_the_tokenizer_has_the_keys_of_the_official_file(name, keys):
    assert described(empty_tokenizer(PUBLISHED[name].config)) == published_keys(keys)["keys"]


def test_the_finer_tokenizer_has_the_keys_of_its_official_file():
    config = {**PUBLISHED["llamagen-b-256"].config, "tokenizer": {"ch_mult": (1, 2, 2, 4)}}
    assert described(empty_tokenizer(config)) == published_keys("llamagen_vq_8")["keys"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_files_are_those_of_the_key_files(name):
    published, official = PUBLISHED[name], published_keys(KEY_FILES[name])
    if published.checkpoint is None:
        return
    listed = " ".join(official["official_files"])
    assert published.checkpoint.repository in listed
    assert published.checkpoint.name in listed


def test_a_constant_of_other_sizes_is_told_from_a_parameter():
    config = dict(PUBLISHED["var-d16"].config)
    network = empty_network(config)
    constants = network.constants()
    assert constants["lvl_1L"].shape == (1, 680)
    parameters = {name for name, _ in network.named_parameters()}
    assert not parameters & constants.keys()
    assert parameters | constants.keys() == network.state_dict().keys()
    assert isinstance(network, FAMILIES["var"].network)
    mask = constants["attn_bias_for_masking"][0, 0]
    assert mask[0].tolist() == [0.0, *[-torch.inf] * 679]
    assert not mask[-1].any()
