"""Products with ones that only pick columns, written as an index again.

`edge_tcur_export.trace` picks features from a layer's output by a product with a matrix [r, n1] of ones and
zeros, because of its backward pass. Forward, a Gather does the same in less time, and that graph's backward
pass is there already.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

_PARTS = frozenset({"Gather", "Reshape", "Slice", "Split", "Squeeze"})  # of the stack of one group's indices


def pick_by_index(model: ir.Model) -> list[str]:
    """Writes each product of a value and transposed ones as a Gather.

    Args:
        model: an inference or a step graph, changed in place. The gradient of what was picked stays a
            product.

    Returns:
        names of what is picked, [tokens, r], or of its difference to the bias where that is all that is read
        of it: little to keep for a backward pass, and much to compute again.
    """
    names: dict[str, None] = {}
    for node in [node for node in model.graph if node.op_type == "MatMul"]:
        value, rows = node.inputs[0], _picked(node)
        if value is None or len(value.shape or ()) != 2 or rows is None:
            continue
        old = node.outputs[0]
        pick = ir.node("Gather", [value, rows], {"axis": 1}, name=f"{old.name}.pick")
        new, name = pick.outputs[0], old.name
        new.type, new.shape = old.type, old.shape
        model.graph.insert_before(node, pick)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name, new.name = f"{name}.product", name
        readers = list(new.consumers())
        without_bias = len(readers) == 1 and readers[0].op_type == "Sub"
        names[str(readers[0].outputs[0].name if without_bias else name)] = None
    common.RemoveUnusedNodesPass()(model)
    return list(names)


def _picked(node: ir.Node) -> ir.Value | None:
    """The indices of what a product with ``Transpose(Cast(rows == 0 .. n1))`` picks; None for another one."""
    equal = node
    for operator in ("Transpose", "Cast", "Equal"):
        given = equal.inputs[1 if equal is node else 0]
        made = None if given is None else given.producer()
        if made is None or made.op_type != operator:
            return None
        equal = made
    column, places = equal.inputs
    made = None if column is None else column.producer()
    if made is None or made.op_type != "Unsqueeze" or not _counts(places):
        return None
    rows, axis = made.inputs
    if rows is None or not _is_fed(rows) or axis is None or axis.const_value is None:
        return None
    return rows if int(axis.const_value.numpy().item()) in (1, -1) else None


def _is_fed(rows: ir.Value) -> bool:
    """Whether a list is one of the factors' indices, each of them a row that is there. A model's own products
    of this kind may compare with numbers that no place has, such as the label of what counts for nothing."""
    if len(rows.shape or ()) != 1 or rows.dtype != ir.DataType.INT32:
        return False
    value: ir.Value | None = rows
    while value is not None and (made := value.producer()) is not None:
        if made.op_type not in _PARTS:
            return False
        value = made.inputs[0]
    return value is not None and value.is_graph_input()


def _counts(value: ir.Value | None) -> bool:
    """Whether a value is 0, 1, 2, ...: a Range, or what is left of a short one."""
    if value is None:
        return False
    if value.const_value is not None:
        numbers = value.const_value.numpy()
        return bool((numbers == np.arange(numbers.size)).all()) and numbers.ndim == 1
    node = value.producer()
    if node is None or node.op_type != "Range":
        return False
    start, _, step = (None if given is None else given.const_value for given in node.inputs)
    return start is not None and step is not None and start.numpy() == 0 and step.numpy() == 1
