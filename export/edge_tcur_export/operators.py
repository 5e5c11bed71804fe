"""Operators that ONNX Runtime Training 1.19.2 cannot differentiate, found before anything is built."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import onnx_ir as ir

# Measured: generate_artifacts of 1.19.2 refuses each of them between a parameter and the loss; of
# ConvTranspose it writes a gradient that has no kernel on a CPU.
NO_GRADIENT = frozenset({
    "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Ceil", "Celu", "CenterCropPad", "Col2Im",
    "Compress", "ConvTranspose", "Cosh", "CumSum", "DFT", "DepthToSpace", "Det", "Einsum", "Elu", "Floor",
    "GRU",
    "GlobalLpPool", "GlobalMaxPool", "GridSample", "HardSigmoid", "HardSwish", "Hardmax",
    "InstanceNormalization", "LRN", "LSTM", "LpNormalization", "LpPool", "Mean", "Mish", "Mod", "PRelu",
    "RNN", "ReduceL1", "ReduceLogSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSumSquare",
    "ReverseSequence", "Round", "Selu", "Shrink", "Sign", "Sinh", "Softplus", "Softsign", "SpaceToDepth",
    "Sum", "Tan", "ThresholdedRelu", "com.microsoft.Attention", "com.microsoft.MatMulNBits",
    "com.microsoft.MultiHeadAttention",
})  # fmt: skip
MODULE = "module"  # key of ir.Node.meta: name of the torch module that a node came from
_SCOPES = "pkg.torch.onnx.name_scopes"
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Undifferentiable:
    """A node that the gradient of the loss would have to pass.

    Attributes:
        operator: its type, with the domain where that is not ONNX's own.
        node: its name in the graph.
        module: name of the torch module that it came from, where known.
    """

    operator: str
    node: str
    module: str | None

    def __str__(self) -> str:
        origin = f", from the module {self.module}" if self.module else ""
        return f"{self.operator} (node {self.node}{origin})"


def remember_modules(model: ir.Model, prefix: str) -> ir.Model:
    """Keeps the module path of each node in memory (`MODULE`), before the exporter's metadata, which
    holds source paths, is cleared. `prefix` is cut off the paths."""
    for node in model.graph:
        scopes = node.metadata_props.get(_SCOPES)
        # The list goes from the whole model to the module, and ends with the operator's own name.
        path = ast.literal_eval(scopes)[-2:-1] if scopes else []
        if path and path[0].startswith(prefix):
            node.meta[MODULE] = path[0].removeprefix(prefix)
    return model


def find_undifferentiable(
    model: ir.Model, trained: Collection[str], output: str = "loss"
) -> list[Undifferentiable]:
    """Nodes without a gradient between the `trained` values and `output`, in graph order.

    Integers and booleans (shapes, indices, comparisons) carry no gradient, so paths end there.
    """
    on_the_way_down = _reached(model.graph, set(trained))
    needed = {value for value in model.graph.outputs if value.name == output}
    found = []
    for node in reversed(model.graph):
        if not needed.intersection(node.outputs):
            continue
        needed.update(value for value in node.inputs if value is not None)
        if on_the_way_down.intersection(node.outputs) and _lacks_gradient(node):
            found.append(Undifferentiable(_operator(node), node.name or "?", node.meta.get(MODULE)))
    return found[::-1]


def _reached(nodes: Iterable[ir.Node], names: set[str]) -> set[ir.Value]:
    """Floating-point values that depend on a value in `names`."""
    result: set[ir.Value] = set()
    for node in nodes:
        if any(value is not None and (value in result or value.name in names) for value in node.inputs):
            result.update(value for value in node.outputs if value.dtype is None or value.dtype in _FLOATS)
    return result


def _operator(node: ir.Node) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def _lacks_gradient(node: ir.Node) -> bool:
    if node.op_type == "Pad" and node.attributes.get_string("mode", "constant") != "constant":
        return True  # of its modes, only this one has a gradient
    return _operator(node) in NO_GRADIENT


_INSTEAD = {
    "CumSum": "a product with a triangular matrix of ones",
    "Einsum": "transposes, reshapes and matrix products",
    "InstanceNormalization": "layer norm over the same axes, or group norm with one group a channel",
    "Mod": "x - y * floor(x / y) on values that need no gradient",
    "PRelu": "relu(x) - slope * relu(-x)",
    "ReduceL1": "the sum of abs(x)",
    "ReduceMax": "topk or a smooth maximum such as logsumexp",
    "ReduceMin": "minus the maximum of -x, by topk",
    "ReduceProd": "exp of the sum of log(x), where x is positive",
    "ReduceSumSquare": "the sum of x * x",
    "Softplus": "log(1 + exp(x))",
    "Softsign": "x / (1 + abs(x))",
    **dict.fromkeys(
        ("Celu", "Elu", "HardSigmoid", "HardSwish", "Mish", "Selu"), "relu, gelu, sigmoid or tanh"
    ),
    **dict.fromkeys(("GRU", "LSTM", "RNN"), "the cell written out in products and tanh or sigmoid"),
}


def written_out(operator: str) -> str | None:
    """Simpler operators that give the same as this one; None where we know of none."""
    return _INSTEAD.get(operator)


def replacement(operator: str) -> str:
    """What to use instead of an operator that ONNX Runtime Training cannot differentiate."""
    step = "--target step, whose graph has no such limit"
    return f"{_INSTEAD[operator]}, or {step}" if operator in _INSTEAD else step
