"""Holds the cost model's choice of form against measurement: `python tests/benchmarks/forms.py`.

For each cell of a grid of tokens, shapes, ranks, couplings and kinds of layer it times forward and backward
of the adapted layers of a block in every form, one after the other in each round, and prints how much slower
the chosen one is than the best: the median over the rounds of the ratio of the two times in one round. A cell
above the limit is measured again, twice at most; where it is above it each time the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from edge_tcur.method.adapted import inject
from edge_tcur.method.config import TCurConfig
from edge_tcur.method.cost import Sizes, cheapest_form
from edge_tcur.method.forms import possible_forms
from edge_tcur.method.layer import AdaptedLayer
from edge_tcur.method.quantized import quantize_linears

LIMIT = 0.2  # how much slower than the best form the chosen one may be
ATTEMPTS = 3


@dataclass(frozen=True)
class Cell:
    """One place of the grid: `size` weights [n1, n2] of rank `rank`, coupled or not, at `tokens` tokens.

    `kind`: linear, int8 or convolution (1x1, a picture of `tokens` pixels).
    """

    tokens: int
    size: int
    n1: int
    n2: int
    rank: int
    coupled: bool = False
    kind: str = "linear"


SHAPES = ((384, 384), (1536, 384), (384, 1536))
CELLS = [
    Cell(tokens, size, n1, n2, rank, coupled)
    for tokens in (64, 512, 2048)
    for n1, n2 in SHAPES
    for size, rank, coupled in ((1, 8, False), (1, 32, False), (6, 2, True), (6, 8, True), (24, 8, True))
] + [
    Cell(tokens, size, n1, n2, 8, coupled, kind)
    for kind in ("int8", "convolution")
    for tokens in (64, 1024)
    for n1, n2 in SHAPES
    for size, coupled in ((1, False), (6, True))
]


def build(cell: Cell) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Layers that are not adapted yet, an input of each, and a gradient of its output."""
    if cell.kind == "convolution":
        side = round(cell.tokens**0.5)
        assert side * side == cell.tokens, "a picture is square"
        convolutions = [nn.Conv2d(cell.n2, cell.n1, 1) for _ in range(cell.size)]
        upstream = torch.randn(1, cell.n1, side, side)
        return nn.Sequential(*convolutions), torch.randn(1, cell.n2, side, side), upstream
    model = nn.Sequential(*[nn.Linear(cell.n2, cell.n1) for _ in range(cell.size)])
    if cell.kind == "int8":
        quantize_linears(model)
    return model, torch.randn(cell.tokens, cell.n2), torch.randn(cell.tokens, cell.n1)


def measure(cell: Cell, rounds: int) -> tuple[str, dict[str, list[float]]]:
    """The chosen form, and form -> processor seconds of forward and backward in each round, a layer."""
    torch.manual_seed(0)
    model, x, upstream = build(cell)
    config = TCurConfig(
        rank=cell.rank,
        grouping="shape",
        coupling="all" if cell.coupled else "none",
        selection="squared-norm",
        targets="*",
    )
    injection = inject(model, config)
    layers = [layer for layer in model if isinstance(layer, AdaptedLayer)]
    group = injection.groups[next(iter(injection.groups))]
    forms = possible_forms(layers[0].view, has_rows=group.has_rows, in_block=group.in_block)
    x.requires_grad_(True)
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    for count in range(rounds + 1):  # the first is not counted
        for form in forms:
            for layer in layers:
                layer.form = form
            started = time.process_time()
            outputs = [layer(x) for layer in layers]
            torch.autograd.backward(outputs, [upstream] * len(outputs))
            if count:
                seconds[form].append((time.process_time() - started) / len(layers))
    sizes = Sizes(cell.tokens, cell.n1, cell.n2, group.columns_t.shape[1], cell.rank)
    return cheapest_form(forms, sizes), seconds


def excess(choice: str, seconds: dict[str, list[float]]) -> tuple[float, str]:
    """How much slower the chosen form is than the fastest, and which that is."""
    ratios = {
        form: median(a / b for a, b in zip(seconds[choice], values, strict=True))
        for form, values in seconds.items()
    }
    best = max(ratios, key=ratios.__getitem__)
    return ratios[best] - 1, best


def judge(cell: Cell, rounds: int, limit: float = LIMIT) -> tuple[float, str]:
    """The least excess of up to `ATTEMPTS` measurements (one within the limit ends them), and a line."""
    found: list[tuple[float, str]] = []
    for _ in range(ATTEMPTS):
        choice, seconds = measure(cell, rounds)
        over, best = excess(choice, seconds)
        shown = "  ".join(f"{form} {1000 * median(values):.2f}" for form, values in seconds.items())
        found.append((over, f"{cell}: {choice} (+{over:.0%}; best {best})  ms: {shown}"))
        if over <= limit:
            break
    return min(found)


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--limit", type=float, default=LIMIT, help="of the excess over the best form")
    parser.add_argument("--kind", help="measure this kind of layer only: linear, int8 or convolution")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells = [cell for cell in CELLS if options.kind in (None, cell.kind)]
    overs = []
    for cell in cells:
        over, line = judge(cell, options.rounds, options.limit)
        overs.append(over)
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    failed = sum(over > options.limit for over in overs)
    sys.stdout.write(
        f"the chosen form is at most {max(overs):.0%} slower than the best, over {len(cells)} cells; "
        f"{failed} above {options.limit:.0%}\n"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
