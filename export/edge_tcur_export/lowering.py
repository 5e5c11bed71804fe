"""Passes between torch's traced programs and ExecuTorch, each with its test in tests/export/test_lowering.py.

ExecuTorch 1.5.1 takes the joint forward and backward program, with what these passes repair: see
docs/traps.md.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.experimental import _copy_graph_module_and_signature
from torch.export.graph_signature import InputKind

from edge_tcur.models.quiet import import_quietly
from edge_tcur_export.quiet import quiet_torch

PORTABLE, XNNPACK, VULKAN = "portable", "xnnpack", "vulkan"
_Pass = Callable[[fx.GraphModule], fx.GraphModule]
_IDLE = (torch.ops.aten.alias.default, torch.ops.aten.detach.default)
_ASSERTIONS = (torch.ops.aten._assert_scalar.default, torch.ops.aten._assert_tensor_metadata.default)
# Copies in ExecuTorch's edge dialect: without effect where shape and dtype stay.
_COPIES = frozenset({
    "_clone_dim_order", "_to_dim_order_copy", "alias_copy", "expand_copy", "slice_copy", "view_copy",
})  # fmt: skip
_SMALLEST = 64  # a matrix product with a smaller side is no faster in XNNPACK than outside
_MOST_AXES = 6  # XNN_MAX_TENSOR_DIMS
_SWALLOWING = (
    "AddmmConfig",
    "BatchNormConfig",
    "ConvolutionConfig",
    "LinearConfig",
    "MMConfig",
    "PreluConfig",
)


def drop_idle(program: ExportedProgram) -> ExportedProgram:
    """Removes aliases and assertions: ExecuTorch has no kernel for either."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _IDLE:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.op == "call_function" and node.target in _ASSERTIONS:
            graph.erase_node(node)
    results = graph.output_node().args[0]
    for spec, node in zip(program.graph_signature.output_specs, results, strict=True):
        spec.arg.name = node.name  # an output that was an alias has another name now
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


_VIEWS = (
    torch.ops.aten.view.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten.flatten.using_ints,
)


def reshape_weights(program: ExportedProgram) -> ExportedProgram:
    """Keeps no view of a frozen tensor: ExecuTorch cannot emit one of a tensor that lies in another file.

    A tensor that is only read in one other shape is held in that shape, under a name of its own. One that is
    read in several (the kernel of an adapted convolution, whose columns are picked from a matrix) is copied
    while the program runs.
    """
    graph, signature = program.graph_module.graph, program.graph_signature
    for spec in signature.input_specs:
        if spec.kind is not InputKind.BUFFER:
            continue
        weight = next(node for node in graph.nodes if node.op == "placeholder" and node.name == spec.arg.name)
        views = [user for user in weight.users if user.target in _VIEWS]
        shapes = {tuple(view.meta["val"].shape) for view in views}
        if len(views) == len(weight.users) and len(shapes) == 1:
            spec.target = _hold_in(program, str(spec.target), shapes.pop())
            weight.meta = {**weight.meta, "val": views[0].meta["val"]}
            for view in views:
                view.replace_all_uses_with(weight)
                graph.erase_node(view)
        else:
            _copy_for(graph, weight, views)
    program.graph_module.recompile()
    return program


def _hold_in(program: ExportedProgram, target: str, shape: tuple[int, ...]) -> str:
    """Reshapes a frozen tensor of a program; its new name."""
    named = f"{target}_{'x'.join(map(str, shape))}"
    held = program.state_dict if target in program.state_dict else program.constants
    held[named] = held[target].reshape(shape)
    del held[target]
    return named


def _copy_for(graph: fx.Graph, weight: fx.Node, views: Sequence[fx.Node]) -> None:
    for view in views:
        with graph.inserting_before(view):
            copy = graph.call_function(torch.ops.aten.clone.default, (weight,))
        copy.meta = dict(weight.meta)
        view.replace_input_with(weight, copy)


def batch_products(module: fx.GraphModule) -> fx.GraphModule:
    """Writes large matrix products as batches of one, in the edge dialect.

    XNNPACK takes an ``mm`` only where the second matrix is a constant that it packs into the program, a
    second copy of the weight for the forward pass and a third for the backward one. A ``bmm`` takes both
    from outside, so that weights stay in the one base file.
    """
    for node in list(module.graph.nodes):
        if node.op == "call_function" and _short_name(node) == "mm" and _is_large(node):
            _batch(module.graph, node)
    module.recompile()
    return module


def _is_large(node: fx.Node) -> bool:
    sizes = [size for argument in node.args for size in argument.meta["val"].shape]  # type: ignore[union-attr]
    return all(not isinstance(size, int) or size >= _SMALLEST for size in sizes)


def _batch(graph: fx.Graph, node: fx.Node) -> None:
    from executorch.exir.dialects._ops import ops

    def add(target: Callable[..., Any], *arguments: Any) -> fx.Node:
        added = graph.call_function(target, arguments)
        values = [item.meta["val"] if isinstance(item, fx.Node) else item for item in arguments]
        added.meta = {**node.meta, "val": target(*values)}
        return added

    aten = ops.edge.aten
    with graph.inserting_before(node):
        left, right = (add(aten.unsqueeze_copy.default, argument, 0) for argument in node.args)
        product = add(aten.squeeze_copy.dims, add(aten.bmm.default, left, right), [0])
    node.replace_all_uses_with(product)
    graph.erase_node(node)


def drop_copies(module: fx.GraphModule) -> fx.GraphModule:
    """Removes copies that change neither shape nor dtype, in the edge dialect.

    XNNPACK removes them itself after it has cut the program into parts, and then refuses a part that hands
    one of its inputs on as an output: the joint program of a BERT has such parts, around its softmax.
    """
    for node in list(module.graph.nodes):
        if node.op != "call_function" or _short_name(node) not in _COPIES:
            continue
        if node.args[0].op == "placeholder" and any(_short_name(user) == "view_copy" for user in node.users):
            continue  # see `reshape_weights`
        before, after = node.args[0].meta["val"], node.meta["val"]
        if before.shape == after.shape and before.dtype == after.dtype:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    module.recompile()
    return module


def _short_name(node: fx.Node) -> str:
    """``view_copy`` of ``aten.view_copy.default``."""
    parts = getattr(node.target, "__name__", "").split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def import_executorch() -> Any:
    """`executorch.exir`, without what its import says: libraries that are missing and not needed here.

    It must come before any other part of ExecuTorch: its modules import each other in circles.
    """
    return import_quietly("executorch.exir")


def xnnpack() -> list[Any]:
    """Partitioners for XNNPACK, without the operators that would pack a copy of a weight."""
    import_executorch()
    with quiet_torch():
        from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    # It warns of a conversion without its partitioner, which takes apart what it keeps whole: `_keeps_any`.
    logging.getLogger(XnnpackPartitioner.__module__).setLevel(logging.ERROR)
    configs = [config for config in ALL_PARTITIONER_CONFIGS if config.__name__ not in _SWALLOWING]

    class Bounded(XnnpackPartitioner):  # type: ignore[misc]
        """Leaves outside what XNNPACK takes and cannot load: tensors of more axes than it has."""

        def get_matched_nodes_from_configs(self, ep: ExportedProgram) -> list[list[fx.Node]]:
            found: list[list[fx.Node]] = super().get_matched_nodes_from_configs(ep)
            return [nodes for nodes in found if max(map(_axes, nodes)) <= _MOST_AXES]

    return [Bounded(configs=configs)]


def _axes(node: fx.Node) -> int:
    """The most axes of a tensor that a node reads or makes."""
    values = (item.meta.get("val") for item in (node, *node.all_input_nodes))
    return max((value.dim() for value in values if isinstance(value, torch.Tensor)), default=0)


def vulkan() -> list[Any]:
    """A partitioner for Vulkan that takes every batch and length up to the limits.

    Its delegates hold copies of the weights that they read, in the layout of the GPU.
    """
    import_executorch()
    root = logging.getLogger()
    level = root.level
    with quiet_torch():
        from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner
    root.setLevel(level)  # its import makes the root logger talk
    return [VulkanPartitioner({"require_dynamic_shapes": True})]


def left_over(program: ExportedProgram) -> dict[str, int]:
    """Operators outside every delegate, with how often, the most frequent first."""
    names = Counter(
        _short_name(node)
        for node in program.graph_module.graph.nodes
        if node.op == "call_function" and _short_name(node) not in {"executorch_call_delegate", "getitem"}
    )
    return dict(names.most_common())


class Lowering:
    """One traced program on its way to several backends.

    Most of a lowering is the conversion into ExecuTorch's edge dialect, which depends on a backend only where
    that one keeps an operator of the program whole (XNNPACK a pooling, Vulkan many): otherwise it is done
    once for all of them.

    Args:
        program: traced; used up.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self._traced = program

    @cached_property
    def program(self) -> ExportedProgram:
        """The traced program as ExecuTorch can take it."""
        return reshape_weights(drop_idle(self._traced))

    @cached_property
    def _plain(self) -> ExportedProgram:
        """In the edge dialect, no operator kept whole."""
        exir = import_executorch()
        edge = exir.to_edge(_copied(self.program), compile_config=_settings())
        result: ExportedProgram = edge.transform(_as_passes([drop_copies])).exported_program()
        return result

    def lower(self, backend: str) -> Any:
        """The edge program for a backend, its parts handed to that (executorch.exir.EdgeProgramManager)."""
        exir = import_executorch()
        partitioners, passes = _PARTITIONERS[backend](), _PASSES.get(backend, ())
        if _keeps_any(self.program, partitioners):
            return exir.to_edge_transform_and_lower(
                _copied(self.program),
                transform_passes=_as_passes([drop_copies, *passes]),
                partitioner=partitioners,
                compile_config=_settings(),
            )
        edge = exir.EdgeProgramManager(_copied(self._plain), compile_config=_settings())
        edge = edge.transform(_as_passes(passes))
        for partitioner in partitioners:
            edge = edge.to_backend(partitioner)
        return edge


def _settings() -> Any:
    # The joint program has operators of the backward pass that are not in the core set.
    return import_executorch().EdgeCompileConfig(_check_ir_validity=False)


_PARTITIONERS: dict[str, Callable[[], list[Any]]] = {PORTABLE: list, XNNPACK: xnnpack, VULKAN: vulkan}
_PASSES: dict[str, Sequence[_Pass]] = {XNNPACK: (batch_products,)}


def _copied(program: ExportedProgram) -> ExportedProgram:
    """A program with a graph of its own over the same tensors: a lowering changes the graph in place."""
    module, signature = _copy_graph_module_and_signature(program)
    result: ExportedProgram = program._update(module, signature)
    return result


def _keeps_any(program: ExportedProgram, partitioners: Sequence[Any]) -> bool:
    """Whether a backend keeps an operator of the program that would else be taken apart."""
    kept = {target for partitioner in partitioners for target in partitioner.ops_to_not_decompose(program)[0]}
    return any(node.target in kept for node in program.graph_module.graph.nodes)


def _as_passes(passes: Sequence[_Pass]) -> list[Any]:
    from executorch.exir.pass_base import ExportPass, PassResult

    class Run(ExportPass):  # type: ignore[misc]
        """One of the passes of this module, as ExecuTorch calls them."""

        def __init__(self, run: _Pass) -> None:
            super().__init__()
            self._run = run

        def call(self, graph_module: fx.GraphModule) -> Any:
            return PassResult(self._run(graph_module), True)

    return [Run(run) for run in passes]
