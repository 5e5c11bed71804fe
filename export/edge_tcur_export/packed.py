"""Rows of an int4 table, taken as bytes.

ONNX Runtime's Gather and Slice take no int4, and dequantised for them a table of words is eight times its
size, for a few of its rows. A byte holds two neighbours of a row: bytes are taken, and a table of 256 pairs
of numbers says what they hold.

Of other weights this would be worse: ONNX Runtime maps each tensor of a file by itself, so pages that are
read as int4 by a product and as uint8 by a Gather are resident twice, and columns lie in all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx_ir as ir

from edge_tcur_export.quantize import BLOCK

_PAIRS = "int4.pairs"  # an initializer, once a graph
Write = Callable[[str, list[ir.Value | None], dict[str, int]], ir.Value]


def pack(values: np.ndarray) -> np.ndarray:
    """int4 [a, b] as int8, b even -> uint8 [a, b / 2], the first of two in the low half: the bytes of an ONNX
    tensor of int4."""
    low, high = values[:, 0::2].astype(np.uint8) & 15, values[:, 1::2].astype(np.uint8) & 15
    both: np.ndarray = low | high << 4
    return both


def unpack(both: np.ndarray) -> np.ndarray:
    """The inverse of `pack`: int8 [a, b]."""
    halves = np.stack([both & 15, both >> 4], axis=-1).reshape(len(both), -1)
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


def numbers(
    graph: ir.Graph, write: Write, found: ir.Value, scales: ir.Value, sizes: tuple[int, int]
) -> ir.Value:
    """What rows of a table hold, f32 [..., columns].

    Args:
        write: makes a node, from its operator, inputs and attributes.
        found: the rows, uint8 [..., columns / 2], see `pack`.
        scales: of the rows, f32 [..., columns / BLOCK].
        sizes: number of the axes before the last, and columns.
    """
    rank, columns = sizes

    def shape(*last: int) -> ir.Value:
        name = f"{_PAIRS}.sizes_{rank}_{'_'.join(map(str, last))}"
        return constant(graph, name, np.array([0] * rank + list(last)))  # 0: as it is

    places = write("Cast", [found], {"to": int(ir.DataType.INT32)})
    table = unpack(np.arange(256, dtype=np.uint8)[:, None]).astype(np.float32)
    pairs = write("Gather", [constant(graph, _PAIRS, table), places], {"axis": 0})
    blocks = write("Reshape", [pairs, shape(columns // BLOCK, BLOCK)], {})
    spread = write("Reshape", [scales, shape(columns // BLOCK, 1)], {})
    return write("Reshape", [write("Mul", [blocks, spread], {}), shape(columns)], {})
