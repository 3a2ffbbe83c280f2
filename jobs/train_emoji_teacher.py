"""Train a text teacher on real emoji: word vectors, tokenizer, judge, teacher.

    python jobs/train_emoji_teacher.py --packages FOLDER --out runs/emoji/models

Where the packages come from stands at the head of jobs/emoji_pictures.py. Each stage is skipped
where it is in the output folder; one that was killed goes on from the last of its states in --work.
"""

import argparse
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from emoji_judge_training import tell_judge, train_judge, write_judge
from emoji_pictures import Draw, Picture, moved, package, pixels, read_pictures
from safetensors.torch import load as parse_safetensors
from teacher_training import (
    DEVICE,
    States,
    descend,
    digest,
    forget,
    half,
    optimise,
    quantise_llamagen,
    report,
    restart_dead_codes,
)
from torch import Tensor, nn

from ddray.method.conditioning import Captions, choose, left_padded
from ddray.models.llamagen import LlamaGen, LlamaGenConfig
from ddray.models.llamagen_vq import LlamaGenVQ, LlamaGenVQConfig
from ddray.storage.checkpoint import load_folder, load_into, save_folder
from ddray.text.averaging import AveragingConfig, AveragingEncoder, DeepAveraging, read_averaging
from ddray.text.loading import EMOJI
from ddray.text.words import WordEncoder
from ddray.text.words import words as words_of

WORD_WIDTH, POSITION_WIDTH, LENGTH = 112, 16, 16
CODES, POSITIONS = 512, 8
DEFAULT_CFG, DEFAULT_TOP_P = 2.0, 0.5
EXAMPLES = [
    "red apple",
    "woman firefighter dark skin tone",
    "3d rocket",
    "smiling face with sunglasses",
    "carrot, flat",
    "flag japan",
]
STATISTICS = frozenset({"quantize.codebook_used"})


def new_tokenizer() -> LlamaGenVQ:
    """64 tokens of 512 unit codes for 32 x 32 pixels."""
    return LlamaGenVQ(
        LlamaGenVQConfig(
            codebook_size=CODES,
            codebook_embed_dim=8,
            z_channels=64,
            ch=32,
            ch_mult=(1, 2, 2),
            num_res_blocks=1,
        )
    )


@torch.no_grad()
def look_near(vq: LlamaGenVQ) -> None:
    """Leave out of an encoder what looks far, for good; its norms alone still see all the picture.

    Otherwise every token tells of all the picture, the white corners too: fewer errors of pixels,
    but tokens that nobody can foretell.
    """
    encoder = vq.encoder
    for part in (*encoder.mid, *encoder.conv_blocks[-1].attn):
        for parameter in part.parameters():
            parameter.requires_grad_(False).zero_()


def new_text() -> DeepAveraging:
    """A summary of 256 numbers."""
    return DeepAveraging(
        AveragingConfig(
            words="emoji-words",
            max_words=LENGTH,
            word_width=WORD_WIDTH + POSITION_WIDTH,
            hidden=512,
            width=256,
        )
    )


def new_teacher(text: AveragingConfig) -> LlamaGen:
    """Six blocks of width 192."""
    return LlamaGen(
        LlamaGenConfig(
            dim=192,
            n_layer=6,
            n_head=6,
            vocab_size=CODES,
            num_classes=1,
            block_size=64,
            cls_token_num=POSITIONS,
            caption_dim=text.width,
            multiple_of=64,
        )
    )


def make_encoder(packages: Path, pictures: list[Picture], folder: Path) -> None:
    """The word vectors of wordllama, of its pieces of plain letters, along their main directions.

    They are those of the words of the captions and of all pieces, both alike in weight; the
    features of a caption have a mean square of one.
    """
    with zipfile.ZipFile(package(packages, "wordllama-*.whl")) as wheel:
        read = json.loads(wheel.read("wordllama/tokenizers/l2_supercat_tokenizer_config.json"))
        table = parse_safetensors(wheel.read("wordllama/weights/l2_supercat_256.safetensors"))
    (all_PW,) = table.values()
    plain = {
        piece.replace("\u2581", "_"): number
        for piece, number in read["model"]["vocab"].items()
        if piece.isascii() or piece.startswith("\u2581")
    }
    kept = [p for p in plain if p == "_" or (p.removeprefix("_").isalnum() and p == p.lower())]
    kept = [p for p in kept if p.removeprefix("_").isascii()]
    vectors = all_PW[[plain[p] for p in kept]].float()
    whole = WordEncoder(kept, vectors, length=LENGTH, position_width=POSITION_WIDTH)
    known = sorted({word for picture in pictures for word in words_of(picture.name)})
    features, mask = whole(known)
    of_words = features[mask.bool()][:, : vectors.shape[1]]
    spread = sum(x.T @ x / len(x) for x in (of_words, vectors))
    _, directions = torch.linalg.eigh(spread)
    turn = directions.flip(1)[:, :WORD_WIDTH]
    scale = (of_words @ turn).square().mean().rsqrt()
    told = vectors @ turn * scale
    kept_share = float((of_words @ turn).square().sum() / of_words.square().sum())
    print(f"{len(kept)} pieces; {kept_share:.3f} of the squares of {len(known)} words kept")
    WordEncoder(kept, told, length=LENGTH, position_width=POSITION_WIDTH).save(folder)


def edges(images: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels."""
    return images.diff(dim=2), images.diff(dim=3)


def train_tokenizer(pictures: list[Picture], work: Path, steps: int) -> LlamaGenVQ:
    """VQ autoencoder: squared and absolute error, edges as well; dead codes revived."""
    torch.manual_seed(2)
    vq = new_tokenizer().to(DEVICE)
    look_near(vq)
    codes = vq.quantize.embedding.weight
    optimizer, schedule = optimise(vq, 2e-3, steps)
    images = pixels(pictures)
    draw = Draw(pictures, seed=2)
    used = torch.zeros(len(codes), device=DEVICE)
    run = {"steps": steps, "pictures": len(pictures)}
    states = States(
        work / "tokenizer.pt", run, draw, model=vq, optimizer=optimizer, schedule=schedule
    )
    for step in states.steps(steps):
        batch = moved(images[draw.rows(32)], draw.random).to(DEVICE)
        quantised = quantise_llamagen(vq, batch)
        squared = F.mse_loss(quantised.images, batch)
        pairs = zip(edges(quantised.images), edges(batch), strict=True)
        sharp = sum(F.l1_loss(mine, real) for mine, real in pairs)
        loss = squared + 0.2 * F.l1_loss(quantised.images, batch) + 0.2 * sharp + quantised.loss
        descend(loss, vq, optimizer, schedule)
        used += torch.bincount(quantised.tokens.flatten(), minlength=len(used))
        # Restarts stop early enough for every code to settle.
        if step % 25 == 24 and step < 0.7 * steps:
            restart_dead_codes(codes, used, quantised.targets)
        report("tokenizer", step, steps, mse=squared / 4, codes=(used > 0).sum())
        if step % 25 == 24:
            used.zero_()
    return vq.eval()


class Rows(NamedTuple):
    """What the teacher learns from.

    Attributes:
        tokens_NL: int64 [N, L] of every picture.
        captions: features of all ways to ask for them, picture by picture.
        ways: how many there are of each.
    """

    tokens_NL: Tensor
    captions: Captions
    ways: int


@torch.no_grad()
def tokens_of(pictures: list[Picture], vq: LlamaGenVQ) -> Tensor:
    """Tokens int64 [N, L] of pictures."""
    images = pixels(pictures).float() / 127.5 - 1
    return torch.cat([vq.encode(part.to(DEVICE)) for part in images.split(256)])


def rows_of(pictures: list[Picture], tokens_NL: Tensor, encode: AveragingEncoder) -> Rows:
    """Tokens and caption features of pictures."""
    asked = [caption for picture in pictures for caption in picture.captions()]
    features, mask = encode(asked)
    captions = left_padded((features, mask), *features.shape[1:], torch.device(DEVICE))
    return Rows(tokens_NL, captions, len(pictures[0].captions()))


class Grid(nn.Module):
    """Logits of all tokens from a caption's features at once: what the features are trained by.

    Args:
        features: D, numbers of a caption.
        tokens: of an image.
        codes: V.
    """

    def __init__(self, features: int, tokens: int, codes: int, width: int = 64):
        super().__init__()
        self.cells = nn.Sequential(
            nn.Linear(features, tokens * width),
            nn.Unflatten(1, (tokens, width)),
            nn.LayerNorm(width),
            nn.SiLU(),
            nn.Linear(width, codes),
        )
        self.place_LV = nn.Parameter(torch.zeros(tokens, codes))

    def forward(self, features_BD: Tensor) -> Tensor:
        """[B, L, V]."""
        out: Tensor = self.cells(F.dropout(features_BD, 0.1, self.training))
        return out + self.place_LV


def train_text(
    train: list[Picture], tokens_NL: Tensor, words: WordEncoder, work: Path, steps: int
) -> DeepAveraging:
    """Captions to all tokens of their pictures at once: cross entropy.

    What is learnt of a picture from its caption alone is learnt here, by a network a hundredth as
    dear as the teacher; the teacher learns the rest.
    """
    torch.manual_seed(3)
    text = new_text()
    grid = Grid(text.config.width, tokens_NL.shape[1], CODES)
    both = nn.ModuleList((text, grid)).to(DEVICE)
    optimizer, schedule = optimise(both, 2e-3, steps)
    draw = Draw(train, seed=3)
    asked = [caption for picture in train for caption in picture.captions()]
    ways = len(asked) // len(train)
    features, mask = words(asked)
    run = {"steps": steps, "tokens": digest(tokens_NL)}
    states = States(work / "text.pt", run, draw, model=both, optimizer=optimizer, schedule=schedule)
    for step in states.steps(steps):
        numbers = draw.rows(256)
        told = numbers * ways + torch.randint(ways, (len(numbers),), generator=draw.random)
        logits = grid(text(features[told], mask[told]))
        loss = F.cross_entropy(logits.flatten(0, 1), tokens_NL[numbers].flatten())
        descend(loss, both, optimizer, schedule)
        report("text", step, steps, nats=loss)
    return text.eval()


def nats(model: LlamaGen, rows: Rows, numbers: Tensor, told: Captions, known_NL: Tensor) -> Tensor:
    """Mean negative log-likelihood of a token.

    Args:
        model: the teacher.
        rows: pictures.
        numbers: which of them.
        told: their captions.
        known_NL: what is seen of the tokens before.
    """
    logits = model(told, known_NL)
    return F.cross_entropy(logits.flatten(0, 1), rows.tokens_NL[numbers].flatten())


@torch.no_grad()
def held_out_nats(model: LlamaGen, held: Rows) -> tuple[Tensor, Tensor]:
    """Nats of some held-out pictures by their own full captions, and by those of others."""
    numbers = torch.arange(0, len(held.tokens_NL), 4)
    told = held.captions[numbers * held.ways + held.ways - 1]
    astray = held.captions[numbers.roll(1) * held.ways + held.ways - 1]
    known = held.tokens_NL[numbers]
    own, others = (nats(model, held, numbers, captions, known) for captions in (told, astray))
    return own, others


@torch.no_grad()
def begin(model: LlamaGen) -> None:
    """Initial weights: each layer keeps the size of what it gets, as small models need it.

    All embeddings of tokens have a part in common, so that attention by place alone, whatever the
    tokens are, can be learnt from the first step: LlamaGen has no other positions.
    """
    model.init_weights()
    for name, layer in model.layers.named_modules():
        if isinstance(layer, nn.Linear):
            added = name.endswith(("wo", "w2"))
            scale = (2 * len(model.layers)) ** -0.5 if added else 1.0
            layer.weight.normal_(std=scale * layer.weight.shape[1] ** -0.5)
    caption = model.cls_embedding.cap_proj
    for layer in (caption.fc1, caption.fc2):
        layer.weight.normal_(std=layer.weight.shape[1] ** -0.5)
    model.tok_embeddings.weight.normal_().add_(torch.randn(model.config.dim))


def corrupted(tokens_NL: Tensor, random: torch.Generator) -> Tensor:
    """Tokens of which up to half, another share in every row, are replaced by any others.

    So that a picture is told by its caption and not by its first tokens alone, and what was drawn
    wrongly is mended behind it (as in Infinity, Han et al., arXiv 2412.04431).
    """
    share = 0.5 * torch.rand(len(tokens_NL), 1, generator=random)
    wrong = torch.rand(tokens_NL.shape, generator=random) < share
    others = torch.randint(CODES, tokens_NL.shape, generator=random)
    return torch.where(wrong.to(tokens_NL.device), others.to(tokens_NL.device), tokens_NL)


def train_teacher(
    model: LlamaGen,
    train: Rows,
    held: Rows,
    draw: Draw,
    start: Mapping[str, Tensor] | None,
    work: Path,
    steps: int,
) -> LlamaGen:
    """Next-token cross entropy behind corrupted tokens; one caption in ten is dropped."""
    torch.manual_seed(4)
    begin(model)
    if start is not None:
        load_into(model, start, "the weights to begin with")
    model.to(DEVICE)
    optimizer, schedule = optimise(model, 2e-3 if start is None else 1e-3, steps)
    run = {
        "steps": steps,
        "tokens": digest(train.tokens_NL),
        "captions": digest(train.captions.features_BTD[:, 0]),
    }
    states = States(
        work / "teacher.pt", run, draw, model=model, optimizer=optimizer, schedule=schedule
    )
    for step in states.steps(steps):
        numbers = draw.rows(32)
        ways = torch.randint(train.ways, (len(numbers),), generator=draw.random)
        told = train.captions[numbers * train.ways + ways]
        dropped = torch.rand(len(numbers), generator=draw.random) < 0.1
        told = choose(dropped.to(DEVICE), model.null(told), told)
        known = corrupted(train.tokens_NL[numbers], draw.random)
        loss = nats(model, train, numbers, told, known)
        descend(loss, model, optimizer, schedule)
        if step % 500 == 499 or step == steps - 1:
            own, others = held_out_nats(model, held)
            print(f"teacher  held out: {own:.3f} nats, {others:.3f} by others' captions")
        report("teacher", step, steps, nats=loss)
    return model.eval()


def write_captions(pictures: list[Picture], file: Path, count: int, seed: int) -> None:
    """Captions drawn by concept, one a line, all that is known of a picture in each."""
    numbers = Draw(pictures, seed).rows(count).tolist()
    file.write_text("".join(f"{pictures[number].captions()[-1]}\n" for number in numbers))


def write_teacher(teacher: LlamaGen, vq: LlamaGenVQ, folder: Path) -> None:
    """The folder of the teacher, weights in float16."""
    config = {
        "family": "llamagen",
        **asdict(teacher.config),
        "default_cfg": DEFAULT_CFG,
        "default_top_p": DEFAULT_TOP_P,
        "text_encoder": "emoji-text",
        "images": EMOJI,
        "example_captions": EXAMPLES,
        "tokenizer": asdict(vq.config),
    }
    save_folder(folder, config, model=half(teacher.cpu()), tokenizer=half(vq.cpu(), STATISTICS))


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True, help="folder of their files")
    parser.add_argument("--out", type=Path, default=Path("runs/emoji/models"))
    parser.add_argument("--work", type=Path, default=Path("runs/emoji"), help="states of stages")
    parser.add_argument("--only", choices=("words", "tokenizer", "text", "judge", "teacher"))
    parser.add_argument("--init", type=Path, help="a teacher's folder to begin with")
    parser.add_argument("--tokenizer-steps", type=int, default=2500)
    parser.add_argument("--text-steps", type=int, default=1500)
    parser.add_argument("--judge-steps", type=int, default=2500)
    parser.add_argument("--teacher-steps", type=int, default=10000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pictures = read_pictures(args.packages)
    train = [picture for picture in pictures if not picture.held_out]
    held = [picture for picture in pictures if picture.held_out]

    def to_do(stage: str, folder: Path) -> bool:
        return args.only == stage if args.only else not (folder / "config.json").exists()

    words_folder, vq_folder = args.out / "emoji-words", args.work / "tokenizer"
    if to_do("words", words_folder):
        # The folder's config comes last, and says that all is there.
        words_folder.mkdir(parents=True, exist_ok=True)
        write_captions(train, words_folder / "captions.txt", 20_000, seed=6)
        write_captions(held, words_folder / "held-out.txt", 5_000, seed=7)
        make_encoder(args.packages, train, words_folder)
    words = WordEncoder.load(words_folder, length=LENGTH, device=DEVICE)
    if to_do("tokenizer", vq_folder):
        vq = train_tokenizer(train, args.work, args.tokenizer_steps)
        save_folder(vq_folder, {"family": "tokenizer"}, model=half(vq.cpu(), STATISTICS))
        forget(args.work / "tokenizer.pt")
    vq = new_tokenizer()
    load_into(vq, load_folder(vq_folder)[1], str(vq_folder), STATISTICS)
    vq.to(DEVICE)
    if to_do("judge", args.out / "emoji-judge"):
        towers = train_judge(train, vq, words, args.work, args.judge_steps)
        write_judge(towers, held, args.out / "emoji-judge")
        forget(args.work / "judge.pt")
        tell_judge(args.out / "emoji-judge", pictures)
    learnt, unseen = (tokens_of(part, vq) for part in (train, held))
    if to_do("text", args.out / "emoji-text"):
        text = train_text(train, learnt, words, args.work, args.text_steps)
        text.save(args.out / "emoji-text")
        forget(args.work / "text.pt")
    if to_do("teacher", args.out / "emoji-llamagen"):
        text = read_averaging(args.out / "emoji-text").to(DEVICE)
        encode = AveragingEncoder(text, words, length=POSITIONS)
        start = None if args.init is None else load_folder(args.init)[1]
        teacher = train_teacher(
            new_teacher(text.config),
            rows_of(train, learnt, encode),
            rows_of(held, unseen, encode),
            Draw(train, seed=4),
            start,
            args.work,
            args.teacher_steps,
        )
        write_teacher(teacher, vq, args.out / "emoji-llamagen")
        forget(args.work / "teacher.pt")


if __name__ == "__main__":
    main()
