"""A graph pass: quantised weights in the place of float32 ones, dequantised where they are read.

It runs on the finished graphs, ONNX Runtime Training's too: its builder folds a DequantizeLinear back into
a float32 copy of the weight, and is given the float32 weight instead.

Each reader gets a DequantizeLinear of its own: one for forward and backward would keep every float32
weight alive from the one to the other. Of int8, and of tables, what is gathered or cut is taken as
it is stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir

from edge_tcur.errors import ExportError
from edge_tcur_export import packed
from edge_tcur_export.quantize import BLOCK, Quantized
from edge_tcur_export.recompute import Gate
from edge_tcur_runtime.formats.weights import INT4, INT8

INT4_OPSET = 21  # the first one with int4 and blocks
VALUES, SCALES = ".values", ".scales"  # behind the name of a weight: its two tensors
PACKED = ".packed"  # the values of int4 once more, two a byte, as uint8: the same bytes of a file
_Key = tuple[tuple[int, ...], bytes]


class WeightTable:
    """Quantised weights, found by the content that they have dequantised.

    ONNX Runtime Training may name a tensor as it likes; the content tells which one it is.
    """

    def __init__(self, weights: Iterable[Quantized]) -> None:
        self._weights = {_key(weight.dequantize()): weight for weight in weights}

    @classmethod
    def of(cls, pairs: Iterable[tuple[np.ndarray, Quantized]]) -> WeightTable:
        """A table that finds weights by their content as it is before it is quantised."""
        table = cls(())
        table._weights = {_key(array): weight for array, weight in pairs}
        return table

    def find(self, value: ir.Value) -> Quantized | None:
        """The quantised form of an initializer, or None."""
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) != 2:
            return None
        return self._weights.get(_key(tensor.numpy()))

    def __bool__(self) -> bool:
        return bool(self._weights)


def _key(array: np.ndarray) -> _Key:
    return array.shape, hashlib.sha256(np.ascontiguousarray(array).data).digest()


def quantize_weights(model: ir.Model, table: WeightTable) -> frozenset[str]:
    """Replaces the initializers that `table` knows, in place.

    Returns:
        names of the new initializers: values, and scales.

    Raises:
        ExportError: a weight is read in a way that has no quantised form.
    """
    added: list[str] = []
    dequantised: list[ir.Node] = []
    for name, value in list(model.graph.initializers.items()):
        weight = table.find(value)
        if weight is None:
            continue
        stored = _Stored(model.graph, name, weight)
        for node, place in list(value.uses()):
            stored.serve(node, place)
        del model.graph.initializers[name]
        added += stored.names
        dequantised += stored.nodes
        if weight.precision == INT4:
            model.graph.opset_imports[""] = max(INT4_OPSET, model.graph.opset_imports[""])
    # First in the graph: ONNX Runtime orders nodes depth first from the outputs, of a node's inputs the
    # one that stands last first. Beside its reader in the backward pass, a DequantizeLinear comes before
    # the whole chain that its reader waits for, and every float32 weight is alive at once.
    if dequantised:
        model.graph.insert_before(model.graph[0], dequantised)
    return frozenset(added)


def dequantize_late(model: ir.Model) -> ir.Model:
    """Gives each reader of a dequantised weight a DequantizeLinear of its own that waits for the reader's
    first operand; where that is the weight, as of a Gather, for the first operand of who reads the result.

    For a graph that is run in the order of the file. A DequantizeLinear needs nothing but the file, so in
    that order ONNX Runtime runs it before every node that its optimiser has fused (those come last), and all
    float32 weights are alive at once. The gate is that of `edge_tcur_export.recompute`, on the scales.
    """
    places = {node: place for place, node in enumerate(model.graph)}
    gates: dict[ir.Value, Gate] = {}
    for node in [node for node in model.graph if node.op_type == "DequantizeLinear"]:
        values, scales = node.inputs
        assert scales is not None
        for number, (reader, place) in enumerate(list(node.outputs[0].uses())):
            operand, scale, made = _awaited(reader, places), scales, list[ir.Node]()
            if operand is not None:
                if operand not in gates:
                    gates[operand] = Gate(model.graph, operand, "weights")
                scale = gates[operand](scales)
                made = [new for new in gates[operand].nodes if new.graph is None]
            own = ir.node(
                "DequantizeLinear",
                [values, scale],
                {name: attribute.value for name, attribute in node.attributes.items()},
                name=f"{node.name}.{number}",
            )
            own.outputs[0].name = f"{node.outputs[0].name}.{number}"
            own.outputs[0].type, own.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
            model.graph.insert_before(reader, [*made, own])
            reader.replace_input_with(place, own.outputs[0])
        model.graph.remove(node, safe=True)
    model.graph.sort()
    return model


def _awaited(reader: ir.Node, places: Mapping[ir.Node, int]) -> ir.Value | None:
    """What a reader of a dequantised weight waits for anyway; of the first reader of what is gathered,
    nothing depends on that yet."""
    if reader.op_type == "Gather":
        after = sorted(reader.outputs[0].consumers(), key=lambda node: places.get(node, 0))
        return next(
            (v for node in after[:1] for v in node.inputs if v is not None and v is not reader.outputs[0]),
            None,
        )
    first = reader.inputs[0]
    made = None if first is None else first.producer()
    return None if made is not None and made.op_type == "DequantizeLinear" else first


class _Stored:
    """The initializers of a quantised weight, and what its readers are given.

    Attributes:
        names: of the initializers that the readers needed.
        nodes: that dequantise the whole weight.
    """

    def __init__(self, graph: ir.Graph, name: str, weight: Quantized) -> None:
        self._graph, self._name, self._weight = graph, name, weight
        self._inserted = 0  # nodes beside the readers
        self.nodes: list[ir.Node] = []
        self.names: list[str] = []
        # Those of a table of int8 are gathered with its rows.
        column = weight.precision == INT8 and self._is_table
        self._scales = self._add(SCALES, weight.scales[:, None] if column else weight.scales)

    def _add(self, suffix: str, array: np.ndarray) -> ir.Value:
        name = self._name + suffix
        if name in self._graph.initializers:
            return self._graph.initializers[name]
        tensor = ir.Tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        value.const_value = tensor
        self._graph.initializers[name] = value
        self.names.append(name)
        return value

    def _values(self) -> ir.Value:
        """The stored values, int8 or int4."""
        values = self._weight.values
        return self._add(VALUES, values.astype(ml_dtypes.int4) if self._weight.precision == INT4 else values)

    def serve(self, node: ir.Node, place: int) -> None:
        """Gives one reader what it reads."""
        if node.op_type == "Gather" and place == 0:
            self._serve_gather(node)
        elif self._is_table and node.op_type == "Slice" and place == 0:
            self._serve_slice(node)
        elif self._is_table and self._weight.precision == INT8:
            node.replace_input_with(place, self._floats(node, self._values(), self._scales))
        elif self._is_table:
            rows, columns = self._weight.values.shape
            node.replace_input_with(place, self._unmoved(node, self._dequantize(), rows, columns))
        elif node.op_type == "Transpose" and list(node.attributes.get_ints("perm", (1, 0))) == [1, 0]:
            self._serve_transpose(node)
        elif node.op_type == "MatMul" and place == 1:
            self._serve_product(node, transposed=False)
        elif node.op_type == "Gemm" and place == 1:
            node.replace_input_with(place, self._dequantize())
        else:
            raise self._unknown(node)

    @property
    def _is_table(self) -> bool:
        """Whether it is stored as an embedding has it: a scale, or several, for each row."""
        return self._weight.axis == (0 if self._weight.precision == INT8 else 1)

    def _unknown(self, node: ir.Node) -> ExportError:
        return ExportError(
            f"the weight is read by {node.op_type} (node {node.name or '?'}), "
            f"which has no form over {self._weight.precision}",
            where=self._name,
            hint="export with --precision fp32",
        )

    def _dequantize(self) -> ir.Value:
        """The float32 weight, for one reader."""
        attributes: dict[str, int] = {"axis": self._weight.axis}
        if self._weight.precision == INT4:
            attributes["block_size"] = BLOCK
        node = ir.node(
            "DequantizeLinear",
            [self._values(), self._scales],
            attributes,
            name=f"{self._name}.dequantize.{len(self.nodes)}",
        )
        node.outputs[0].name = f"{self._name}.float.{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def _serve_gather(self, node: ir.Node) -> None:
        """Rows or columns: of int8, gathered as they are stored, with their scales. ONNX's Gather takes int4
        but ONNX Runtime's does not: rows of a table are gathered as bytes, any other weight is dequantised,
        and freed after it. (One DequantizeLinear for two readers would be split by ONNX Runtime, and not be
        first any more.)"""
        indices, axis = node.inputs[1], node.attributes.get_int("axis", 0) % 2
        assert indices is not None
        if self._weight.precision == INT4:
            self._serve_int4(node, indices, axis)
            return
        values = self._insert(node, "Gather", [self._values(), indices], {"axis": axis})
        scales = self._scales
        if axis == self._weight.axis:
            scales = self._insert(node, "Gather", [scales, indices], {"axis": 0})
        self._replace(node, self._floats(node, values, scales))

    def _serve_int4(self, node: ir.Node, indices: ir.Value, axis: int) -> None:
        known = indices.shape if indices.shape is not None else (node.outputs[0].shape or ())[1:]
        if not self._is_table or axis or not known or self._weight.values.shape[1] % BLOCK:
            node.replace_input_with(0, self._dequantize())
            return
        write = self._write(node)
        found = write("Gather", [self._packed(), indices], {"axis": 0})
        scales = write("Gather", [self._scales, indices], {"axis": 0})
        sizes = (len(known), self._weight.values.shape[1])
        self._replace(node, packed.numbers(self._graph, write, found, scales, sizes))

    def _packed(self) -> ir.Value:
        return self._add(PACKED, packed.pack(self._weight.values))

    def _write(self, node: ir.Node) -> packed.Write:
        return lambda *made: self._insert(node, *made)

    def _serve_slice(self, node: ir.Node) -> None:
        """A piece of a table (`edge_tcur_export.vocabulary`), cut as it is stored. A tensor over that part of
        the file would need no copy, but its pages would be resident twice where rows are gathered too."""
        scales = self._insert(node, "Slice", [self._scales, *node.inputs[1:]], {})
        stored = self._values() if self._weight.precision == INT8 else self._packed()
        cut = self._insert(node, "Slice", [stored, *node.inputs[1:]], {})
        if self._weight.precision == INT8:
            self._replace(node, self._floats(node, cut, scales))
            return
        columns = self._weight.values.shape[1]
        self._replace(node, packed.numbers(self._graph, self._write(node), cut, scales, (1, columns)))

    def _unmoved(self, node: ir.Node, floats: ir.Value, rows: int, columns: int) -> ir.Value:
        """The same, behind a Reshape that changes nothing: of a DequantizeLinear with two readers ONNX
        Runtime would make two, with a MatMul behind it a MatMulNBits, and it would move it through a
        Transpose."""
        name = f"quantized.sizes_{rows}_{columns}"
        sizes = packed.constant(self._graph, name, np.array([rows, columns]))
        return self._insert(node, "Reshape", [floats, sizes], {})

    def _floats(self, node: ir.Node, values: ir.Value, scales: ir.Value) -> ir.Value:
        """A Cast and a Mul: a Transpose follows in the backward pass, see `_serve_transpose`; and of a
        DequantizeLinear with two readers ONNX Runtime makes two."""
        floats = self._insert(node, "Cast", [values], {"to": int(ir.DataType.FLOAT)})
        return self._insert(node, "Mul", [floats, scales], {})

    def _serve_transpose(self, node: ir.Node) -> None:
        """The backward pass multiplies by the transpose. ONNX Runtime moves a DequantizeLinear through a
        Transpose without turning its axis: the product turns the weight instead."""
        for reader, place in list(node.outputs[0].uses()):
            if reader.op_type != "MatMul" or place != 1:
                raise self._unknown(reader)
            self._serve_product(reader, transposed=True)
        self._graph.remove(node, safe=True)

    def _serve_product(self, node: ir.Node, *, transposed: bool) -> None:
        """A Gemm in the place of a MatMul: of DequantizeLinear (int4) and MatMul, ONNX Runtime makes a
        MatMulNBits, which holds the weight a second time and rounds the other matrix to int8."""
        left = node.inputs[0]
        if left is None or len(left.shape or ()) != 2:
            raise self._unknown(node)
        inputs: list[ir.Value | None] = [left, self._dequantize()]
        self._replace(node, self._insert(node, "Gemm", inputs, {"transB": int(transposed)}))

    def _insert(
        self, before: ir.Node, operator: str, inputs: list[ir.Value | None], attributes: dict[str, int]
    ) -> ir.Value:
        self._inserted += 1
        name = f"{self._name}.{operator}.{self._inserted}"
        node = ir.node(operator, inputs, attributes, name=name)
        node.outputs[0].name = f"{name}.output"
        self._graph.insert_before(before, node)
        return node.outputs[0]

    def _replace(self, node: ir.Node, value: ir.Value) -> None:
        """Puts `value` in the place of a node's only output, and removes the node."""
        old = node.outputs[0]
        value.name, value.shape, value.type = old.name, old.shape, old.type
        old.replace_all_uses_with(value, replace_graph_outputs=True)
        self._graph.remove(node, safe=True)
