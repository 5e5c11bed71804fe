"""The pass that puts quantised weights into a graph, on small graphs, and what would happen without each of
its rules."""

from __future__ import annotations

import subprocess
import sys

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_tcur.errors import ExportError
from edge_tcur_export.ort_training import _generate
from edge_tcur_export.packed import pack, unpack
from edge_tcur_export.quantize import quantize_int4, quantize_int8
from edge_tcur_export.quantized_graph import WeightTable, dequantize_late, quantize_weights
from edge_tcur_runtime.formats.bundle import ADAMW

HEADER = '<ir_version: 10, opset_import: ["" : 20]>\n'
# Forward, rows, columns, and backward of one layer, as the exported graphs have them.
LAYER = """layer (float[b, 64] x, float[b, 16] d, int32[r] rows, int32[r] cols)
    => (float[b, 16] y, float[64, r] right, float[r, 16] left, float[b, 64] dx)
{
    y = MatMul(x, weight)
    right = Gather <axis = 1> (weight, rows)
    left = Gather <axis = 0> (weight, cols)
    turned = Transpose <perm = [1, 0]> (weight)
    dx = MatMul(d, turned)
}"""
TABLE = """table (int64[b, s] ids) => (float[b, s, 8] y) { y = Gather <axis = 0> (weight, ids) }"""
kinds = pytest.mark.parametrize("kind", ["int8", "int4"])


def parse(text, weight):
    proto = onnx.parser.parse_model(HEADER + text)
    proto.graph.input.append(onnx.helper.make_tensor_value_info("weight", 1, weight.shape))
    model = ir.from_proto(proto)
    value = model.graph.inputs.pop()
    value.const_value = ir.tensor(weight, name="weight")
    model.graph.initializers["weight"] = value
    return model


def quantized_layer(kind):
    matrix = np.random.default_rng(1).normal(size=(64, 16)).astype(np.float32)
    return quantize_int8(matrix, 1) if kind == "int8" else quantize_int4(matrix, 0)


def run(model, feeds, optimized=None, disabled=()):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    raw = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(
        raw, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(disabled)
    )
    return session.run(None, feeds)


def layer_feeds():
    generator = np.random.default_rng(2)
    x, d = (generator.normal(size=(3, size)).astype(np.float32) for size in (64, 16))
    return {"x": x, "d": d, "rows": np.array([3, 5], np.int32), "cols": np.array([60, 2], np.int32)}


@kinds
@pytest.mark.parametrize("disabled", [(), ("ConstantFolding",)])
def test_a_layer_computes_what_it_computes_with_the_dequantised_weight(kind, disabled):
    quantized = quantized_layer(kind)
    plain, model = (parse(LAYER, quantized.dequantize()) for _ in range(2))
    added = quantize_weights(model, WeightTable([quantized]))
    assert added == set(model.graph.initializers) == {"weight.values", "weight.scales"}
    for found, expected in zip(
        run(model, layer_feeds(), disabled=disabled), run(plain, layer_feeds()), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@kinds
def test_each_product_has_a_dequantised_weight_of_its_own_after_optimisation_too(kind, tmp_path):
    quantized = quantized_layer(kind)
    model = parse(LAYER, quantized.dequantize())
    quantize_weights(model, WeightTable([quantized]))
    assert model.graph.opset_imports[""] == (21 if kind == "int4" else 20)
    nodes = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    assert list(model.graph)[: len(nodes)] == nodes  # first in the graph
    # Products forward and backward; of int4 also both gathers.
    assert len(nodes) == (2 if kind == "int8" else 4)
    assert {"Transpose", "MatMul"}.isdisjoint(node.op_type for node in model.graph)
    path = tmp_path / "optimized.onnx"
    run(model, layer_feeds(), path)  # ONNX Runtime's defaults: constants are folded, equal nodes merged
    optimized = onnx.load(path, load_external_data=False)
    kept = [node for node in optimized.graph.node if node.op_type == "DequantizeLinear"]
    assert len(kept) == len(nodes)
    assert {tensor.name: tensor.data_type for tensor in optimized.graph.initializer}["weight.values"] == (
        onnx.TensorProto.INT8 if kind == "int8" else onnx.TensorProto.INT4
    )
    assert not [t for t in optimized.graph.initializer if t.data_type == 1 and np.prod(t.dims) >= 1024]


def test_onnx_runtime_would_round_the_inputs_of_a_matmul_over_int4(tmp_path):
    """Why products are Gemms: with a MatMul in its place, the same weight gives other answers, and a second
    copy of it, packed."""
    quantized = quantized_layer("int4")
    model = parse("g (float[b, 64] x) => (float[b, 16] y) { y = MatMul(x, weight) }", quantized.dequantize())
    quantize_weights(model, WeightTable([quantized]))
    feeds = {"x": layer_feeds()["x"]}
    expected = feeds["x"] @ quantized.dequantize()
    np.testing.assert_allclose(run(model, feeds)[0], expected, rtol=1e-5, atol=1e-5)
    product = next(node for node in model.graph if node.op_type == "Gemm")
    product.op_type = "MatMul"
    product.attributes.clear()
    other = run(model, feeds, tmp_path / "optimized.onnx")[0]
    operators = {
        n.op_type for n in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    }
    assert operators == {"MatMulNBits"}
    assert np.abs(other - expected).max() > 1e-3 * np.abs(expected).max()


def test_onnx_runtime_cannot_load_a_transpose_behind_a_dequantize_linear():
    """Why the backward pass reads the weight by a Gemm: 1.19.2 moves a DequantizeLinear through a Transpose
    with the axis that it had before, and gives the QuantizeLinear that goes with it a wrong type."""
    quantized = quantized_layer("int8")
    model = parse(
        "g (float[b, 16] d) => (float[b, 64] dx) "
        "{ turned = Transpose <perm = [1, 0]> (weight) dx = MatMul(d, turned) }",
        quantized.dequantize(),
    )
    values, scales = (
        ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.tensor(array).dtype))
        for name, array in (("v", quantized.values), ("s", quantized.scales))
    )
    values.const_value, scales.const_value = ir.tensor(quantized.values), ir.tensor(quantized.scales)
    model.graph.initializers.update({"v": values, "s": scales})
    node = ir.node("DequantizeLinear", [values, scales], {"axis": 1})
    node.outputs[0].name = "w"
    model.graph.initializers["weight"].replace_all_uses_with(node.outputs[0])
    del model.graph.initializers["weight"]
    model.graph.insert_before(model.graph[0], node)
    with pytest.raises(Exception, match="does not match expected type"):
        run(model, {"d": layer_feeds()["d"]})


def test_rows_of_a_table_are_gathered_as_int8():
    table = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    quantized = quantize_int8(table, 0)
    model = parse(TABLE, quantized.dequantize())
    quantize_weights(model, WeightTable([quantized]))
    assert [node.op_type for node in model.graph] == ["Gather", "Gather", "Cast", "Mul"]
    ids = np.array([[1, 49, 1], [0, 7, 3]])
    np.testing.assert_array_equal(run(model, {"ids": ids})[0], quantized.dequantize()[ids])


@settings(max_examples=25, deadline=None)
@given(
    rows=st.sampled_from([1, 40]), columns=st.sampled_from([32, 96]), batch=st.booleans(),
    kind=st.sampled_from(["int32", "int64"]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_rows_of_an_int4_table_are_gathered_as_bytes(rows, columns, batch, kind, seed):
    generator = np.random.default_rng(seed)
    weight = quantize_int4(generator.normal(size=(rows, columns)).astype(np.float32), 1)
    indices = generator.integers(0, rows, (2, 3) if batch else 5).astype(kind)
    sizes = "a, b" if batch else "a"
    text = f"g ({kind}[{sizes}] ids) => (float[{sizes}, c] y) {{ y = Gather <axis = 0> (weight, ids) }}"
    model = parse(text, weight.dequantize())
    assert quantize_weights(model, WeightTable([weight])) == {"weight.packed", "weight.scales"}
    assert "DequantizeLinear" not in {node.op_type for node in model.graph}
    np.testing.assert_array_equal(run(model, {"ids": indices})[0], weight.dequantize()[indices])


def test_packed_bytes_are_those_of_an_onnx_tensor_of_int4():
    values = np.random.default_rng(0).integers(-7, 8, (3, 6)).astype(np.int8)
    assert pack(values).tobytes() == ir.Tensor(values.astype(ml_dtypes.int4)).tobytes()
    np.testing.assert_array_equal(unpack(pack(values)), values)


def test_what_the_table_does_not_know_stays():
    quantized = quantized_layer("int8")
    model = parse(LAYER, quantized.dequantize() + 1)
    assert quantize_weights(model, WeightTable([quantized])) == frozenset()
    assert list(model.graph.initializers) == ["weight"]


@kinds
@pytest.mark.parametrize(
    "body",
    [
        "y = Neg(weight)",
        "t = Transpose <perm = [1, 0]> (weight) y = Neg(t)",
        "t = Transpose <perm = [1, 0]> (weight) y = MatMul(t, x)",
        "e = Unsqueeze(x, axes) y = MatMul(e, weight)",
    ],
)
def test_a_reader_without_a_quantised_form_is_refused(kind, body):
    quantized = quantized_layer(kind)
    model = parse(
        f"g (float[64, 64] x, int64[1] axes) => (float[a, b] y) {{ {body} }}", quantized.dequantize()
    )
    with pytest.raises(ExportError, match="has no form over") as caught:
        quantize_weights(model, WeightTable([quantized]))
    assert caught.value.where == "weight"
    assert "--precision fp32" in caught.value.hint


def test_a_product_with_a_table_reads_what_its_rows_dequantise_to():
    """The head of a language model that is tied to its table of words."""
    quantized = quantize_int8(np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32), 0)
    text = """g (float[b, 8] x) => (float[b, 50] y)
    { turned = Transpose <perm = [1, 0]> (weight) y = MatMul(x, turned) }"""
    model = parse(text, quantized.dequantize())
    assert quantize_weights(model, WeightTable([quantized])) == {"weight.values", "weight.scales"}
    x = np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)
    np.testing.assert_allclose(run(model, {"x": x})[0], x @ quantized.dequantize().T, rtol=1e-5, atol=1e-5)


DEEP = """
import sys
import numpy as np, onnx_ir as ir
from pathlib import Path
from edge_tcur_export.base_file import BaseFile
from edge_tcur_export.quantize import quantize_int8
from edge_tcur_export.quantized_graph import WeightTable, dequantize_late
LAYERS, SIZE = 10, 768
kind, root = sys.argv[1], Path(sys.argv[2])
generator, weights, nodes, initializers = np.random.default_rng(0), [], [], []
x = top = ir.Value(name="x", shape=ir.Shape(["b", SIZE]), type=ir.TensorType(ir.DataType.FLOAT))
def add(operator, *inputs, **attributes):
    nodes.append(ir.node(operator, inputs, attributes, name=f"n{len(nodes)}"))
    out = nodes[-1].outputs[0]
    out.name, out.shape, out.type = f"v{len(nodes)}", ir.Shape(["b", SIZE]), x.type
    return out
hidden = []
for layer in range(LAYERS):
    quantized = quantize_int8(generator.normal(size=(SIZE, SIZE)).astype(np.float32) / 30, 1)
    weights.append(quantized)
    value = ir.Value(name=f"w{layer}", shape=ir.Shape((SIZE, SIZE)), type=x.type)
    value.const_value = ir.tensor(quantized.dequantize(), name=value.name)
    initializers.append(value)
    top = add("Tanh", add("MatMul", top, value))
    hidden.append(top)
gradient = top
for value, output in zip(initializers[::-1], hidden[::-1]):
    gradient = add("MatMul", add("Mul", gradient, output), add("Transpose", value, perm=[1, 0]))
graph = ir.Graph([x], [top, gradient], nodes=nodes, initializers=initializers, opset_imports={"": 20})
model = ir.Model(graph, ir_version=10)
BaseFile(root, WeightTable(weights)).externalize(model)
if kind == "late":
    for node in [n for n in model.graph if n.op_type == "DequantizeLinear"]:
        (reader, _), = node.outputs[0].uses()
        model.graph.remove(node)
        model.graph.insert_before(reader, node)
if kind == "gated":
    dequantize_late(model)
if kind == "shared":
    first = {}
    for node in [n for n in model.graph if n.op_type == "DequantizeLinear"]:
        kept = first.setdefault(node.inputs[0].name, node)
        node.outputs[0].replace_all_uses_with(kept.outputs[0])
ir.save(model, root / "deep.onnx")
"""
PEAK = """
import sys
import numpy as np

from edge_tcur_runtime.budget import read_memory
from edge_tcur_runtime.engines.session import open_session
from pathlib import Path
import edge_tcur_runtime.engines.session as session
from edge_tcur_runtime import heap
session.import_onnxruntime()
heap.give_back_at_once()  # as a run with a budget does
before = read_memory().peak
opened = open_session(Path(sys.argv[1]) / "deep.onnx", threads=1, in_order=len(sys.argv) > 2)
opened.run(None, {"x": np.ones((4, 768), np.float32)})
print(read_memory().peak - before)
"""


def peak(kind, root, *order):
    root.mkdir()
    for code, arguments in ((DEEP, (kind, root)), (PEAK, (root, *order))):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_step_holds_a_few_float32_weights_at_a_time(tmp_path):
    """One dequantised weight for both passes keeps all of them alive in between; a DequantizeLinear beside
    its reader in the graph comes before everything that its reader waits for."""
    weight = 768 * 768 * 4
    base = 10 * weight // 4
    peaks = {kind: peak(kind, tmp_path / kind) for kind in ("ours", "late", "shared")}
    assert peaks["ours"] < base + 5 * weight  # the base, mapped, two weights, and the session
    assert peaks["late"] > peaks["ours"] + 4 * weight
    assert peaks["shared"] > peaks["ours"] + 4 * weight
    # In the order of the file it is the other way round.
    first, gated = (peak(kind, tmp_path / f"{kind}-in-order", "order") for kind in ("ours", "gated"))
    assert gated < base + 5 * weight
    assert first > gated + 4 * weight


def ancestors(node):
    """Every value that a node needs."""
    waiting, ahead = [node], set()
    while waiting:
        given = [value for value in waiting.pop().inputs if value is not None]
        ahead.update(given)
        waiting += [value.producer() for value in given if value.producer() is not None]
    return ahead


def test_a_late_weight_waits_for_the_operand_of_its_reader():
    quantized = quantized_layer("int8")
    model = parse(LAYER, quantized.dequantize())
    quantize_weights(model, WeightTable([quantized]))
    before = run(model, layer_feeds())
    dequantize_late(model)
    dequantised = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    assert len(dequantised) == 2
    for node in dequantised:
        (use,) = node.outputs[0].uses()
        assert use.node.inputs[0] in ancestors(node)
    for found, expected in zip(run(model, layer_feeds()), before, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_late_weight_that_is_gathered_from_waits_for_the_reader_of_what_is_gathered():
    """In the order of the file nothing else would make it wait, and all weights would be float32 at once."""
    quantized = quantized_layer("int4")
    text = """g (float[b, 64] x, int32[r] rows) => (float[b, r] y, float[r, 64] z)
    {
        right = Gather <axis = 1> (weight, rows)
        u = Neg(x)
        y = MatMul(u, right)
        z = Transpose <perm = [1, 0]> (right)
    }"""
    model = parse(text, quantized.dequantize())
    quantize_weights(model, WeightTable([quantized]))
    feeds = {name: layer_feeds()[name] for name in ("x", "rows")}
    before = run(model, feeds)
    dequantize_late(model)
    (node,) = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    assert "u" in {value.name for value in ancestors(node)}
    for found, expected in zip(run(model, feeds), before, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_onnx_runtime_trainings_builder_unfolds_a_quantised_weight(tmp_path):
    """Why the pass runs on what the builder wrote, and not before."""
    quantized = quantized_layer("int8")
    body = "y = MatMul(x, weight) z = MatMul(y, core) loss = ReduceMean <keepdims = 0> (z)"
    model = parse(
        f"g (float[b, 64] x, float[16, 16] core) => (float loss) {{ {body} }}", quantized.dequantize()
    )
    core = model.graph.inputs.pop()
    core.const_value = ir.tensor(np.ones((16, 16), np.float32), name="core")
    model.graph.initializers["core"] = core
    early = model.clone()
    quantize_weights(early, WeightTable([quantized]))
    _generate(ir.to_proto(early), ["core"], tmp_path, ADAMW)
    training = onnx.load(tmp_path / "training_model.onnx")
    assert {tensor.data_type for tensor in training.graph.initializer} == {onnx.TensorProto.FLOAT}
    _generate(ir.to_proto(model), ["core"], tmp_path, ADAMW)
    late = ir.load(tmp_path / "training_model.onnx")
    assert quantize_weights(late, WeightTable([quantized])) == {"weight.values", "weight.scales"}
