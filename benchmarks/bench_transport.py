"""Accuracy and speed of the transport for every solver setting, and the cost of trajectories.

    python benchmarks/bench_transport.py [--device cuda] [--json FILE]   (5 minutes on one core)

Agreement is with the float64 map on the same noise. "digits" uses the bundled teacher's own
distributions; the others are random codebooks and logits of the sizes of published tokenizers. The
plain loop is what one would write first: the same evaluations over all rows at once.
"""

import statistics
import time
from functools import partial

import frame
import torch
import torch.nn.functional as F
from torch import Tensor

import ddray
from ddray.method.flow import Grid, Transport, multistep_weights
from ddray.report.table import Column

# Solver, and the share of its default evaluations.
SETTINGS = (
    ("euler", 1.0),
    ("ab2", 0.5),
    ("ab2", 1.0),
    ("rk4", 1.0),
    ("ab4", 0.5),
    ("ab4", 0.7),
    ("ab4", 1.0),
)
COLUMNS = (
    Column("case", "case"),
    Column("rows", "rows"),
    Column("solver", "solver"),
    Column("num_evals", "evaluations"),
    Column("agreement", "agreement", "", ".4f"),
    Column("us_per_row", "time", "us/token", ".1f"),
)
PLAIN_COLUMNS = (
    Column("case", "case"),
    Column("rows", "rows"),
    Column("num_evals", "evaluations"),
    Column("us_per_row", "ddray", "us/token", ".1f"),
    Column("plain_us_per_row", "plain loop", "us/token", ".1f"),
    Column("speedup", "x plain loop", "", ".1f"),
    Column("same_tokens", "same tokens", "", ".4f"),
)


def digits_case(images: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codebook, logits and noise of the bundled teacher along its own trajectories."""
    teacher = ddray.load_teacher("digits-llamagen", device="cpu")
    labels, index = torch.arange(images) % 10, torch.arange(images)
    logits, cfg = [], teacher.default_cfg
    for rows in zip(labels.split(50), index.split(50), strict=True):
        tokens = teacher.trajectories(*rows, seed=1, cfg=cfg)
        logits.append(teacher.guided_logits(rows[0], tokens, cfg).flatten(0, 1))
    noise = ddray.noise(1, index, (teacher.num_tokens, teacher.codebook.shape[1]))
    return teacher.codebook, torch.cat(logits), noise.flatten(0, 1)


def random_case(rows: int, vocab: int, width: int, sphere: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes (on the unit sphere, as LlamaGen's, or Gaussian, as VAR's) and logits."""
    torch.manual_seed(0)
    codes = torch.randn(vocab, width)
    codes = F.normalize(codes, dim=-1) if sphere else codes / 2
    return codes, torch.randn(rows, vocab) * 2, torch.randn(rows, width)


def bench(name: str, codes: Tensor, logits: Tensor, noise: Tensor) -> list[dict[str, object]]:
    """One row a setting: agreement with the exact map, and the least time of three rounds."""
    exact = Transport(codes, "exact")(noise, logits)
    solvers = []
    for solver, share in SETTINGS:
        evals = Transport(codes, solver).num_evals
        solvers.append(Transport(codes, solver, evals if share == 1 else int(evals * share)))
    tokens = [solve(noise, logits) for solve in solvers]
    # In turns, so that a load that comes and goes meets all settings; a GPU is done when its tokens
    # are here.
    ways = {
        solve: partial(frame.seconds_of, lambda solve=solve: solve(noise, logits).cpu())
        for solve in solvers
    }
    times = frame.in_turns(ways, 3)
    return [
        {
            "case": name,
            "rows": len(noise),
            "solver": solve.solver,
            "num_evals": solve.num_evals,
            "agreement": float((mine == exact).float().mean()),
            "us_per_row": min(times[solve]) / len(noise) * 1e6,
        }
        for solve, mine in zip(solvers, tokens, strict=True)
    ]


def plain_loop(codes: Tensor, logits: Tensor, noise: Tensor, grid: Grid, weights: Tensor) -> Tensor:
    """The transport as its formula reads, over all rows at once."""
    steps, order = weights.shape
    half_square = codes.square().sum(-1) / 2
    y, velocities = noise, [torch.zeros_like(noise)] * order
    for step in range(steps):
        lam = grid.at(step / steps)
        p = torch.softmax(logits + lam * (y @ codes.T) - lam**2 * half_square, -1)
        velocities[step % order] = p @ codes
        y = y + sum(w * v for w, v in zip(weights[step], velocities, strict=True))
    lam = grid.at(1.0)
    return (logits + lam * (y @ codes.T) - lam**2 * half_square).argmax(-1)


def against_plain_loop(
    name: str, codes: Tensor, logits: Tensor, noise: Tensor, repeats: int
) -> dict[str, object]:
    """Times of ddray's default setting and of the plain loop, alternated, and their ratio."""
    solve = Transport(codes)
    weights = multistep_weights(solve.grid, solve.num_evals, 4).float()
    centred = codes - codes.mean(0)  # as ddray has them, for the same rounding
    ours, plain = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        tokens = solve(noise, logits).cpu()
        middle = time.perf_counter()
        expected = plain_loop(centred, logits, noise, solve.grid, weights).cpu()
        ours.append(middle - start)
        plain.append(time.perf_counter() - middle)
    return {
        "case": name,
        "rows": len(noise),
        "num_evals": solve.num_evals,
        "us_per_row": min(ours) / len(noise) * 1e6,
        "plain_us_per_row": min(plain) / len(noise) * 1e6,
        "speedup": statistics.median(b / a for a, b in zip(ours, plain, strict=True)),
        "same_tokens": float((tokens == expected).float().mean()),
    }


def chi_square(draws: int) -> dict[str, float]:
    """Tokens of one digits distribution over fresh noise against its probabilities."""
    codes, logits, _ = digits_case(50)
    row = logits[24]
    noise = ddray.noise(2, torch.arange(draws), (1, codes.shape[1]))[:, 0]
    tokens = ddray.transport(noise, row.expand(draws, -1), codes)
    expected = row.double().softmax(-1) * draws
    counts = torch.bincount(tokens, minlength=len(row)).double()
    # Cells that expect fewer than five draws count as one.
    small = expected < 5
    cells = [torch.cat((x[~small], x[small].sum()[None])) for x in (counts, expected)]
    statistic = float(((cells[0] - cells[1]) ** 2 / cells[1]).sum())
    freedom = len(cells[0]) - 1
    survival = 1 - float(
        torch.special.gammainc(
            torch.tensor(freedom / 2.0).double(), torch.tensor(statistic / 2.0).double()
        )
    )
    return {"draws": draws, "chi_square": statistic, "degrees": freedom, "p_value": survival}


def trajectory_cost(batch: int, repeats: int) -> dict[str, float]:
    """Time of trajectories over that of plain sampling of the same images, alternated."""
    teacher = ddray.load_teacher("digits-llamagen", device="cpu")
    labels, index = torch.arange(batch) % 10, torch.arange(batch)
    options = {"cfg": teacher.default_cfg, "seed": 1}
    ways = {
        "plain": lambda: teacher.sample(labels, index=index, **options),
        "trajectories": lambda: teacher.trajectories(labels, index, **options),
    }
    times = frame.in_turns(
        {what: partial(frame.seconds_of, work) for what, work in ways.items()}, repeats
    )
    plain, whole = times["plain"], times["trajectories"]
    return {
        "batch": batch,
        "plain_ms_per_image": statistics.median(plain) / batch * 1e3,
        "ratio": statistics.median(b / a for a, b in zip(plain, whole, strict=True)),
    }


def main() -> None:
    """Print the tables; write them as JSON if asked."""
    parser = frame.arguments(__doc__)
    parser.add_argument("--device", default="cpu", help="of the solvers and the plain loop")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cases = {
        "digits V=256 E=8": digits_case(100),
        "sphere V=256 E=8": random_case(4000, 256, 8, sphere=True),
        "Gaussian V=4096 E=32": random_case(2000, 4096, 32, sphere=False),
        "sphere V=16384 E=8": random_case(2000, 16384, 8, sphere=True),
    }
    cases = {name: [x.to(args.device) for x in case] for name, case in cases.items()}
    where = frame.about("torch", device=args.device, note=f"{args.threads} thread(s)")
    rows = [row for name, case in cases.items() for row in bench(name, *case)]
    plain = [against_plain_loop(name, *case, repeats=3) for name, case in cases.items()]
    result = {
        **where,
        "solvers": rows,
        "plain_loop": plain,
        "chi_square": chi_square(100_000),
        "trajectories": trajectory_cost(100, 9),
    }
    frame.tell(result, "Transport", (rows, COLUMNS), (plain, PLAIN_COLUMNS))
    print(f"chi-square: {result['chi_square']}\ntrajectories: {result['trajectories']}")
    frame.write(args.json, result)


if __name__ == "__main__":
    main()
