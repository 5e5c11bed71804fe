"""LogSoftmax of a step graph, written out: ONNX Runtime's WebGPU provider has no kernel for it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def write_log_softmax(model: ir.Model) -> ir.Model:
    """Writes each LogSoftmax as ``s - log(sum(exp(s)))``, ``s = x - max(x)``; what it gives keeps its name.

    A loss on the CPU would bring every output of the model back from the GPU, and send its gradient.
    """
    graph = model.graph
    for node in [node for node in graph if node.op_type == "LogSoftmax" and node.domain == ""]:
        value, result = node.inputs[0], node.outputs[0]
        axis = node.attributes.get("axis")
        axes = _axes(graph, -1 if axis is None else axis.as_int())
        name = result.name or node.name or "log_softmax"
        largest = _reduce("ReduceMax", value, axes, f"{name}.max")
        shifted = ir.Node("", "Sub", [value, largest.outputs[0]], num_outputs=1, name=f"{name}.shift")
        powers = ir.Node("", "Exp", shifted.outputs, num_outputs=1, name=f"{name}.exp")
        total = _reduce("ReduceSum", powers.outputs[0], axes, f"{name}.sum")
        logarithm = ir.Node("", "Log", total.outputs, num_outputs=1, name=f"{name}.log")
        last = ir.Node(
            "", "Sub", [shifted.outputs[0], logarithm.outputs[0]], num_outputs=1, name=f"{name}.normalise"
        )
        added = [largest, shifted, powers, total, logarithm, last]
        for new in added[:-1]:
            new.outputs[0].name = f"{new.name}.value"
        for new in added:
            new.outputs[0].type = result.type
        for new in (shifted, powers, last):
            new.outputs[0].shape = result.shape
        graph.insert_before(node, added)
        _take_over(result, last.outputs[0])
        graph.remove(node, safe=True)
    return model


def _reduce(operator: str, value: ir.Value | None, axes: ir.Value, name: str) -> ir.Node:
    keep = ir.AttrInt64("keepdims", 1)
    return ir.Node("", operator, [value, axes], [keep], num_outputs=1, name=name)


def _axes(graph: ir.Graph, axis: int) -> ir.Value:
    name = f"log_softmax.axes.{axis}"
    if name not in graph.initializers:
        axes = ir.tensor(np.asarray([axis], np.int64), name=name)
        value = ir.Value(
            name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]), const_value=axes
        )
        graph.initializers[name] = value
    return graph.initializers[name]


def _take_over(old: ir.Value, new: ir.Value) -> None:
    """Puts `new` in the place of `old`, under its name."""
    name = old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    old.name, new.name = f"{name}.before", name
