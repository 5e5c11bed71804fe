"""Features that are picked by a product with ones: written as an index where that is all, and no graph of a
bundle gathers rows across a stored weight."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

from edge_tcur.errors import ExportError
from edge_tcur_export.graph import to_proto
from edge_tcur_export.picks import pick_by_index

GRAPH = """<ir_version: 10, opset_import: ["" : 20]>
g (float[t, 4] layer, int32[r] rows, float[t, r] gradient) => (float[t, r] features, float[t, 4] spread)
<int32 zero = {0}, int32 one = {1}, int32 four = {4}, int64[1] last = {1}, float[4] b = {1, -2, 3, 0.5}> {
    places = Range(zero, four, one)
    column = Unsqueeze(rows, last)
    equal = Equal(column, places)
    ones = Cast <to = 1> (equal)
    turned = Transpose(ones)
    picked = MatMul(layer, turned)
    own = Gather <axis = 0> (b, rows)
    features = Sub(picked, own)
    spread = MatMul(gradient, ones)
}"""


def parse(text):
    return ir.from_proto(onnx.parser.parse_model(text))


def answers(model, rank, tokens=5):
    generator = np.random.default_rng(rank)
    feeds = {
        "layer": generator.normal(size=(tokens, 4)).astype(np.float32),
        "rows": generator.permutation(4)[:rank].astype(np.int32),
        "gradient": generator.normal(size=(tokens, rank)).astype(np.float32),
    }
    content = to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(["features", "spread"], feeds)


@pytest.mark.parametrize("rank", [1, 3])
def test_what_is_picked_is_an_index_and_its_gradient_stays_a_product(rank):
    model = parse(GRAPH)
    assert pick_by_index(model) == ["features"]
    products = [node for node in model.graph if node.op_type == "MatMul"]
    assert [node.outputs[0].name for node in products] == ["spread"]
    for found, expected in zip(answers(model, rank), answers(parse(GRAPH), rank), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_without_a_bias_what_is_picked_is_kept_itself():
    model = parse(
        GRAPH.replace("    own = Gather <axis = 0> (b, rows)\n", "").replace(
            "Sub(picked, own)", "Neg(picked)"
        )
    )
    assert pick_by_index(model) == ["picked"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Range(zero, four, one)", "Range(one, five, one)"),  # counts from one
        ("MatMul(layer, turned)", "MatMul(layer, other)"),
        ("Equal(column, places)", "Less(column, places)"),
        ("Equal(column, places)", "Equal(places, column)"),
        ("Unsqueeze(rows, last)", "Unsqueeze(rows, first)"),
        ("Unsqueeze(rows, last)", "Unsqueeze(other_rows, last)"),  # made by the model, where -1 picks nothing
        ("float[t, 4] layer,", "float[s, t, 4] layer,"),
    ],
)
def test_other_products_stay(old, new):
    text = GRAPH.replace(old, new).replace(
        "int32 four = {4}",
        "int32 four = {4}, int32 five = {5}, int64[1] first = {0}, int32[r] other_rows, "
        "float[4, 2] other = {1, 0, 0, 1, 0, 0, 0, 0}",
    )
    text = text.replace("    places =", "    other_rows = Neg(rows)\n    places =")
    if "other)" in new:
        text = text.replace("    own = Gather <axis = 0> (b, rows)\n", "").replace(
            "Sub(picked, own)", "Neg(picked)"
        )
    model = parse(text)
    assert pick_by_index(model) == []
    assert sum(node.op_type == "MatMul" for node in model.graph) == 2


@pytest.mark.parametrize("role", ["infer", "step", "train"])
def test_no_graph_of_a_bundle_without_coupling_gathers_rows_of_a_weight(vit, role):
    """They lie across the stored, transposed matrix."""
    graph = vit.graph(role).graph
    weights = {value.name for value in graph.initializer if value.name.endswith(".weight_t")}
    gathered = [
        [item.i for item in node.attribute if item.name == "axis"]
        for node in graph.node
        if node.op_type == "Gather" and node.input[0] in weights
    ]
    assert weights
    assert gathered
    assert all(axis in ([], [0]) for axis in gathered)


@pytest.mark.parametrize("role", ["step", "train"])
def test_the_gradient_of_a_stack_of_cores_is_one_concatenation(vit, role):
    """That of slices picked one by one would be a mask of the whole stack for each of them."""
    kinds = Counter(node.op_type for node in vit.graph(role).graph.node)
    masks = sum(kinds[name] for name in ("Where", "ScatterND", "ScatterElements", "GatherGrad"))
    assert masks < len(vit.bundle.manifest.groups)


def test_what_is_picked_is_kept_by_the_graph_that_recomputes(export_vit):
    """So the last product of a block is not computed again for it: each block's is there once more in the
    backward pass of its own input alone."""
    exported = export_vit("picked", {"targets": "*.fc1,*.fc2"}, recompute=True)
    graph = exported.graph("step_recompute").graph
    first = next(
        v.name for v in graph.initializer if "layers.0" in v.name and v.name.endswith("fc2.weight_t")
    )
    products = [node for node in graph.node if node.op_type == "Gemm" and node.input[1] == first]
    forward = [node for node in products if not any(item.name == "transB" for item in node.attribute)]
    assert len(forward) == 1


def test_recompute_of_blocks_of_which_nothing_is_kept_is_refused(export_vit):
    with pytest.raises(ExportError, match="recompute would spare nothing"):
        export_vit("idle", {"targets": "*.fc2"}, recompute=True)
