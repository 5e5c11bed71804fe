"""The tables of a bundle from which a device predicts what a pass takes (`edge_tcur_runtime.formats.memory`).

Shapes are inferred for a few batches and lengths only: the bytes of every value are a polynomial of samples
(degree one) and tokens (degree two), which those sizes determine. The walk of the live values is then done
at every point of the grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from edge_tcur_export.memory_model import activation_peak, execution_steps, input_shapes, split_base
from edge_tcur_export.shapes import UnknownSizesError, ValueShape, value_shapes
from edge_tcur_runtime.formats.bundle import STEP_VARIANTS, BundleGroup, InputSpec
from edge_tcur_runtime.formats.memory import GraphTable, MemoryTables

TRAINING = ("step", *STEP_VARIANTS, "train")
SAMPLES = (1, 2, 4, 8, 16, 32, 128)
_BYTE = 4  # operations that moving a byte is worth: a core does about 20 GFLOP/s and 5 GB/s
_BATCHES, _LENGTHS = (2, 5), (4, 7, 12)  # that shapes are inferred for; 1 may be a special case
_PRODUCTS = frozenset({"MatMul", "Gemm", "FusedMatMul"})
_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose", "ConvGrad"})


def make_tables(
    directory: Path,
    roles: Mapping[str, str],
    inputs: Mapping[str, InputSpec],
    groups: Mapping[str, BundleGroup],
    lengths: Sequence[int],
) -> MemoryTables | None:
    """Tables of the training graphs in `directory`; None where there is none.

    Args:
        roles: role -> file name.
        lengths: tokens that batches are padded to; empty where the model has no such axis.
    """
    ranks = {name: group.rank for name, group in groups.items()}
    grid = tuple(lengths) or (0,)
    graphs = {}
    for role in TRAINING:
        if role in roles:
            model = onnx.load(str(directory / roles[role]), load_external_data=False)
            graphs[role] = graph_table(model, inputs, ranks, grid)
    return MemoryTables(SAMPLES, grid, graphs) if graphs else None


def graph_table(
    model: onnx.ModelProto,
    inputs: Mapping[str, InputSpec],
    ranks: Mapping[str, int],
    lengths: Sequence[int],
) -> GraphTable:
    """The table of one graph.

    Args:
        model: without the base in memory.
        inputs: the model's inputs with their named axes.
        ranks: of each group.
        lengths: rows of the grid; a single 0 where the model has no such axis.
    """
    fit = _Fit(model, inputs, ranks, tokens=list(lengths) != [0])
    steps = execution_steps(model)
    outputs = {value.name for value in model.graph.output}
    base, rows = split_base(model)
    values, work = [], []
    for length in lengths:
        fitted = [fit.at(samples, length) for samples in SAMPLES]
        peaks = [
            activation_peak(steps, sizes, outputs) + sum(sizes.get(name, 0) for name in fit.fed)
            for sizes, _ in fitted
        ]
        values.append(_growing(peaks))
        work.append(_growing([operations + _BYTE * sum(sizes.values()) for sizes, operations in fitted]))
    return GraphTable(len(steps), base, rows, tuple(values), tuple(work))


def _growing(numbers: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(value) for value in np.maximum.accumulate(np.array(numbers, np.int64)))


class _Fit:
    """Bytes of every value and operations of a pass, as polynomials of samples and tokens.

    Attributes:
        fed: names of the graph's inputs.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        inputs: Mapping[str, InputSpec],
        ranks: Mapping[str, int],
        *,
        tokens: bool,
    ) -> None:
        lengths = _LENGTHS if tokens else (0,)
        self._powers = 3 if tokens else 1
        points = [(samples, length) for samples in _BATCHES for length in lengths]
        found, rows = [], []
        self.fed: list[str] = []
        for samples, length in points:
            shapes = input_shapes(model, inputs, samples, length, ranks)
            self.fed = list(shapes)
            sizes = value_shapes(model, shapes)
            found.append((sizes, _operations(model, sizes)))
            rows.append(self._terms(samples, length))
        self._names = sorted(set.intersection(*(set(sizes) for sizes, _ in found)))
        table = np.array(
            [[sizes[name].bytes for name in self._names] + [count] for sizes, count in found], np.float64
        )
        self._factors = np.linalg.solve(np.array(rows), table)
        if not np.allclose(np.array(rows) @ self._factors, table):
            raise UnknownSizesError("the sizes of a graph's values are no polynomials of its batch")

    def _terms(self, samples: int, length: int) -> list[float]:
        return [float(b * length**power) for b in (1, samples) for power in range(self._powers)]

    def at(self, samples: int, length: int) -> tuple[dict[str, int], int]:
        """Bytes by value, and floating point operations of the products."""
        *sizes, count = np.rint(np.array(self._terms(samples, length)) @ self._factors).astype(np.int64)
        return {name: max(0, int(size)) for name, size in zip(self._names, sizes, strict=True)}, int(count)


def _operations(model: onnx.ModelProto, shapes: Mapping[str, ValueShape]) -> int:
    """Multiplications and additions of the products and convolutions."""
    dims = {name: shape.dims for name, shape in shapes.items()}
    dims |= {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    total = 0
    for node in model.graph.node:
        out, second = dims.get(node.output[0]), dims.get(node.input[1]) if len(node.input) > 1 else None
        if not out or not second:
            continue
        if node.op_type in _PRODUCTS:
            transposed = len(second) == 1 or any(a.name == "transB" and a.i for a in node.attribute)
            total += 2 * math.prod(out) * (second[-1] if transposed else second[-2])
        elif node.op_type in _CONVOLUTIONS:
            total += 2 * math.prod(out) * math.prod(second[1:])
    return total
