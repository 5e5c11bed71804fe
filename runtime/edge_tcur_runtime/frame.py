"""Frames: coordinates in which the core is trained. Pure numpy, shared with the workstation.

In the t-product algebra (DFT along the slices) the update is ``C * U * R``. With the raw frame the
optimiser moves ``U`` itself and its effective step depends on the lengths and angles of the chosen
columns and rows. The orthonormal frame moves ``V`` with ``U = S * V * T``, where ``C * S`` and
``T * R`` are orthonormal: ``S`` and ``T`` come from r x r Cholesky factors of the Gram matrices, one
per frequency, so nothing is stored and any machine recomputes them from the base and the indices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_RIDGE = 1e-9  # relative to the largest frequency: keeps an empty or deficient Gram matrix invertible


def t_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The t-product of real tensors: circular convolution along the slices of matrix products.

    Args:
        a: [n3, p, q].
        b: [n3, q, s].

    Returns:
        float64 [n3, p, s]: ``out[l] = sum over i + j = l (mod n3) of a[i] @ b[j]``
        (Kilmer and Martin 2011, definition 3.1).
    """
    product: np.ndarray = np.fft.irfft(np.fft.rfft(a, axis=0) @ np.fft.rfft(b, axis=0), n=len(a), axis=0)
    return product


def t_transpose(a: np.ndarray) -> np.ndarray:
    """The t-transpose [n3, q, p] of [n3, p, q]: each slice transposed, slices 1..n3-1 reversed."""
    return np.roll(a[::-1], 1, axis=0).swapaxes(1, 2)


@dataclass(frozen=True)
class Frame:
    """Coordinates of one group's core: ``U = left * V * right`` (t-products).

    Attributes:
        left, right: float64 [n3, r, r], or None for the raw frame.
        left_inverse, right_inverse: their t-inverses.
    """

    left: np.ndarray | None = None
    right: np.ndarray | None = None
    left_inverse: np.ndarray | None = None
    right_inverse: np.ndarray | None = None

    def to_raw(self, core: np.ndarray) -> np.ndarray:
        """Raw core U [n3, r, r] (float64) of a core V in this frame."""
        return _sandwich(self.left, core, self.right)

    def from_raw(self, core: np.ndarray) -> np.ndarray:
        """Core V [n3, r, r] (float64) in this frame of a raw core U."""
        return _sandwich(self.left_inverse, core, self.right_inverse)

    def pull_back(self, gradient: np.ndarray) -> np.ndarray:
        """Gradient with respect to V [n3, r, r] (float64) from the gradient with respect to U."""
        if self.left is None or self.right is None:
            return gradient.astype(np.float64)
        return _sandwich(t_transpose(self.left), gradient, t_transpose(self.right))


def _sandwich(left: np.ndarray | None, core: np.ndarray, right: np.ndarray | None) -> np.ndarray:
    if left is None or right is None:
        return core.astype(np.float64)
    return t_product(t_product(left, core), right)


def _whiten(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cholesky factor L [n3 // 2 + 1, r, r] (complex) of each Gram matrix, and its inverse."""
    rank = gram.shape[-1]
    scale = np.trace(gram, axis1=1, axis2=2).real / rank
    ridge = _RIDGE * max(float(scale.max()), float(np.finfo(np.float64).tiny))
    factor = np.linalg.cholesky(gram + ridge * np.eye(rank))
    return factor, np.linalg.inv(factor)


def build_frame(kind: str, columns: np.ndarray, rows: np.ndarray) -> Frame:
    """The frame of a group.

    Args:
        kind: ``"raw"`` or ``"orthonormal"``.
        columns: C, [n3, n1, r], the chosen columns of every slice.
        rows: R, [n3, r, n2], the chosen rows of every slice.

    Raises:
        ValueError: an unknown kind.
    """
    if kind == "raw":
        return Frame()
    if kind != "orthonormal":
        raise ValueError(f"unknown frame {kind!r}")
    n3 = len(columns)
    c_hat = np.fft.rfft(columns.astype(np.float64), axis=0)
    r_hat = np.fft.rfft(rows.astype(np.float64), axis=0)
    c_factor, c_inverse = _whiten(c_hat.conj().swapaxes(1, 2) @ c_hat)
    r_factor, r_inverse = _whiten(r_hat @ r_hat.conj().swapaxes(1, 2))

    def real(value: np.ndarray) -> np.ndarray:
        result: np.ndarray = np.fft.irfft(value, n=n3, axis=0)
        return result

    # c_hat @ inv(L)^H has orthonormal columns, inv(L) @ r_hat orthonormal rows.
    return Frame(
        left=real(c_inverse.conj().swapaxes(1, 2)),
        right=real(r_inverse),
        left_inverse=real(c_factor.conj().swapaxes(1, 2)),
        right_inverse=real(r_factor),
    )
