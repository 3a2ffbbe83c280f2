"""Train the bundled digits models on real digits: classifier, tokenizer, teacher of a family.

    python jobs/train_digits_teacher.py --family llamagen --out ddray/models/bundled

It takes about 25 minutes on two CPU cores. Each stage is kept in the output folder and skipped by a
rerun; `--only STAGE` trains one anew.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from teacher_training import (
    DEVICE,
    Quantised,
    descend,
    half,
    mutual_distance,
    optimise,
    quantise_llamagen,
    report,
    restart_dead_codes,
)
from torch import Tensor

from ddray.metrics.digits import Digits, augment, load_digits, reference_digits
from ddray.metrics.digits_classifier import DigitsClassifier
from ddray.metrics.fd_digits import statistics_of
from ddray.models.llamagen import LlamaGen, LlamaGenConfig
from ddray.models.llamagen_vq import LlamaGenVQ, LlamaGenVQConfig
from ddray.models.var import VAR
from ddray.models.var_blocks import VARConfig
from ddray.models.var_vq import VARVQ, VARVQConfig
from ddray.storage.checkpoint import load_into, read_weights, save_folder

DIGITS_TOKENIZER = {"z_channels": 64, "ch": 32, "num_res_blocks": 1, "in_channels": 1}
SCALES = (1, 2, 3, 5, 7)


def quantise_var(vq: VARVQ, images: Tensor) -> Quantised:
    """Scale by scale what is left; the sum so far should be close at every scale."""
    quantizer = vq.quantize
    latent = vq.quant_conv(vq.encoder(images))
    total = torch.zeros_like(latent)
    losses, tokens, targets = [], [], []
    for scale in range(len(SCALES)):
        sought = quantizer.seen_by((latent - total).detach(), scale)
        tokens.append(quantizer.nearest(sought))
        total = total + quantizer.contribution(quantizer.codebook[tokens[-1]], scale)
        losses.append(mutual_distance(total, latent))
        targets.append(sought.flatten(0, 1))
    decoded = vq.decoder(vq.post_quant_conv(latent + (total - latent).detach()))
    return Quantised(decoded, torch.cat(tokens, 1), torch.stack(losses).mean(), torch.cat(targets))


class Recipe(NamedTuple):
    """What differs between the families."""

    tokenizer: LlamaGenVQ | VARVQ
    quantise: Callable[[Any, Tensor], Quantised]
    teacher: LlamaGen | VAR
    statistics: frozenset[str]


def llamagen() -> Recipe:
    """49 tokens of 256 unit codes."""
    vq = LlamaGenVQConfig(
        codebook_size=256, codebook_embed_dim=8, ch_mult=(1, 2, 2), **DIGITS_TOKENIZER
    )
    net = LlamaGenConfig(
        dim=128, n_layer=6, n_head=4, vocab_size=256, num_classes=10, block_size=49, multiple_of=64
    )
    statistics = frozenset({"quantize.codebook_used"})
    return Recipe(LlamaGenVQ(vq), quantise_llamagen, LlamaGen(net), statistics)


def var() -> Recipe:
    """88 tokens of 256 codes over five scales."""
    sizes = {**DIGITS_TOKENIZER, "z_channels": 8}
    vq = VARVQ(VARVQConfig(vocab_size=256, ch_mult=(1, 1, 2), patch_nums=SCALES, **sizes))
    net = VAR(
        VARConfig(
            depth=5,
            embed_dim=128,
            num_heads=4,
            num_classes=10,
            patch_nums=SCALES,
            vocab_size=256,
            codebook_dim=8,
        )
    )
    net.use_quantizer(vq.quantize)
    return Recipe(vq, quantise_var, net, frozenset({"quantize.ema_vocab_hit_SV"}))


RECIPES = {"llamagen": llamagen, "var": var}
DEFAULT_CFG = {"llamagen": 2.0, "var": 1.0}


def batches(data: Digits, size: int, steps: int, seed: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Freshly augmented batches, a shuffled pass over the data after the other."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < size:
            order = torch.cat((order, torch.randperm(len(data.labels), generator=generator)))
        rows, order = order[:size], order[size:]
        images = augment(data.images[rows], generator)
        yield step, images.to(DEVICE), data.labels[rows].to(DEVICE)


def halves_distance(model: DigitsClassifier, held_out: Digits) -> float:
    """Frechet distance between two disjoint halves of the held-out digits, class by class."""
    halves = (reference_digits(Digits(*(x[i::2] for x in held_out))) for i in (0, 1))
    a, b = (statistics_of(model, half.images) for half in halves)
    return a.distance(b)


@torch.no_grad()
def rescale_features(model: DigitsClassifier, factor: float) -> None:
    """Multiply the rectified features by a factor, and leave the classes as they are.

    A network may scale its features as it likes, and a Frechet distance with them. The unit of
    fd_digits is therefore the distance between two halves of the real digits.
    """
    model.hidden.weight *= factor
    model.hidden.bias *= factor
    model.classes.weight /= factor


def train_classifier(train: Digits, held_out: Digits, out: Path, steps: int) -> None:
    """The classifier of the metric; saved with the reference statistics of the held-out digits."""
    torch.manual_seed(1)
    model = DigitsClassifier().to(DEVICE)
    optimizer, schedule = optimise(model, 3e-3, steps)
    for step, images, labels in batches(train, 128, steps, seed=1):
        loss = F.cross_entropy(model(images), labels, label_smoothing=0.05)
        descend(loss, model, optimizer, schedule)
        report("classifier", step, steps, loss=loss)
    model = model.eval().cpu()
    rescale_features(model, halves_distance(model, held_out) ** -0.5)
    model = model.half().float()
    statistics = statistics_of(model, reference_digits(held_out).images)
    with torch.no_grad():
        accuracy = float((model(held_out.images).argmax(-1) == held_out.labels).float().mean())
    training = statistics_of(model, reference_digits(train, 1).images)
    quality = {
        "held_out_accuracy": accuracy,
        "fd_digits_of_disjoint_halves": halves_distance(model, held_out),
        "fd_digits_of_training_digits": statistics.distance(training),
    }
    state = {**model.state_dict(), **statistics.tensors()}
    save_folder(out / "digits-classifier", {"family": "digits-classifier", **quality}, model=state)
    print(quality)


def train_tokenizer(recipe: Recipe, train: Digits, steps: int) -> None:
    """VQ autoencoder: squared error, straight-through gradient, commitment, dead codes revived."""
    torch.manual_seed(2)
    vq = recipe.tokenizer.to(DEVICE)
    codes = vq.quantize.embedding.weight
    optimizer, schedule = optimise(vq, 2e-3, steps)
    used = torch.zeros(len(codes), device=DEVICE)
    for step, images, _ in batches(train, 128, steps, seed=2):
        images = images * 2 - 1
        quantised = recipe.quantise(vq, images)
        reconstruction = F.mse_loss(quantised.images, images)
        descend(reconstruction + quantised.loss, vq, optimizer, schedule)
        used += torch.bincount(quantised.tokens.flatten(), minlength=len(used))
        # Restarts stop early enough for every code to settle.
        if step % 25 == 24 and step < 0.7 * steps:
            restart_dead_codes(codes, used, quantised.targets)
            used.zero_()
        report("tokenizer", step, steps, mse=reconstruction / 4, codes=(used > 0).sum())
    vq.eval()


def encode(vq: LlamaGenVQ | VARVQ, data: Digits, passes: int) -> tuple[Tensor, Tensor]:
    """Tokens [passes * N, L] and labels of freshly augmented digits."""
    generator = torch.Generator().manual_seed(3)
    tokens = []
    with torch.no_grad():
        for _ in range(passes):
            for images in augment(data.images, generator).split(200):
                tokens.append(vq.encode(images.to(DEVICE) * 2 - 1))
    return torch.cat(tokens), data.labels.repeat(passes).to(DEVICE)


def train_teacher(recipe: Recipe, train: Digits, held_out: Digits, steps: int) -> None:
    """The autoregressive teacher on tokens of augmented digits; one class in ten is dropped."""
    torch.manual_seed(4)
    vq, model = recipe.tokenizer.to(DEVICE), recipe.teacher.to(DEVICE)
    model.init_weights()
    optimizer, schedule = optimise(model, 2e-3, steps)
    tokens, labels = encode(vq, train, passes=12)
    held_tokens, held_labels = encode(vq, held_out, passes=1)
    for step in range(steps):
        rows = torch.randint(len(tokens), (64,))
        cond = labels[rows].masked_fill(torch.rand(64) < 0.1, model.config.num_classes)
        logits = model(cond, tokens[rows])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[rows].flatten())
        descend(loss, model, optimizer, schedule)
        if step % 250 == 249 or step == steps - 1:
            with torch.no_grad():
                held = F.cross_entropy(
                    model(held_labels, held_tokens).flatten(0, 1), held_tokens.flatten()
                )
            print(f"teacher  held-out nll {held:.3f}")
        report("teacher", step, steps, nll=loss)
    model.eval()


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=RECIPES, default="llamagen")
    parser.add_argument("--out", type=Path, default=Path("ddray/models/bundled"))
    parser.add_argument("--only", choices=("classifier", "tokenizer", "teacher"))
    parser.add_argument("--classifier-steps", type=int, default=3000)
    parser.add_argument("--tokenizer-steps", type=int, default=1000)
    parser.add_argument("--teacher-steps", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train, held_out = load_digits()
    if args.only == "classifier" or not (args.out / "digits-classifier/config.json").exists():
        train_classifier(train, held_out, args.out, args.classifier_steps)
    torch.manual_seed(2)
    recipe = RECIPES[args.family]()
    folder = args.out / f"digits-{args.family}"
    tokenizer_file = folder / "tokenizer.safetensors"
    if args.only == "tokenizer" or not tokenizer_file.exists():
        train_tokenizer(recipe, train, args.tokenizer_steps)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(half(recipe.tokenizer.cpu(), recipe.statistics), tokenizer_file)
    load_into(
        recipe.tokenizer, read_weights(tokenizer_file), str(tokenizer_file), recipe.statistics
    )
    if args.only == "teacher" or not (folder / "config.json").exists():
        train_teacher(recipe, train, held_out, args.teacher_steps)
        config = {
            "family": args.family,
            **asdict(recipe.teacher.config),
            "default_cfg": DEFAULT_CFG[args.family],
            "tokenizer": asdict(recipe.tokenizer.config),
        }
        save_folder(
            folder,
            config,
            model=half(recipe.teacher.cpu()),
            tokenizer=half(recipe.tokenizer.cpu(), recipe.statistics),
        )


if __name__ == "__main__":
    main()
