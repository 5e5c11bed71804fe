"""What a plan says of nodes without a kernel: where they come from, and what to use instead."""

from __future__ import annotations

import re

import onnx

from edge_tcur_export.operators import written_out
from edge_tcur_export.providers import PROVIDERS, Unsupported
from edge_tcur_export.quantized_graph import SCALES, VALUES
from edge_tcur_export.trace import PREFIX

_CPU = "cpu"
_SUFFIX = re.compile(rf"({re.escape(VALUES)}|{re.escape(SCALES)}|\.reader\.\d+)+$")


def modules_of_weights(model: onnx.ModelProto) -> dict[str, str]:
    """Value name -> module, of the nodes that read a weight of the base themselves.

    An exported graph keeps no modules, but the names of the base's tensors begin with theirs.
    """
    owners = {
        tensor.name: _SUFFIX.sub("", tensor.name).removeprefix(PREFIX).rpartition(".")[0]
        for tensor in model.graph.initializer
        if tensor.name.startswith(PREFIX)
    }
    found = {}
    for node in model.graph.node:
        module = next((owners[name] for name in node.input if owners.get(name)), None)
        if module is not None:
            found.update({name: module for name in node.output if name})
    return found


def kernel_instead(node: Unsupported, provider: str) -> str:
    """What to use in the place of a node's kernel that `provider` lacks."""
    if "." in node.operator:  # tables hold ONNX's own operators
        return f"the kernel of the domain {node.operator.rpartition('.')[0]} that the CPU provider brings"
    have = [
        name
        for name, other in PROVIDERS.items()
        if node.operator in other.operators and (other.integers or not node.integer)
    ]
    if node.integer and _CPU in have:
        return "the CPU provider, where it runs by itself: sizes and indices are a few bytes"
    parts = ["the CPU provider, where it runs by itself"] if _CPU in have and provider != _CPU else []
    others = [name for name in have if name not in (_CPU, provider)]
    parts += (
        [f"--provider {' or '.join(others)}, which {'have' if others[1:] else 'has'} it"] if others else []
    )
    text = written_out(node.operator)
    parts += [f"{text}, in the model"] if text else []
    return "; or ".join(parts) or "other operators in the model: no provider that we know has a kernel"
