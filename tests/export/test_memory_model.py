"""Sizes of a graph's values, values alive at once, and the prediction against what processes really use."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_tcur_export.memory_model import (
    MemoryEstimate,
    Step,
    activation_peak,
    base_bytes,
    estimate_memory,
    input_shapes,
    pooled_peak,
)
from edge_tcur_export.shapes import UnknownSizesError, ValueShape, evaluate, tensor_bytes, value_bytes
from edge_tcur_runtime.formats.bundle import open_bundle

DATA = Path(__file__).parents[1] / "data"
HEADER = '<ir_version: 10, opset_import: ["" : 20]>\n'


def chain(*steps):
    return [
        Step(operator, tuple(inputs.split()), tuple(outputs.split())) for operator, inputs, outputs in steps
    ]


def test_a_value_lives_from_its_node_to_its_last_reader():
    steps = chain(
        ("MatMul", "x w", "a"), ("MatMul", "a w", "b"), ("MatMul", "b w", "c"), ("MatMul", "c a", "y")
    )
    sizes = {"a": 10, "b": 1, "c": 4, "y": 2}
    assert activation_peak(steps, sizes, {"y"}) == 10 + 4 + 2  # b is gone when y is made
    assert activation_peak(steps, sizes, {"y", "b"}) == 10 + 1 + 4 + 2
    assert activation_peak(steps[:3], sizes, {"c"}) == 10 + 1  # nothing reads a after b


def test_views_share_a_buffer_and_elementwise_operators_take_one_over():
    sizes = {"a": 8, "b": 8, "c": 8, "d": 8}
    views = chain(
        ("MatMul", "x", "a"), ("Reshape", "a s", "b"), ("Squeeze", "b", "c"), ("Transpose", "c", "d")
    )
    assert activation_peak(views, sizes, {"d"}) == 16
    in_place = chain(("MatMul", "x", "a"), ("Add", "a k", "b"), ("Tanh", "b", "c"))
    assert activation_peak(in_place, sizes, {"c"}) == 8
    read_later = chain(("MatMul", "x", "a"), ("Add", "a k", "b"), ("Mul", "b a", "c"))
    assert activation_peak(read_later, sizes, {"c"}) == 16


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=12), st.data())
def test_the_peak_lies_between_the_largest_value_and_all_of_them(sizes, data):
    names = [f"v{place}" for place in range(len(sizes))]
    steps = []
    for place, name in enumerate(names):
        read = data.draw(st.lists(st.sampled_from(["x", *names[:place]]), min_size=1, max_size=3))
        operator = data.draw(st.sampled_from(["MatMul", "Add", "Reshape"]))
        steps.append(Step(operator, tuple(read), (name,)))
    table = dict(zip(names, sizes, strict=True))
    peak = activation_peak(steps, table, {names[-1]})
    made = [size for step, size in zip(steps, sizes, strict=True) if step.operator != "Reshape"]
    assert max(made, default=0) <= peak <= sum(sizes)
    assert activation_peak(steps, {name: 2 * size for name, size in table.items()}, {names[-1]}) == 2 * peak


def test_size_expressions():
    assert evaluate("s1*s2 + 3", {"s1": 4, "s2": 5}) == 23
    assert evaluate("Max(s1, 2)", {"s1": 1}) == 2
    assert evaluate("s1//2", {"s1": 5}) == 2
    assert evaluate("s9", {"s1": 4}) is None


def test_sizes_that_contradict_the_graph_are_refused():
    model = onnx.parser.parse_model(
        HEADER + "g (float[b, 4] x, float[b] y) => (float[b, 4] z) { z = Tanh(x) }"
    )
    assert value_bytes(model, {"x": [3, 4], "y": [3]})["z"] == 48
    for wrong in ({"x": [3, 5]}, {"x": [3]}, {"x": [3, 4], "y": [2]}):
        with pytest.raises(UnknownSizesError):
            value_bytes(model, wrong)


def graph_of(name, role):
    bundle = open_bundle(DATA / name)
    return bundle, onnx.load(str(bundle.graph(role)), load_external_data=False)


def shapes_of(bundle, model, batch, rank=None):
    ranks = {name: rank or group.rank for name, group in bundle.manifest.groups.items()}
    return input_shapes(model, bundle.manifest.inputs, batch, 0, ranks)


@pytest.mark.parametrize(("name", "rank"), [("bundle-v1", 3), ("bundle-v1", 2), ("sketch-v1", 2)])
def test_the_sizes_are_those_that_onnx_runtime_makes(name, rank, tmp_path):
    """Every value of a real step graph, exposed and measured."""
    bundle, model = graph_of(name, "step")
    shapes = shapes_of(bundle, model, 5, rank)
    sizes = value_bytes(model, shapes)
    names = [value for node in model.graph.node for value in node.output if value]
    copy = onnx.load(str(bundle.graph("step")))
    there = {value.name for value in copy.graph.output}
    copy.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in names if n not in there)
    session = onnxruntime.InferenceSession(copy.SerializeToString(), providers=["CPUExecutionProvider"])
    kinds = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(int64)": np.int64}
    feeds = {value.name: np.zeros(shapes[value.name], kinds[value.type]) for value in session.get_inputs()}
    found = dict(zip(names, session.run(names, feeds), strict=True))
    assert len(names) > 300
    known = {name: value.nbytes for name, value in found.items() if name in sizes}
    assert {name: sizes[name] for name in known} == known
    # What shape inference leaves open is arithmetic of sizes: a few integers.
    assert sum(value.nbytes for name, value in found.items() if name not in sizes) < 2000


@pytest.mark.parametrize("external", [True, False])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("INT4", 8),
        ("UINT4", 8),
        ("FLOAT4E2M1", 8),
        ("INT8", 15),
        ("FLOAT16", 30),
        ("FLOAT", 60),
        ("INT64", 120),
    ],
)
def test_an_initializer_has_the_bytes_that_onnx_writes_for_it(kind, expected, external):
    """int4: two numbers in a byte, the last byte filled up."""
    number = getattr(onnx.TensorProto, kind)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(number)
    tensor = onnx.numpy_helper.from_array(np.ones((3, 5)).astype(dtype), "w")
    assert len(tensor.raw_data) == expected
    if external:
        tensor.data_location, tensor.raw_data = onnx.TensorProto.EXTERNAL, b""
    assert tensor_bytes(tensor) == expected


def test_an_int4_weight_is_read_and_moved_as_half_a_byte_a_number():
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21]> g (float[b, 64] x, float[] s) => (float[b, 32] y) {
            d = DequantizeLinear(w, s)
            y = MatMul(x, d)
        }"""
    )
    dims, kind = (64, 32), onnx.TensorProto.INT4
    tensor = onnx.TensorProto(name="w", data_type=kind, dims=dims, data_location=onnx.TensorProto.EXTERNAL)
    model.graph.initializer.append(tensor)
    sizes = value_bytes(model, {"x": [2, 64], "s": []})
    assert sizes["w"] == 64 * 32 // 2
    assert sizes["d"] == 64 * 32 * 4
    assert base_bytes(model, sizes) == 64 * 32 // 2


def test_an_inference_holds_both_float_copies_of_an_int4_weight():
    """Rows of int4 are picked from a copy of their own, and ONNX Runtime makes it beside the product's."""
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21]> g (float[b, 64] x, int64[r] i, float[] s)
        => (float[b, 32] y, float[r, 32] z) {
            d = DequantizeLinear(w, s)
            y = MatMul(x, d)
            e = DequantizeLinear(w, s)
            z = Gather(e, i)
        }"""
    )
    kind, place = onnx.TensorProto.INT4, onnx.TensorProto.EXTERNAL
    model.graph.initializer.append(
        onnx.TensorProto(name="w", data_type=kind, dims=(64, 32), data_location=place)
    )
    shapes = {"x": [2, 64], "i": [4], "s": []}
    walked, inference = (estimate_memory(model, shapes, role=role) for role in (None, "infer"))
    assert inference.activations - walked.activations == 64 * 32 * 4
    del model.graph.node[2:]
    del model.graph.output[1:]
    assert estimate_memory(model, shapes, role="infer") == estimate_memory(model, shapes)


def test_gathered_weights_cost_the_rows_that_are_read():
    model = onnx.parser.parse_model(
        HEADER
        + """g (int64[b] i, float[b, 8] x) => (float[b, 8] y) {
            e = Gather(table, i)
            m = MatMul(x, w)
            y = Add(e, m)
        }"""
    )
    for name, dims in (("table", (100_000, 8)), ("w", (8, 8))):
        tensor = onnx.TensorProto(name=name, data_type=1, dims=dims, data_location=onnx.TensorProto.EXTERNAL)
        model.graph.initializer.append(tensor)
    row, page = 8 * 4, 4096
    sizes = value_bytes(model, {"i": [10], "x": [10, 8]})
    assert base_bytes(model, sizes) == 10 * (row + page) + 8 * 8 * 4
    sizes = value_bytes(model, {"i": [10**6], "x": [10**6, 8]})
    assert base_bytes(model, sizes) == 100_000 * row + 8 * 8 * 4


def benchmark():
    path = Path(__file__).parents[1] / "benchmarks" / "memory_model.py"
    spec = importlib.util.spec_from_file_location("memory_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_buffer_stays_for_later_values_of_its_shape_alone():
    """[6, 4] and [2, 3, 4] have the same bytes and no buffer in common."""
    flat, apart, small = ValueShape((6, 4), 4), ValueShape((2, 3, 4), 4), ValueShape((6,), 4)
    chained = chain(("MatMul", "x w", "a"), ("MatMul", "a w", "b"), ("MatMul", "b w", "c"))
    assert pooled_peak(chained, dict.fromkeys("abc", flat), {"c"}) == 2 * 96
    assert pooled_peak(chained, {"a": flat, "b": small, "c": flat}, {"c"}) == 96 + 24
    assert pooled_peak(chained, {"a": flat, "b": small, "c": apart}, {"c"}) == 2 * 96 + 24
    in_place = chain(("MatMul", "x w", "a"), ("Add", "a w", "b"), ("Softmax", "b", "c"))
    assert pooled_peak(in_place, dict.fromkeys("abc", flat), {"c"}) == 2 * 96
    viewed = chain(("MatMul", "x w", "a"), ("Reshape", "a s", "b"), ("Gelu", "b", "c"))
    assert pooled_peak(viewed, {"a": flat, "b": apart, "c": apart}, {"c"}) == 2 * 96


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.data())
def test_buffers_take_at_least_what_is_alive(sizes, data):
    names = [f"v{place}" for place in range(len(sizes))]
    steps = []
    for place, name in enumerate(names):
        read = data.draw(st.lists(st.sampled_from(["x", *names[:place]]), min_size=1, max_size=3))
        operator = data.draw(st.sampled_from(["MatMul", "Add", "Softmax"]))
        steps.append(Step(operator, tuple(read), (name,)))
    shapes = {name: ValueShape((size,), 4) for name, size in zip(names, sizes, strict=True)}
    alive = activation_peak(steps, {name: shape.bytes for name, shape in shapes.items()}, {names[-1]})
    assert alive <= pooled_peak(steps, shapes, {names[-1]}) <= 4 * sum(sizes)


@pytest.mark.parametrize("batch", [1, 4096, 16384])
def test_the_inference_graphs_prediction_is_near_what_a_fresh_process_uses(batch, capsys):
    """Small at first; at the largest batch nearly all of it are the buffers."""
    tool, root = benchmark(), DATA / "bundle-v1"
    measured, predicted = tool.measure(root, "infer", batch, 0)[-1], tool.predict(root, "infer", batch, 0)
    ratio = predicted.total / measured
    with capsys.disabled():
        print(f" infer at {batch}: predicted {ratio:.2f} of {measured / 2**20:.0f} MiB", end="")
    assert 0.87 <= ratio <= 1.13


@pytest.mark.parametrize("role", ["step", "train"])
@pytest.mark.parametrize("batch", [1, 1024, 4096])
def test_the_prediction_is_near_what_a_fresh_process_uses(role, batch, capsys):
    """VmHWM of a process that loads the graph as a device does and takes one step."""
    tool, root = benchmark(), DATA / "bundle-v1"
    measured, predicted = tool.measure(root, role, batch, 0)[-1], tool.predict(root, role, batch, 0)
    ratio = predicted.total / measured
    with capsys.disabled():
        print(f" {role} at {batch}: predicted {ratio:.2f} of {measured / 2**20:.0f} MiB", end="")
    assert 0.75 <= ratio <= 1.25


def test_the_estimate_adds_up_and_grows_with_the_batch():
    assert MemoryEstimate(1, 2, 3, 4).to_dict() == {
        "libraries": 1, "session": 2, "base": 3, "activations": 4, "total": 10,
    }  # fmt: skip
    bundle, model = graph_of("bundle-v1", "step")
    small, large = (estimate_memory(model, shapes_of(bundle, model, batch)) for batch in (1024, 2048))
    assert (small.session, small.base, small.libraries) == (large.session, large.base, large.libraries)
    assert 1.95 < large.activations / small.activations < 2
