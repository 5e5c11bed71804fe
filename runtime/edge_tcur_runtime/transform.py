"""Transforms of the generalised t-product: along which the slices of a block are coupled.

Kernfeld, Kilmer and Aeron, *Tensor-tensor products with invertible linear transforms* (2015),
definition 3.1: transform along the slices, multiply slice by slice, transform back. ``dft`` gives
Kilmer and Martin's t-product (circular convolution, the one of the tCURLoRA paper), ``dct`` (the
orthonormal DCT-II) a product without wrap-around, ``identity`` slice-by-slice products.

A stack of n3 slices is cut into b blocks of p consecutive slices (n3 = b * p); blocks never mix.
Pure numpy, shared with the workstation.
"""

from __future__ import annotations

import numpy as np

TRANSFORMS = ("dft", "dct", "identity")


def dct_matrix(size: int) -> np.ndarray:
    """The orthonormal DCT-II, float64 [size, size]: its inverse is its transpose."""
    steps = np.arange(size)
    matrix: np.ndarray = np.sqrt(2 / size) * np.cos(
        np.pi * (2 * steps[None, :] + 1) * steps[:, None] / (2 * size)
    )
    matrix[0] /= np.sqrt(2)
    return matrix


def to_domain(kind: str, value: np.ndarray) -> np.ndarray:
    """`value` [b, p, ...] transformed along its slices: complex [b, p // 2 + 1, ...] for ``dft``
    (the other frequencies are conjugates), real [b, p, ...] otherwise.

    Raises:
        ValueError: an unknown transform.
    """
    if kind == "dft":
        # numpy 1 transforms float32 in double precision, numpy 2 in single: a machine must not show.
        return np.fft.rfft(np.asarray(value, np.float64), axis=1)
    if kind == "dct":
        return _along_slices(dct_matrix(value.shape[1]), value)
    if kind == "identity":
        return np.asarray(value, dtype=np.float64)
    raise ValueError(f"unknown transform {kind!r}")


def from_domain(kind: str, value: np.ndarray, size: int) -> np.ndarray:
    """The inverse of `to_domain`: float64 [b, size, ...].

    Raises:
        ValueError: an unknown transform.
    """
    if kind == "dft":
        result: np.ndarray = np.fft.irfft(value, n=size, axis=1)
        return result
    if kind == "dct":
        return _along_slices(dct_matrix(size).T, value)
    if kind == "identity":
        return value
    raise ValueError(f"unknown transform {kind!r}")


def _along_slices(matrix: np.ndarray, value: np.ndarray) -> np.ndarray:
    return np.moveaxis(np.tensordot(matrix, np.asarray(value, np.float64), axes=(1, 1)), 0, 1)


def structure(kind: str, size: int) -> np.ndarray:
    """Structure constants of the product, float64 [size, size, size, size].

    Slice ``l`` of ``C * U * R`` is the sum over i, j, k of ``structure[l, i, j, k] C[i] U[j] R[k]``:
    for ``dft`` one where ``i + j + k = l (mod size)``, for ``identity`` one where all are equal.

    Raises:
        ValueError: an unknown transform.
    """
    if kind not in TRANSFORMS:
        raise ValueError(f"unknown transform {kind!r}")
    if kind == "dft":
        i, j, k = np.ogrid[:size, :size, :size]
        hits: np.ndarray = ((i + j + k) % size)[None] == np.arange(size)[:, None, None, None]
        return hits.astype(np.float64)
    matrix = dct_matrix(size) if kind == "dct" else np.eye(size)
    constants: np.ndarray = np.einsum("fl,fi,fj,fk->lijk", matrix, matrix, matrix, matrix)
    return constants
