"""A frozen weight as `base.bin` holds it: float32, int8 with a scale for each output feature, or int4 with a
scale for each block of input features. Rows and columns are read without reading the weight whole.

Dequantising is ONNX's DequantizeLinear without a zero point: ``float32(value) * scale``, one product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_tcur_runtime.errors import FileFormatError
from edge_tcur_runtime.formats.schema import Fields

FP32, INT8, INT4 = "fp32", "int8", "int4"
PRECISIONS = (FP32, INT8, INT4)
_BITS = {"float32": 32, INT8: 8, INT4: 4}


@dataclass(frozen=True)
class TensorPlace:
    """Where a weight lies in `base.bin`.

    Attributes:
        offset: bytes from the start of the file.
        dtype: ``float32``, ``int8``, or ``int4``: two values a byte, the first in the low half.
        shape: shape as stored.
        transposed: True where the stored matrix is the transpose of the base's parameter
            (linear weights are stored [n2, n1], as MatMul reads them).
        scales: of int8 and int4, where the scales lie: f32, [n1] of int8; of int4 in the shape of the
            stored matrix with ``ceil(n2 / block)`` in the place of n2.
        block: of int4, how many consecutive input features share a scale.
    """

    offset: int
    dtype: str
    shape: tuple[int, ...]
    transposed: bool
    scales: int | None = None
    block: int | None = None

    def document(self) -> dict[str, Any]:
        """JSON values; fields that the dtype has no use for are absent."""
        return {key: value for key, value in vars(self).items() if value is not None}

    def scale_shape(self) -> tuple[int, ...]:
        """Shape of the scales of a quantised matrix."""
        outputs, inputs = self.shape[::-1] if self.transposed else self.shape
        if self.block is None:
            return (outputs,)
        blocks = -(-inputs // self.block)
        return (blocks, outputs) if self.transposed else (outputs, blocks)

    def end(self) -> int:
        """First byte behind the weight and its scales."""
        end = self.offset + stored_bytes(self.dtype, self.shape)
        return end if self.scales is None else max(end, self.scales + 4 * math.prod(self.scale_shape()))


def stored_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor without its scales."""
    return -(-math.prod(shape) * _BITS[dtype] // 8)


def parse_place(fields: Fields) -> TensorPlace:
    """A place from the manifest.

    Raises:
        FileFormatError: an unknown, missing or idle field.
    """
    dtype = fields.choice("dtype", tuple(_BITS))
    quantised = ("scales",) if dtype == INT8 else ("scales", "block") if dtype == INT4 else ()
    fields.only("offset", "dtype", "shape", "transposed", *quantised)
    shape = fields.sizes("shape")
    if quantised and len(shape) != 2:
        raise FileFormatError(f"a weight of {dtype} must be a matrix, not {list(shape)}", where=fields.where)
    return TensorPlace(
        fields.integer("offset"),
        dtype,
        shape,
        fields.flag("transposed"),
        fields.integer("scales") if quantised else None,
        fields.integer("block", low=1) if dtype == INT4 else None,
    )


def pack_int4(values: np.ndarray) -> np.ndarray:
    """uint8 [ceil(n / 2)] of n values int8 in -8 to 7, the first in the low half; as ONNX packs them."""
    flat = values.reshape(-1)
    if flat.size % 2:
        flat = np.append(flat, np.int8(0))
    halves = flat.astype(np.uint8) & 0xF
    packed: np.ndarray = halves[0::2] | (halves[1::2] << 4)
    return packed


def unpack_int4(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """int8 of `shape` from what `pack_int4` gave."""
    halves = np.empty(packed.size * 2, np.uint8)
    halves[0::2], halves[1::2] = packed & 0xF, packed >> 4
    signed: np.ndarray = ((halves ^ 8).astype(np.int8) - np.int8(8))[: math.prod(shape)]
    return signed.reshape(shape)


def read_columns_and_rows(
    path: Path, place: TensorPlace, rows: np.ndarray, cols: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Columns [n1, r] and rows [r, n2], f32, of one weight as the graphs see it.

    The file is mapped: of float32 and int8 only what is asked for is read; of int4, one weight is unpacked
    to int8.

    Args:
        path: `base.bin`.
        rows, cols: indices [r].
    """
    weight = _map_values(path, place)
    if place.scales is None:
        return np.array(weight[:, cols]), np.array(weight[rows, :])
    scales = _map(path, "<f4", place.scales, place.scale_shape())
    if place.block is None:
        by_row = np.array(scales)[:, None]
        return weight[:, cols] * by_row, weight[rows, :] * by_row[rows]
    by_block = scales.T if place.transposed else scales  # [n1, blocks]
    of_rows = np.repeat(by_block[rows], place.block, axis=1)[:, : weight.shape[1]]
    return weight[:, cols] * by_block[:, cols // place.block], weight[rows, :] * of_rows


def _map(path: Path, dtype: str, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)


def _map_values(path: Path, place: TensorPlace) -> np.ndarray:
    """The stored values [n1, n2], mapped where the dtype allows."""
    if place.dtype == INT4:
        size = (stored_bytes(INT4, place.shape),)
        stored = unpack_int4(_map(path, "u1", place.offset, size), place.shape)
    else:
        stored = _map(path, "<f4" if place.scales is None else "i1", place.offset, place.shape)
    return stored.T if place.transposed else stored
