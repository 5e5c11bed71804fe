"""Products of matrices as Gemms: what is one, what is not, and that every number stays."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

from edge_tcur_export.gemm import write_gemms
from edge_tcur_export.graph import to_proto

GRAPH = """<ir_version: 10, opset_import: ["" : 20]>
g (float[t, 6] x, float[t, 4] dy, float[2, 3, 6] y)
    => (float[t, 4] out, float[t, 6] dx, float[6, 4] dw, float[2, 3, 4] batched)
<float[6, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6},
 float[4] b = {1, -2, 3, 0.5}> {
    product = MatMul(x, w)
    out = Add(b, product)
    turned = Transpose <perm = [1, 0]> (w)
    large = MatMul(dy, turned)
    dx = Add(large, x)
    x_t = Transpose(x)
    dw = MatMul(x_t, dy)
    batched = MatMul(y, w)
}"""
OUTPUTS = ("out", "dx", "dw", "batched")


def parse(text):
    return ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))


def answers(model):
    generator = np.random.default_rng(0)
    feeds = {
        "x": generator.normal(size=(5, 6)).astype(np.float32),
        "dy": generator.normal(size=(5, 4)).astype(np.float32),
        "y": generator.normal(size=(2, 3, 6)).astype(np.float32),
    }
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run(OUTPUTS, feeds)


def test_products_their_turns_and_what_is_added_are_one_node_each():
    model = parse(GRAPH)
    assert write_gemms(model) == 3
    kinds = Counter(node.op_type for node in model.graph)
    assert kinds == {"Gemm": 3, "MatMul": 1}  # one of three axes stays
    for found, expected in zip(answers(model), answers(parse(GRAPH)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("old", "new", "added"),
    [
        ("out = Add(b, product)", "out = Sub(product, b)", 1),  # no sum
        ("out = Add(b, product)", "z = Neg(product)\n    s = Add(b, product)\n    out = Add(s, z)", 1),
        ("dx = Add(large, x)", "column = ReduceSum <keepdims = 1> (large)\n    dx = Add(large, column)", 1),
    ],
)
def test_only_what_a_gemm_adds_is_added(old, new, added):
    text = GRAPH.replace(old, new)
    assert text != GRAPH
    model = parse(text)
    assert write_gemms(model) == 3
    with_sum = [node for node in model.graph if node.op_type == "Gemm" and len(node.inputs) == 3]
    assert len(with_sum) == added
    for found, expected in zip(answers(model), answers(parse(text)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_no_weight_is_turned_in_the_graph_that_recomputes(words):
    graph = words.graph("step_recompute").graph
    weights = {value.name for value in graph.initializer}
    turned = [
        node.input[0] for node in graph.node if node.op_type == "Transpose" and node.input[0] in weights
    ]
    assert turned == []
    assert sum(node.op_type == "Gemm" for node in graph.node) > 12
