"""Weight-only quantisation of a matrix: symmetric, int8 with one scale an output feature, int4 with one scale
a block of input features. Pure.

What a graph computes with is `Quantized.dequantize`, bit for bit: ONNX's DequantizeLinear is one
float32 product.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_tcur.errors import ExportError
from edge_tcur_runtime.formats.weights import INT4, INT8

BLOCK = 32  # input features that share a scale in int4
_LARGEST = {INT8: 127, INT4: 7}  # symmetric: the one more on the negative side is not used
_LARGEST_ENTRY = np.finfo(np.float32).max / 2  # beyond it, the largest value times its scale may overflow
_SMALLEST_SCALE = np.finfo(np.float32).tiny  # of rows of zeros


@dataclass(frozen=True)
class Quantized:
    """A quantised matrix in the orientation that the graphs store.

    Attributes:
        precision: ``int8`` or ``int4``.
        values: int8 [a, b]; of int4 in -7 to 7, one a byte.
        scales: f32; [a] or [b] of int8; of int4 the shape of `values` with ``ceil(size / BLOCK)`` in the
            place of the axis.
        axis: of int8, the axis that has a scale for each index; of int4, the axis that the blocks lie along.
    """

    precision: str
    values: np.ndarray
    scales: np.ndarray
    axis: int

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales in a file."""
        packed = self.values.size if self.precision == INT8 else -(-self.values.size // 2)
        return packed + self.scales.nbytes

    def dequantize(self) -> np.ndarray:
        """f32 [a, b]."""
        if self.precision == INT8:
            scales = np.expand_dims(self.scales, 1 - self.axis)
        else:
            size = self.values.shape[self.axis]
            scales = _spread(self.scales, self.axis, size)
        product: np.ndarray = self.values.astype(np.float32) * scales
        return product


def quantize_int8(matrix: np.ndarray, axis: int, name: str = "") -> Quantized:
    """One scale for each index of `axis`; the error of an entry is at most half of its scale.

    Args:
        matrix: f32 [a, b].
        name: of the weight, for messages.

    Raises:
        ExportError: an entry is not finite, or too large for a scale.
    """
    _require_finite(matrix, INT8, name)
    largest = np.abs(matrix).max(axis=1 - axis, initial=0)
    scales = _scales(largest, INT8)
    values = np.rint(matrix / np.expand_dims(scales, 1 - axis))
    return Quantized(INT8, _clipped(values, INT8), scales, axis)


def quantize_int4(matrix: np.ndarray, axis: int, name: str = "") -> Quantized:
    """One scale for each `BLOCK` consecutive entries along `axis`, the last block may be shorter; the
    error of an entry is at most half of its scale.

    Args, Raises: as `quantize_int8`.
    """
    _require_finite(matrix, INT4, name)
    size = matrix.shape[axis]
    starts = np.arange(0, size, BLOCK)
    scales = _scales(np.maximum.reduceat(np.abs(matrix), starts, axis=axis), INT4)
    values = np.rint(matrix / _spread(scales, axis, size))
    return Quantized(INT4, _clipped(values, INT4), scales, axis)


def _spread(scales: np.ndarray, axis: int, size: int) -> np.ndarray:
    """The scale of each of `size` entries along `axis`."""
    spread: np.ndarray = np.repeat(scales, BLOCK, axis=axis).take(range(size), axis=axis)
    return spread


def _scales(largest: np.ndarray, precision: str) -> np.ndarray:
    scales: np.ndarray = np.maximum(largest / np.float32(_LARGEST[precision]), _SMALLEST_SCALE)
    return scales


def _clipped(values: np.ndarray, precision: str) -> np.ndarray:
    bound = _LARGEST[precision]
    clipped: np.ndarray = values.clip(-bound, bound).astype(np.int8)
    return clipped


def _require_finite(matrix: np.ndarray, precision: str, name: str) -> None:
    if not (np.abs(matrix) <= _LARGEST_ENTRY).all():
        raise ExportError(
            f"a weight that is not finite cannot be {precision}",
            where=name or None,
            hint="export with --precision fp32, and look at what the training of the base did",
        )


def relative_error(matrix: np.ndarray, quantized: Quantized) -> float:
    """Norm of the difference over the norm of the matrix; 0 of a matrix of zeros."""
    norm = float(np.linalg.norm(matrix.astype(np.float64)))
    difference = float(np.linalg.norm(matrix.astype(np.float64) - quantized.dequantize()))
    return difference / norm if norm else 0.0
