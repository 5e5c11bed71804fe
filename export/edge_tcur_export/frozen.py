"""Graph passes around ONNX Runtime Training's builder, which is shown no frozen tensor but small ones.

A protobuf file ends at 2 GiB and the builder copies a graph several times: the base stands as inputs while
the gradient is built, and is put back as the tensors of `base.bin`. The builder cannot fold or rename it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx_ir as ir

from edge_tcur_export.base_file import INLINE_BYTES

_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def name_each_reader(model: ir.Model, trained: Collection[str]) -> ir.Model:
    """Gives each node that reads a shared frozen vector an initializer of its own name, of the same tensor.

    The builder writes gradients of a norm's scale and bias also where nobody wants them, named after the
    initializers: of a module that is called in several places (one LayerNorm for all blocks, ALBERT's shared
    layer) there would be two of one name, which ends in "Duplicate definition of name (..._grad)". It makes
    such norms of products and sums too, so all vectors are told apart, whatever reads them.

    Args:
        trained: names whose gradients are wanted, and added up; they are left alone.
    """
    graph = model.graph
    seen: set[ir.Value] = set()
    for node in graph:
        for place, value in list(enumerate(node.inputs)):
            if value is None or value.name in trained or not _is_vector(value.const_value):
                continue
            if value in seen:
                node.replace_input_with(place, _alias(graph, value))
            seen.add(value)
    return model


def _is_vector(tensor: ir.TensorProtocol | None) -> bool:
    return tensor is not None and len(tensor.shape) == 1 and tensor.dtype in _FLOATS


def _alias(graph: ir.Graph, value: ir.Value) -> ir.Value:
    tensor = value.const_value
    assert tensor is not None
    number = 1
    while (name := f"{value.name}.reader.{number}") in graph.initializers:
        number += 1
    alias = ir.Value(name=name, shape=value.shape, type=value.type, const_value=tensor)
    graph.initializers[name] = alias
    return alias


def take_out(model: ir.Model, trained: Collection[str]) -> dict[str, ir.TensorProtocol]:
    """Turns the frozen initializers into inputs, tiny ones (shapes, axes, scalars) apart.

    Returns:
        name -> tensor, for `put_back`.
    """
    graph = model.graph
    taken: dict[str, ir.TensorProtocol] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or name in trained or tensor.nbytes <= INLINE_BYTES:
            continue
        taken[name] = tensor
        value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
        value.const_value = None
        del graph.initializers[name]
        graph.inputs.append(value)
    return taken


def put_back(model: ir.Model, taken: Mapping[str, ir.TensorProtocol]) -> ir.Model:
    """Turns the inputs of `take_out` into initializers again; what nothing reads any more is dropped."""
    graph = model.graph
    frozen = [value for value in graph.inputs if value.name in taken]
    kept = [value for value in graph.inputs if value.name not in taken]
    del graph.inputs[:]
    graph.inputs.extend(kept)
    for value in frozen:
        if value.uses():
            assert value.name is not None
            value.const_value = taken[value.name]
            graph.initializers[value.name] = value
    return model
