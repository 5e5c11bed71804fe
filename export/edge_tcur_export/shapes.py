"""Sizes of the values of an exported graph at one batch, length and rank.

The exporter notes the shape of most values as expressions of symbols such as ``s24*s91``. They are evaluated
for the sizes asked for, and what the exporter left open is filled in by ONNX's own shape inference.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import onnx
from onnx import shape_inference

_EXTERNAL = onnx.TensorProto.EXTERNAL
# Several numbers share a byte in a file and in memory; numpy's dtypes of these have a byte for each.
_PACKED = {"INT4": 2, "UINT4": 2, "FLOAT4E2M1": 2, "INT2": 4, "UINT2": 4}


class UnknownSizesError(ValueError):
    """Inputs whose sizes contradict the graph."""


@dataclass(frozen=True)
class ValueShape:
    """Sizes of a value's axes, and bytes of one entry (half a byte of int4)."""

    dims: tuple[int, ...]
    item: float

    @property
    def bytes(self) -> int:
        """Of the whole value."""
        return math.ceil(math.prod(self.dims) * self.item)


def value_bytes(model: onnx.ModelProto, inputs: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Bytes of every value of a graph whose size can be told; see `value_shapes`."""
    return {name: shape.bytes for name, shape in value_shapes(model, inputs).items()}


def value_shapes(model: onnx.ModelProto, inputs: Mapping[str, Sequence[int]]) -> dict[str, ValueShape]:
    """Shape of every value of a graph whose sizes can be told.

    Args:
        model: without external data in memory; it is not changed.
        inputs: graph input -> shape. Inputs that are not named keep their static sizes.

    Raises:
        UnknownSizesError: a shape that the graph's inputs cannot have.
    """
    bindings = _bindings(model.graph.input, inputs)
    concrete = onnx.ModelProto()
    concrete.CopyFrom(model)
    graph = concrete.graph
    for value in graph.input:
        if value.name in inputs:
            _set_shape(value, inputs[value.name])
    kept = [value for value in graph.value_info if _settle(value, bindings)]
    del graph.value_info[:]
    graph.value_info.extend(kept)
    for value in graph.output:
        _settle(value, bindings)
    _declare_weights(graph, inputs)
    concrete = shape_inference.infer_shapes(concrete, data_prop=True)
    found = [*concrete.graph.value_info, *concrete.graph.output, *concrete.graph.input]
    shapes = {value.name: _shape(value) for value in found}
    return {name: shape for name, shape in shapes.items() if shape is not None}


def _bindings(values: Sequence[onnx.ValueInfoProto], inputs: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Symbol -> size, read off the inputs."""
    bindings: dict[str, int] = {}
    for value in values:
        dims = value.type.tensor_type.shape.dim
        given = inputs.get(value.name)
        if given is None:
            continue
        if len(given) != len(dims):
            raise UnknownSizesError(f"{value.name} has {len(dims)} axes, not {len(given)}")
        for dim, size in zip(dims, given, strict=True):
            expected = bindings.setdefault(dim.dim_param, size) if dim.dim_param else dim.dim_value
            if expected != size:
                raise UnknownSizesError(f"{value.name}: {size} where the graph has {expected}")
    return bindings


def _set_shape(value: onnx.ValueInfoProto, shape: Sequence[int]) -> None:
    for dim, size in zip(value.type.tensor_type.shape.dim, shape, strict=True):
        dim.dim_value = size


def _settle(value: onnx.ValueInfoProto, bindings: Mapping[str, int]) -> bool:
    """Puts numbers in the place of expressions; where one cannot be told, drops the shape and says False."""
    tensor = value.type.tensor_type
    dims = tensor.shape.dim
    sizes = [evaluate(dim.dim_param, bindings) if dim.dim_param else dim.dim_value for dim in dims]
    if not tensor.HasField("shape") or any(size is None for size in sizes):
        tensor.ClearField("shape")
        return False
    for dim, size in zip(tensor.shape.dim, sizes, strict=True):
        assert size is not None
        dim.dim_value = size
    return True


def evaluate(expression: str, bindings: Mapping[str, int]) -> int | None:
    """The value of a size expression, or None where it holds an unknown symbol."""
    if expression in bindings:
        return bindings[expression]
    return _evaluate(expression, tuple(bindings.items()))


@lru_cache(maxsize=4096)  # a graph has thousands of axes and a few dozen expressions
def _evaluate(expression: str, bindings: tuple[tuple[str, int], ...]) -> int | None:
    import sympy  # type: ignore[import-untyped]

    known = {name: sympy.Integer(size) for name, size in bindings}
    try:
        result = sympy.sympify(expression, locals=known)
    except (sympy.SympifyError, TypeError, SyntaxError):
        return None
    return int(result) if getattr(result, "is_Integer", False) else None


def _declare_weights(graph: onnx.GraphProto, fed: Collection[str]) -> None:
    """Large initializers become inputs, as inference would want their data; defaults of what is fed go."""
    declared = {value.name for value in graph.input}
    for tensor in list(graph.initializer):
        if tensor.data_location == _EXTERNAL or tensor.name in fed:
            if tensor.name not in declared:
                graph.input.append(
                    onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
                )
            graph.initializer.remove(tensor)


def _shape(value: onnx.ValueInfoProto) -> ValueShape | None:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape") or not all(dim.HasField("dim_value") for dim in tensor.shape.dim):
        return None
    return ValueShape(tuple(int(dim.dim_value) for dim in tensor.shape.dim), _item_bytes(tensor.elem_type))


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of an initializer, wherever its data lie."""
    return ValueShape(tuple(int(size) for size in tensor.dims), _item_bytes(tensor.data_type)).bytes


def _item_bytes(kind: int) -> float:
    """Bytes of one entry; a value whose type was not told is taken as float32."""
    kind = kind or onnx.TensorProto.FLOAT
    sharing = _PACKED.get(onnx.TensorProto.DataType.Name(kind))
    if sharing is not None:
        return 1 / sharing
    return float(onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize)
