"""Rows and columns of an int4 weight, gathered as bytes.

ONNX Runtime's Gather takes no int4. Dequantised for it, a weight is eight times its size for a few of its rows,
and in a graph that is run in the order of the file all weights are so at once, since nothing makes them wait. A
byte holds two neighbours of a row: bytes are gathered from the same file as uint8, and a table of 256 pairs of
numbers says what they hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from edge_tcur_export.quantize import BLOCK, Quantized

_PAIRS, _NUMBERS = "int4.pairs", "int4.numbers"  # initializers, once a graph
_INDICES = {ir.DataType.INT32: np.int32, ir.DataType.INT64: np.int64}
_Insert = Callable[[str, list[ir.Value | None], dict[str, int]], ir.Value]


@dataclass(frozen=True)
class Source:
    """What is gathered from.

    Attributes:
        values: uint8 [a, b / 2], see `pack`.
        scales: f32, see `Quantized`.
        weight: the weight [a, b].
    """

    values: ir.Value
    scales: ir.Value
    weight: Quantized


class Writer:
    """Makes nodes before the Gather that they take the place of.

    Args:
        insert: makes one, from its operator, inputs and attributes.
    """

    def __init__(self, graph: ir.Graph, insert: _Insert) -> None:
        self._graph, self._insert = graph, insert

    def __call__(self, operator: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        """A node's output."""
        return self._insert(operator, list(inputs), attributes)

    def constant(self, numbers: list[int] | int, dtype: type = np.int64) -> ir.Value:
        """An initializer of integers."""
        array = np.array(numbers, dtype)
        digits = "_".join(map(str, array.reshape(-1)))
        return constant(self._graph, f"packed.{array.dtype}.{array.ndim}.{digits}", array)

    def table(self, *, flat: bool) -> ir.Value:
        """The numbers of each byte, f32: [256, 2], or one behind the other [512]."""
        pairs = unpack(np.arange(256, dtype=np.uint8)[:, None]).astype(np.float32)
        return constant(self._graph, _NUMBERS if flat else _PAIRS, pairs.reshape(-1) if flat else pairs)


Form = Callable[[Writer, Source, ir.Value], ir.Value]


def pack(values: np.ndarray) -> np.ndarray:
    """int4 [a, b] as int8, b even -> uint8 [a, b / 2], the first of two in the low half: the bytes of an ONNX
    tensor of int4."""
    low, high = values[:, 0::2].astype(np.uint8) & 15, values[:, 1::2].astype(np.uint8) & 15
    packed: np.ndarray = low | high << 4
    return packed


def unpack(packed: np.ndarray) -> np.ndarray:
    """The inverse of `pack`: int8 [a, b]."""
    halves = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    numbers: np.ndarray = halves.astype(ml_dtypes.uint4).view(ml_dtypes.int4).astype(np.int8)
    return numbers


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """An initializer, made once a graph."""
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        graph.register_initializer(
            ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
        )
    return graph.initializers[name]


def form_of(weight: Quantized, axis: int, rank: int | None, dtype: ir.DataType | None) -> Form | None:
    """How to gather; None where that takes the whole weight.

    Args:
        weight: of int4.
        axis: that is gathered along.
        rank: axes of the indices.
        dtype: of the indices.
    """
    rows, columns = weight.values.shape
    if columns % 2 or rank is None or dtype not in _INDICES:
        return None
    if axis == 0:
        if weight.axis == 0:
            return _rows
        return _rows_of_table if columns % BLOCK == 0 else None
    return _columns if weight.axis == 0 and rows % BLOCK == 0 and rank == 1 else None


def _bytes(write: Writer, source: Source, indices: ir.Value, axis: int) -> ir.Value:
    gathered = write("Gather", source.values, indices, axis=axis)
    return write("Cast", gathered, to=int(ir.DataType.INT32))


def _ahead(indices: ir.Value) -> list[int]:
    """Of a Reshape: the axes of the indices, as they are."""
    return [0] * len(indices.shape or ())


def _rows(write: Writer, source: Source, indices: ir.Value) -> ir.Value:
    """Blocks lie along the rows: each number has a scale of its own."""
    pairs = write("Gather", write.table(flat=False), _bytes(write, source, indices, 0), axis=0)
    shape = [*_ahead(indices), source.weight.values.shape[1]]
    numbers = write("Reshape", pairs, write.constant(shape))
    block = write("Div", indices, write.constant(BLOCK, _type(indices)))
    return write("Mul", numbers, write("Gather", source.scales, block, axis=0))


def _rows_of_table(write: Writer, source: Source, indices: ir.Value) -> ir.Value:
    """Blocks lie within the rows."""
    pairs = write("Gather", write.table(flat=False), _bytes(write, source, indices, 0), axis=0)
    ahead, columns = _ahead(indices), source.weight.values.shape[1]
    numbers = write("Reshape", pairs, write.constant([*ahead, columns // BLOCK, BLOCK]))
    scales = write("Gather", source.scales, indices, axis=0)
    spread = write("Reshape", scales, write.constant([*ahead, columns // BLOCK, 1]))
    return write("Reshape", write("Mul", numbers, spread), write.constant([*ahead, columns]))


def _columns(write: Writer, source: Source, indices: ir.Value) -> ir.Value:
    """Of each byte of a column the half that it is."""
    kind, rows = _type(indices), source.weight.values.shape[0]
    found = _bytes(write, source, write("Div", indices, write.constant(2, kind)), 1)
    half = write("Cast", write("Mod", indices, write.constant(2, kind)), to=int(ir.DataType.INT32))
    place = write("Add", write("Mul", found, write.constant(2, np.int32)), half)
    numbers = write("Gather", write.table(flat=True), place, axis=0)
    blocks = write("Reshape", numbers, write.constant([rows // BLOCK, BLOCK, -1]))
    scales = write("Gather", source.scales, indices, axis=1)
    spread = write("Reshape", scales, write.constant([rows // BLOCK, 1, -1]))
    return write("Reshape", write("Mul", blocks, spread), write.constant([rows, -1]))


def _type(indices: ir.Value) -> type:
    assert indices.dtype is not None
    return _INDICES[indices.dtype]
