"""The core whose update comes nearest to a given one: least squares in the algebra of the transform."""

from __future__ import annotations

import numpy as np

from edge_tcur_runtime.transform import from_domain, to_domain

_CUTOFF = 1e-9  # of the largest singular value: columns or rows that are copies of each other


def fit_core(
    update: np.ndarray, columns: np.ndarray, rows: np.ndarray, *, transform: str, blocks: int
) -> np.ndarray:
    """``U = pinv(C) D pinv(R)``, frequency by frequency.

    Args:
        update: D, [n3, n1, n2].
        columns: C, [n3, n1, r]; rows: R, [n3, r, n2].
        transform: along the slices of a block; blocks: b, the n3 slices are b blocks.

    Returns:
        raw core float64 [n3, r, r] with the smallest ``|| D - C * U * R ||``.
    """

    def domain(value: np.ndarray) -> np.ndarray:
        return to_domain(transform, value.astype(np.float64).reshape(blocks, -1, *value.shape[1:]))

    left, right = (np.linalg.pinv(domain(value), rcond=_CUTOFF) for value in (columns, rows))
    core = left @ domain(update) @ right
    rank = columns.shape[2]
    return from_domain(transform, core, len(update) // blocks).reshape(-1, rank, rank)
