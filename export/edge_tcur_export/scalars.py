"""Scalars that a backward pass spreads to the size of a tensor, to add or multiply them entry by entry."""

from __future__ import annotations

import onnx_ir as ir

_BROADCAST = frozenset({"Add", "Div", "Mul", "Sub"})


def read_scalars(model: ir.Model) -> ir.Model:
    """Lets elementwise operators read a scalar itself in the place of an Expand of it, where the other
    operand has that size anyway.

    Such tensors (the one of ``1 - sigmoid``, a zero) depend on nothing, so ONNX Runtime may make them at the
    start and keep them for all blocks; each Expand is a node whose bookkeeping takes 5 kB besides.
    """
    for node in [node for node in model.graph if node.op_type == "Expand" and node.domain == ""]:
        scalar, spread = node.inputs[0], node.outputs[0]
        if scalar is None or scalar.shape is None or any(size != 1 for size in scalar.shape):
            continue
        if spread.shape is None or len(scalar.shape) > len(spread.shape):
            continue
        for reader, place in list(spread.uses()):
            if reader.op_type in _BROADCAST and _same(reader.inputs[1 - place], spread):
                reader.replace_input_with(place, scalar)
        if not spread.uses() and not spread.is_graph_output():
            model.graph.remove(node, safe=True)
    return model


def _same(other: ir.Value | None, spread: ir.Value) -> bool:
    """Whether another operand has the size of what is spread; a symbol is one size in all of a graph."""
    return (
        other is not None and other is not spread and other.shape is not None and other.shape == spread.shape
    )
