"""How far ddray is from the published code: every golden case, quantity by quantity.

    python benchmarks/parity.py [--markdown]

The fixtures in tests/golden hold what the public modules computed on tiny random models (see its
README). Floats pass within 2e-4 + 1e-4 |expected|; integers, booleans and infinities exactly.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import golden_llamagen as llamagen
import golden_var as var
import torch
from golden_cases import GOLDEN, Pairs, Tensors
from safetensors.torch import load_file
from torch import Tensor

from ddray.method.flow import full_float32

ABSOLUTE, RELATIVE = 2e-4, 1e-4

CASES: dict[str, Callable[[dict[str, Any], Tensors], Pairs]] = {
    case.__name__: case
    for case in (
        llamagen.lg_c2i, llamagen.lg_t2i, llamagen.lg_vq, llamagen.lg_filter, llamagen.lg_dd,
        llamagen.lg_dd_init, llamagen.lg_teacher,
        var.var_vae, var.var_quant10, var.var, var.var_filter, var.var_dd, var.var_dd_init,
        var.var_teacher,
    )
}  # fmt: skip


class Outputs(dict[str, Tensor]):
    """Tensors of a case that note which of upstream's outputs were read."""

    def __init__(self, tensors: Tensors):
        super().__init__(tensors)
        self.unread = {name for name in tensors if name.startswith("out/")}

    def __getitem__(self, name: str) -> Tensor:
        self.unread.discard(name)
        return super().__getitem__(name)


class Deviation(NamedTuple):
    """One quantity of one case.

    Attributes:
        quantity: what was compared.
        exact: whether it had to be equal: integers and booleans.
        largest: largest absolute difference.
        passed: whether every element is within the tolerance.
    """

    quantity: str
    exact: bool
    largest: float
    passed: bool


def compare(quantity: str, actual: Tensor, expected: Tensor) -> Deviation:
    """One comparison, by the pass rule of the fixtures."""
    if actual.shape != expected.shape:
        raise ValueError(f"{quantity}: {[*actual.shape]} instead of {[*expected.shape]}")
    if not expected.is_floating_point():
        return Deviation(quantity, True, float((actual != expected).sum()), actual.equal(expected))
    same = actual == expected  # infinities too
    difference = torch.where(same, 0.0, (actual - expected).abs())
    within = expected.isfinite() & (difference <= ABSOLUTE + RELATIVE * expected.abs())
    return Deviation(quantity, False, float(difference.max()), bool((same | within).all()))


@torch.inference_mode()
def deviations(case: str) -> tuple[list[Deviation], set[str]]:
    """All comparisons of a case, and the outputs that none of them reads.

    Those are steps on the way to an output that is compared: the input, argmax and codes of a
    student's earlier jump, and what a teacher wrote in the middle of a schedule.
    """
    config = json.loads((GOLDEN / "meta" / f"{case}.json").read_text())["config"]
    tensors = Outputs(load_file(GOLDEN / "io" / f"{case}.safetensors"))
    with full_float32(torch.device("cpu")):
        return [compare(*pair) for pair in CASES[case](config, tensors)], tensors.unread


def main() -> None:
    """Print a line a case, or a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", action="store_true", help="a table for docs/models.md")
    markdown = parser.parse_args().markdown
    if markdown:
        print("| case | what | quantities | exact | not compared | largest deviation | passed |")
        print("|---|---|---:|---:|---:|---:|---|")
    for case, make in CASES.items():
        found, unread = deviations(case)
        title = (make.__doc__ or "").rstrip(".")
        exact = sum(d.exact for d in found)
        largest = max((d.largest for d in found if not d.exact), default=0.0)
        passed = "yes" if all(d.passed for d in found) else "NO"
        if markdown:
            figures = f"{len(found)} | {exact} | {len(unread)} | {largest:.1e} | {passed}"
            print(f"| {case} | {title} | {figures} |")
            continue
        print(f"{case:12} {len(found):3} quantities, largest deviation {largest:.1e}: {passed}")
        if unread:
            print(f"    not compared: {', '.join(sorted(unread))}")
        for deviation in found:
            if not deviation.passed:
                print(f"    {deviation}")


if __name__ == "__main__":
    main()
