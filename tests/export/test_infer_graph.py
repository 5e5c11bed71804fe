"""The inference graph's form of the update: what is rewritten, what is not, and that the answers stay."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

from edge_tcur_export.graph import to_proto
from edge_tcur_export.infer_graph import multiply_cores_first, split_stacks

GRAPH = """<ir_version: 10, opset_import: ["" : 20]>
g (float[t, 6] x, float[6, 4] w, float[r, r] core, int32[r] rows, int32[r] cols) => (float[t, 4] logits)
<float[4] b = {1, -2, 3, 0.5}> {
    p = MatMul(x, w)
    layer = Add(p, b)
    picked = Gather <axis = 1> (layer, rows)
    own = Gather <axis = 0> (b, rows)
    h = Sub(picked, own)
    left_t = Gather <axis = 0> (w, cols)
    core_t = Transpose(core)
    m = MatMul(h, core_t)
    u = MatMul(m, left_t)
    logits = Add(layer, u)
}"""
WITHOUT_BIAS = (
    GRAPH.replace("    layer = Add(p, b)\n", "")
    .replace("layer", "p")
    .replace("    own = Gather <axis = 0> (b, rows)\n    h = Sub(picked, own)\n", "")
    .replace("(h, core_t)", "(picked, core_t)")
)


def parse(text):
    model = ir.from_proto(onnx.parser.parse_model(text))
    for node in model.graph:  # ONNX Runtime's GatherSliceToSplitFusion refuses several without a name
        node.name = node.outputs[0].name
    return model


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
def test_core_and_columns_are_multiplied_first_and_the_answers_stay(text, rank):
    model, fed = parse(text), feeds(rank)
    expected = answer(parse(text), fed)
    assert multiply_cores_first(model) == 1
    np.testing.assert_allclose(answer(model, fed), expected, rtol=1e-5, atol=1e-5)
    kinds = Counter(node.op_type for node in model.graph)
    assert (kinds["Gemm"], kinds["MatMul"]) == (1, 2)  # for each token: the layer, and one product


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(layer, rows)", "(z, rows)"),  # of another value
        ("<axis = 1> (layer, rows)", "<axis = 0> (layer, rows)"),
        ("u = MatMul(m, left_t)", "q = Neg(m)\n    u = MatMul(m, left_t)"),  # read otherwise as well
        ("logits = Add(layer, u)", "s = Neg(u)\n    logits = Add(layer, s)"),
        ("logits = Add(layer, u)", "logits = Mul(layer, u)"),
    ],
)
def test_what_is_no_update_of_a_weight_alone_stays(old, new):
    text = GRAPH.replace(old, new).replace("    picked", "    z = Neg(layer)\n    picked")
    assert text.count(new) == 1
    model = parse(text)
    before = [node.op_type for node in model.graph if node.op_type != "Neg"]
    assert multiply_cores_first(model) == 0
    assert [node.op_type for node in model.graph if node.op_type != "Neg"] == before


def test_a_models_own_update_of_places_by_others_stays():
    model = parse(
        GRAPH.replace("x, float[6, 4] w", "layer, float[6, 4] w")
        .replace("float[t, 6]", "float[s, 4, 4]")
        .replace("    p = MatMul(x, w)\n    layer = Add(p, b)\n", "")
        .replace("float[t, 4] l", "float[s, 4, 4] l")
    )
    assert multiply_cores_first(model) == 0


def test_every_update_of_a_bundle_without_coupling_is_rewritten(vit):
    adapted = sum(len(group.parameters) for group in vit.bundle.manifest.groups.values())
    for role, rewritten in (("infer", adapted), ("step", 0)):
        products = [node for node in vit.graph(role).graph.node if node.op_type == "Gemm"]
        assert len(products) == rewritten, role


STACKS = """<ir_version: 10, opset_import: ["" : 20]>
g (float[t, 4] x, float[2, r, r] core, int32[2, r] rows) => (float[t, s] logits)
<int64 zero = {0}, int64 one = {1}> {
    rows0 = Gather <axis = 0> (rows, zero)
    rows1 = Gather <axis = 0> (rows, one)
    core0 = Gather <axis = 0> (core, zero)
    core1 = Gather <axis = 0> (core, one)
    turned0 = Transpose <perm = [1, 0]> (core0)
    turned1 = Transpose <perm = [1, 0]> (core1)
    a = Gather <axis = 1> (x, rows0)
    b = MatMul(a, turned0)
    c = Gather <axis = 1> (x, rows1)
    d = MatMul(c, turned1)
    logits = Add(b, d)
}"""


def stacked(rank):
    generator = np.random.default_rng(rank)
    return {
        "x": generator.normal(size=(5, 4)).astype(np.float32),
        "core": generator.normal(size=(2, rank, rank)).astype(np.float32),
        "rows": np.stack([generator.permutation(4)[:rank] for _ in range(2)]).astype(np.int32),
    }


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("turned", [True, False])
def test_slices_come_from_one_split(turned, rank):
    text = STACKS if turned else STACKS.replace("MatMul(a, turned0)", "MatMul(a, core0)")
    model = parse(text)
    assert split_stacks(model) == 2
    np.testing.assert_array_equal(answer(model, stacked(rank)), answer(parse(text), stacked(rank)))
    kinds = Counter(node.op_type for node in model.graph)
    assert (kinds["Split"], kinds["Gather"], kinds["Squeeze"]) == (2, 2, 0)
    assert kinds["Transpose"] == 1  # of the whole stack, or of the one slice that is turned


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "rows1 = Gather <axis = 0> (rows, one)",
            "rows1 = Gather <axis = 0> (rows, zero)",
        ),  # not every slice
        ("a = Gather <axis = 1> (x, rows0)", "k = Neg(rows)\n    a = Gather <axis = 1> (x, rows0)"),
        ("int32[2, r] rows", "int32[n, r] rows"),
    ],
)
def test_a_stack_that_is_read_otherwise_stays(old, new):
    model = parse(STACKS.replace(old, new))
    assert split_stacks(model) == 1  # the core alone


@pytest.mark.parametrize("turned", [True, False])
def test_slices_need_not_be_square(turned):
    """Sketches: [n, n1, r] and [n, r, n2]."""
    text = STACKS.replace("float[2, r, r] core", "float[2, m, r] core" if turned else "float[2, r, m] core")
    if not turned:
        text = text.replace("(a, turned0)", "(a, core0)").replace("(c, turned1)", "(c, core1)")
    fed = stacked(3) | {"core": np.random.default_rng(0).normal(size=(2, 7, 3)).astype(np.float32)}
    if not turned:
        fed["core"] = np.ascontiguousarray(fed["core"].transpose(0, 2, 1))
    model = parse(text)
    assert split_stacks(model) == 2
    np.testing.assert_array_equal(answer(model, fed), answer(parse(text), fed))
