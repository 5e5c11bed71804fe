"""The inference graph's own form of the update, for a graph without a backward pass.

**Rows of the product instead of rows of the weight.** Traced for training, the update of a weight alone is
``((x R) core) C``, and the rows ``R`` of the weight are gathered on every call, number by number of the
stored, transposed matrix. It is cheaper to take them from the product that is there anyway,
``x R = (x W)[rows]``, and to multiply core and columns first: what is left for each token is one small
product, which adds to the layer's output.

**One split of a stack.** Slices of a factor are picked by one node each, and ONNX Runtime makes of them a
split and one Squeeze a slice; where a step is small, nodes are what costs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from edge_tcur_export.packed import constant


@dataclass(frozen=True)
class _Update:
    """A node ``layer + ((x R) core) C``.

    Attributes:
        total: the addition.
        layer: output of the frozen layer [tokens, n1].
        bias: of the layer [n1], if it has one.
        rows: indices [r] of the rows.
        core: transposed core [r, r]; columns: [r, n1].
    """

    total: ir.Node
    layer: ir.Value
    bias: ir.Value | None
    rows: ir.Value
    core: ir.Value
    columns: ir.Value


def take_rows_of_products(model: ir.Model) -> int:
    """Rewrites the update of every weight that is alone; other updates stay as they are.

    Args:
        model: a forward graph, changed in place; the backward pass of the new form would be a scatter.

    Returns:
        how many updates were rewritten.
    """
    found = [update for node in model.graph if (update := _match(node)) is not None]
    for update in found:
        _rewrite(model.graph, update)
    common.RemoveUnusedNodesPass()(model)
    return len(found)


def _match(node: ir.Node) -> _Update | None:
    if node.op_type != "Add":
        return None
    layer, update = node.inputs
    product, bias = linear_layer(layer)
    update, columns = _product(update)
    update, core = _product(update)
    x, gathered = _product(update)
    gather = None if gathered is None else gathered.producer()
    if product is None or gather is None or gather.op_type != "Gather":
        return None
    own = (product.inputs[0], product.inputs[1]) == (x, gather.inputs[0])
    if not own or gather.attributes.get_int("axis", 0) != 1:
        return None
    rows = gather.inputs[1]
    if layer is None or rows is None or core is None or columns is None:
        return None
    return _Update(node, layer, bias, rows, core, columns)


def _product(value: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
    """The operands of the product that a value is, where nothing else reads it."""
    node = None if value is None else value.producer()
    if value is None or node is None or node.op_type != "MatMul" or len(value.uses()) != 1:
        return None, None
    return node.inputs[0], node.inputs[1]


def linear_layer(value: ir.Value | None) -> tuple[ir.Node | None, ir.Value | None]:
    """The product and the bias of a linear layer's output."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "Add":
        product, bias = (given for given in node.inputs)
        node = None if product is None else product.producer()
        if bias is None or not bias.is_initializer():
            return None, None
    else:
        bias = None
    return (node, bias) if node is not None and node.op_type == "MatMul" else (None, None)


def _rewrite(graph: ir.Graph, update: _Update) -> None:
    name = str(update.total.outputs[0].name)
    nodes: list[ir.Node] = []

    def add(operator: str, inputs: list[ir.Value], suffix: str, **attributes: int) -> ir.Value:
        made = ir.Node(
            "",
            operator,
            inputs,
            [ir.AttrInt64(key, value) for key, value in attributes.items()],
            num_outputs=1,
            name=f"{name}.{suffix}",
        )
        made.outputs[0].name, made.outputs[0].type = f"{name}.{suffix}", update.layer.type
        nodes.append(made)
        return made.outputs[0]

    picked = add("Gather", [update.layer, update.rows], "rows", axis=1)
    if update.bias is not None:
        picked = add("Sub", [picked, add("Gather", [update.bias, update.rows], "bias", axis=0)], "product")
    right = add("MatMul", [update.core, update.columns], "right")
    total = add("Gemm", [picked, right, update.layer], "total")
    old = update.total.outputs[0]
    total.shape, total.type = old.shape, old.type
    graph.insert_before(update.total, nodes)
    old.replace_all_uses_with(total, replace_graph_outputs=True)
    old.name, total.name = f"{name}.before", name  # it may be an output of the graph


def split_stacks(model: ir.Model) -> int:
    """Takes all slices of a factor from one Split of its flattened stack.

    Args:
        model: a forward graph, changed in place. Only inputs [n, r] and [n, r, r] are rewritten of which each
            of the n slices is picked by a constant index and nothing else is read.

    Returns:
        how many inputs were rewritten.
    """
    count = 0
    for value in model.graph.inputs:
        picks = _picks(value)
        if picks is not None:
            _split(model.graph, value, picks)
            count += 1
    common.RemoveUnusedNodesPass()(model)
    return count


def _picks(value: ir.Value) -> dict[int, list[ir.Node]] | None:
    """Index -> the nodes that pick that slice, where that is all that is read of `value`."""
    if value.shape is None or len(value.shape) not in (2, 3) or not isinstance(value.shape[0], int):
        return None
    picks: dict[int, list[ir.Node]] = {}
    for node, _ in value.uses():
        index = node.inputs[1] if node.op_type == "Gather" and node.inputs[0] is value else None
        constant = None if index is None or index.const_value is None else index.const_value.numpy()
        if constant is None or constant.ndim or node.attributes.get_int("axis", 0):
            return None
        picks.setdefault(int(constant), []).append(node)
    return picks if sorted(picks) == list(range(value.shape[0])) else None


def _split(graph: ir.Graph, value: ir.Value, picks: dict[int, list[ir.Node]]) -> None:
    nodes: list[ir.Node] = []

    def add(
        operator: str, inputs: list[ir.Value], suffix: str, *attributes: ir.Attr, outputs: int = 1
    ) -> ir.Node:
        node = ir.Node("", operator, inputs, attributes, num_outputs=outputs, name=f"{value.name}.{suffix}")
        for place, made in enumerate(node.outputs):
            made.name = f"{value.name}.{suffix}" if outputs == 1 else f"{value.name}.{place}"
        nodes.append(node)
        return node

    flat = constant(graph, "stacks.any", np.array([-1]))
    stack, shape = value, flat
    readers = [reader for found in picks.values() for node in found for reader, _ in node.outputs[0].uses()]
    turned = len(value.shape or ()) == 3 and all(_turns(reader) for reader in readers)
    if turned:
        stack = add("Transpose", [stack], "turned", ir.AttrInt64s("perm", [0, 2, 1])).outputs[0]
    if len(value.shape or ()) == 3:
        last = ir.AttrInt64("start", 1 if turned else 2), ir.AttrInt64("end", 2 if turned else 3)
        width = add("Shape", [value], "width", *last)
        shape = add("Concat", [flat, width.outputs[0]], "rows_of_slices", ir.AttrInt64("axis", 0)).outputs[0]
    rows = add("Reshape", [stack, shape], "flat").outputs[0]
    count = ir.AttrInt64("num_outputs", len(picks))
    slices = add("Split", [rows], "slices", ir.AttrInt64("axis", 0), count, outputs=len(picks)).outputs
    graph.insert_before(next(iter(graph)), nodes)
    for place, found in picks.items():
        for node in found:
            old = [reader.outputs[0] for reader, _ in node.outputs[0].uses()] if turned else [node.outputs[0]]
            for output in old:
                slices[place].type, slices[place].shape = output.type, output.shape
                output.replace_all_uses_with(slices[place])


def _turns(node: ir.Node) -> bool:
    perm = node.attributes.get("perm")
    return node.op_type == "Transpose" and (perm is None or list(perm.as_ints()) == [1, 0])
