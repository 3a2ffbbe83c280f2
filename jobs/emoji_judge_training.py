"""The judge of emoji: trained on pictures and captions that the held-out ones are not among."""

from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from emoji_pictures import Draw, Picture, moved, pixels
from teacher_training import DEVICE, States, descend, half, optimise, report
from torch import Tensor

from ddray.metrics.caption_agreement import CaptionAgreement
from ddray.metrics.efficientnet import EfficientNet
from ddray.metrics.emoji_judge import EmojiJudge, EmojiTowers
from ddray.metrics.network import POOL
from ddray.metrics.pixels import eight_bit
from ddray.models.llamagen_vq import LlamaGenVQ
from ddray.storage.checkpoint import save_folder
from ddray.text.words import WordEncoder


def train_judge(
    pictures: list[Picture], vq: LlamaGenVQ, encoder: WordEncoder, work: Path, steps: int
) -> EmojiTowers:
    """Pictures to their captions among those of a batch, and back.

    Every second batch is of pictures as tokens show them. Two variants of each concept are in a
    batch, so that tones and styles must be told apart.
    """
    torch.manual_seed(5)
    towers = EmojiTowers(encoder.width).to(DEVICE)
    optimizer, schedule = optimise(towers, 1e-3, steps)
    seen = pixels(pictures), as_tokens_show(pictures, vq)
    asked = [picture.captions() for picture in pictures]
    draw = Draw(pictures, seed=5)
    run = {"steps": steps, "pictures": len(pictures)}
    states = States(
        work / "judge.pt", run, draw, model=towers, optimizer=optimizer, schedule=schedule
    )
    for step in states.steps(steps):
        numbers = draw.rows(96, each=2)
        ways = torch.randint(3, (len(numbers),), generator=draw.random).tolist()
        captions = [asked[number][way] for number, way in zip(numbers.tolist(), ways, strict=True)]
        batch = moved(seen[step % 2][numbers], draw.random, mirrored=False)
        batch = batch + 0.05 * torch.randn(batch.shape, generator=draw.random)
        told = towers.captions(*encoder(captions))
        likeness = towers.pictures(batch.to(DEVICE)) @ told.T * towers.log_scale.exp()
        # Variants may be asked for by the same words.
        same = torch.tensor([[a == b for b in captions] for a in captions], device=DEVICE).float()
        wanted = same / same.sum(1, keepdim=True)
        loss = F.cross_entropy(likeness, wanted) + F.cross_entropy(likeness.T, wanted)
        descend(loss, towers, optimizer, schedule)
        report("judge", step, steps, nats=loss / 2)
    return towers.eval()


@torch.no_grad()
def as_tokens_show(pictures: list[Picture], vq: LlamaGenVQ) -> Tensor:
    """Reconstructions uint8 [N, 3, 32, 32] by the tokenizer."""
    shown = []
    for part in pixels(pictures).split(256):
        tokens = vq.encode(part.to(DEVICE) / 127.5 - 1)
        shown.append(eight_bit((vq.decode(vq.codebook[tokens]) + 1) / 2).cpu())
    return torch.cat(shown)


def write_reference(held: list[Picture], file: Path) -> None:
    """Features of the held-out pictures, by the network that `fd_efficientnet` is defined on."""
    network = EfficientNet()
    found = network(pixels(held))[POOL].half().numpy()
    np.savez_compressed(file, features=found, network=network.name, extractor=network.fingerprint)


def write_judge(towers: EmojiTowers, held: list[Picture], folder: Path) -> None:
    """The folder of the judge, and beside it the real pictures as features."""
    width = towers.captions.word.in_features
    card = {"family": "emoji-judge", "text_encoder": "emoji-words", "word_width": width}
    # The folder's config comes last, and says that all is there.
    folder.mkdir(parents=True, exist_ok=True)
    write_reference(held, folder / "held-out.npz")
    save_folder(folder, card, model=half(towers.cpu()))


def tell_judge(folder: Path, pictures: list[Picture]) -> None:
    """Print how many real pictures the judge finds by their full caption, among a hundred."""
    judge = EmojiJudge(folder)
    for held_out, toned in product((False, True), repeat=2):
        some = [p for p in pictures if (p.held_out, "skin tone" in p.name) == (held_out, toned)]
        agreement = CaptionAgreement(judge.of_captions)
        found = judge(pixels(some))[POOL].numpy()
        agreement.add(found, [picture.captions()[-1] for picture in some])
        kind = f"{'held out' if held_out else 'learnt'}{', with a skin tone' if toned else ''}"
        print(f"judge  {len(some)} real pictures {kind}: {agreement.results()['retrieval']:.3f}")
