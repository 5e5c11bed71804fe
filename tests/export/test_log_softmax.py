"""LogSoftmax written out: the same numbers, and none left in a step graph."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from edge_tcur_export.log_softmax import write_log_softmax


def graph_of(axis):
    helper = onnx.helper
    attributes = {} if axis is None else {"axis": axis}
    nodes = [
        helper.make_node("LogSoftmax", ["x"], ["y"], name="first", **attributes),
        helper.make_node("Exp", ["y"], ["p"], name="reader"),
    ]
    values = {name: helper.make_tensor_value_info(name, 1, ["a", 3, 5]) for name in "xyp"}
    graph = helper.make_graph(nodes, "g", [values["x"]], [values["y"], values["p"]])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model, x):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["y", "p"], {"x": x})


@pytest.mark.parametrize("axis", [None, 1, -1])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_it_gives_the_same_numbers(axis, scale):
    before = graph_of(axis)
    x = (scale * np.random.default_rng(0).normal(size=(2, 3, 5))).astype(np.float32)
    written = ir.to_proto(write_log_softmax(ir.from_proto(before)))
    onnx.checker.check_model(written, full_check=True)
    assert "LogSoftmax" not in {node.op_type for node in written.graph.node}
    assert [value.name for value in written.graph.output] == ["y", "p"]
    for found, expected in zip(run(written, x), run(before, x), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * scale)


def test_a_step_graph_has_none(vit):
    assert "LogSoftmax" not in {node.op_type for node in vit.graph("step").graph.node}
