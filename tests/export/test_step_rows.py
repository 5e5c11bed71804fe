"""Rows of a weight in a graph with a backward pass: none is gathered, and every number stays."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

from edge_tcur_export.graph import to_proto
from edge_tcur_export.step_rows import take_rows_by_products

OUTPUTS = ("y", "dcore", "dx")
GRAPH = """<ir_version: 10, opset_import: ["" : 20]>
g (float[t, 6] x, float[r, r] core, int32[r] rows, int32[r] cols, float[t, 4] dy)
    => (float[t, 4] y, float[r, r] dcore, float[t, 6] dx) {
    p = MatMul(x, w)
    layer = Add(p, b)
    right_t = Gather <axis = 1> (w, rows)
    left_t = Gather <axis = 0> (w, cols)
    core_t = Transpose(core)
    h = MatMul(x, right_t)
    m = MatMul(h, core_t)
    u = MatMul(m, left_t)
    y = Add(layer, u)
    left = Transpose(left_t)
    dm = MatMul(dy, left)
    h_t = Transpose(h)
    dcore_t = MatMul(h_t, dm)
    dcore = Transpose(dcore_t)
    dh = MatMul(dm, core)
    right = Transpose(right_t)
    small = MatMul(dh, right)
    w_t = Transpose(w)
    large = MatMul(dy, w_t)
    dx = Add(small, large)
}"""
WITHOUT_BIAS = GRAPH.replace("    layer = Add(p, b)\n", "").replace("(layer, u)", "(p, u)")
OTHER_ORDER = GRAPH.replace("Add(small, large)", "Add(large, small)")
WEIGHT = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
BIAS = np.array([1, -2, 3, 0.5], np.float32)


def parse(text):
    proto = onnx.parser.parse_model(text)
    for name, array in (("w", WEIGHT), ("b", BIAS)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def answers(model, rank, tokens=5):
    generator = np.random.default_rng(rank)
    feeds = {
        "x": generator.normal(size=(tokens, 6)).astype(np.float32),
        "core": generator.normal(size=(rank, rank)).astype(np.float32),
        "rows": generator.permutation(4)[:rank].astype(np.int32),
        "cols": generator.permutation(6)[:rank].astype(np.int32),
        "dy": generator.normal(size=(tokens, 4)).astype(np.float32),
    }
    content = to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}
    return session.run(OUTPUTS, {name: value for name, value in feeds.items() if name in names})


def gathers_across(model):
    """Gathers of single numbers from all over a stored weight."""
    return [
        node
        for node in model.graph
        if node.op_type == "Gather"
        and node.inputs[0].is_initializer()
        and node.attributes.get_int("axis", 0) == 1
    ]


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("text", [GRAPH, WITHOUT_BIAS, OTHER_ORDER], ids=["bias", "no bias", "order"])
def test_both_passes_do_without_the_rows(text, rank):
    model = parse(text)
    assert len(gathers_across(model)) == 1
    kept = take_rows_by_products(model)
    assert gathers_across(model) == []
    assert [name for name in kept if name in {out.name for n in model.graph for out in n.outputs}] == kept
    for found, expected in zip(answers(model, rank), answers(parse(text), rank), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_an_input_without_a_gradient_needs_the_forward_pass_alone():
    text = GRAPH.replace("    dx = Add(small, large)\n", "    dx = Identity(x)\n")
    for line in ("dh = MatMul(dm, core)", "right = Transpose(right_t)", "small = MatMul(dh, right)"):
        text = text.replace(f"    {line}\n", "")
    model = parse(text)
    assert len(take_rows_by_products(model)) == 1
    assert gathers_across(model) == []
    for found, expected in zip(answers(model, 2), answers(parse(text), 2), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("h = MatMul(x, right_t)", "z = Neg(x)\n    h = MatMul(z, right_t)"),  # of another product
        ("m = MatMul(h, core_t)", "m = MatMul(h, core_t)\n    q = Neg(right_t)"),  # read otherwise as well
        ("large = MatMul(dy, w_t)", "z = Neg(w_t)\n    large = MatMul(dy, z)"),  # another gradient
        ("dx = Add(small, large)", "dx = Sub(large, small)"),
        ("dx = Add(small, large)", "z = Neg(large)\n    s = Add(small, large)\n    dx = Add(s, z)"),
    ],
)
def test_what_is_no_update_of_a_weight_alone_stays(old, new):
    text = GRAPH.replace(old, new)
    assert text != GRAPH
    model = parse(text)
    before = [node.op_type for node in model.graph]
    assert take_rows_by_products(model) == []
    assert len(gathers_across(model)) == 1
    assert sorted(node.op_type for node in model.graph if node.op_type != "Neg") == sorted(
        kind for kind in before if kind != "Neg"
    )


@pytest.mark.parametrize("role", ["step", "infer"])
def test_no_graph_of_a_bundle_without_coupling_gathers_rows_of_a_weight(vit, role):
    graph = vit.graph(role).graph
    weights = {value.name for value in graph.initializer if value.name.endswith(".weight_t")}
    found = [
        node.input[0]
        for node in graph.node
        if node.op_type == "Gather"
        and node.input[0] in weights
        and any(item.name == "axis" and item.i == 1 for item in node.attribute)
    ]
    assert weights
    assert found == []
