"""Which rows and columns of a stack of weights become the frozen factors.

Imports no torch: the names of the rules are options of `edge-tcur train`, whose help must be cheap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def _largest(energy: Tensor, count: int) -> Tensor:
    """Sorted indices of the `count` largest entries; ties go to the lower index, on any machine."""
    order = energy.argsort(descending=True, stable=True)
    return order[:count].sort().values


def select_by_norm(stack: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The paper's rule: the columns with the largest norm over the stack, then rows on those columns.

    He et al., arXiv 2501.02227, section 2.2. Norms are summed over the slices in the transform
    domain there; by Parseval the order is that of the squared norms of the real slices, so no FFT
    is needed. Indices are returned sorted: their order does not change what the factors span.

    Args:
        stack: W, [n3, n1, n2].
        rank: r, at most min(n1, n2).

    Returns:
        rows int64 [r] and columns int64 [r], strictly increasing.
    """
    squared = stack.double().square()
    columns = _largest(squared.sum(dim=(0, 1)), rank)
    rows = _largest(squared[:, :, columns].sum(dim=(0, 2)), rank)
    return rows, columns


SELECTIONS: dict[str, Callable[[Tensor, int], tuple[Tensor, Tensor]]] = {"norm": select_by_norm}
