"""Predicted peak memory of a process that runs an exported graph on ONNX Runtime's CPU provider.

The runtime's session settings keep this countable: no arena, no memory pattern, no prepacking and no folded
constants (`edge_tcur_runtime.engines.session`), so a value is allocated when its node runs and freed after
its last reader. The weights are mapped from `base.bin`: those that are only gathered from cost the pages of
the rows that are read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass

import onnx

from edge_tcur_export.shapes import ValueShape, tensor_bytes, value_shapes
from edge_tcur_runtime.formats.bundle import InputSpec
from edge_tcur_runtime.formats.memory import RowTable
from edge_tcur_runtime.planner import FACTORS, session_bytes

# Measured with tests/benchmarks/memory_model.py: Python with numpy and our import of ONNX Runtime 1.19.2, and
# what a session keeps of each node.
LIBRARY_BYTES = 56 * 2**20
NODE_BYTES = 10 * 2**10
INFER = "infer"
_PAGE = 4096
_LATE = "DequantizeLinear"
_WORTH_COUNTING = 2**18  # bytes; of smaller tables all is taken as read
_VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})  # the same buffer
# Elementwise operators whose output may take the place of an input that nothing else reads.
_IN_PLACE = frozenset({
    "Abs", "Add", "Cast", "Clip", "Div", "Exp", "Log", "Mul", "Neg", "Pow", "Reciprocal", "Relu", "Sigmoid",
    "Softmax", "Sqrt", "Sub", "Sum", "Tanh", "Where",
})  # fmt: skip
_POOLED_IN_PLACE = _IN_PLACE - {"Softmax"}  # of ONNX Runtime's plan; measured with the threshold of `mmap`


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a step.

    Attributes:
        libraries: Python, numpy and ONNX Runtime.
        session: what ONNX Runtime keeps of the graph.
        base: the part of `base.bin` that is read.
        activations: values alive at once, inputs included.
    """

    libraries: int
    session: int
    base: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.libraries + self.session + self.base + self.activations

    def to_dict(self) -> dict[str, int]:
        """JSON values, with the total."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class Step:
    """A node in the order of execution: its type and the names of the values that it reads and makes."""

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def activation_peak(steps: Sequence[Step], sizes: Mapping[str, int], kept: Collection[str]) -> int:
    """Largest number of bytes alive at once.

    Args:
        steps: in the order of execution.
        sizes: bytes of each value; a value without a size counts nothing.
        kept: values that stay to the end: the graph's outputs.
    """
    owner = _owners(steps)  # value -> the value whose buffer it shares
    readers: dict[str, int] = {}
    for place, step in enumerate(steps):
        readers.update({owner.get(name, name): place for name in step.inputs})
    forever = {owner.get(name, name) for name in kept}
    made = {name for step in steps for name in step.outputs}
    alive = peak = 0
    for place, step in enumerate(steps):
        own = {name for name in step.outputs if owner.get(name, name) == name}
        read = {owner.get(name, name) for name in step.inputs}
        ending = {name for name in read & made if readers[name] == place and name not in forever}
        new = sum(sizes.get(name, 0) for name in own)
        # One input that ends here may hand its buffer to an output of the same size.
        if step.operator in _IN_PLACE and any(sizes.get(name) == new for name in ending):
            peak = max(peak, alive)
        else:
            peak = max(peak, alive + new)
        unread = {name for name in own if name not in readers and name not in forever}
        alive += new - sum(sizes.get(name, 0) for name in ending | unread)
    return peak


def pooled_peak(steps: Sequence[Step], shapes: Mapping[str, ValueShape], kept: Collection[str]) -> int:
    """Bytes of the buffers of a session in ONNX Runtime's own order, at their most.

    It plans before it runs: a buffer that is free again goes to a later value of the same shape, and else
    stays to the end. So of each shape as many stay as are ever alive at once, and [batch * tokens, n] takes
    none of [batch, tokens, n].

    Args:
        steps: in the order of execution.
        shapes: of each value; one without a shape counts nothing.
        kept: values that stay to the end: the graph's outputs.
    """
    owner, readers = _owners(steps), dict[str, int]()
    for place, step in enumerate(steps):
        readers.update({owner.get(name, name): place for name in step.inputs})
    made = {name for step in steps for name in step.outputs if name in shapes}
    forever = {owner.get(name, name) for name in kept}
    alive, most = Counter[ValueShape](), Counter[ValueShape]()
    for place, step in enumerate(steps):
        own = [name for name in step.outputs if owner.get(name, name) == name and name in made]
        read = {owner.get(name, name) for name in step.inputs} & made
        ending = {name for name in read - forever if readers[name] == place}
        new, ended = Counter(shapes[name] for name in own), Counter(shapes[name] for name in ending)
        taken = new & ended if step.operator in _POOLED_IN_PLACE else Counter[ValueShape]()
        alive += new - taken
        most |= alive
        unread = {name for name in own if name not in readers and name not in forever}
        alive -= (ended - taken) + Counter(shapes[name] for name in unread)
    return sum(shape.bytes * count for shape, count in most.items())


def _owners(steps: Sequence[Step]) -> dict[str, str]:
    owner: dict[str, str] = {}
    for step in steps:
        if step.operator in _VIEWS and step.inputs and step.outputs:
            source = step.inputs[0]
            owner[step.outputs[0]] = owner.get(source, source)
    return owner


def execution_steps(model: onnx.ModelProto) -> list[Step]:
    """The nodes of a graph in the order of the file, but each DequantizeLinear as late as it may.

    They stand first in most graphs and ONNX Runtime runs them where they are needed (`quantized_graph.py`).
    """
    nodes = list(model.graph.node)
    steps = [Step(node.op_type, tuple(node.input), tuple(filter(None, node.output))) for node in nodes]
    waiting = {name: step for step in steps if step.operator == _LATE for name in step.outputs}
    ordered: list[Step] = []
    for step in steps:
        if step.operator != _LATE:
            ordered += [waiting.pop(name) for name in dict.fromkeys(step.inputs) if name in waiting]
            ordered.append(step)
    return ordered


def base_bytes(model: onnx.ModelProto, sizes: Mapping[str, int]) -> int:
    """Bytes of the weights that a run touches.

    A weight that is only gathered from along its first axis is mapped page by page: each row that is read
    costs its own bytes and at most one page more.
    """
    total = 0
    for tensor, nodes in _weights(model):
        size = tensor_bytes(tensor)
        if nodes and all(_takes_rows(node, tensor.name) for node in nodes):
            rows = sum(sizes.get(node.input[1], size) // 8 for node in nodes)
            size = min(size, rows * (size // max(tensor.dims[0], 1) + _PAGE))
        total += size
    return total


def _weights(model: onnx.ModelProto) -> list[tuple[onnx.TensorProto, list[onnx.NodeProto]]]:
    """The weights of a graph, each with the nodes that read it."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return [(tensor, readers.get(tensor.name, [])) for tensor in model.graph.initializer]


def split_base(model: onnx.ModelProto) -> tuple[int, tuple[RowTable, ...]]:
    """Bytes of the weights that every run reads, and the tables of which a model's input picks rows."""
    inputs = {value.name for value in model.graph.input}
    whole, tables = [], []
    for tensor, nodes in _weights(model):
        size, pickers = tensor_bytes(tensor), {node.input[1] for node in nodes if len(node.input) > 1}
        picked = bool(nodes) and all(_takes_rows(node, tensor.name) for node in nodes)
        if picked and len(pickers) == 1 and pickers <= inputs and size >= _WORTH_COUNTING:
            tables.append(RowTable(size, size // max(tensor.dims[0], 1), pickers.pop()))
        else:
            whole.append(tensor)
    return _distinct_bytes(whole), tuple(tables)


def _distinct_bytes(tensors: Sequence[onnx.TensorProto]) -> int:
    """Bytes of tensors, of which several may lie in the same part of `base.bin` (`quantized_graph.py`)."""
    total, spans = 0, []
    for tensor in tensors:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if "length" in place:
            first = int(place.get("offset", 0))
            spans.append((first, first + int(place["length"])))
        else:
            total += tensor_bytes(tensor)
    end = 0
    for first, last in sorted(spans):
        total += max(0, last - max(first, end))
        end = max(end, last)
    return total


def _takes_rows(node: onnx.NodeProto, name: str) -> bool:
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
    return node.op_type == "Gather" and node.input[0] == name and axis == 0


def estimate_memory(
    model: onnx.ModelProto,
    inputs: Mapping[str, Sequence[int]],
    *,
    role: str | None = None,
    libraries: int = LIBRARY_BYTES,
) -> MemoryEstimate:
    """Peak memory of one run of a graph.

    Args:
        model: the graph, without the base in memory.
        inputs: shapes of what is fed, by name.
        role: of a training graph, for the figures that a device begins with (`edge_tcur_runtime.planner`);
            `INFER` counts the buffers of `pooled_peak`; None the values that are alive, and nodes.
        libraries: bytes of the process before a graph is opened.
    """
    shapes, steps = value_shapes(model, inputs), execution_steps(model)
    sizes = {name: shape.bytes for name, shape in shapes.items()}
    fed, outputs = sum(sizes.get(name, 0) for name in inputs), {value.name for value in model.graph.output}
    pooled = role == INFER
    peak = pooled_peak(steps, shapes, outputs) if pooled else activation_peak(steps, sizes, outputs)
    session, values = NODE_BYTES * len(steps), peak + fed
    if pooled:
        values += _second_copy(model, sizes)
    if role in FACTORS:
        session, values = session_bytes(role, len(steps)), math.ceil(FACTORS[role] * values)
    return MemoryEstimate(libraries, session, base_bytes(model, sizes), values)


def _second_copy(model: onnx.ModelProto, sizes: Mapping[str, int]) -> int:
    """Bytes of the largest weight that two nodes dequantise: in its own order ONNX Runtime makes both copies
    before it reads the first (int4, whose rows are gathered from the second one)."""
    copies: dict[str, list[int]] = {}
    for node in model.graph.node:
        if node.op_type == _LATE:
            copies.setdefault(node.input[0], []).append(sizes.get(node.output[0], 0))
    return max((min(found) for found in copies.values() if len(found) > 1), default=0)


def input_shapes(
    model: onnx.ModelProto,
    inputs: Mapping[str, InputSpec],
    batch: int,
    length: int,
    ranks: Mapping[str, int],
) -> dict[str, list[int]]:
    """Shapes of everything that is fed to a graph.

    Args:
        inputs: the model's inputs with their named axes.
        ranks: of each group.
    """
    axes = {"batch": batch, "sequence": length}
    symbols: dict[str, int] = {}
    shapes: dict[str, list[int]] = {}
    for value in model.graph.input:
        spec = inputs.get(value.name)
        if spec is not None:
            shapes[value.name] = [axes[axis] if isinstance(axis, str) else axis for axis in spec.shape]
            dims = value.type.tensor_type.shape.dim
            symbols |= {dim.dim_param: size for dim, size in zip(dims, shapes[value.name], strict=True)}
    for value in model.graph.input:
        if value.name not in shapes:  # targets share the axes of the inputs; a factor has its group's rank
            free = ranks.get(value.name.rpartition(".")[0])
            shapes[value.name] = [
                (free or symbols.get(dim.dim_param, batch)) if dim.dim_param else dim.dim_value
                for dim in value.type.tensor_type.shape.dim
            ]
    return {value.name: shapes[value.name] for value in model.graph.input}
