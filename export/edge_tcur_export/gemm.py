"""Products of matrices with what stands around them, as one Gemm each.

ONNX Runtime's optimiser does that itself. The graph that recomputes runs without it, as what it makes comes
last in the order of the file (`engines/ort_step.py`): each weight would be turned in memory on every step,
for the backward pass, and each bias would be a pass of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common


def write_gemms(model: ir.Model) -> int:
    """Writes ``MatMul`` of two matrices, turned or not, and an ``Add`` behind it, as a Gemm.

    Args:
        model: changed in place; products of more axes, or of values whose shape is not known, stay.

    Returns:
        how many products were rewritten.
    """
    count = 0
    for node in [node for node in model.graph if node.op_type == "MatMul" and node.domain == ""]:
        left, right = (None if value is None else _operand(value) for value in node.inputs)
        if left is None or right is None:
            continue
        end, addend = node, _addend(node)
        if addend is not None:
            end = next(iter(node.outputs[0].consumers()))
        inputs = [left.value, right.value, *([] if addend is None else [addend])]
        turns = {"transA": left.turned, "transB": right.turned}
        attributes = {name: 1 for name, turned in turns.items() if turned}
        old = end.outputs[0]
        new = ir.node("Gemm", inputs, attributes, name=f"{old.name}.gemm")
        output = new.outputs[0]
        output.type, output.shape = old.type, old.shape
        model.graph.insert_before(end, new)
        name, old.name = old.name, f"{old.name}.before"
        output.name = name
        old.replace_all_uses_with(output, replace_graph_outputs=True)
        count += 1
    common.RemoveUnusedNodesPass()(model)
    return count


@dataclass(frozen=True)
class _Operand:
    """A matrix, and whether the product reads it turned."""

    value: ir.Value
    turned: bool


def _operand(value: ir.Value) -> _Operand | None:
    if len(value.shape or ()) != 2 or value.dtype != ir.DataType.FLOAT:
        return None
    node = value.producer()
    if node is not None and node.op_type == "Transpose" and node.inputs[0] is not None:
        perm = node.attributes.get("perm")
        if perm is None or list(perm.as_ints()) == [1, 0]:
            return _Operand(node.inputs[0], turned=True)
    return _Operand(value, turned=False)


def _addend(node: ir.Node) -> ir.Value | None:
    """What alone is added to a product: a bias, or a matrix of its size."""
    product = node.outputs[0]
    readers = list(product.uses())
    if len(readers) != 1 or readers[0].node.op_type != "Add" or product.shape is None:
        return None
    other = readers[0].node.inputs[1 - readers[0].idx]
    if other is None or other is product or other.shape is None or len(product.shape) != 2:
        return None
    same = other.shape == product.shape
    return other if same or list(other.shape) == [product.shape[1]] else None
