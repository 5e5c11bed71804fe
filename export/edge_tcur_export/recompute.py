"""Recompute: a step graph that keeps each block's input for the backward pass, and not what lies within.

Activation checkpointing (Chen et al., *Training Deep Nets with Sublinear Memory Cost*, arXiv 1604.06174) as a
property of the graph: what the backward pass reads of a block is computed a second time, from the
block's input, by duplicates of the block's own nodes. Two things would undo that, an optimiser that merges
equal nodes and a scheduler that runs the duplicates early. Neither can: the duplicates read the block's input
through a gate, a Reshape to the input's own shape whose second operand also takes zero numbers of a
gradient that arrives at the block. It copies nothing, changes no value (an empty slice adds nothing, not even
the NaN of a gradient), and depends on the gradient by data.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from edge_tcur.errors import ExportError

FORWARD_OUTPUTS = ("loss", "logits")
_BLOCK = re.compile(r"^.*?(?<![^.])\d+(?=\.)")
_BEFORE = -1  # level of what lies in front of the first block
_NOT_AGAIN = frozenset({
    "Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
    "RandomUniformLike",
})  # fmt: skip
_SIZES = frozenset({"Shape", "Size"})
_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
_AGAIN = ".again"
_HINT = "leave --recompute out for this model"


def block_of(name: str) -> str | None:
    """The numbered layer that a dotted name lies in (``encoder.layer.3`` of ``encoder.layer.3.dense.bias``),
    the outermost where there are several; None where there is none."""
    found = _BLOCK.match(name)
    return None if found is None else found[0]


@dataclass(frozen=True)
class RecomputedBlock:
    """What was done for one block.

    Attributes:
        name: of the block, as in its weights' names.
        nodes: how many nodes were duplicated.
        gate: the gradient that the duplicates wait for.
    """

    name: str
    nodes: int
    gate: str


def recompute_blocks(
    model: ir.Model, inputs: Collection[str], keep: Collection[str] = ()
) -> list[RecomputedBlock]:
    """Lets the backward pass read duplicates of what each block computes, the last block's apart: its
    backward pass comes at once, so nothing of it is ever kept for long.

    Args:
        model: a step graph, changed in place: outputs ``loss``, ``logits`` and gradients.
        inputs: names of the graph's inputs that hold the batch, the targets among them.
        keep: names of values that stay: small, and dear to compute again.

    Returns:
        the blocks that are recomputed, in the order in which the backward pass reaches them.

    Raises:
        ExportError: the model has no two numbered blocks, the gradient takes a way through the graph that
            leaves no place for a gate, or nothing is kept that could be computed again.
    """
    plan = _Plan(model.graph, frozenset(inputs), frozenset(keep))
    if len(plan.blocks) < 2:
        raise ExportError(
            f"recompute needs numbered blocks (layers.0, layers.1, ...); the model has {len(plan.blocks)}",
            hint=_HINT,
        )
    gates, done = _gates(plan), []
    for level in range(len(plan.blocks) - 2, _BEFORE, -1):
        read = plan.read_backward(level)
        if read:
            if level not in gates:
                raise ExportError(
                    f"recompute found no gradient that arrives at the block {plan.blocks[level]}", hint=_HINT
                )
            done.append(_recompute(plan, level, read, gates[level]))
    if not done:
        raise ExportError(
            "recompute would spare nothing: of no block but the last is anything kept", hint=_HINT
        )
    model.graph.sort()
    return done


@dataclass
class _Plan:
    """Forward and backward nodes of a step graph, and the level of every value of the forward pass.

    Attributes:
        blocks: names of the numbered blocks in the order in which the forward pass reads their weights.
        levels: values that depend on the batch (sizes alone do not count) -> index of the last block that
            they went through, `_BEFORE` in front of the first.
        forward: the nodes that loss and outputs need.
        backward: the others, in graph order.
    """

    graph: ir.Graph
    inputs: frozenset[str]
    keep: frozenset[str]
    blocks: list[str] = field(default_factory=list)
    levels: dict[ir.Value, int] = field(default_factory=dict)
    forward: list[ir.Node] = field(default_factory=list)
    backward: list[ir.Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        ahead = _ancestors(value for value in self.graph.outputs if value.name in FORWARD_OUTPUTS)
        for node in self.graph:
            (self.forward if node in ahead else self.backward).append(node)
        self.levels = {value: _BEFORE for value in self.graph.inputs if value.name in self.inputs}
        own: dict[ir.Value, frozenset[str]] = {}  # values made of weights alone -> blocks of the weights
        for name, value in self.graph.initializers.items():
            block = block_of(name)
            own[value] = frozenset() if block is None else frozenset({block})
        for node in self.forward:
            self._place(node, own)

    def _place(self, node: ir.Node, own: dict[ir.Value, frozenset[str]]) -> None:
        given = [value for value in node.inputs if value is not None]
        before = [self.levels[value] for value in given if value in self.levels]
        weights = [own.get(value, frozenset()) for value in given]
        if node.op_type in _SIZES or not before:
            own.update(dict.fromkeys(node.outputs, frozenset().union(*weights)))
            return
        level = max(before)
        # What is gathered from weights of many blocks (columns of coupled slices) says nothing of a place.
        for block in (name for names in weights if len(names) == 1 for name in names):
            if block not in self.blocks:
                self.blocks.append(block)
            level = max(level, self.blocks.index(block))
        self.levels.update(dict.fromkeys(node.outputs, level))

    def is_kept(self, value: ir.Value) -> bool:
        """Whether a value of the forward pass stays: an input, an output, what is asked for, what another
        block reads, and what would not come out the same a second time."""
        node = value.producer()
        named = value.is_graph_output() or value.name in self.keep
        if node is None or named or not _is_repeatable(node):
            return True
        level = self.levels[value]
        return level == _BEFORE or any(
            self.levels.get(output, level) > level
            for reader in value.consumers()
            for output in reader.outputs
        )

    def span(self, value: ir.Value) -> tuple[int, int]:
        """The lowest and the highest level that a value of the forward pass makes its reader wait for. What
        is kept is there from the start, so it is never the lowest."""
        level = self.levels.get(value)
        if level is None:
            return len(self.blocks), _BEFORE
        return (len(self.blocks) if self.is_kept(value) else level), level

    def read_backward(self, level: int) -> list[ir.Value]:
        """What the backward pass reads of the inside of a block."""
        found = {
            value: None
            for node in self.backward
            for value in node.inputs
            if value is not None and self.levels.get(value) == level and not self.is_kept(value)
        }
        return list(found)


def _recompute(plan: _Plan, level: int, read: list[ir.Value], gradient: ir.Value) -> RecomputedBlock:
    """Duplicates what is needed of one block and turns the backward pass to the duplicates."""
    chosen, outside = _closure(plan, level, read)
    gate = Gate(plan.graph, gradient, plan.blocks[level])
    copies = {value: gate(value) for value in outside}
    duplicates = [_duplicate(node, copies) for node in chosen]
    producer = gradient.producer()
    assert producer is not None
    plan.graph.insert_after(producer, [*gate.nodes, *duplicates])
    for node in plan.backward:
        for place, value in enumerate(node.inputs):
            if value is not None and value in copies and value not in outside:
                node.replace_input_with(place, copies[value])
    return RecomputedBlock(plan.blocks[level], len(duplicates), str(gradient.name))


def _closure(plan: _Plan, level: int, read: list[ir.Value]) -> tuple[list[ir.Node], list[ir.Value]]:
    """The nodes that compute `read`, in order, and the values of the batch that they start from."""
    needed, outside = set(read), dict[ir.Value, None]()
    chosen = []
    for node in reversed(plan.forward):
        if not needed.intersection(node.outputs):
            continue
        chosen.append(node)
        for value in node.inputs:
            if value is None or value not in plan.levels:
                continue
            if plan.levels[value] == level and not plan.is_kept(value):
                needed.add(value)
            else:
                outside[value] = None
    return chosen[::-1], list(outside)


def _gates(plan: _Plan) -> dict[int, ir.Value]:
    """Level -> a gradient that arrives at that block: its backward pass reads it, it depends on the loss and
    on nothing that this block or an earlier one computes again. Of several, one that depends on the block
    next behind: blocks are then computed again one after the other."""
    top = len(plan.blocks) - 1
    spans: dict[ir.Value, tuple[int, int]] = {}  # lowest and highest level that a value waits for
    gates: dict[int, ir.Value] = {}
    for node in plan.backward:
        given = [value for value in node.inputs if value is not None]
        of_given = {value: spans.get(value) or plan.span(value) for value in given}
        low = min((span[0] for span in of_given.values()), default=top + 1)
        high = max((span[1] for span in of_given.values()), default=_BEFORE)
        spans.update(dict.fromkeys(node.outputs, (low, high)))
        for value in given:
            if value in spans and low < spans[value][0] and spans[value][1] == top:
                best = gates.get(low)
                if best is None or spans[value][0] < spans[best][0]:
                    gates[low] = value
    return gates


def _is_repeatable(node: ir.Node) -> bool:
    subgraphs = any(attribute.type in _GRAPHS for attribute in node.attributes.values())
    return node.op_type not in _NOT_AGAIN and not subgraphs


def _ancestors(values: Iterable[ir.Value]) -> set[ir.Node]:
    """The nodes that the values need."""
    found: set[ir.Node] = set()
    waiting = [value.producer() for value in values]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [value.producer() for value in node.inputs if value is not None]
    return found


def _duplicate(node: ir.Node, copies: dict[ir.Value, ir.Value]) -> ir.Node:
    """A node of the same kind that reads the copies; its outputs are added to them."""
    twin = ir.Node(
        node.domain,
        node.op_type,
        [value if value is None else copies.get(value, value) for value in node.inputs],
        node.attributes.values(),
        num_outputs=len(node.outputs),
        version=node.version,
        name=f"{node.name or node.outputs[0].name}{_AGAIN}",
    )
    for value, copy in zip(node.outputs, twin.outputs, strict=True):
        copy.name, copy.type = f"{value.name}{_AGAIN}", value.type
        copy.shape = None if value.shape is None else ir.Shape(list(value.shape))
        copies[value] = copy
    return twin


class Gate:
    """Lets values through once a gradient is there, unchanged and without a copy.

    ONNX Runtime keeps about 5 kB of each node: sizes that are known are a constant.

    Attributes:
        nodes: in order; to be put into the graph.
    """

    def __init__(self, graph: ir.Graph, gradient: ir.Value, block: str) -> None:
        self._name = f"{gradient.name}.gate.{block}"
        self._graph = graph
        self._passed: dict[ir.Value, ir.Value] = {}
        self._constants = {
            name: _constant(graph, name, value)
            for name, value in (("recompute.whole", [-1]), ("recompute.zero", [0]))
        }
        self.nodes: list[ir.Node] = []
        whole, zero = self._constants.values()
        flat = self._add("Reshape", [gradient, whole], "flat", gradient.dtype)
        none = self._add("Slice", [flat, zero, zero, zero], "none", gradient.dtype)
        to = {"to": ir.AttrInt64("to", ir.DataType.INT64.value)}
        self._none = self._add("Cast", [none], "sizes", ir.DataType.INT64, to)

    def __call__(self, value: ir.Value) -> ir.Value:
        """The same value, behind the gate."""
        if value not in self._passed:
            axis = {"axis": ir.AttrInt64("axis", 0)}
            sizes = [self._own(value), self._none]
            shape = self._add("Concat", sizes, f"{value.name}.sizes", ir.DataType.INT64, axis)
            self._passed[value] = self._add("Reshape", [value, shape], str(value.name), value.dtype)
        return self._passed[value]

    def _own(self, value: ir.Value) -> ir.Value:
        """The sizes of a value."""
        if value.shape is not None and value.shape.is_static():
            sizes = list(value.shape.numpy())
            return _constant(self._graph, f"recompute.sizes_{'_'.join(map(str, sizes))}", sizes)
        return self._add("Shape", [value], f"{value.name}.own", ir.DataType.INT64)

    def _add(
        self,
        operator: str,
        inputs: list[ir.Value],
        name: str,
        dtype: ir.DataType | None,
        attributes: dict[str, ir.Attr] | None = None,
    ) -> ir.Value:
        name = f"{self._name}.{name}"
        node = ir.Node("", operator, inputs, attributes or {}, num_outputs=1, name=name)
        node.outputs[0].name = name
        if dtype is not None:
            node.outputs[0].type = ir.TensorType(dtype)
        self.nodes.append(node)
        return node.outputs[0]


def _constant(graph: ir.Graph, name: str, numbers: list[int]) -> ir.Value:
    """An int64 initializer, made once a graph."""
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(numbers, np.int64), name=name)
        graph.register_initializer(
            ir.Value(
                name=name,
                shape=ir.Shape([len(numbers)]),
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
        )
    return graph.initializers[name]
