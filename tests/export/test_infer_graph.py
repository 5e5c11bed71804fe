"""The inference graph's form of the update: what is rewritten, what is not, and that the answers stay."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

from edge_tcur_export.graph import to_proto
from edge_tcur_export.infer_graph import take_rows_of_products

GRAPH = """<ir_version: 10, opset_import: ["" : 20]>
g (float[t, 6] x, float[6, 4] w, float[r, r] core, int32[r] rows, int32[r] cols) => (float[t, 4] logits)
<float[4] b = {1, -2, 3, 0.5}> {
    p = MatMul(x, w)
    layer = Add(p, b)
    i = Cast <to = 7> (rows)
    right_t = Gather <axis = 1> (w, i)
    j = Cast <to = 7> (cols)
    left_t = Gather <axis = 0> (w, j)
    core_t = Transpose(core)
    h = MatMul(x, right_t)
    m = MatMul(h, core_t)
    u = MatMul(m, left_t)
    logits = Add(layer, u)
}"""
WITHOUT_BIAS = GRAPH.replace("    layer = Add(p, b)\n", "").replace("(layer, u)", "(p, u)")


def parse(text):
    return ir.from_proto(onnx.parser.parse_model(text))


def answer(model, feeds):
    session = onnxruntime.InferenceSession(
        to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(["logits"], feeds)[0]


def feeds(rank, tokens=5):
    generator = np.random.default_rng(rank)
    return {
        "x": generator.normal(size=(tokens, 6)).astype(np.float32),
        "w": generator.normal(size=(6, 4)).astype(np.float32),
        "core": generator.normal(size=(rank, rank)).astype(np.float32),
        "rows": generator.permutation(4)[:rank].astype(np.int32),
        "cols": generator.permutation(6)[:rank].astype(np.int32),
    }


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("text", [GRAPH, WITHOUT_BIAS], ids=["bias", "no bias"])
def test_rows_are_taken_from_the_product_and_the_answers_stay(text, rank):
    model, fed = parse(text), feeds(rank)
    expected = answer(parse(text), fed)
    assert take_rows_of_products(model) == 1
    np.testing.assert_allclose(answer(model, fed), expected, rtol=1e-5, atol=1e-5)
    gathers = [node for node in model.graph if node.op_type == "Gather"]
    weight = [node for node in gathers if node.inputs[0].name == "w"]
    assert [node.attributes.get_int("axis", 0) for node in weight] == [
        0
    ]  # columns, whole rows of what is stored
    assert Counter(node.op_type for node in model.graph)["Cast"] == 0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("h = MatMul(x, right_t)", "z = Neg(x)\n    h = MatMul(z, right_t)"),  # another input
        ("Gather <axis = 1> (w, i)", "Gather <axis = 1> (v, i)"),  # another weight's rows
        ("Gather <axis = 1> (w, i)", "Gather <axis = 1> (v, i)\n    q = Neg(m)"),
        ("logits = Add(layer, u)", "s = Neg(u)\n    logits = Add(layer, s)"),
        ("logits = Add(layer, u)", "logits = Mul(layer, u)"),
    ],
)
def test_what_is_no_update_of_a_weight_alone_stays(old, new):
    text = GRAPH.replace(old, new).replace("p = MatMul", "v = Neg(w)\n    p = MatMul")
    assert text.count(new) == 1
    model = parse(text)
    before = [node.op_type for node in model.graph if node.op_type != "Neg"]
    assert take_rows_of_products(model) == 0
    assert [node.op_type for node in model.graph if node.op_type != "Neg"] == before


def test_every_update_of_a_bundle_without_coupling_is_rewritten(vit):
    adapted = sum(len(group.parameters) for group in vit.bundle.manifest.groups.values())
    for role, rewritten in (("infer", adapted), ("step", 0)):
        products = [node for node in vit.graph(role).graph.node if node.op_type == "Gemm"]
        assert len(products) == rewritten, role
