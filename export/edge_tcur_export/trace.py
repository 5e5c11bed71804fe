"""A base and its adapted layers as one function of inputs, targets and factors, traced by torch.export.

Every linear weight is held transposed, [n2, n1], as ONNX MatMul reads it: one stored copy then serves
the product, the gathered columns and the gathered rows. The factors are arguments, so rows, columns,
core and rank stay free in the exported graphs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree

from edge_tcur.errors import ExportError
from edge_tcur.method.config import TCurConfig
from edge_tcur.method.targets import Group
from edge_tcur.method.tproduct import coupling_constants, coupling_matrix
from edge_tcur.method.views import View, find_view
from edge_tcur.models import Base
from edge_tcur.models.base import example_inputs
from edge_tcur.tasks import Task
from edge_tcur_export.convolution import FrozenConvolution, FrozenLayer, Parts, Update, Updates
from edge_tcur_export.decompositions import BACKWARD, Table
from edge_tcur_export.failures import explained, explained_backward
from edge_tcur_export.narrow import narrow
from edge_tcur_export.rewrites import rewrite
from edge_tcur_runtime.formats.factors import SKETCH, factor_parts

# core [n3, r, r] and the frozen factors: rows, cols int32 [b, r], or left [n3, n1, r], right [n3, r, n2]
GroupFactors = tuple[Tensor, Tensor, Tensor]
PREFIX = "model."  # what `FactorModel` puts before the names of the base
TARGETS = "labels"  # name of the targets in every graph
OUTPUTS = ("loss", "logits", "metric")  # of the forward pass, before any gradients
EXAMPLE_LENGTH = 16  # tokens of an example, where the base takes as many


class _Coupled:
    """Slices that a transform couples: the factored form."""

    def __init__(
        self, group: Group, transform: str, layers: Sequence[FrozenLayer], factors: GroupFactors
    ) -> None:
        core, rows, cols = factors
        self._size = group.size
        self._constants = coupling_constants(transform, group.size)
        self._blocks = []
        for block in range(group.blocks):
            part = slice(block * group.size, (block + 1) * group.size)
            own = layers[part]
            rows_t = torch.cat([layer.rows_t(rows[block]) for layer in own], dim=1)
            columns_t = torch.cat([layer.columns_t(cols[block]) for layer in own], dim=0)
            self._blocks.append((core if group.blocks == 1 else core[part], rows_t, columns_t))

    def parts(self, position: int) -> Parts:
        """See `Update`."""
        block, place = divmod(position, self._size)
        core, rows_t, columns_t = self._blocks[block]
        return Parts(rows_t, coupling_matrix(core, self._constants[place]), columns_t)


class _Alone:
    """Slices alone, in factored form."""

    def __init__(self, group: Group, layers: Sequence[FrozenLayer], factors: GroupFactors) -> None:
        core, self._rows, self._cols = factors
        self._cores = core.chunk(core.shape[0])
        self._places = torch.arange(group.n1, dtype=self._rows.dtype)
        self._size = group.size
        self._layers = layers

    def parts(self, position: int) -> Parts:
        """See `Update`."""
        block = position // self._size
        columns_t = self._layers[position].columns_t(self._cols[block])
        return Parts(self._rows[block], self._cores[position].squeeze(0).T, columns_t, self._places)


class _Sketched:
    """A core between vectors that are fed."""

    def __init__(self, factors: GroupFactors) -> None:
        self._core, self._left, self._right = factors

    def parts(self, position: int) -> Parts:
        """See `Update`."""
        return Parts(self._right[position].T, self._core[position].T, self._left[position].T)


class FrozenLinear(FrozenLayer):
    """A linear layer with its weight stored transposed, and its group's update where it has one."""

    weight_t: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Module, view: View, *, trains_bias: bool = False) -> None:
        super().__init__()
        self._trains_bias = trains_bias
        self.register_buffer("weight_t", view.matrix(linear).detach().T.contiguous())
        bias = cast("Tensor | None", linear.bias)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @property
    def weight(self) -> Tensor:
        """[n1, n2], for a model that asks its dtype, device or shape. Of a layer with an update all entries
        are NaN: what a model computes with them would pass the update by."""
        if self._update is None:
            return self.weight_t.T
        return self.weight_t.new_full((), float("nan")).expand(self.weight_t.shape[::-1])

    def rows_t(self, rows: Tensor) -> Tensor:
        """See `FrozenLayer`."""
        return self.weight_t.index_select(1, rows)

    def columns_t(self, cols: Tensor) -> Tensor:
        """See `FrozenLayer`."""
        return self.weight_t.index_select(0, cols)

    def forward(self, x: Tensor) -> Tensor:
        """[..., n2] -> [..., n1]. Works on rows: each product of a tensor of more axes would be traced with
        two reshapes of its own, forward and backward, and their sizes computed in the graph."""
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        output = rows @ self.weight_t
        if self.bias is not None:
            output = output + self.bias
        parts = self.update()
        if parts is not None:
            places = parts.places
            features = rows @ parts.rows if places is None else self._pick(output, parts.rows, places)
            output = output + (features @ parts.matrix) @ parts.columns
        return output if x.dim() == 2 else output.reshape(*x.shape[:-1], output.shape[-1])

    def _pick(self, output: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        """``x R`` [tokens, r], the rows `rows` [r] of the weight: picked from the layer's output.

        Those rows lie across the stored, transposed matrix: to gather them is to read single numbers from all
        over the file on every step. By a product with ones, whose backward pass is another one: that of an
        index is a scatter. (`edge_tcur_export.picks` makes an index of it where there is no backward.)
        """
        ones = (rows.unsqueeze(1) == places).to(output.dtype)  # [r, n1]
        picked = output @ ones.T
        if self.bias is None:
            return picked
        own = self.bias.unsqueeze(0) @ ones.T if self._trains_bias else self.bias.index_select(0, rows)
        return picked - own


class FactorModel(nn.Module):
    """``forward(inputs, targets, factors, extras) -> (loss, outputs, metric)`` over a frozen base.

    Args:
        base: consumed: its linear layers are replaced and its parameters become buffers.
        groups: the adapted groups.
        task: gives loss and metric.
        config: says which factors there are and what couples them.
    """

    def __init__(self, base: Base, groups: tuple[Group, ...], task: Task, config: TCurConfig) -> None:
        super().__init__()
        self.model = base.model
        self._task = task
        self._extras = tuple(base.extra_parameters(config.modules_to_save))
        self._updates = Updates()
        self._layers: dict[str, list[FrozenLayer]] = {}
        self._groups = {group.name: group for group in groups}
        self._config = config
        tied = _tied(self.model)
        for name, module in list(self.model.named_modules()):
            view = find_view(module)
            alone = f"{name}.weight" not in self._extras and id(getattr(module, "weight", None)) not in tied
            if isinstance(view, View) and view.is_linear and alone:
                trains_bias = f"{name}.bias" in self._extras
                _set_module(self.model, name, FrozenLinear(module, view, trains_bias=trains_bias))
        for group in groups:
            layers = [_frozen_layer(self.model, name) for name in group.modules]
            self._layers[group.name] = layers
            for position, layer in enumerate(layers):
                layer.adapt(self._updates, group.name, position)
        _freeze(self.model)

    def forward(
        self,
        inputs: dict[str, Tensor],
        targets: Tensor,
        factors: dict[str, GroupFactors],
        extras: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean loss (scalar), outputs and metric (scalar); the last two are detached: only the loss has a
        backward."""
        outputs = self.outputs(inputs, factors, extras)
        detached = outputs.detach()
        return self._task.loss(outputs, targets), detached, self._task.measure(detached, targets)

    def outputs(
        self, inputs: dict[str, Tensor], factors: dict[str, GroupFactors], extras: dict[str, Tensor]
    ) -> Tensor:
        """Outputs of the base under the factors and extras."""
        for group, layers in self._layers.items():
            self._updates.by_group[group] = self._update(self._groups[group], layers, factors[group])
        outputs: Tensor = torch.func.functional_call(self.model, extras, kwargs=inputs)
        self._updates.by_group.clear()
        return outputs

    def _update(self, group: Group, layers: Sequence[FrozenLayer], factors: GroupFactors) -> Update:
        if self._config.frame == SKETCH:
            return _Sketched(factors)
        if self._config.domain == "identity" or group.size == 1:
            return _Alone(group, layers, factors)
        return _Coupled(group, self._config.domain, layers, factors)


def _tied(model: nn.Module) -> set[int]:
    """Parameters that several modules hold, such as the embedding that is a language model's head too: stored
    transposed for one of them, they would be stored twice. They are never adapted (`find_targets`)."""
    holders = Counter(
        id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False)
    )
    return {parameter for parameter, count in holders.items() if count > 1}


def _frozen_layer(model: nn.Module, name: str) -> FrozenLayer:
    """The layer of that name; a convolution, which only an update makes another module, is replaced."""
    module = model.get_submodule(name)
    if not isinstance(module, FrozenLayer):
        module = FrozenConvolution(module)
        _set_module(model, name, module)
    return module


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _freeze(model: nn.Module) -> None:
    """Turns parameters into buffers: the joint export refuses a parameter that gets no gradient."""
    shared: dict[int, Tensor] = {}
    for module in model.modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, leaf)
            module.register_buffer(leaf, shared.setdefault(id(parameter), parameter.detach()))


@dataclass(frozen=True)
class Signature:
    """Names of a traced program's inputs and outputs, in order."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Traced:
    """A traced program and the names that its graph gets."""

    program: ExportedProgram
    signature: Signature


@dataclass(frozen=True)
class Example:
    """Arguments of `FactorModel.forward` for tracing and for parity."""

    inputs: dict[str, Tensor]
    targets: Tensor
    factors: dict[str, GroupFactors]
    extras: dict[str, Tensor]
    parts: tuple[str, ...]

    def arguments(self) -> tuple[Any, ...]:
        """Positional arguments."""
        return (self.inputs, self.targets, self.factors, self.extras)

    def named(self) -> dict[str, Tensor]:
        """Every tensor by its name in the graphs, in signature order."""
        result = {**self.inputs, TARGETS: self.targets}
        for group, parts in self.factors.items():
            names = (f"{group}.{part}" for part in self.parts)
            result |= dict(zip(names, parts, strict=True))
        return result | self.extras

    def trained(self) -> dict[str, Tensor]:
        """The tensors that get gradients: every core, and the extras."""
        return {f"{group}.core": parts[0] for group, parts in self.factors.items()} | self.extras


def make_example(
    base: Base,
    groups: tuple[Group, ...],
    rank: Callable[[Group], int],
    *,
    batch: int,
    seed: int,
    config: TCurConfig,
    task: Task,
) -> Example:
    """Random arguments: valid frozen factors, a small core, head values around zero.

    Args:
        rank: of each group; no larger than its sizes.
        config: says which factors and extras there are.
        task: says what targets are.
    """
    generator = torch.Generator().manual_seed(seed)
    length = min(EXAMPLE_LENGTH, int(base.preprocessing.get("max_length", EXAMPLE_LENGTH)))
    inputs = example_inputs(base.inputs, {"batch": batch, "sequence": length}, seed)
    with torch.no_grad():
        targets = task.example_targets(base.model(**inputs), generator)

    def pick(group: Group, size: int) -> Tensor:
        count = rank(group)
        picks = [torch.randperm(size, generator=generator)[:count] for _ in range(group.blocks)]
        return torch.stack([torch.sort(part).values for part in picks]).to(torch.int32)

    factors = {}
    for group in groups:
        count, n3 = rank(group), len(group.modules)
        core = 0.02 * torch.randn(n3, count, count, generator=generator)
        if config.frame == SKETCH:
            left = torch.randn(n3, group.n1, count, generator=generator) / group.n1**0.5
            right = torch.randn(n3, count, group.n2, generator=generator) / group.n2**0.5
            factors[group.name] = (core, left, right)
        else:
            factors[group.name] = (core, pick(group, group.n1), pick(group, group.n2))
    extras = {
        name: 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in base.extra_parameters(config.modules_to_save).items()
    }
    example = Example(inputs, targets, factors, extras, factor_parts(config.frame))
    for value in example.trained().values():
        value.requires_grad_(True)
    return example


def free_axes(base: Base, limits: Mapping[str, int]) -> Callable[[tuple[int | str, ...]], dict[int, Any]]:
    """From the axes of an input to its dynamic shape.

    Args:
        limits: largest size of ``batch``, and of ``sequence`` where that is below the base's.
    """
    axes: dict[str, Any] = {"batch": Dim("batch", min=1, max=limits["batch"])}
    if "max_length" in base.preprocessing:
        longest = int(base.preprocessing["max_length"])
        axes["sequence"] = Dim("sequence", min=2, max=min(longest, limits.get("sequence", longest)))
    return lambda shape: {place: axes[axis] for place, axis in enumerate(shape) if isinstance(axis, str)}


def _dynamic_shapes(base: Base, groups: tuple[Group, ...], task: Task, example: Example) -> tuple[Any, ...]:
    dynamic = free_axes(base, {"batch": 2**16})
    factors: dict[str, tuple[dict[int, Any], ...]] = {}
    for position, group in enumerate(groups):
        largest = min(group.n1, group.n2)  # a weight of one row or column has one rank
        rank = Dim(f"rank_{position}", min=1, max=largest) if largest > 1 else None
        indices = example.parts == factor_parts("raw")
        factors[group.name] = ({1: rank, 2: rank}, {1 if indices else 2: rank}, {1: rank})
    inputs = {name: dynamic(spec.shape) for name, spec in base.inputs.items()}
    return (
        inputs,
        dynamic(task.target_axes(base.inputs, base.labels)),
        factors,
        {name: {} for name in example.extras},
    )


def trace_forward(
    model: FactorModel, base: Base, groups: tuple[Group, ...], task: Task, example: Example
) -> Traced:
    """Traces the forward pass with free batch, sequence and ranks: outputs `OUTPUTS`.

    Raises:
        ExportError: torch.export cannot trace the model; the module and line are named.
    """
    shapes = _dynamic_shapes(base, groups, task, example)
    program = trace_program(model, example.arguments(), shapes)
    return Traced(program, Signature(tuple(example.named()), OUTPUTS))


def trace_program(model: nn.Module, arguments: tuple[Any, ...], shapes: tuple[Any, ...]) -> ExportedProgram:
    """Traces one call of a module.

    Raises:
        ExportError: torch.export cannot trace it; the module and line are named.
    """

    def export() -> ExportedProgram:
        return torch.export.export(
            model,
            arguments,
            dynamic_shapes=shapes,
            # A guard such as min(4 r, 4 r^2) == 4 r holds for every rank but cannot be solved by the
            # tracer; as an assertion at run time it is dropped by the conversions.
            prefer_deferred_runtime_asserts_over_guards=True,
        )

    return narrow(rewrite(explained(export, model)))


def trace_backward(program: ExportedProgram, table: Table | None = None) -> ExportedProgram:
    """The joint program of a traced one: its outputs, the first of them the loss, and then the gradients.

    Args:
        table: decompositions besides torch's core ones and `BACKWARD`.

    Raises:
        ExportError: an operator of the model has no backward that can be traced.
    """
    return explained_backward(lambda: _joint(program, BACKWARD | (table or {})), program)


def _joint(program: ExportedProgram, table: Table) -> ExportedProgram:
    """What `torch.export.experimental._export_forward_backward` does, which takes no decompositions."""
    from torch._decomp import core_aten_decompositions
    from torch.export import experimental
    from torch.export.exported_program import _decompose_exported_program

    # Fused attention that a model calls for has a backward without decomposition; this way has one.
    with sdpa_kernel(SDPBackend.MATH):
        joint = _decompose_exported_program(
            program,
            cia_to_decomp={},
            python_decomp_table={**core_aten_decompositions(), **table},
            joint_loss_index=0,
            decompose_custom_triton_ops=False,
        )
    module, signature = experimental._copy_graph_module_and_signature(joint)
    experimental._remove_detach_pass(module, signature)
    result: ExportedProgram = joint._update(module, signature)
    return result


def trace_step(forward: Traced, example: Example) -> Traced:
    """Forward and backward in one program: outputs `OUTPUTS` and ``<factor>.grad`` of each core and
    extra.

    Raises:
        ExportError: an operator of the model has no backward that can be traced.
    """
    program = trace_backward(forward.program)
    order = _gradient_order(program, forward.signature)
    wanted = [name for name, value in example.trained().items() if value.requires_grad]
    if set(order) != set(wanted):
        raise ExportError(f"gradients came out for {order}; expected {wanted}")
    for spec in program.graph_signature.output_specs:
        spec.kind, spec.target = OutputKind.USER_OUTPUT, None
    outputs = (*OUTPUTS, *(f"{name}.grad" for name in order))
    program.module_call_graph[0].signature.out_spec = _pytree.tree_structure(tuple(range(len(outputs))))
    return Traced(program, Signature(forward.signature.inputs, outputs))


def _gradient_order(program: ExportedProgram, signature: Signature) -> list[str]:
    """The name of the input that each gradient output belongs to."""
    user_inputs = list(program.graph_signature.user_inputs)
    names: dict[str, str] = dict(zip(map(str, user_inputs), signature.inputs, strict=True))
    # torch 2.13 names these targets after the position of the argument, not after the placeholder.
    for position, spec in enumerate(program.graph_signature.input_specs):
        names.setdefault(f"arg{position}_1", names.get(getattr(spec.arg, "name", ""), ""))
    kinds = (OutputKind.GRADIENT_TO_USER_INPUT, OutputKind.GRADIENT_TO_PARAMETER)
    return [names[str(spec.target)] for spec in program.graph_signature.output_specs if spec.kind in kinds]


def stored_weight(parameter: str) -> tuple[str, str]:
    """The graph's names of an adapted parameter of the base: stored transposed (linear layers), and stored
    as it is (convolutions)."""
    module = parameter.removesuffix(".weight")
    return f"{PREFIX}{module}.weight_t", f"{PREFIX}{parameter}"
