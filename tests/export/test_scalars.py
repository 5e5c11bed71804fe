"""Elementwise operators read a scalar as it is."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import onnxruntime

from edge_tcur_export.scalars import read_scalars

HEADER = '<ir_version: 10, opset_import: ["" : 20]>\n'
# The first is read by a Sub of its size and by a Mul, the second by a sum of another size, the third stays a
# result, the fourth is no scalar.
GRAPH = """g (float[b, 3] x, float[3] row, int64[2] sizes)
    => (float[b, 3] y, float[b, 3] z, float[b, 3] one, float[b, 3] w)
<float one_value = {1.0}, float[1] two_value = {2.0}, float[b, 3] s, float[b, 3] ones, float[b, 3] twos,
 float[b, 3] rows>
{
    s = Sigmoid(x)
    ones = Expand(one_value, sizes)
    d = Sub(ones, s)
    y = Mul(d, ones)
    twos = Expand(two_value, sizes)
    z = Add(row, twos)
    one = Expand(one_value, sizes)
    rows = Expand(row, sizes)
    w = Add(rows, x)
}"""


def parse():
    model = ir.from_proto(onnx.parser.parse_model(HEADER + GRAPH))
    for node in model.graph:
        if node.op_type == "Sub":
            node.outputs[0].shape = node.inputs[1].shape
    return model


def run(model):
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    x = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    return session.run(None, {"x": x, "row": x[0], "sizes": np.array([2, 3])})


def test_a_scalar_is_read_where_the_other_operand_has_the_size():
    model, plain = parse(), parse()
    read_scalars(model)
    left = [node.outputs[0].name for node in model.graph if node.op_type == "Expand"]
    assert left == ["twos", "one", "rows"]
    for found, expected in zip(run(model), run(plain), strict=True):
        np.testing.assert_array_equal(found, expected)
