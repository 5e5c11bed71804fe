"""Where an exported graph departs from torch: the first operator whose value is another.

The exporter names the values of a graph after the nodes of the traced program that they come from. So the
program is run node by node, and the graph with its inner values exposed, on the same inputs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from safetensors.numpy import save
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from edge_tcur_export.exposed import FEED, VALUE, distance
from edge_tcur_export.operators import MODULE
from edge_tcur_export.trace import PREFIX

PROGRAM = "program"  # key of ir.Model.meta: the traced program that the graph was converted from
TRACED = 1e-4  # relative difference between a model and its traced program; see `parity.TOLERANCES`
_LARGEST = 64 * 2**20  # bytes of a value that is compared; larger ones are copies of embeddings


@dataclass(frozen=True)
class Source:
    """What a graph was converted from.

    Attributes:
        program: the traced program.
        inputs: names of its arguments, in order.
        modules: value name -> name of the torch module that it came from.
    """

    program: ExportedProgram
    inputs: tuple[str, ...]
    modules: Mapping[str, str]

    @classmethod
    def of(cls, model: ir.Model, inputs: tuple[str, ...]) -> Source:
        """Of a graph that `edge_tcur_export.graph.to_graph` has just made."""
        modules = {}
        for node in model.graph:
            name = node.meta.get(MODULE) or _module_of_weight(node)
            if name is not None:
                modules.update({value.name: name for value in node.outputs if value.name})
        return cls(model.meta[PROGRAM], inputs, modules)


def _module_of_weight(node: ir.Node) -> str | None:
    """The joint program keeps no modules, but the names of weights tell those that have one."""
    names = [value.name or "" for value in node.inputs if value is not None and value.is_initializer()]
    own = [name for name in names if name.startswith(PREFIX)]
    return own[0].removeprefix(PREFIX).rpartition(".")[0] if own else None


@dataclass(frozen=True)
class Difference:
    """Where a graph departs from torch.

    Attributes:
        operator, node: type and name in the graph.
        module: name of the torch module that it came from, where known.
        error: largest difference of its value, relative to the largest expected entry.
    """

    operator: str
    node: str
    module: str | None
    error: float

    def __str__(self) -> str:
        origin = f", from the module {self.module}" if self.module else ""
        return f"{self.operator} (node {self.node}{origin}), by {self.error:.2e}"


class _Recorder(fx.Interpreter):
    """Runs a program and keeps the value of every node."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[str, np.ndarray] = {}

    def run_node(self, n: fx.Node) -> Any:
        """See `torch.fx.Interpreter`."""
        result = super().run_node(n)
        if n.op == "call_function" and isinstance(result, Tensor) and result.nbytes <= _LARGEST:
            self.values[n.name] = np.array(result.detach().numpy(), order="C")
        return result


def run_program(
    program: ExportedProgram, arguments: Sequence[np.ndarray]
) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """The value of every node of a traced program, by name, and the program's outputs.

    Args:
        arguments: of the program's inputs, in order.
    """
    given, values = iter(arguments), []
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            values.append(torch.from_numpy(np.array(next(given))))
        else:
            target = str(spec.target)
            values.append(program.state_dict.get(target, program.constants.get(target)))
    recorder = _Recorder(program.graph_module)
    with torch.no_grad():
        outputs = recorder.run(*values)
    return recorder.values, [value.numpy() for value in outputs]


def starts_in_tracing(source: Source, feeds: Mapping[str, np.ndarray], expected: np.ndarray) -> bool:
    """Whether the traced program itself gives other outputs (its second ones) than the model."""
    _, outputs = run_program(source.program, [feeds[name] for name in source.inputs])
    return distance(outputs[1], expected) > TRACED


def find_difference(
    graph: Path, source: Source, feeds: Mapping[str, np.ndarray], tolerances: tuple[float, float]
) -> Difference | None:
    """The first operator of an exported graph that departs from torch.

    Args:
        graph: on disk, beside the base file.
        feeds: every input of the traced program by name.
        tolerances: see `edge_tcur_export.exposed.first_difference`.

    Returns:
        None where no value departs, or the graph cannot be run with its values exposed.
    """
    values, _ = run_program(source.program, [feeds[name] for name in source.inputs])
    content = {f"{VALUE}{name}": value for name, value in values.items()}
    content |= {f"{FEED}{name}": np.array(value, order="C") for name, value in feeds.items()}
    with TemporaryDirectory() as work:
        reference = Path(work) / "reference.safetensors"
        reference.write_bytes(save(content))
        command = [sys.executable, "-m", "edge_tcur_export.exposed", graph, reference, *tolerances]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
    if found is None:
        return None
    return Difference(found["operator"], found["node"], source.modules.get(found["value"]), found["error"])
