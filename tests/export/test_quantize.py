"""Quantising a matrix: error bounds, and that ONNX Runtime dequantises to the same bits."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from edge_tcur.errors import ExportError
from edge_tcur_export.quantize import BLOCK, quantize_int4, quantize_int8, relative_error

QUANTIZERS = {"int8": (quantize_int8, 127), "int4": (quantize_int4, 7)}
SHAPES = array_shapes(min_dims=2, max_dims=2, max_side=70)
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)
MATRICES = arrays(np.float32, SHAPES, elements=FLOATS, fill=st.floats(-4, 4, width=32))
kinds = pytest.mark.parametrize("kind", QUANTIZERS)
axes = pytest.mark.parametrize("axis", [0, 1])


def spread(quantized):
    """The scale of every entry."""
    ones = np.ones_like(quantized.values)
    return np.abs(type(quantized)(quantized.precision, ones, quantized.scales, quantized.axis).dequantize())


@kinds
@axes
@settings(max_examples=60, deadline=None)
@given(MATRICES)
def test_the_error_of_an_entry_is_at_most_half_of_its_scale(kind, axis, matrix):
    quantize, largest = QUANTIZERS[kind]
    found = quantize(matrix, axis)
    assert found.values.dtype == np.int8
    assert np.abs(found.values).max() <= largest
    error = np.abs(found.dequantize().astype(np.float64) - matrix)
    scales = spread(found).astype(np.float64)
    assert (error <= scales * (0.5 + 1e-4)).all()
    # No scale is larger than the largest entry that it is for needs.
    assert scales.max() <= max(float(np.abs(matrix).max()) / largest * (1 + 1e-6), 2e-38)


@kinds
@axes
@settings(max_examples=30, deadline=None)
@given(MATRICES)
def test_what_was_dequantised_is_quantised_to_itself(kind, axis, matrix):
    quantize, _ = QUANTIZERS[kind]
    once = quantize(matrix, axis).dequantize()
    np.testing.assert_allclose(quantize(once, axis).dequantize(), once, rtol=1e-6)


@axes
def test_an_output_feature_has_its_own_scale_in_int8(axis):
    matrix = np.array([[1.0, 100], [-2, 50]], np.float32)
    scales = quantize_int8(matrix, axis).scales * 127
    np.testing.assert_allclose(scales, [100, 50] if axis == 0 else [2, 100], rtol=1e-6)


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5])
def test_a_block_of_int4_ends_where_the_axis_does(size):
    matrix = np.ones((size, 3), np.float32)
    matrix[BLOCK:] = 1000
    found = quantize_int4(matrix, 0)
    assert found.scales.shape == (-(-size // BLOCK), 3)
    np.testing.assert_allclose(found.dequantize(), matrix, rtol=1e-6)  # the large ones leave the others alone
    assert found.nbytes == -(-size * 3 // 2) + found.scales.nbytes


@kinds
def test_rows_of_zeros_stay_zeros(kind):
    found = QUANTIZERS[kind][0](np.zeros((5, 40), np.float32), 0)
    assert not found.dequantize().any()
    assert (found.scales > 0).all()
    assert relative_error(np.zeros((5, 40), np.float32), found) == 0


@kinds
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(kind, value):
    matrix = np.ones((40, 4), np.float32)
    matrix[17, 2] = value
    with pytest.raises(ExportError, match="not finite") as caught:
        QUANTIZERS[kind][0](matrix, 1, "layer.weight")
    assert caught.value.where == "layer.weight"


def onnx_dequantized(quantized):
    """What ONNX Runtime's DequantizeLinear makes of it."""
    int4 = quantized.precision == "int4"
    values = quantized.values.astype(ml_dtypes.int4) if int4 else quantized.values
    inputs = [ir.Value(name=name) for name in ("values", "scales")]
    for value, array in zip(inputs, (values, quantized.scales), strict=True):
        value.const_value = ir.Tensor(array, name=value.name)
    attributes = {"axis": quantized.axis, **({"block_size": BLOCK} if int4 else {})}
    node = ir.node("DequantizeLinear", inputs, attributes)
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=inputs, opset_imports={"": 21}, name="g")
    raw = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = onnxruntime.InferenceSession(raw, providers=["CPUExecutionProvider"])
    return session.run(None, {})[0]


@kinds
@axes
@pytest.mark.parametrize("shape", [(64, 16), (40, 17), (33, 5), (7, 3)])
def test_onnx_runtime_dequantises_to_the_same_bits(kind, axis, shape):
    matrix = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    quantized = QUANTIZERS[kind][0](matrix, axis)
    np.testing.assert_array_equal(onnx_dequantized(quantized), quantized.dequantize())
