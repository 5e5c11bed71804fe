"""Which rows and columns of a block of weights become the frozen factors.

Every rule takes the weights W [p, n1, n2] of one block (its p weights share rows and columns) and
returns strictly increasing rows and columns: their order does not change what the factors span.
Imports no torch before a rule runs: the names are options of `edge-tcur train`, whose help must be cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edge_tcur_runtime.transform import to_domain

if TYPE_CHECKING:
    from torch import Tensor

GRADIENT, UPDATE = "gradient", "update"
_TINY = 1e-12  # of the largest energy: a direction below it counts as empty


@dataclass(frozen=True)
class Choice:
    """What a rule may look at besides the weights.

    Attributes:
        rank: r, at most min(n1, n2).
        transform: the transform along the slices of the block.
        seed: of the rules that draw at random; the same for the same block of the same base.
        directions: what the rows and columns shall span, [p, n1, n2], or None: the mean gradient of the
            loss with respect to W, or an update of W that was learnt before.
    """

    rank: int
    transform: str = "dft"
    seed: int = 0
    directions: Tensor | None = None


Rule = Callable[["Tensor", Choice], tuple["Tensor", "Tensor"]]


def _largest(energy: Tensor, count: int) -> Tensor:
    """Sorted indices of the `count` largest entries; ties go to the lower index, on any machine."""
    order = energy.argsort(descending=True, stable=True)
    return order[:count].sort().values


def select_by_norm(stack: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """The paper's rule: columns with the largest norm summed over the slices, then rows on those columns.

    He et al., arXiv 2501.02227, section 2.2. The source does not say whether norms are summed over the
    slices of the weights or over their transforms; taken here: over the transform's domain, where
    the t-product acts slice by slice.
    """
    import torch

    slices = torch.from_numpy(np.abs(to_domain(choice.transform, stack.double().cpu().numpy()[None])[0]))
    columns = _largest(slices.square().sum(dim=1).sqrt().sum(dim=0), choice.rank)
    rows = _largest(slices[:, :, columns].square().sum(dim=2).sqrt().sum(dim=0), choice.rank)
    return rows.to(stack.device), columns.to(stack.device)


def select_by_squared_norm(stack: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """As `select_by_norm` with squared norms: by Parseval the same in every domain."""
    squared = stack.double().square()
    columns = _largest(squared.sum(dim=(0, 1)), choice.rank)
    rows = _largest(squared[:, :, columns].sum(dim=(0, 2)), choice.rank)
    return rows, columns


def select_by_inverse_norm(stack: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """CURLoRA's rule: rows and columns drawn without replacement, the rarer used (smaller) the likelier.

    Fawi, arXiv 2408.14572, section 3.1: probabilities proportional to the inverse squared norms. An
    empty row or column, whose inverse is infinite, is left out while others remain.
    """
    squared = stack.double().square()
    return (
        _draw_inverse(squared.sum(dim=(0, 2)), choice.rank, (choice.seed, 0)),
        _draw_inverse(squared.sum(dim=(0, 1)), choice.rank, (choice.seed, 1)),
    )


def _draw_inverse(energy: Tensor, count: int, seed: tuple[int, int]) -> Tensor:
    import torch

    values = energy.cpu().numpy()
    floor = _TINY * max(float(values.max()), float(np.finfo(np.float64).tiny))
    with np.errstate(over="ignore"):  # the inverse of a floor that is next to zero, which is not taken
        weights = np.where(values > floor, 1 / np.maximum(values, floor), 0.0)
    if np.count_nonzero(weights) < count:
        weights = weights + np.finfo(np.float64).tiny
    generator = np.random.Generator(np.random.PCG64(seed))
    # Exponential clocks: the first `count` to ring are a draw without replacement in these proportions.
    with np.errstate(divide="ignore", over="ignore"):
        times = generator.exponential(size=len(weights)) / weights
    chosen = np.sort(np.argsort(times, kind="stable")[:count])
    return torch.from_numpy(chosen).to(energy.device)


def select_by_leverage(stack: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """Rows and columns with the largest leverage scores in the best rank-r subspaces.

    Mahoney and Drineas, *CUR matrix decompositions* (2009), equation 3; of the slices on top of each
    other for columns, side by side for rows.
    """
    import torch

    def leverage(unfolded: Tensor) -> Tensor:
        gram = unfolded.T @ unfolded
        _, vectors = torch.linalg.eigh(gram)
        scores: Tensor = vectors[:, -choice.rank :].square().sum(dim=1)
        return scores

    weights = stack.double()
    columns = leverage(weights.reshape(-1, weights.shape[2]))
    rows = leverage(weights.permute(0, 2, 1).reshape(-1, weights.shape[1]))
    return _largest(rows, choice.rank), _largest(columns, choice.rank)


def select_at_random(stack: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """Uniformly random rows and columns: the control of every other rule."""
    import torch

    generator = np.random.Generator(np.random.PCG64(choice.seed))
    picks = (np.sort(generator.permutation(size)[: choice.rank]) for size in stack.shape[1:])
    rows, columns = (torch.from_numpy(pick).to(stack.device) for pick in picks)
    return rows, columns


def select_by_directions(stack: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """Rows and columns whose spans hold most of the task's gradient, or of an update learnt before.

    With orthonormal factors the gradient of the core is ``C^T G R^T``: the larger its norm, the more of
    the task one step can reach; and the core that comes nearest to an update D is ``C^T D R^T``. Columns
    are picked one by one, each the one that adds most of the energy to the span of those before it
    (orthogonal matching pursuit); then rows in the same way, on the part that the columns span.

    Raises:
        ValueError: no directions were given.
    """
    if choice.directions is None:
        raise ValueError("a selection by gradient or update needs its directions")
    weights, directions = stack.double(), choice.directions.double()
    columns = pursue(weights, directions, choice.rank)
    rows = pursue(weights.transpose(1, 2), columns.held.transpose(1, 2), choice.rank)
    return _sorted(rows.taken, stack), _sorted(columns.taken, stack)


def _sorted(indices: Sequence[int], like: Tensor) -> Tensor:
    import torch

    return torch.tensor(sorted(indices), device=like.device)


@dataclass(frozen=True)
class Pursuit:
    """Columns in the order in which they were picked.

    Attributes:
        taken: their indices.
        units: [p, count, m], of each the part that those before it do not span, at unit length.
        held: [p, m, k], the part of the directions in the span of all.
    """

    taken: tuple[int, ...]
    units: Tensor
    held: Tensor


def pursue(weights: Tensor, directions: Tensor, count: int) -> Pursuit:
    """Picks, greedily, `count` columns of `weights` [p, m, n] that span most of `directions` [p, m, k]."""
    import torch

    atoms, rest = weights.clone(), directions
    taken: list[int] = []
    units: list[Tensor] = []
    for _ in range(count):
        energy = atoms.square().sum(dim=1)  # [p, n]: of what the chosen ones leave of each column
        usable = energy > _TINY * weights.square().sum(dim=1).amax()
        aligned = (atoms.transpose(1, 2) @ rest).square().sum(dim=2)  # [p, n]
        score = torch.where(usable, aligned / energy.clamp_min(1e-300), 0.0).sum(dim=0)
        score[taken] = -1.0
        best = int(score.argmax())
        taken.append(best)
        length = energy[:, best].clamp_min(1e-300).sqrt()
        unit = torch.where(usable[:, best, None], atoms[:, :, best] / length[:, None], 0.0)  # [p, m]
        atoms = atoms - unit[:, :, None] * (unit[:, None, :] @ atoms)
        rest = rest - unit[:, :, None] * (unit[:, None, :] @ rest)
        units.append(unit)
    return Pursuit(tuple(taken), torch.stack(units, dim=1), directions - rest)


SELECTIONS: dict[str, Rule] = {
    "norm": select_by_norm,
    "squared-norm": select_by_squared_norm,
    "inverse-norm": select_by_inverse_norm,
    "leverage": select_by_leverage,
    GRADIENT: select_by_directions,
    UPDATE: select_by_directions,
    "random": select_at_random,
}
