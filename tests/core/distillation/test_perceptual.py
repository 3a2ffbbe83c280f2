"""Facts about the distance of decoded images."""

import sys

import pytest
import torch

from ddray.config.distillation import DistillConfig
from ddray.config.loading import load_config
from ddray.distillation.losses import Prediction
from ddray.distillation.perceptual import Lpips, Perceptual, check_lpips, encoder_distance
from ddray.errors import CheckpointError, ConfigError
from ddray.method.student import given_tokens
from ddray.storage.checkpoint import fingerprint
from tests.core.distillation.test_score_distillation import TEACHERS, prediction
from tests.core.tiny import tiny_teacher, tiny_var

TOKENIZER = DistillConfig(perceptual={"distance": "tokenizer"})


def distance(teacher, said, precision=0.0):
    return Perceptual(TOKENIZER, teacher, code_precision=precision).loss(said)[0]


def sure_of(teacher, tokens_BL, said):
    """What a student says that gives these tokens and doubts none."""
    logits = torch.nn.functional.one_hot(tokens_BL, len(teacher.codebook)) * 100.0
    return said._replace(logits_BLV=logits.requires_grad_(True))


def by_distance(teacher, tokens_BL, rank):
    """For every token, the code at a rank of closeness; 0 is itself."""
    codebook = teacher.codebook
    return torch.cdist(codebook, codebook).argsort(1)[tokens_BL, rank]


@pytest.mark.parametrize("family", TEACHERS)
def test_the_teachers_own_tokens_are_at_no_distance(family):
    teacher = TEACHERS[family]()
    said = prediction(teacher)
    said = sure_of(teacher, said.tokens_BL, said)
    loss = distance(teacher, said)
    loss.backward()
    assert 0 <= float(loss.detach()) < 1e-10
    assert said.logits_BLV.grad.abs().max() < 1e-6


@pytest.mark.parametrize("family", TEACHERS)
def test_tokens_further_away_are_at_a_larger_distance(family):
    teacher = TEACHERS[family]()
    said = prediction(teacher, rows=8)
    said = said._replace(asked_BL=torch.ones_like(said.asked_BL))
    near, far = (
        float(distance(teacher, sure_of(teacher, by_distance(teacher, said.tokens_BL, k), said)))
        for k in (1, -1)
    )
    assert 0 < near < far < 4


@pytest.mark.parametrize("family", TEACHERS)
def test_the_gradient_reaches_both_heads_where_tokens_were_asked_for_and_nothing_else(family):
    teacher = TEACHERS[family]()
    before = fingerprint(teacher.tokenizer.module)
    said = prediction(teacher)
    distance(teacher, said, precision=8.0).backward()
    for head in (said.logits_BLV, said.codes_BLE):
        assert head.grad[said.asked_BL].abs().sum() > 0
        assert head.grad[~said.asked_BL].abs().sum() == 0
    assert all(weight.grad is None for weight in teacher.tokenizer.module.parameters())
    assert fingerprint(teacher.tokenizer.module) == before


def test_the_image_is_the_one_of_the_tokens_that_are_read():
    teacher = tiny_teacher()
    said = prediction(teacher)
    tokens = torch.where(said.asked_BL, said.logits_BLV.argmax(-1), said.tokens_BL)
    module = teacher.tokenizer.module
    images, targets = (module.decode(teacher.codebook[t]) for t in (tokens, said.tokens_BL))
    expected = encoder_distance(module.encoder, images, targets).mean()
    torch.testing.assert_close(distance(teacher, said).detach(), expected)


def test_rows_that_were_asked_for_nothing_do_not_count():
    teacher = tiny_var()
    said = prediction(teacher)
    t_B = torch.tensor([0, 1, len(teacher.stages)])
    said = said._replace(asked_BL=~given_tokens(teacher.stages, t_B), t_B=t_B)
    two = Prediction(*(part[:2] for part in said))
    torch.testing.assert_close(distance(teacher, said), distance(teacher, two))


def test_the_weight_scales_the_loss_and_not_the_figure():
    teacher = tiny_teacher()
    said = prediction(teacher)
    config = DistillConfig(perceptual={"distance": "tokenizer", "weight": 3.0})
    loss, scalars = Perceptual(config, teacher, code_precision=0.0).loss(said)
    torch.testing.assert_close(loss.detach(), 3 * scalars["perceptual"])


def test_the_distance_is_twice_one_minus_the_cosine():
    teacher = tiny_teacher()
    encoder = teacher.tokenizer.module.encoder
    images, targets = torch.randn(2, 2, 3, 4, 4)
    cosines = [
        torch.cosine_similarity(a, b, dim=1).mean((1, 2))
        for a, b in zip(encoder.features(images), encoder.features(targets), strict=True)
    ]
    # Two levels and the middle.
    assert len(cosines) == 3
    expected = 2 - 2 * torch.stack(cosines).mean(0)
    torch.testing.assert_close(encoder_distance(encoder, images, targets), expected)


def test_lpips_without_the_package_says_what_to_install(monkeypatch):
    # As Python itself marks a module that cannot be imported.
    monkeypatch.setitem(sys.modules, "lpips", None)
    config = DistillConfig(perceptual={"distance": "lpips", "weights_file": "vgg.pth"})
    with pytest.raises(ConfigError, match=r"needs the package lpips; install ddray\[lpips\]"):
        check_lpips(config)
    with pytest.raises(ConfigError, match=r"perceptual\.distance=tokenizer"):
        Perceptual(config, tiny_teacher(), code_precision=0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["distance=lpips"], "distance=lpips with perceptual.weights_file=None: lpips needs"),
        (["weights_file=x"], "perceptual.distance=off with perceptual.weights_file=/.+/x"),
        (["distance=vgg"], "distance='vgg': input should be 'off', 'tokenizer' or 'lpips'"),
        (["distance=tokenizer", "weight=0"], "perceptual.weight=0: .*greater than 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        load_config(DistillConfig, settings=[f"perceptual.{setting}" for setting in settings])


def test_off_is_a_word_also_where_yaml_reads_a_truth_value():
    config = load_config(DistillConfig, settings=["perceptual.distance=off"])
    assert config.perceptual.distance == "off"
    check_lpips(DistillConfig())


@pytest.fixture(scope="module")
def lpips_file(tmp_path_factory):
    """Random weights of the real network, of a scale that keeps its features finite."""
    lpips = pytest.importorskip("lpips")
    with torch.device("meta"):
        network = lpips.LPIPS(pretrained=False, pnet_rand=True, net="vgg", verbose=False)
    network.to_empty(device="cpu")
    network.scaling_layer.shift.zero_()
    network.scaling_layer.scale.fill_(1)
    generator = torch.Generator().manual_seed(0)
    for name, weight in network.named_parameters():
        if weight.dim() == 1:
            weight.data.zero_()
            continue
        weight.data.normal_(0, (2 / weight[0].numel()) ** 0.5, generator=generator)
        if name.startswith("lin"):
            weight.data.abs_()
    file = tmp_path_factory.mktemp("lpips") / "vgg.pth"
    torch.save(network.state_dict(), file)
    return file


@pytest.mark.slow
def test_lpips_is_that_of_the_package(lpips_file):
    network = Lpips(lpips_file)
    images, targets = (torch.rand(2, 1, 28, 28) * 2 - 1 for _ in range(2))
    assert network(images, images).abs().max() == 0
    found = network(images, targets)
    enlarged = (
        torch.nn.functional.interpolate(x, size=(64, 64), mode="bilinear").repeat(1, 3, 1, 1)
        for x in (images, targets)
    )
    theirs = network._network(*enlarged).flatten()
    assert (found > 0).all()
    torch.testing.assert_close(found, theirs)
    # Grey is read as three equal channels.
    repeated = (x.repeat(1, 3, 1, 1) for x in (images, targets))
    torch.testing.assert_close(network(*repeated), found)
    # Where nothing is seen at all, the package's own gradient is NaN.
    black = torch.zeros(1, 3, 64, 64, requires_grad=True)
    network(black, torch.rand(1, 3, 64, 64)).sum().backward()
    assert black.grad.isfinite().all()


@pytest.mark.slow
def test_a_job_with_lpips_reaches_both_heads(lpips_file, monkeypatch):
    monkeypatch.chdir(lpips_file.parent)
    named = {"distance": "lpips", "weights_file": lpips_file.name}
    config = DistillConfig(perceptual=named)
    check_lpips(config)
    monkeypatch.chdir("/")
    teacher = tiny_teacher()
    said = prediction(teacher)
    Perceptual(config, teacher, code_precision=8.0).loss(said)[0].backward()
    for head in (said.logits_BLV, said.codes_BLE):
        assert head.grad[said.asked_BL].abs().sum() > 0


def test_lpips_needs_its_file_whole(lpips_file, tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.pth does not exist or is no file"):
        Lpips(tmp_path / "nowhere.pth")
    torch.save({"lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}, tmp_path / "heads.pth")
    with pytest.raises(CheckpointError, match=r"heads\.pth does not fit the model: missing"):
        Lpips(tmp_path / "heads.pth")
