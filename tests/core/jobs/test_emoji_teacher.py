"""Facts about the job of the emoji teacher: what is held out, how pictures are drawn, resuming."""

import io
import json
import tarfile
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from ddray.errors import ConfigError
from tests.paths import ROOT

APPLE, FLAG, WAVE, TONE = "\U0001f34e", "\U0001f1ef\U0001f1f5", "\U0001f44b", "\U0001f3ff"
NAMES = {
    APPLE: ":red_apple:",
    FLAG: ":Japan:",
    WAVE: ":waving_hand:",
    WAVE + TONE: ":waving_hand_dark_skin_tone:",
    "\u2764\ufe0f": ":red_heart:",
}
FILES = {
    "emoji-datasource-google-1.0.0.tgz": "img/google/64",
    "emoji-datasource-twitter-1.0.0.tgz": "img/twitter/64",
    "lobehub-fluent-emoji-3d-1.0.0.tgz": "assets",
}


@pytest.fixture
def job(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "jobs"))
    import train_emoji_teacher

    return train_emoji_teacher


@pytest.fixture
def pieces(job):
    """What trainings share."""
    import teacher_training

    return teacher_training


@pytest.fixture
def packages(tmp_path):
    """A folder of packages as they are published, of five pictures each."""
    with zipfile.ZipFile(tmp_path / "emoji-2.0-py3-none-any.whl", "w") as wheel:
        known = {shown: {"en": name, "status": 2} for shown, name in NAMES.items()}
        known |= {"\u2764": {"en": ":red_heart:", "status": 4}}
        wheel.writestr("emoji/unicode_codes/emoji.json", json.dumps(known))
    red = io.BytesIO()
    Image.new("RGBA", (64, 64), (255, 0, 0, 128)).save(red, "png")
    for file, folder in FILES.items():
        with tarfile.open(tmp_path / file, "w:gz") as archive:
            for shown in NAMES:
                points = "-".join(f"{ord(sign):04x}" for sign in shown)
                member = tarfile.TarInfo(f"package/{folder}/{points}.png")
                member.size = len(red.getvalue())
                archive.addfile(member, io.BytesIO(red.getvalue()))
            archive.addfile(tarfile.TarInfo("package/package.json"))
    return tmp_path


def test_pictures_have_the_names_that_people_type(job, packages):
    pictures = job.read_pictures(packages)
    assert Counter(picture.style for picture in pictures) == {"noto": 5, "flat": 5, "3d": 5}
    named = {picture.name: picture for picture in pictures}
    hand = "waving hand"
    assert {*named} == {"red apple", "flag japan", hand, f"{hand} dark skin tone", "red heart"}
    assert named[f"{hand} dark skin tone"].concept == named[hand].concept == hand
    (pixel,) = {tuple(pixel) for pixel in named["red apple"].image_HWC.reshape(-1, 3).tolist()}
    assert pixel == pytest.approx((255, 127, 127), abs=1)  # half of it shows the white behind
    (packages / "lobehub-fluent-emoji-3d-1.0.0.tgz").unlink()
    with pytest.raises(ConfigError, match=r"lacks \*fluent\*.tgz; the head of emoji_pictures.py"):
        job.read_pictures(packages)


def some_pictures(job):
    """A thousand concepts, half of them in two tones as well, in all styles."""
    from emoji_pictures import STYLES

    image = np.zeros((32, 32, 3), np.uint8)
    return [
        job.Picture(f"thing {k}{tone}", f"thing {k}", style, image)
        for k in range(1000)
        for tone in ("", " dark skin tone", " light skin tone")[: 3 if k % 2 else 1]
        for style in STYLES
    ]


def test_what_is_held_out_was_seen_in_parts_and_never_whole(job):
    pictures = some_pictures(job)
    held = [picture for picture in pictures if picture.held_out]
    assert len(held) / len(pictures) == pytest.approx(0.15, abs=0.02)
    seen = [picture for picture in pictures if not picture.held_out]
    assert {picture.concept for picture in held} <= {picture.concept for picture in seen}
    for picture in held:
        same = [other for other in pictures if other.name == picture.name]
        # A tone in all styles, or one style of three.
        assert sum(other.held_out for other in same) == (3 if "skin tone" in picture.name else 1)
    assert not {p.captions()[-1] for p in held} & {p.captions()[-1] for p in seen}


def test_pictures_are_drawn_by_concept_first(job):
    pictures = some_pictures(job)
    draw = job.Draw(pictures, seed=0)
    drawn = Counter(pictures[number].concept for number in draw.rows(3000).tolist())
    assert {*drawn.values()} == {3}
    pairs = draw.rows(500, each=2).view(-1, 2).tolist()
    assert all(pictures[a].concept == pictures[b].concept for a, b in pairs)


@pytest.mark.slow
def test_a_stage_that_was_killed_goes_on_bit_for_bit(job, pieces, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "STATE_EVERY", 4)
    pictures = some_pictures(job)

    def weights(file, stops):
        """After a training of ten steps, which was begun anew at each stop."""
        for stop in stops:
            torch.manual_seed(0)
            model = torch.nn.Linear(3, 1)
            optimizer, schedule = job.optimise(model, 0.1, 10)
            draw = job.Draw(pictures, seed=1)
            parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
            for step in job.States(file, {"steps": 10}, draw, **parts).steps(10):
                if step == stop:
                    break
                rows = draw.rows(8).float()[:, None] / 1000 + torch.rand(8, 3)
                job.descend(model(rows).square().mean(), model, optimizer, schedule)
        return model.state_dict()

    whole = weights(tmp_path / "whole.pt", [10])
    again = weights(tmp_path / "again.pt", [3, 6, 9, 10])
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    with pytest.raises(ConfigError, match=r"again.pt is of \{'steps': 10\}, not of \{'steps': 4\}"):
        job.States(tmp_path / "again.pt", {"steps": 4}, job.Draw(pictures, seed=1)).begin()


def test_moved_pictures_are_white_from_outside(job):
    images = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    moved = job.moved(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    assert {*moved.unique().tolist()} == {-1.0, 1.0}
    white = (moved == 1).flatten(1).any(1)
    assert 0.8 < white.float().mean() < 1  # one in 25 is moved nowhere


def test_an_encoder_that_looks_near_passes_its_middle_by(job):
    vq = job.new_tokenizer()
    job.look_near(vq)
    h = torch.randn(2, 64, 8, 8)
    assert torch.equal(vq.encoder.mid(h), h)
    vq.latents(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is None for parameter in vq.encoder.mid.parameters())
    assert vq.encoder.conv_in.weight.grad.any()


def test_up_to_half_of_the_tokens_before_are_wrong(job):
    tokens = torch.full((4000, 64), 7)
    wrong = (job.corrupted(tokens, torch.Generator().manual_seed(0)) != tokens).float().mean(1)
    assert wrong.mean() == pytest.approx(0.25, abs=0.01)
    assert wrong.max() < 0.8
    assert wrong.min() == 0


@torch.no_grad()
def test_layers_of_a_new_teacher_keep_the_size_of_what_they_get(job):
    model = job.new_teacher(job.new_text().config)
    job.begin(model)
    x = torch.randn(8, 192)
    for layer in (model.layers[0].attention.wqkv, model.layers[5].feed_forward.w1):
        assert float(layer(x).std()) == pytest.approx(1, abs=0.1)
    common = model.tok_embeddings.weight.mean(0)
    assert float(common.std()) == pytest.approx(1, abs=0.2)
    assert not model.output.weight.any()


def test_the_newest_package_is_taken(job, tmp_path):
    for version in ("2.9.0", "2.10.0", "2.14.1"):
        (tmp_path / f"emoji-{version}-py3-none-any.whl").touch()
    assert job.package(tmp_path, "emoji-*.whl").name == "emoji-2.14.1-py3-none-any.whl"
