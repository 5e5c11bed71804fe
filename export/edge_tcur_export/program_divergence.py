"""Where one of ExecuTorch's programs departs from torch: the first operator whose value is another.

A ``.pte`` file gives its outputs only. So the traced program is lowered again, for the same backend by the
same passes, with inner values as outputs: first values spread over all of it, then those between the last
right ones and the first wrong one, each time a shorter program. Done only where a program failed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.numpy import save
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.experimental import _copy_graph_module_and_signature
from torch.export.graph_signature import InputKind, OutputKind, OutputSpec, TensorArgument
from torch.utils import _pytree

from edge_tcur.errors import ExportError
from edge_tcur_export.divergence import TRACED, Difference, run_program
from edge_tcur_export.exposed import FEED, VALUE, distance
from edge_tcur_export.lowering import Lowering
from edge_tcur_export.quiet import quiet_torch
from edge_tcur_export.trace import PREFIX

_MOST = 128  # values that are outputs at once: the memory of all of them is reserved for the largest batch
_ROUNDS = 4  # programs that are lowered in search of an operator
_LARGEST_BASE = 2**30  # bytes of frozen tensors; each of those programs holds them
_TRAINED = "trained."  # of parameters, before the name of the core or extra
_BASE = "base."  # of frozen tensors, before the name in `FactorModel`


@dataclass(frozen=True)
class ProgramSource:
    """What a program was lowered from.

    Attributes:
        program: the traced program, as its lowering left it.
        inputs: names of its inputs, in order.
        outputs: names of its first outputs, in order.
        backend: what it was lowered for.
    """

    program: ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    backend: str

    def arguments(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """What it is fed, in order."""
        return [feeds[name] for name in self.inputs]

    def at(self, feeds: Mapping[str, np.ndarray]) -> ExportedProgram:
        """The program with its parameters as `feeds` have them."""
        held = dict(self.program.state_dict)
        for spec in self.program.graph_signature.input_specs:
            if spec.kind is InputKind.PARAMETER:
                value = torch.from_numpy(np.array(feeds[str(spec.target).removeprefix(_TRAINED)]))
                held[str(spec.target)] = nn.Parameter(value)
        with quiet_torch():
            module, signature = _copy_graph_module_and_signature(self.program)
            result: ExportedProgram = self.program._update(module, signature, state_dict=held)
        return result


def traces_otherwise(source: ProgramSource, feeds: Mapping[str, np.ndarray], expected: np.ndarray) -> bool:
    """Whether the traced program itself gives other logits than the model."""
    _, outputs = run_program(source.at(feeds), source.arguments(feeds))
    return distance(outputs[source.outputs.index("logits")], expected) > TRACED


def find_program_difference(
    source: ProgramSource, feeds: Mapping[str, np.ndarray], tolerances: tuple[float, float]
) -> Difference | None:
    """The first operator of a program that departs from torch when its values are looked at.

    Args:
        feeds: every input and trained value by name.
        tolerances: see `edge_tcur_export.exposed.first_difference`.

    Returns:
        None where no value departs, the base is too large to be put into programs, or ExecuTorch cannot lower
        or run a program with more outputs.
    """
    program, arguments = source.at(feeds), source.arguments(feeds)
    if sum(value.nbytes for value in program.state_dict.values()) > _LARGEST_BASE:
        return None
    values, _ = run_program(program, arguments)
    graph = program.graph_module.graph
    readable = [node.name for node in graph.nodes if node.name in values and _is_made(node)]
    nodes = {node.name: node for node in graph.nodes}
    candidates, right, found = readable, set[str](), None
    must = {node.name for node in graph.output_node().args[0] if node.name in readable}
    for _ in range(_ROUNDS):
        picked = _spread(candidates, must)
        errors = _errors(exposed(program, picked), source.backend, arguments, {n: values[n] for n in picked})
        if errors is None:
            break
        wrong = {name: error for name, error in errors.items() if not error <= tolerances[0]}
        if not wrong:
            break
        sure = (name for name, error in wrong.items() if not error <= tolerances[1])
        first = next(sure, next(iter(wrong)))
        found = _named(nodes[first], wrong[first])
        right |= errors.keys() - wrong.keys()
        between = _between(nodes[first], right)
        candidates, must = [name for name in readable if name in between], {first}
        if not candidates:
            break
    return found


def _is_made(node: fx.Node) -> bool:
    """Whether a node computes something: a view of what is fed or frozen has no value of its own."""
    return any(argument.op != "placeholder" for argument in node.all_input_nodes) or "view" not in node.name


def _spread(candidates: Sequence[str], must: Iterable[str]) -> list[str]:
    """At most `_MOST` of the candidates, spread evenly, and those that must be there; in their order."""
    step = max(1, -(-len(candidates) // _MOST))
    chosen = {*candidates[::step], *must}
    rest = [name for name in must if name not in candidates]
    return [name for name in candidates if name in chosen] + rest


def _between(wrong: fx.Node, right: set[str]) -> set[str]:
    """What a value is computed from, no further back than right values."""
    found, open_nodes = set[str](), list(wrong.all_input_nodes)
    while open_nodes:
        node = open_nodes.pop()
        if node.name not in right and node.name not in found:
            found.add(node.name)
            open_nodes += node.all_input_nodes
    return found


def exposed(program: ExportedProgram, names: Sequence[str]) -> ExportedProgram:
    """A copy of a program whose outputs are the values of these nodes, without what they do not need."""
    with quiet_torch():
        module, signature = _copy_graph_module_and_signature(program)
    originals = (node.name for node in program.graph_module.graph.nodes)
    copies = dict(zip(originals, module.graph.nodes, strict=True))
    picked = [copies[name] for name in names]
    module.graph.output_node().args = (tuple(picked),)
    module.graph.eliminate_dead_code()
    module.recompile()
    signature.output_specs = [
        OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(name=node.name), None) for node in picked
    ]
    with quiet_torch():
        result: ExportedProgram = program._update(module, signature)
    spec = _pytree.tree_structure(tuple(range(len(picked))))
    result.module_call_graph[0].signature.out_spec = spec
    return result


def _errors(
    program: ExportedProgram,
    backend: str,
    arguments: Sequence[np.ndarray],
    expected: Mapping[str, np.ndarray],
) -> dict[str, float] | None:
    """Name of each output -> how far it is from torch's value, by ExecuTorch in a process of its own; None
    where it cannot be lowered or run."""
    content = {f"{FEED}{place}": np.array(v, order="C") for place, v in enumerate(arguments)}
    content |= {f"{VALUE}{place}": np.array(v, order="C") for place, v in enumerate(expected.values())}
    try:
        lowered = _lowered(program, backend)
    except ExportError:
        return None
    with TemporaryDirectory() as work:
        file, reference = Path(work) / "exposed.pte", Path(work) / "reference.safetensors"
        file.write_bytes(lowered)
        reference.write_bytes(save(content))
        command = [sys.executable, "-m", "edge_tcur_export.exposed_program", str(file), str(reference)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return None
    found = json.loads(done.stdout.splitlines()[-1])
    return dict(zip(expected, found, strict=True))


def _lowered(program: ExportedProgram, backend: str) -> bytes:
    """A program with its weights.

    Raises:
        ExportError: ExecuTorch's passes cannot take it.
    """
    with quiet_torch():
        try:
            return bytes(Lowering(program).lower(backend).to_executorch().buffer)
        except Exception as error:
            raise ExportError("ExecuTorch cannot lower the program with its values as outputs") from error


def _named(node: fx.Node, error: float) -> Difference:
    operator = getattr(node.target, "__name__", str(node.target)).removesuffix(".default")
    return Difference(operator, node.name, _module_of(node), error)


def _module_of(node: fx.Node) -> str | None:
    """The joint program keeps no modules, but the names of weights tell those that have one."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = str(stack[-1][0]) if stack else ""
    for argument in node.all_input_nodes:
        if not path and argument.op == "placeholder":
            target = str(argument.meta.get("target", argument.name))
            path = target.rpartition(".")[0]
    return path.removeprefix(_BASE).removeprefix(PREFIX) or None
