"""The inference graph's own form of the update: rows of the product instead of rows of the weight.

Traced for training, the update of a weight alone is ``((x R) core) C``, and the rows ``R`` of the weight are
gathered on every call, number by number of the stored, transposed matrix. Without a backward pass it is
cheaper to take them from the product that is there anyway, ``x R = (x W)[rows]``, and to multiply core and
columns first: what is left for each token is one small product, which adds to the layer's output.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common


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
    product, bias = _layer(layer)
    update, columns = _product(update)
    update, core = _product(update)
    x, gathered = _product(update)
    gather = None if gathered is None else gathered.producer()
    if product is None or gather is None or gather.op_type != "Gather":
        return None
    own = (product.inputs[0], product.inputs[1]) == (x, gather.inputs[0])
    if not own or gather.attributes.get_int("axis", 0) != 1:
        return None
    rows = _fed(gather.inputs[1])
    if layer is None or rows is None or core is None or columns is None:
        return None
    return _Update(node, layer, bias, rows, core, columns)


def _product(value: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
    """The operands of the product that a value is, where nothing else reads it."""
    node = None if value is None else value.producer()
    if value is None or node is None or node.op_type != "MatMul" or len(value.uses()) != 1:
        return None, None
    return node.inputs[0], node.inputs[1]


def _layer(value: ir.Value | None) -> tuple[ir.Node | None, ir.Value | None]:
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


def _fed(value: ir.Value | None) -> ir.Value | None:
    """Indices as they are fed, before the exporter's conversions: Gather takes int32."""
    while (
        value is not None and (node := value.producer()) is not None and node.op_type in ("Cast", "Reshape")
    ):
        value = node.inputs[0]
    return value


def _rewrite(graph: ir.Graph, update: _Update) -> None:
    name = str(update.total.outputs[0].name)
    nodes: list[ir.Node] = []
    gather = update.columns.producer()
    if gather is not None and gather.op_type == "Gather":
        gather.replace_input_with(1, _fed(gather.inputs[1]))

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
