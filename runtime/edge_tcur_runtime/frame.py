"""Frames: coordinates in which the core is trained. Pure numpy, shared with the workstation.

In the algebra of the transform (`edge_tcur_runtime.transform`) the update is ``C * U * R``. With the raw
frame the optimiser moves ``U`` itself and its effective step depends on the lengths and angles of the
chosen columns and rows. The orthonormal frame moves ``V`` with ``U = S * V * T``, where ``C * S`` and
``T * R`` are orthonormal: ``S`` and ``T`` come from r x r Cholesky factors of the Gram matrices, one
per frequency, so nothing is stored and any machine recomputes them from the base and the indices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_tcur_runtime.transform import TRANSFORMS, from_domain, to_domain

_RIDGE = 1e-9  # relative to the largest frequency: keeps an empty or deficient Gram matrix invertible
_EMPTY = 1e-24  # squared norm below which columns count as empty: float32 holds the inverses of what it gives


@dataclass(frozen=True)
class Frame:
    """Coordinates of one group's core: ``U = alpha * S * V * T`` in the algebra of `transform`.

    Attributes:
        transform: ``dft``, ``dct`` or ``identity``.
        blocks: b; the core's n3 slices are b blocks of n3 / b.
        alpha: scale of the update, and so of the effective step.
        left, right: S and T in the transform's domain [b, f, r, r], or None for the raw frame.
        left_inverse, right_inverse: their inverses, slice by slice.
    """

    transform: str = "dft"
    blocks: int = 1
    alpha: float = 1.0
    left: np.ndarray | None = None
    right: np.ndarray | None = None
    left_inverse: np.ndarray | None = None
    right_inverse: np.ndarray | None = None

    def to_raw(self, core: np.ndarray) -> np.ndarray:
        """Raw core U [n3, r, r] (float64) of a core V in this frame."""
        return self.alpha * self._sandwich(self.left, core, self.right)

    def from_raw(self, core: np.ndarray) -> np.ndarray:
        """Core V [n3, r, r] (float64) in this frame of a raw core U."""
        return self._sandwich(self.left_inverse, core, self.right_inverse) / self.alpha

    def pull_back(self, gradient: np.ndarray) -> np.ndarray:
        """Gradient with respect to V [n3, r, r] (float64) from the gradient with respect to U."""
        if self.left is None or self.right is None:
            return self.alpha * gradient.astype(np.float64)
        left, right = (value.conj().swapaxes(-1, -2) for value in (self.left, self.right))
        return self.alpha * self._sandwich(left, gradient, right)

    def _sandwich(self, left: np.ndarray | None, core: np.ndarray, right: np.ndarray | None) -> np.ndarray:
        if left is None or right is None:
            return core.astype(np.float64)
        blocks = core.reshape(self.blocks, -1, *core.shape[1:])
        product = left @ to_domain(self.transform, blocks) @ right
        return from_domain(self.transform, product, blocks.shape[1]).reshape(core.shape)


def _whiten(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cholesky factor L [b, f, r, r] of each Gram matrix, and its inverse."""
    rank = gram.shape[-1]
    scale = np.trace(gram, axis1=-2, axis2=-1).real.max(axis=1) / rank
    ridge = _RIDGE * np.maximum(scale, _EMPTY)
    factor = np.linalg.cholesky(gram + ridge[:, None, None, None] * np.eye(rank))
    return factor, np.linalg.inv(factor)


def build_frame(
    kind: str,
    columns: np.ndarray,
    rows: np.ndarray,
    *,
    transform: str = "dft",
    blocks: int = 1,
    alpha: float = 1.0,
) -> Frame:
    """The frame of a group.

    Args:
        kind: ``"raw"`` or ``"orthonormal"``.
        columns: C, [n3, n1, r], the chosen columns of every slice.
        rows: R, [n3, r, n2], the chosen rows of every slice.
        transform, blocks, alpha: see `Frame`.

    Raises:
        ValueError: an unknown kind or transform.
    """
    if transform not in TRANSFORMS:
        raise ValueError(f"unknown transform {transform!r}")
    if kind == "raw":
        return Frame(transform, blocks, alpha)
    if kind != "orthonormal":
        raise ValueError(f"unknown frame {kind!r}")
    c_hat, r_hat = (
        to_domain(transform, value.astype(np.float64).reshape(blocks, -1, *value.shape[1:]))
        for value in (columns, rows)
    )
    c_factor, c_inverse = _whiten(c_hat.conj().swapaxes(-1, -2) @ c_hat)
    r_factor, r_inverse = _whiten(r_hat @ r_hat.conj().swapaxes(-1, -2))
    # c_hat @ inv(L)^H has orthonormal columns, inv(L) @ r_hat orthonormal rows.
    return Frame(
        transform,
        blocks,
        alpha,
        left=c_inverse.conj().swapaxes(-1, -2),
        right=r_inverse,
        left_inverse=c_factor.conj().swapaxes(-1, -2),
        right_inverse=r_factor,
    )
