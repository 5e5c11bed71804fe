"""The step graph's own form of the rows of a weight: nothing is gathered across the stored matrix.

The update of a weight alone is ``((x R) core) C``, where ``R`` are rows of the weight, which is stored
transposed: to gather them is to read single numbers from all over the file, each from memory of its own, on
every step; with few tokens a step that is a fifth of the time. Neither pass needs ``R``:

- forward, ``x R = (x W)[rows]``: the rows of a product that is there anyway;
- backward, with the gradient ``g`` of the layer and ``h`` of ``x R``, the gradient of ``x`` is
  ``g W^T + h R^T = (g + h E) W^T`` with ``E`` [r, n1] one where a row was picked: the small product is added
  on the other side of the large one. (Traced, the backward pass of rows of a product would be a scatter.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from edge_tcur_export.infer_graph import linear_layer
from edge_tcur_export.packed import constant


@dataclass(frozen=True)
class _Backward:
    """Nodes ``total = large + small`` with ``large = g W^T`` and ``small = h R^T``."""

    total: ir.Node
    large: ir.Node
    small: ir.Node


@dataclass(frozen=True)
class _Rows:
    """A gather of rows and everything that reads it.

    Attributes:
        gather: ``R`` [n2, r] of the weight [n2, n1].
        product: ``x R``.
        layer: output of the frozen layer, ``x W`` and its bias, [tokens, n1].
        bias: of the layer [n1], if it has one.
        backward: where a gradient of ``x`` is needed.
    """

    gather: ir.Node
    product: ir.Node
    layer: ir.Value
    bias: ir.Value | None
    backward: _Backward | None


def take_rows_by_products(model: ir.Model) -> list[str]:
    """Rewrites the rows of every weight that is alone; those of coupled slices stay as they are.

    Args:
        model: a step graph, changed in place.

    Returns:
        names of the values ``x R`` [tokens, r], which the backward pass reads: little to keep, and much to
        compute again.
    """
    found = [rows for node in model.graph if (rows := _match(node)) is not None]
    kept = [_rewrite(model.graph, rows) for rows in found]
    common.RemoveUnusedNodesPass()(model)
    model.graph.sort()
    return kept


def _match(node: ir.Node) -> _Rows | None:
    weight = node.inputs[0] if node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 1 else None
    if weight is None or not weight.is_initializer():
        return None
    products: list[ir.Node] = []
    turned: list[ir.Node] = []
    for reader in node.outputs[0].consumers():
        (turned if reader.op_type == "Transpose" else products).append(reader)
    if len(products) != 1 or len(turned) > 1 or products[0].op_type != "MatMul":
        return None
    layer, bias = _layer(products[0].inputs[0], weight)
    backward = _backward(turned[0], weight) if turned else None
    if layer is None or (turned and backward is None):
        return None
    return _Rows(node, products[0], layer, bias, backward)


def _layer(x: ir.Value | None, weight: ir.Value) -> tuple[ir.Value | None, ir.Value | None]:
    """The output of the one layer that multiplies `x` [tokens, n2] with a weight, and its bias."""
    if x is None or x.shape is None or len(x.shape) != 2:
        return None, None
    made = [n for n in x.consumers() if n.op_type == "MatMul" and list(n.inputs) == [x, weight]]
    if len(made) != 1:
        return None, None
    output = made[0].outputs[0]
    readers = list(output.consumers())
    if len(readers) == 1 and readers[0].op_type == "Add":
        product, bias = linear_layer(readers[0].outputs[0])
        if product is made[0] and bias is not None:
            return readers[0].outputs[0], bias
    return output, None


def _backward(turn: ir.Node, weight: ir.Value) -> _Backward | None:
    """The gradient that the transposed rows are part of."""
    small = _only_reader(turn.outputs[0], "MatMul")
    total = None if small is None else _only_reader(small.outputs[0], "Add")
    if small is None or total is None:
        return None
    for value in total.inputs:
        large = None if value is None else value.producer()
        if large is None or large is small or large.op_type != "MatMul" or len(large.outputs[0].uses()) != 1:
            continue
        turned = None if large.inputs[1] is None else large.inputs[1].producer()
        if turned is not None and turned.op_type == "Transpose" and turned.inputs[0] is weight:
            return _Backward(total, large, small)
    return None


def _only_reader(value: ir.Value, operator: str) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and uses[0].node.op_type == operator else None


def _rewrite(graph: ir.Graph, rows: _Rows) -> str:
    picked = rows.product.outputs[0]
    indices = rows.gather.inputs[1]
    assert indices is not None
    writer = _Writer(str(picked.name))
    taken = writer("Gather", [rows.layer, indices], "rows", picked, axis=1)
    if rows.bias is not None:
        bias = writer("Gather", [rows.bias, indices], "bias", picked, axis=0)
        bias.shape = None if picked.shape is None else ir.Shape([picked.shape[1]])
        taken = writer("Sub", [taken, bias], "product", picked)
    graph.insert_before(rows.product, writer.nodes)
    picked.replace_all_uses_with(taken)
    if rows.backward is not None:
        _rewrite_backward(graph, rows.backward, indices)
    return str(taken.name)


def _rewrite_backward(graph: ir.Graph, backward: _Backward, indices: ir.Value) -> None:
    old, (gradient, turned), above = (
        backward.total.outputs[0],
        backward.large.inputs,
        backward.small.inputs[0],
    )
    assert gradient is not None
    assert gradient.shape is not None
    assert turned is not None
    assert above is not None
    assert above.shape is not None
    writer = _Writer(str(old.name))
    width = gradient.shape[1]
    assert isinstance(width, int)  # of the layer
    places = ir.Shape([above.shape[1], width])
    axis = constant(graph, "step_rows.last", np.array([-1]))
    column = writer("Unsqueeze", [indices, axis], "column", old)
    column.type, column.shape = indices.type, ir.Shape([above.shape[1], 1])
    numbers = constant(graph, f"step_rows.numbers_{width}", np.arange(width, dtype=np.int32))
    equal = writer("Equal", [column, numbers], "picked", old)
    equal.type, equal.shape = ir.TensorType(ir.DataType.BOOL), places
    ones = writer("Cast", [equal], "ones", old, to=int(ir.DataType.FLOAT))
    ones.shape = places
    added = writer(
        "Add", [writer("MatMul", [above, ones], "spread", gradient), gradient], "with_rows", gradient
    )
    total = writer("MatMul", [added, turned], "total", old)
    graph.insert_before(backward.total, writer.nodes)
    name, old.name = old.name, f"{old.name}.before"
    total.name = name
    old.replace_all_uses_with(total, replace_graph_outputs=True)


class _Writer:
    """Makes nodes of float32 values, in order."""

    def __init__(self, name: str) -> None:
        self._name, self.nodes = name, list[ir.Node]()

    def __call__(
        self, operator: str, inputs: list[ir.Value], suffix: str, like: ir.Value, **attributes: int
    ) -> ir.Value:
        """A node's output, of the type and the shape of another value."""
        node = ir.node(operator, inputs, attributes, name=f"{self._name}.{suffix}")
        output = node.outputs[0]
        output.name = f"{self._name}.{suffix}"
        output.type, output.shape = like.type, like.shape
        self.nodes.append(node)
        return output
