"""The inference graph's own form of the update, for a graph without a backward pass.

**Core and columns first.** Traced for training, the update of a weight alone is ``((x R) core) C``. Where
``x R`` is picked from the layer's output, core and columns are multiplied first: what is left for each
token is one small product, which adds to that output.

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
    """A node ``layer + (features core) C``.

    Attributes:
        total: the addition.
        layer: output of the frozen layer [tokens, n1].
        features: picked from it, [tokens, r].
        core: transposed core [r, r]; columns: [r, n1].
    """

    total: ir.Node
    layer: ir.Value
    features: ir.Value
    core: ir.Value
    columns: ir.Value


def multiply_cores_first(model: ir.Model) -> int:
    """Rewrites the update of every weight that is alone; other updates stay as they are.

    Args:
        model: a forward graph in which features are picked by an index (`edge_tcur_export.picks`), changed in
            place.

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
    update, columns = _product(update)
    features, core = _product(update)
    if layer is None or features is None or core is None or columns is None:
        return None
    return _Update(node, layer, features, core, columns) if _is_picked(features, layer) else None


def _product(value: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
    """The operands of the product that a value is, where nothing else reads it."""
    node = None if value is None else value.producer()
    if value is None or node is None or node.op_type != "MatMul" or len(value.uses()) != 1:
        return None, None
    return node.inputs[0], node.inputs[1]


def _is_picked(features: ir.Value, layer: ir.Value) -> bool:
    """Whether they are columns of the layer's output, without their bias where it has one."""
    node = features.producer()
    if node is not None and node.op_type == "Sub":
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    if layer.shape is not None and len(layer.shape) != 2:
        return False  # a model's own update of places by others
    return (
        node is not None
        and node.op_type == "Gather"
        and node.inputs[0] is layer
        and node.attributes.get_int("axis", 0) == 1
    )


def _rewrite(graph: ir.Graph, update: _Update) -> None:
    old = update.total.outputs[0]
    name = str(old.name)
    right = ir.node("MatMul", [update.core, update.columns], name=f"{name}.right")
    total = ir.node("Gemm", [update.features, right.outputs[0], update.layer], name=f"{name}.total")
    right.outputs[0].name, right.outputs[0].type = f"{name}.right", update.columns.type
    total.outputs[0].shape, total.outputs[0].type = old.shape, old.type
    graph.insert_before(update.total, [right, total])
    old.replace_all_uses_with(total.outputs[0], replace_graph_outputs=True)
    old.name, total.outputs[0].name = f"{name}.before", name  # it may be an output of the graph


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
