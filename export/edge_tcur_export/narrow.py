"""Computes of a value what is read of it: of a last block whose first token alone is classified, that token.

A classifier over the first token (ViT, BERT's pooler, DistilBERT, CLIP's vision tower) reads one of the last
block's outputs, and nothing else of them is needed: not the feed-forward of the other tokens, nor their
queries; only keys and values are. The pass finds what is read of each value, from the outputs back, and lets
operators that give one place of an axis read one place. It works on the traced program, so that every
target has it, and every backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

_aten = torch.ops.aten
_END = 2**63 - 1  # of a slice without an end
_ASSERTION = _aten._assert_tensor_metadata.default
_SELECT = _aten.select.int


@dataclass(frozen=True)
class Part:
    """One place of an axis, which is all that is read of a value.

    Attributes:
        axis: of the value, counted from its first one.
        index: of the place; -1 is the last one.
        places: size of the axis, a number or a symbol's expression.
        rows: the value is [batch * places, features], and that row of each sample is read; `axis` is 1.
    """

    axis: int
    index: int
    places: Any
    rows: bool = False


class _Whole:
    """All of a value is read."""


_WHOLE = _Whole()
_Asked = Mapping[fx.Node, Part]  # inputs of a node of which a part is enough; all of the others is read
_Rule = Callable[[fx.Node, Part], "_Asked | None"]  # None: the node gives no part alone


def narrow(program: ExportedProgram) -> ExportedProgram:
    """Lets the program compute the parts that are read; changes it in place.

    Does nothing where no product would be spared, or where an operator changes a tensor in place.
    """
    graph = program.graph_module.graph
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    if any(isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable for target in targets):
        return program
    asked = _what_is_asked(graph)
    if any(node.target in _PRODUCTS for node in asked):
        _write(graph, asked)
        program.graph_module.recompile()
    return program


# --- what is read of each value -----------------------------------------------------------------------------


def _what_is_asked(graph: fx.Graph) -> dict[fx.Node, tuple[Part, _Asked]]:
    """The nodes of which a part is enough: that part, and what they then read of their inputs."""
    whole: set[fx.Node] = set()  # of which rows were asked for that have to be there in full
    while True:
        before = len(whole)
        asked = _walk_back(graph, whole)
        if len(whole) == before:
            return asked


def _walk_back(graph: fx.Graph, whole: set[fx.Node]) -> dict[fx.Node, tuple[Part, _Asked]]:
    read: dict[fx.Node, Part | _Whole] = {}
    found: dict[fx.Node, tuple[Part, _Asked]] = {}
    rows: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        part = read.get(node) if node.users else _WHOLE
        if part is None or node.target is _ASSERTION:
            continue  # nothing reads it
        asked = _by_rule(node, part, whole) if isinstance(part, Part) else None
        if asked is None:
            read[node], asked = _WHOLE, _selected(node)
        elif isinstance(part, Part):
            found[node] = part, asked
        for value in node.all_input_nodes:
            wanted = asked.get(value, _WHOLE)
            read[value] = wanted if read.get(value, wanted) == wanted else _WHOLE
            if isinstance(wanted, Part) and wanted.rows:
                rows.add(value)
    whole |= {value for value in rows if value not in found}
    return found


def _by_rule(node: fx.Node, part: Part, whole: set[fx.Node]) -> _Asked | None:
    rule = _RULES.get(node.target)
    asked = None if rule is None else rule(node, part)
    if asked is None or any(wanted.rows and value in whole for value, wanted in asked.items()):
        return None
    return asked


def _selected(node: fx.Node) -> _Asked:
    """What a node reads that is needed in full: of one place that it takes, that place."""
    if node.target is not _SELECT:
        return {}
    value, axis, index = _arguments(node)
    if not isinstance(index, int) or index < -1:
        return {}
    return {value: Part(axis % _axes(value), index, _expression(_shape(value)[axis]))}


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.args)


def _shape(value: fx.Node) -> tuple[Any, ...]:
    return tuple(value.meta["val"].shape)


def _axes(value: fx.Node) -> int:
    return len(_shape(value))


def _expression(size: Any) -> Any:
    """A size that can be compared without a guard."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _equal(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    return [_expression(size) for size in left] == [_expression(size) for size in right]


# --- rules: the parts of its inputs that a part of a node takes ---------------------------------------------


def _entry_by_entry(node: fx.Node, part: Part) -> _Asked | None:
    """Operands are aligned at their last axes, and spread where they have one place."""
    asked: dict[fx.Node, Part] = {}
    from_last = _axes(node) - (0 if part.rows else part.axis)
    for value in node.all_input_nodes:
        if not isinstance(value.meta.get("val"), torch.Tensor):
            continue
        axis = _axes(value) - from_last
        if axis >= 0 and _expression(_shape(value)[axis]) != 1:
            asked[value] = part if part.rows else replace(part, axis=axis)
    return asked


def _along_the_last(node: fx.Node, part: Part) -> _Asked | None:
    """A normalisation over last axes: its other operands have no place of the part's axis."""
    value, sizes = _arguments(node)[:2]
    own = 0 if part.rows else part.axis
    return {value: part} if own < _axes(value) - len(sizes) else None


def _along_some(node: fx.Node, part: Part) -> _Asked | None:
    """A softmax, or a mean that keeps its axes."""
    value, given = _arguments(node)[:2]
    if given in (None, []):  # all of them
        return None
    axes = {axis % _axes(value) for axis in (given if isinstance(given, (list, tuple)) else [given])}
    own = 0 if part.rows else part.axis
    return {value: part} if own not in axes and _axes(value) == _axes(node) else None


def _product(node: fx.Node, part: Part) -> _Asked | None:
    """A row of a product takes that row of its first operand."""
    left, *others = _arguments(node)
    is_row = part.rows or part.axis == _axes(node) - 2
    return {left: part} if is_row and _axes(left) == _axes(node) and left not in others else None


def _attention(node: fx.Node, part: Part) -> _Asked | None:
    """A query takes all keys and values, and its own row of a mask."""
    query, key, value, *given = _arguments(node)
    options = dict(zip(("attn_mask", "dropout_p", "is_causal"), given, strict=False)) | node.kwargs
    mask, causal = options.get("attn_mask"), options.get("is_causal", False)
    if part.rows or part.axis != _axes(node) - 2 or causal or query in (key, value):
        return None
    asked: dict[fx.Node, Part] = {query: part}
    if isinstance(mask, fx.Node) and _axes(mask) > 1 and _expression(_shape(mask)[-2]) != 1:
        asked[mask] = replace(part, axis=_axes(mask) - 2)
    return asked


def _turned(node: fx.Node, part: Part) -> _Asked | None:
    value, *given = _arguments(node)
    order = list(range(_axes(value)))
    if part.rows:
        return None
    if node.target is _aten.transpose.int:
        first, second = given
        order[first], order[second] = order[second], order[first]
    else:
        order = [axis % len(order) for axis in given[0]]
    return {value: replace(part, axis=order[part.axis])}


def _reshaped(node: fx.Node, part: Part) -> _Asked | None:
    """Axes behind the part's may be split and joined; batch and places may be joined to rows, and split."""
    value = _arguments(node)[0]
    before, after = _shape(value), _shape(node)
    if part.rows:
        joined = len(before) == 3 and _equal(before[2:], after[1:]) and _expression(before[1]) == part.places
        return {value: replace(part, rows=False)} if joined else None
    front = slice(0, part.axis + 1)
    if _equal(before[front], after[front]):
        return {value: part}
    split = part.axis == 1 and len(before) == 2 and len(after) == 3 and _equal(before[1:], after[2:])
    return {value: replace(part, rows=True)} if split else None


def _sliced(node: fx.Node, part: Part) -> _Asked | None:
    value, axis = (*_arguments(node), 0)[:2]
    return None if part.rows or axis % _axes(value) == part.axis else {value: part}


_PRODUCTS = (_aten.matmul.default, _aten.mm.default, _aten.linear.default)
_RESHAPES = (_aten.view.default, _aten.reshape.default)
_ENTRIES = (
    *(_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor),
    *(_aten.where.self, _aten.where.ScalarOther, _aten.where.ScalarSelf, _aten.masked_fill.Scalar),
    *(_aten.gelu.default, _aten.relu.default, _aten.silu.default, _aten.tanh.default, _aten.sigmoid.default),
    *(_aten.rsqrt.default, _aten.pow.Tensor_Scalar, _aten.neg.default, _aten.exp.default),
    *(_aten.to.dtype, _aten.clone.default, _aten.contiguous.default, _aten.dropout.default),
)
_RULES: dict[Any, _Rule] = {
    **dict.fromkeys(_PRODUCTS, _product),
    **dict.fromkeys(_RESHAPES, _reshaped),
    **dict.fromkeys(_ENTRIES, _entry_by_entry),
    **dict.fromkeys((_aten.layer_norm.default, _aten.rms_norm.default), _along_the_last),
    **dict.fromkeys((_aten.softmax.int, _aten.mean.dim), _along_some),
    **dict.fromkeys((_aten.transpose.int, _aten.permute.default), _turned),
    _aten.scaled_dot_product_attention.default: _attention,
    _aten.slice.Tensor: _sliced,
}


# --- the program that computes the parts --------------------------------------------------------------------


def _write(graph: fx.Graph, asked: Mapping[fx.Node, tuple[Part, _Asked]]) -> None:
    """Writes beside each node in `asked` one that computes its part, and removes what nothing reads then."""
    parts: dict[tuple[fx.Node, Part], fx.Node] = {}

    def take(value: fx.Node, part: Part) -> fx.Node:
        """The part of a value that an input is read of: computed alone, or cut out."""
        if (value, part) not in parts:
            end = _END if part.index == -1 else part.index + 1
            parts[value, part] = _call(graph, value, _aten.slice.Tensor, (value, part.axis, part.index, end))
        return parts[value, part]

    for node in list(graph.nodes):
        part, wanted = asked.get(node, (None, _selected(node)))
        if part is None and not any(value in asked for value in wanted):
            continue
        with graph.inserting_before(node):
            given = {value: take(value, item) for value, item in wanted.items()}
            arguments, options = fx.map_arg((node.args, node.kwargs), lambda value: given.get(value, value))  # noqa: B023
            if part is None:  # takes the only place that is left; its name may be that of an output
                node.args = (*arguments[:2], 0)
                continue
            if node.target in _RESHAPES:
                arguments = (arguments[0], _sizes(node, arguments[1], part))
            parts[node, part] = _call(graph, node, node.target, arguments, options)
    for node in graph.find_nodes(op="call_function", target=_ASSERTION):
        if node.args[0] in asked:
            graph.erase_node(node)
    # A dropout counts as one that has an effect.
    graph.eliminate_dead_code(lambda node: node.is_impure() and node not in asked)


def _sizes(node: fx.Node, given: Any, part: Part) -> list[Any]:
    """Sizes of the part of what a reshape gives."""
    if part.rows:
        return [-1, _shape(node)[1]]
    return [1 if axis == part.axis else size for axis, size in enumerate(given)]


def _call(
    graph: fx.Graph, source: fx.Node, target: Any, arguments: Any, options: Mapping[str, Any] | None = None
) -> fx.Node:
    """A call in the place of another node, with the value that it has."""
    made = graph.call_function(target, arguments, dict(options or {}))
    values, named = fx.map_arg((made.args, made.kwargs), lambda item: item.meta["val"])
    made.meta = {**source.meta, "val": target(*values, **named)}
    return made
