"""Our figures beside those of pytorch-fid and torch-fidelity, on the same files and weights.

    python benchmarks/bench_metrics.py [--images 2000] [--beside pytorch-fid] [--device cuda]

Ours is the command `ddray evaluate --samples`, once by the resize of each of the others, or of the
one that `--beside` names. Weights are random ones in the layout of the published file, unless
--inception names it: what is compared are programs, and they must agree whatever the weights.
Images are two sets of coloured clouds in 8-bit PNG; KID takes 1000 of each. Needs the extra
`evaluation`. pytorch-fid fails with SciPy 1.18, where its row is left out.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import frame
import torch
import torch_fidelity
from frame import Figure
from PIL import Image
from torch import Tensor, nn

from ddray.metrics.inception import WEIGHTS_FILE, empty_inception
from ddray.metrics.kid import SUBSET_SIZE

METRICS = {
    "fid": "fid",
    "sfid": "sfid",
    "is": "inception_score",
    "kid": "kid",
    "precision": "precision",
    "recall": "recall",
}
"""By name, their keys."""
THEIRS = {
    "fid": "frechet_inception_distance",
    "inception_score": "inception_score_mean",
    "kid": "kernel_inception_distance_mean",
    "precision": "precision",
    "recall": "recall",
}
RESIZES = {"pytorch-fid": "pytorch-fid", "torch-fidelity": "tensorflow"}
"""By program, how it resizes."""
SIDE = 64


def random_weights(file: Path) -> None:
    """Weights that keep features about one, under the published names."""
    torch.manual_seed(0)
    network = empty_inception().to_empty(device="cpu")
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.reset_parameters()
            nn.init.normal_(module.bias, std=0.2)
    torch.save(network.state_dict(), file)


def clouds(count: int, seed: int) -> Tensor:
    """Images uint8 [N, 64, 64, 3] of smooth colours."""
    draws = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6 + seed, 6 + seed, generator=draws)
    smooth = nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic").clamp(0, 1)
    return (smooth * 255).round().byte().movedim(1, -1)


def write_folder(folder: Path, images: Tensor) -> str:
    """The images as a flat folder, which all programs read."""
    folder.mkdir()
    for k, image in enumerate(images):
        Image.fromarray(image.numpy()).save(folder / f"{k:06d}.png")
    return str(folder)


def ours(place: Path, weights: Path, folders: list[str], args: Any, resize: str) -> dict[str, Any]:
    """What `ddray evaluate` measures."""
    metrics = [name for name in METRICS if name != "kid" or args.images >= SUBSET_SIZE]
    flags = {
        "samples": folders[0],
        "reference": folders[1],
        "inception": weights,
        "metrics": ",".join(metrics),
        "splits": "torch-fidelity",
        "resize": resize,
        "num-gpus": int(args.device == "cuda"),
        "out": place / resize,
    }
    told = ["--any-inception", *(f"--{name}={value}" for name, value in flags.items())]
    subprocess.run([sys.executable, "-m", "ddray.cli", "evaluate", *told], check=True, stdout=2)
    found: dict[str, Any] = json.loads((place / resize / "summary.json").read_text())["quality"][0]
    return {METRICS[name]: found[METRICS[name]] for name in metrics}


def pytorch_fid(place: Path, weights: Path, folders: list[str], device: str) -> float | None:
    """What its command prints; None if it fails."""
    checkpoints = place / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / WEIGHTS_FILE).symlink_to(weights.resolve())
    done = subprocess.run(
        [sys.executable, "-m", "pytorch_fid", "--device", device, "--num-workers", "0", *folders],
        env={**os.environ, "TORCH_HOME": str(place)},
        capture_output=True,
        text=True,
    )
    found = re.search(r"FID:\s+(\S+)", done.stdout)
    if not found:
        print("pytorch-fid failed:", done.stderr.strip().splitlines()[-1], file=sys.stderr)
    return float(found[1]) if found else None


def relative(found: float, theirs: float) -> float:
    """How far apart two figures are, of theirs."""
    return abs(found - theirs) / abs(theirs) if theirs else abs(found)


def compare(args: Any, place: Path) -> tuple[list[Figure], dict[str, Any]]:
    """How far apart the programs are, and our figures by each resize."""
    weights = args.inception or place / "weights.pth"
    if args.inception is None:
        random_weights(weights)
    sets = clouds(args.images, 0), clouds(args.images, 1)
    folders = [write_folder(place / name, s) for name, s in zip("ab", sets, strict=True)]
    beside = (args.beside,) if args.beside else tuple(RESIZES)
    mine = {name: ours(place, weights, folders, args, RESIZES[name]) for name in beside}
    figures = []
    if "pytorch-fid" in beside:
        theirs = pytorch_fid(place, weights, folders, args.device)
        if theirs is not None:
            apart = relative(mine["pytorch-fid"]["fid"], theirs)
            figures.append(Figure("fid, from pytorch-fid's", apart, most=1e-4))
    if "torch-fidelity" in beside:
        figures += beside_fidelity(mine["torch-fidelity"], weights, folders, args.device)
    return figures, mine


def beside_fidelity(
    mine: dict[str, Any], weights: Path, folders: list[str], device: str
) -> list[Figure]:
    """How far our figures are from torch-fidelity's."""
    with contextlib.redirect_stdout(sys.stderr):
        others = torch_fidelity.calculate_metrics(
            input1=folders[0],
            input2=folders[1],
            **dict.fromkeys(("isc", "fid", "prc"), True),
            kid="kid" in mine,
            feature_extractor="inception-v3-compat",
            feature_extractor_weights_path=str(weights),
            cuda=device == "cuda",
            cache=False,
            verbose=False,
        )
    return [
        Figure(f"{key}, from torch-fidelity's", relative(mine[key], others[name]), most=1e-3)
        for key, name in THEIRS.items()
        if key in mine
    ]


def main() -> None:
    """Print how far apart the programs are, as a share of theirs."""
    parser = frame.arguments(__doc__)
    parser.add_argument("--images", type=int, default=2000, help="of each of the two sets")
    parser.add_argument("--beside", choices=RESIZES, help="default: both")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--inception", type=Path, metavar="FILE", help="weights; default: random")
    args = parser.parse_args()
    where = frame.about("torch", "torch_fidelity", device=args.device)
    with tempfile.TemporaryDirectory() as place:
        figures, mine = compare(args, Path(place))
    weights = str(args.inception or "random")
    rows = [figure.row() for figure in figures]
    result = {"images": args.images, "inception": weights, **where, "ours": mine, "rows": rows}
    headline = f"{args.images} images of each set, {weights} weights, shares of theirs"
    frame.tell(result, headline, frame.figures_table(figures))
    frame.write(args.json, result)
    frame.stop_if_missed(figures)


if __name__ == "__main__":
    main()
