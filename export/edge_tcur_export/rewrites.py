"""Passes over a traced forward program that write operators out which a target cannot take or differentiate.

Each changes the program in place and does nothing where its operator is absent; each has its test in
tests/export/test_rewrites.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

_aten = torch.ops.aten


class _Writer:
    """Adds operators in the place of a node, with their values and the module that the node came from."""

    def __init__(self, graph: fx.Graph, node: fx.Node) -> None:
        self._graph, self._node = graph, node

    def __call__(self, target: Callable[..., Any], *arguments: Any) -> fx.Node:
        added = self._graph.call_function(target, arguments)
        values = fx.map_arg(arguments, lambda item: item.meta["val"])
        added.meta = {**self._node.meta, "val": target(*values)}
        return added


def _rewrite(
    program: ExportedProgram, target: Any, write: Callable[[_Writer, fx.Node], fx.Node | None]
) -> ExportedProgram:
    """Replaces the nodes of one operator by what `write` adds for them; None leaves one as it is."""
    graph = program.graph_module.graph
    for node in graph.find_nodes(op="call_function", target=target):
        with graph.inserting_before(node):
            written = write(_Writer(graph, node), node)
        if written is not None:
            node.replace_all_uses_with(written)
            graph.erase_node(node)
    program.graph_module.recompile()
    return program


def write_instance_norms(program: ExportedProgram) -> ExportedProgram:
    """Instance normalisation by means: ONNX Runtime Training has no gradient for it, and torch's own way
    through batch normalisation over [1, batch * channels] fixes the batch size in ExecuTorch."""
    return _rewrite(program, _aten.instance_norm.default, _instance_norm)


def _instance_norm(add: _Writer, node: fx.Node) -> fx.Node | None:
    x, weight, bias, _, _, own_statistics, _, epsilon, *_ = node.args
    if not own_statistics:
        return None  # it is a batch normalisation then
    size = x.meta["val"].dim()  # type: ignore[union-attr]
    axes = list(range(2, size))
    centred = add(_aten.sub.Tensor, x, add(_aten.mean.dim, x, axes, True))
    variance = add(_aten.mean.dim, add(_aten.mul.Tensor, centred, centred), axes, True)
    scale = add(_aten.rsqrt.default, add(_aten.add.Tensor, variance, epsilon))
    result = add(_aten.mul.Tensor, centred, scale)
    for factor, combine in ((weight, _aten.mul.Tensor), (bias, _aten.add.Tensor)):
        if factor is not None:
            result = add(combine, result, add(_aten.view.default, factor, [-1, *[1] * len(axes)]))
    return result


def write_batch_norms(program: ExportedProgram) -> ExportedProgram:
    """Batch normalisation with frozen statistics by a factor and a sum: in ONNX Runtime Training's graph the
    operator would take the statistics of the batch."""
    return _rewrite(program, _aten.batch_norm.default, _batch_norm)


def _batch_norm(add: _Writer, node: fx.Node) -> fx.Node | None:
    x, weight, bias, mean, variance, training, _, epsilon, *_ = node.args
    if training or mean is None:
        return None
    shape = [-1, *[1] * (x.meta["val"].dim() - 2)]  # type: ignore[union-attr]
    factor = add(_aten.rsqrt.default, add(_aten.add.Tensor, variance, epsilon))
    if weight is not None:
        factor = add(_aten.mul.Tensor, factor, weight)
    shift = add(_aten.neg.default, add(_aten.mul.Tensor, mean, factor))
    if bias is not None:
        shift = add(_aten.add.Tensor, bias, shift)
    scaled = add(_aten.mul.Tensor, x, add(_aten.view.default, factor, shape))
    return add(_aten.add.Tensor, scaled, add(_aten.view.default, shift, shape))


def write_transposed_convolutions(program: ExportedProgram) -> ExportedProgram:
    """Transposed convolutions whose steps do not overlap by one matrix product: ONNX Runtime Training has no
    kernel for the gradient of the operator on a CPU."""
    for target in (
        _aten.conv_transpose1d.default,
        _aten.conv_transpose2d.input,
        _aten.conv_transpose3d.input,
    ):
        _rewrite(program, target, _transposed_convolution)
    return program


def _transposed_convolution(add: _Writer, node: fx.Node) -> fx.Node | None:
    places = node.args[0].meta["val"].dim() - 2  # type: ignore[union-attr]
    defaults = (None, [1] * places, [0] * places, [0] * places, 1, [1] * places)
    arguments: tuple[Any, ...] = node.args
    x, weight, given = arguments[0], arguments[1], arguments[2:]
    options: tuple[Any, ...] = (*given, *defaults[len(given) :])
    bias, stride, padding, extra, groups, dilation = options
    channels, filters, *kernel = weight.meta["val"].shape
    whole = (list(stride), groups, any(padding), any(extra), set(dilation))
    if whole != (kernel, 1, False, False, {1}):
        return None
    sides = x.meta["val"].shape[2:]
    if not all(isinstance(side, int) for side in sides):
        return None
    batch = add(_aten.sym_size.int, x, 0)  # a -1 would become a quotient that later guards cannot solve
    last = [0, *range(2, 2 + places), 1]
    rows = add(_aten.reshape.default, add(_aten.permute.default, x, last), [-1, channels])
    matrix = add(_aten.reshape.default, weight, [channels, filters * math.prod(kernel)])
    product = add(_aten.mm.default, rows, matrix)  # [places of the input, filters * steps]
    parts = add(_aten.reshape.default, product, [batch, *sides, filters, *kernel])
    order = [0, 1 + places]
    for axis in range(places):
        order += [1 + axis, 2 + places + axis]
    sizes = [side * step for side, step in zip(sides, kernel, strict=True)]
    result = add(_aten.reshape.default, add(_aten.permute.default, parts, order), [batch, filters, *sizes])
    if bias is None:
        return result
    return add(_aten.add.Tensor, result, add(_aten.view.default, bias, [-1, *[1] * places]))


def rewrite(program: ExportedProgram) -> ExportedProgram:
    """All passes of this module."""
    for write in (write_instance_norms, write_batch_norms, write_transposed_convolutions):
        write(program)
    return program
