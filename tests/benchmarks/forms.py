"""Holds the cost model's choice of form against measurement: `python tests/benchmarks/forms.py`.

For each cell of a grid of tokens, shapes, ranks and couplings it times forward and backward of the adapted
linear layers of a block in every form, interleaved, and prints how much slower the chosen one is than the
best.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass

import torch
from torch import nn

from edge_tcur.method.adapted import inject
from edge_tcur.method.config import TCurConfig
from edge_tcur.method.cost import Sizes, cheapest_form
from edge_tcur.method.forms import possible_forms
from edge_tcur.method.layer import AdaptedLayer


@dataclass(frozen=True)
class Cell:
    """One place of the grid: `size` weights [n1, n2] of rank `rank`, coupled or not, at `tokens` tokens."""

    tokens: int
    size: int
    n1: int
    n2: int
    rank: int
    coupled: bool


CELLS = [
    Cell(tokens, size, n1, n2, rank, coupled)
    for tokens in (64, 512, 2048)
    for n1, n2 in ((384, 384), (1536, 384), (384, 1536))
    for size, rank, coupled in ((1, 8, False), (1, 32, False), (6, 2, True), (6, 8, True), (24, 8, True))
]


def measure(cell: Cell, rounds: int) -> tuple[str, dict[str, float]]:
    """The chosen form, and form -> least processor seconds of forward and backward, a layer."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(cell.n2, cell.n1) for _ in range(cell.size)])
    config = TCurConfig(
        rank=cell.rank,
        grouping="shape",
        coupling="all" if cell.coupled else "none",
        selection="squared-norm",
    )
    injection = inject(model, config)
    layers = [layer for layer in model if isinstance(layer, AdaptedLayer)]
    group = injection.groups[next(iter(injection.groups))]
    forms = possible_forms(layers[0].view, has_rows=group.has_rows, in_block=group.in_block)
    x = torch.randn(cell.tokens, cell.n2, requires_grad=True)
    upstream = torch.randn(cell.tokens, cell.n1)
    seconds = dict.fromkeys(forms, float("inf"))
    for count in range(rounds + 1):
        for form in forms:
            for layer in layers:
                layer.form = form
            started = time.process_time()
            outputs = [layer(x) for layer in layers]
            torch.autograd.backward(outputs, [upstream] * len(outputs))
            if count:
                seconds[form] = min(seconds[form], (time.process_time() - started) / len(layers))
    sizes = Sizes(cell.tokens, cell.n1, cell.n2, group.columns_t.shape[1], cell.rank)
    return cheapest_form(forms, sizes), seconds


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    worst = 0.0
    for cell in CELLS:
        choice, seconds = measure(cell, options.rounds)
        best = min(seconds, key=seconds.__getitem__)
        over = seconds[choice] / seconds[best] - 1
        worst = max(worst, over)
        shown = "  ".join(f"{form} {1000 * value:.2f}" for form, value in seconds.items())
        sys.stdout.write(f"{cell}: {choice} (+{over:.0%}; best {best})  ms: {shown}\n")
        sys.stdout.flush()
    sys.stdout.write(
        f"the chosen form is at most {worst:.0%} slower than the best, over {len(CELLS)} cells\n"
    )


if __name__ == "__main__":
    main()
