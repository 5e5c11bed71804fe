"""Traced program -> ONNX graph, by small passes that each say what they change.

`to_graph` converts and names; the passes below change a graph in place and return it, in the order
in which `bundle.build` calls them. Each has its test in tests/export/test_graph.py.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch.export import ExportedProgram

from edge_tcur.errors import ExportError
from edge_tcur_export.divergence import PROGRAM
from edge_tcur_export.failures import EAGER
from edge_tcur_export.operators import remember_modules
from edge_tcur_export.quiet import quiet_torch
from edge_tcur_export.trace import PREFIX, TARGETS, Traced

OPSET = 20
_MISSING = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.]+)'")
# The exporter drops these, so they need no ONNX form.
_ASSERTIONS = (torch.ops.aten._assert_scalar.default, torch.ops.aten._assert_tensor_metadata.default)
_INDICES = (ir.DataType.INT32, ir.DataType.INT64)
IR_VERSION = 10  # ONNX Runtime Training 1.19.2 reads IR 10 and older; onnx writes newer ones


def to_graph(traced: Traced) -> ir.Model:
    """Converts a traced program, names its inputs and outputs, and folds what is constant.

    The exporter's own optimiser is left out: its pattern rewriter takes longer than everything else
    together on a graph with a backward pass, and ONNX Runtime applies the same rewrites at load.

    Raises:
        ExportError: an operator of torch has no ONNX form.
    """
    from onnxscript.optimizer import fold_constants

    converted = _convert(traced.program)
    model = converted.model
    model.meta[PROGRAM] = converted.exported_program
    # The transpose of a weight would become a second copy of it; limits count elements, not bytes.
    fold_constants(
        model,
        onnx_shape_inference=False,
        input_size_limit=256,
        output_size_limit=256,
        should_fold=lambda node: False if node.op_type == "Transpose" else None,
    )
    for clean in (
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),  # it sees constants, not initializers
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.RemoveUnusedNodesPass(),
    ):
        clean(model)
    merge_reshapes(model)
    read_indices_as_fed(model)
    remember_modules(model, PREFIX)
    clear_metadata(model)
    _name(model.graph.inputs, traced.signature.inputs)
    _name(model.graph.outputs, traced.signature.outputs)
    model.ir_version = IR_VERSION
    return read_sizes_from_inputs(model, TARGETS)


def merge_reshapes(model: ir.Model) -> ir.Model:
    """Skips the first of two reshapes in a row: torch flattens around every linear layer.

    A shape that copies sizes of its input (a zero without ``allowzero``) needs the first one.
    """
    for node in model.graph:
        before = node.inputs[0].producer() if node.op_type == "Reshape" and node.inputs[0] else None
        if before is None or before.op_type != "Reshape":
            continue
        shape = node.inputs[1]
        sizes = None if shape is None or shape.const_value is None else shape.const_value.numpy()
        if node.attributes.get_int("allowzero", 0) == 1 or (sizes is not None and sizes.all()):
            node.replace_input_with(0, before.inputs[0])
    common.RemoveUnusedNodesPass()(model)
    return model


def read_indices_as_fed(model: ir.Model) -> ir.Model:
    """Lets every Gather read a list of indices itself in the place of its conversion to int64, behind a
    Reshape that changes nothing, which the exporter puts in front of each: Gather takes int32 as well."""
    for node in [node for node in model.graph if node.op_type == "Gather"]:
        table, index = node.inputs
        while (made := None if index is None else index.producer()) and _keeps_indices(made):
            index = made.inputs[0]
        if table is None or index is None or index.dtype not in _INDICES or len(index.shape or ()) != 1:
            continue
        if len(table.shape or ()) == len(node.outputs[0].shape or ()):  # a list in the node's eyes too
            node.replace_input_with(1, index)
    common.RemoveUnusedNodesPass()(model)
    return model


def _keeps_indices(node: ir.Node) -> bool:
    return node.op_type == "Reshape" or (
        node.op_type == "Cast" and node.attributes.get_int("to", 0) in {int(dtype) for dtype in _INDICES}
    )


def _convert(program: ExportedProgram) -> torch.onnx.ONNXProgram:
    try:
        with quiet_torch(), _one_registry():
            converted = torch.onnx.export(
                _without_idle_decomposition(program),
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                optimize=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        missing = _MISSING.search(str(error))
        fused = missing is not None and "attention" in missing[1]
        raise ExportError(
            f"torch's operator {missing[1]} has no ONNX form"
            if missing
            else "torch.onnx cannot convert the model",
            hint=EAGER
            if fused
            else "replace it in the model by operators that have one; --debug shows torch's own report",
        ) from error
    assert converted is not None
    return converted


@functools.cache
def _registry() -> Any:
    """torch's operators that have an ONNX form; making it reads the source of each."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    return ONNXRegistry.from_torchlib(opset_version=OPSET)


@contextmanager
def _one_registry() -> Iterator[None]:
    """Lets the exporter use `_registry`: which it would make at each conversion."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    made = _registry()
    original = ONNXRegistry.__dict__["from_torchlib"]
    setattr(ONNXRegistry, "from_torchlib", staticmethod(lambda **_: made))  # noqa: B010
    try:
        yield
    finally:
        setattr(ONNXRegistry, "from_torchlib", original)  # noqa: B010


def _without_idle_decomposition(program: ExportedProgram) -> ExportedProgram:
    """A program that the exporter does not trace once more, where that would change nothing.

    The exporter always runs its decompositions, which takes five times as long as the conversion of a
    graph with a backward pass. They replace operators that have no ONNX form; the joint export has
    usually left none. A program with any such operator is returned as it is.
    """
    from torch.export.experimental import _copy_graph_module_and_signature
    from torch.onnx._internal.exporter import _decomp

    known = {*_decomp.get_onnx_implemented_overloads(_registry()), *_ASSERTIONS}
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    if any(isinstance(target, torch._ops.OperatorBase) and target not in known for target in targets):
        return program
    copy = program._update(*_copy_graph_module_and_signature(program))  # the exporter edits its graph
    copy.run_decompositions = lambda *_: copy
    return copy


def _name(values: Sequence[ir.Value], names: tuple[str, ...]) -> None:
    if len(values) != len(names):
        raise AssertionError(f"the graph has {len(values)} values for {len(names)} names")
    for value, name in zip(values, names, strict=True):
        value.name = name


def clear_metadata(model: ir.Model) -> ir.Model:
    """Removes what the exporter notes of each node and value: source paths of this machine among it."""
    common.ClearMetadataAndDocStringPass()(model)  # leaves the values alone
    model.metadata_props.clear()
    graph = model.graph
    values = [*graph.inputs, *graph.outputs, *graph.initializers.values()]
    for value in (*values, *(output for node in graph for output in node.outputs)):
        value.metadata_props.clear()
        value.doc_string = None
    return model


def read_sizes_from_inputs(model: ir.Model, targets: str) -> ir.Model:
    """Reads dynamic sizes from the model's inputs where the exporter read them from the targets.

    The exporter takes a symbol such as the batch size from any input that has it. Without this pass
    the inference graph would still need labels.
    """
    values = {value.name: value for value in model.graph.inputs}
    source = values.pop(targets)
    for node, _ in list(source.uses()):
        if node.op_type != "Shape" or source.shape is None:
            continue
        wanted = source.shape[node.attributes.get_int("start", 0)]
        for value in values.values():
            axes = [] if value.shape is None else [i for i, size in enumerate(value.shape) if size == wanted]
            if axes:
                node.replace_input_with(0, value)
                node.attributes["start"] = ir.AttrInt64("start", axes[0])
                node.attributes["end"] = ir.AttrInt64("end", axes[0] + 1)
                break
    return model


def keep_outputs(model: ir.Model, names: Collection[str]) -> ir.Model:
    """Drops the other outputs, the nodes that only they need, and inputs that nothing reads."""
    kept = [value for value in model.graph.outputs if value.name in names]
    del model.graph.outputs[:]
    model.graph.outputs.extend(kept)
    common.RemoveUnusedNodesPass()(model)
    used = [value for value in model.graph.inputs if value.uses() or value in kept]
    del model.graph.inputs[:]
    model.graph.inputs.extend(used)
    return model


def add_defaults(model: ir.Model, defaults: dict[str, np.ndarray]) -> ir.Model:
    """Gives inputs a default value: an initializer of the same name (overridable, IR >= 4).

    With a default of zero in every factor, a session that is fed no factors is the base.
    """
    for value in model.graph.inputs:
        if value.name in defaults:
            value.const_value = ir.tensor(defaults[value.name], name=value.name)
            model.graph.initializers[value.name] = value
    return model


def inputs_to_initializers(model: ir.Model, values: dict[str, np.ndarray]) -> ir.Model:
    """Turns inputs into initializers (parameters of ONNX Runtime Training)."""
    kept = []
    for value in model.graph.inputs:
        if value.name not in values:
            kept.append(value)
            continue
        array = values[value.name]
        value.const_value = ir.tensor(array, name=value.name)
        value.shape = ir.Shape(array.shape)
        model.graph.initializers[value.name] = value
    del model.graph.inputs[:]
    model.graph.inputs.extend(kept)
    return model


def add_zero_gradients(model: ir.Model, names: Collection[str]) -> ir.Model:
    """Adds an output ``<name>.grad`` of zeros, of the input's shape, for each input in `names`: no gradient
    reaches them, and readers expect one of everything that can be trained."""
    graph = model.graph
    zero = ir.AttrTensor("value", ir.tensor(np.zeros(1, np.float32)))
    for value in [value for value in graph.inputs if value.name in names]:
        sizes = ir.Node("", "Shape", [value], num_outputs=1, name=f"{value.name}.sizes")
        zeros = ir.Node(
            "", "ConstantOfShape", sizes.outputs, [zero], num_outputs=1, name=f"{value.name}.zeros"
        )
        output = zeros.outputs[0]
        sizes.outputs[0].name, output.name = f"{value.name}.sizes", f"{value.name}.grad"
        output.type = ir.TensorType(ir.DataType.FLOAT)
        output.shape = None if value.shape is None else ir.Shape(list(value.shape))
        graph.extend([sizes, zeros])
        graph.outputs.append(output)
    return model


def declare_layer_norm_outputs(model: ir.Model) -> ir.Model:
    """Declares Mean and InvStdDev on every LayerNormalization.

    ONNX Runtime Training's gradient builder reads all three outputs and fails where a node has one.
    """
    for node in model.graph:
        if node.op_type == "LayerNormalization" and len(node.outputs) == 1:
            name = node.outputs[0].name
            node.resize_outputs(3)
            for place, suffix in ((1, "mean"), (2, "inv_std_dev")):
                node.outputs[place].name = f"{name}.{suffix}"
    return model


def clone(model: ir.Model) -> ir.Model:
    """An independent copy; large tensors are shared."""
    return model.clone()


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """The protobuf form, tensors included."""
    return ir.to_proto(model)
