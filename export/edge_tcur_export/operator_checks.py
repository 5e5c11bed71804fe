"""`checks.onnx`: one node for each kind of operator in a bundle's graphs, for the self-check of a device.

The inputs have the shapes that they have for an example; their values are the example's own integers (so
that indices are in range), or are made on the device within the range of the example's. Weights are not
written.
Read by `edge_tcur_runtime.engines.checks`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edge_tcur_export.exposed import run_with_outputs
from edge_tcur_runtime.engines.checks import METADATA
from edge_tcur_runtime.installed import find_onnxruntime

CHECKS = "checks.onnx"
_ROLES = ("infer", "step", "step_recompute", "step_last")
_COPY = ".example.onnx"  # beside the graph: its external data lies in the same directory
_STORED = 4096  # integers of an input that are written as they are; of a longer one only the range
CONSTANT = 1024  # numbers of a constant that stays one
_ROWS = 1024  # of a table that is gathered from
_FINITE = 3.0e38


@dataclass
class _Kind:
    """One kind of operator: its first node, the graph that this is in, and the nodes of all graphs."""

    node: onnx.NodeProto
    role: str
    nodes: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class _Graph:
    """A graph without its external data, and what is known of its values."""

    model: onnx.ModelProto
    path: Path
    constants: dict[str, onnx.TensorProto]
    types: dict[str, tuple[int, tuple[int | None, ...]]]

    @classmethod
    def read(cls, path: Path) -> _Graph:
        model = onnx.load(str(path), load_external_data=False)
        graph = model.graph
        fed = {value.name for value in graph.input}
        constants = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in fed}
        inferred = onnx.shape_inference.infer_shapes(model).graph
        types = {
            value.name: _type_of(value) for value in (*inferred.value_info, *inferred.input, *inferred.output)
        }
        types |= {name: (tensor.data_type, tuple(tensor.dims)) for name, tensor in constants.items()}
        return cls(model, path, constants, types)

    def kind_of(self, node: onnx.NodeProto) -> tuple[Any, ...]:
        """What makes two nodes of one kind: operator, attributes, and of each input its type, rank, whether
        it is a constant, and whether the last axis suits kernels that read four numbers at once."""
        attributes = sorted((item.name, item.SerializeToString()) for item in node.attribute)
        inputs = [self._input_kind(name) for name in node.input]
        return node.op_type, node.domain, tuple(attributes), tuple(inputs), len(node.output)

    def _input_kind(self, name: str) -> tuple[Any, ...] | None:
        if not name:
            return None
        kind, shape = self.types.get(name, (0, ()))
        last = shape[-1] if shape else None
        width = None if last is None else (0 if last == 1 else 4 if last % 4 == 0 else 1)
        return kind, len(shape), name in self.constants, width

    def constant(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(self.constants[name], str(self.path.parent))


def can_write_checks() -> bool:
    """Whether an export writes `CHECKS`: the values of an example come from ONNX Runtime."""
    return find_onnxruntime() is not None


def write_checks(directory: Path, roles: Mapping[str, str], feeds: Mapping[str, np.ndarray]) -> str:
    """Writes `CHECKS` for the graphs in `directory`.

    Args:
        roles: role -> file name; roles whose operators a device's provider does not run are passed over.
        feeds: inputs, targets and factors of an example, by graph name.

    Returns:
        its file name.

    Raises:
        IncompatibleError, MissingEngineError: the installed ONNX Runtime cannot run a graph.
    """
    graphs = {role: _Graph.read(directory / roles[role]) for role in _ROLES if role in roles}
    kinds: dict[tuple[Any, ...], _Kind] = {}
    for role, graph in graphs.items():
        for node in graph.model.graph.node:
            if any(
                item.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
                for item in node.attribute
            ):
                continue
            kind = kinds.setdefault(graph.kind_of(node), _Kind(node, role))
            kind.nodes.setdefault(role, []).append(node.name)
    writer = _Writer()
    for role, graph in graphs.items():
        mine = [kind for kind in kinds.values() if kind.role == role]
        values = _example_values(graph, [kind.node for kind in mine], feeds)
        for kind in mine:
            writer.add(kind, graph, values)
    first = next(iter(graphs.values())).model
    onnx.save(writer.model(list(first.opset_import), first.ir_version), str(directory / CHECKS))
    return CHECKS


def _type_of(value: onnx.ValueInfoProto) -> tuple[int, tuple[int | None, ...]]:
    tensor = value.type.tensor_type
    sizes = (axis.dim_value if axis.HasField("dim_value") else None for axis in tensor.shape.dim)
    return tensor.elem_type, tuple(sizes)


def _example_values(
    graph: _Graph, nodes: list[onnx.NodeProto], feeds: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """What the inputs of these nodes are for the example, constants apart."""
    inputs = {value.name for value in graph.model.graph.input}
    made = {name for node in graph.model.graph.node for name in node.output}
    wanted = {name for node in nodes for name in node.input if name and name not in graph.constants}
    names = sorted(wanted & made)
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    there = {value.name for value in model.graph.output}
    model.graph.output.extend(
        helper.make_empty_tensor_value_info(name) for name in names if name not in there
    )
    fed = {name: value for name, value in feeds.items() if name in inputs}
    found = run_with_outputs(model, graph.path.with_name(_COPY), fed, names) if names else []
    return {**fed, **dict(zip(names, found, strict=True))}


class _Writer:
    """Collects the nodes of `CHECKS`."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._ranges: dict[str, tuple[float, float]] = {}
        self._checks: list[dict[str, Any]] = []

    def add(self, kind: _Kind, graph: _Graph, values: Mapping[str, np.ndarray]) -> None:
        """Adds the first node of a kind with inputs and outputs of its own."""
        node, place = onnx.NodeProto(), len(self._nodes)
        node.CopyFrom(kind.node)
        node.name = f"{node.op_type}.{place}"
        arrays = [None if not name else _value(name, graph, values) for name in kind.node.input]
        _shorten(node, arrays)
        for number, (name, array) in enumerate(zip(kind.node.input, arrays, strict=True)):
            if array is not None:
                node.input[number] = f"{node.name}.in{number}"
                self._put(node.input[number], array, constant=name in graph.constants)
        for number, name in enumerate(kind.node.output):
            if name:
                node.output[number] = f"{node.name}.out{number}"
                self._outputs.append(helper.make_empty_tensor_value_info(node.output[number]))
        self._nodes.append(node)
        outputs = [name for name in node.output if name]
        self._checks.append({"operator": node.op_type, "outputs": outputs, "nodes": kind.nodes})

    def _put(self, name: str, array: np.ndarray, *, constant: bool) -> None:
        """An input with its range, or with a default where that is short: all integers, and constants."""
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        if constant and array.size <= CONSTANT:
            self._initializers.append(numpy_helper.from_array(array, name))
            return
        self._inputs.append(helper.make_tensor_value_info(name, kind, list(array.shape)))
        if array.dtype.kind != "f" and array.size <= _STORED:
            self._initializers.append(numpy_helper.from_array(array, name))
            return
        finite = np.clip(np.nan_to_num(array.astype(np.float64)), -_FINITE, _FINITE).ravel()
        known = finite if len(finite) else np.zeros(1)
        self._ranges[name] = (float(known.min()), float(known.max()))

    def model(self, opsets: list[onnx.OperatorSetIdProto], ir_version: int) -> onnx.ModelProto:
        """The finished graph."""
        graph = helper.make_graph(
            self._nodes, "checks", self._inputs, self._outputs, initializer=self._initializers
        )
        model = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)
        document = {"checks": self._checks, "ranges": self._ranges}
        helper.set_model_props(model, {METADATA: json.dumps(document, separators=(",", ":"), sort_keys=True)})
        return model


def _value(name: str, graph: _Graph, values: Mapping[str, np.ndarray]) -> np.ndarray:
    return graph.constant(name) if name in graph.constants else values[name]


def _shorten(node: onnx.NodeProto, arrays: list[np.ndarray | None]) -> None:
    """Cuts a long table that rows are gathered from; the indices stay within it."""
    if node.op_type != "Gather" or any(item.name == "axis" and item.i for item in node.attribute):
        return
    table, indices = arrays
    if table is not None and indices is not None and len(table) > _ROWS:
        arrays[:] = [table[:_ROWS], indices % _ROWS]
