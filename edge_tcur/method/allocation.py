"""Ranks by energy: one budget of trained numbers, shared out among single weights.

A core of rank r reaches ``||C^T G R^T||^2`` of the gradient's energy in one step and costs r * r numbers;
of an update learnt before it keeps as much.
Where that energy lies differs much between weights, so the same rank everywhere wastes numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from edge_tcur.method.group import member_of
from edge_tcur.method.selection import pursue
from edge_tcur_runtime.errors import ConfigError
from edge_tcur_runtime.formats.factors import SKETCH

MAX_RANK = 32
_LOOKAHEAD = 8  # ranks: a gain may come only after a few more rows and columns


def energies_by_rank(weight: Tensor, direction: Tensor, frame: str) -> list[float]:
    """Energy of the gradient or update that a core of rank 0, 1, 2, ... reaches.

    Args:
        weight, direction: [n1, n2].
        frame: ``sketch`` for its singular vectors, else rows and columns chosen by it.
    """
    limit = min(MAX_RANK, *weight.shape)
    g = direction.double()
    if frame == SKETCH:
        values = torch.linalg.svdvals(g)[:limit]
        return [0.0, *values.square().cumsum(dim=0).tolist()]
    w = weight.double()
    columns = pursue(w[None], g[None], limit)
    rows = pursue(w.T[None], columns.held.transpose(1, 2), limit)
    reached = (columns.units[0] @ g @ rows.units[0].T).square()
    return [0.0, *(float(reached[:rank, :rank].sum()) for rank in range(1, limit + 1))]


def allocate_ranks(energies: Mapping[str, Sequence[float]], budget: int) -> dict[str, int]:
    """The rank of each weight: at least 1, all cores together at most `budget` numbers.

    Greedy: the next numbers go where they reach most energy a number.

    Args:
        energies: weight -> energy reached by rank (`energies_by_rank`).
        budget: numbers in all.

    Raises:
        ConfigError: not even rank 1 everywhere fits.
    """
    if budget < len(energies):
        raise ConfigError(
            f"{budget} numbers are too few for {len(energies)} weights",
            where="rank_budget",
            hint=f"give at least {len(energies)}, or adapt fewer weights with --targets",
        )
    ranks, left = dict.fromkeys(energies, 1), budget - len(energies)
    while True:
        best: tuple[float, str, int] | None = None
        for name, reached in energies.items():
            rank = ranks[name]
            for higher in range(rank + 1, min(rank + _LOOKAHEAD, len(reached) - 1) + 1):
                cost = higher * higher - rank * rank
                gain = (reached[higher] - reached[rank]) / cost
                if cost <= left and (best is None or gain > best[0]):
                    best = gain, name, higher
        if best is None:
            return ranks
        _, name, higher = best
        left -= higher * higher - ranks[name] * ranks[name]
        ranks[name] = higher


def share_out(model: nn.Module, directions: Mapping[str, Tensor], budget: int, frame: str) -> dict[str, int]:
    """Module name -> rank of a core of its own, under a budget of trained numbers.

    Args:
        model: the base, without adapters.
        directions: module name -> mean gradient or learnt update [n1, n2].
        budget: numbers in all cores.
        frame: of the adapter.

    Raises:
        ConfigError: see `allocate_ranks`.
    """
    energies = {}
    for name, direction in directions.items():
        energies[name] = energies_by_rank(member_of(model, name).matrix(), direction, frame)
    return allocate_ranks(energies, budget)
