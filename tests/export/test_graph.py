"""Each pass of `edge_tcur_export.graph` on a small graph, and what would happen without it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import Dim

from edge_tcur.errors import ExportError
from edge_tcur_export import graph as graphs
from edge_tcur_export.ort_training import _generate
from edge_tcur_export.quiet import quiet_torch
from edge_tcur_export.trace import Signature, Traced

HEADER = '<ir_version: 10, opset_import: ["" : 20]>\n'


def parse(text):
    return ir.from_proto(onnx.parser.parse_model(HEADER + text))


def run(model, feeds):
    """All outputs of a graph by name."""
    session = onnxruntime.InferenceSession(
        graphs.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return dict(zip([value.name for value in session.get_outputs()], session.run(None, feeds), strict=True))


def names(values):
    return [value.name for value in values]


def large(model):
    """Initializers of more than a few numbers."""
    return [name for name, value in model.graph.initializers.items() if value.const_value.nbytes > 256]


class Tied(nn.Module):
    """Reads one weight as it is and transposed, and sizes an expanded token as the batch."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))
        self.register_buffer("token", torch.ones(1, 1))

    def forward(self, x, targets):
        outputs = x @ self.weight + x @ self.weight.T + self.token.expand(x.shape[0], 16)
        return (outputs.mean(dim=1) - targets).square().mean(), outputs


def trace(module, *arguments):
    batch = Dim("batch", min=1, max=64)
    with quiet_torch():
        program = torch.export.export(
            module,
            arguments,
            dynamic_shapes=tuple({0: batch} for _ in arguments),
            prefer_deferred_runtime_asserts_over_guards=True,  # as trace_forward does: a symbol per input
        )
    return Traced(program, Signature(("x", "labels"), ("loss", "logits")))


@pytest.fixture(scope="module")
def traced():
    return trace(Tied(), torch.randn(3, 16), torch.arange(3))


@pytest.fixture(scope="module")
def tied(traced):
    return graphs.to_graph(traced)


def test_to_graph_answers_as_torch_and_carries_no_path(tied):
    x, labels = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32), np.arange(5)
    found = run(graphs.clone(tied), {"x": x, "labels": labels})
    loss, outputs = Tied()(torch.from_numpy(x), torch.from_numpy(labels))
    np.testing.assert_allclose(found["logits"], outputs.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["loss"], loss.item(), rtol=1e-5)
    assert (tied.ir_version, tied.opset_imports) == (10, {"": 20})
    raw = graphs.to_proto(tied).SerializeToString()
    assert b".py" not in raw
    assert b"pkg.torch" not in raw


def test_to_graph_does_not_fold_a_transpose_into_a_second_copy(tied):
    from onnxscript.optimizer import fold_constants

    assert len(large(tied)) == 1
    assert "Transpose" in {node.op_type for node in tied.graph}
    folded = graphs.clone(tied)
    fold_constants(folded, onnx_shape_inference=False, input_size_limit=256, output_size_limit=256)
    assert "Transpose" not in {node.op_type for node in folded.graph}
    assert len(large(folded)) == 2  # what to_graph prevents


def test_to_graph_skips_a_decomposition_that_would_change_nothing(traced, tied, monkeypatch):
    with quiet_torch():
        assert graphs._without_idle_decomposition(traced.program) is traced.program  # .T is composite
    with quiet_torch():
        core = Traced(traced.program.run_decompositions(), traced.signature)
        assert graphs._without_idle_decomposition(core.program) is not core.program
    before = str(core.program.graph)
    fast = graphs.to_graph(core)
    assert str(core.program.graph) == before  # the exporter edited a copy
    monkeypatch.setattr(graphs, "_without_idle_decomposition", lambda program: program)
    slow = graphs.to_graph(core)
    assert [node.op_type for node in fast.graph] == [node.op_type for node in slow.graph]
    feeds = {"x": np.ones((2, 16), np.float32), "labels": np.arange(2)}
    np.testing.assert_array_equal(run(fast, feeds)["logits"], run(slow, feeds)["logits"])


def test_to_graph_names_an_operator_without_onnx_form(capfd):
    class Bessel(nn.Module):
        def forward(self, x, labels):
            outputs = torch.special.bessel_j0(x)
            return (outputs.mean(dim=1) - labels).mean(), outputs

    program = trace(Bessel(), torch.randn(3, 4), torch.arange(3))
    capfd.readouterr()
    with pytest.raises(ExportError, match=r"bessel_j0 has no ONNX form") as caught:
        graphs.to_graph(program)
    assert caught.value.hint is not None
    assert capfd.readouterr() == ("", "")


def test_the_inference_graph_needs_no_labels(traced, tied, monkeypatch):
    model = graphs.keep_outputs(graphs.clone(tied), ("logits",))
    assert names(model.graph.inputs) == ["x"]
    assert run(model, {"x": np.ones((7, 16), np.float32)})["logits"].shape == (7, 16)
    monkeypatch.setattr(graphs, "read_sizes_from_inputs", lambda model, _: model)
    left = graphs.keep_outputs(graphs.to_graph(traced), ("logits",))
    # torch knows x and the targets to be of one size, and reads it where its symbol is named first.
    assert names(left.graph.inputs) == ["x", "labels"]


SIZES = """g (float[batch, length, 4] x, int64[batch, length] labels) => (float[a, b] logits)
<int64[1] one = {1}> {
    n = Shape <start = 0, end = 1> (labels)
    m = Shape <start = 1, end = 2> (labels)
    sizes = Concat <axis = 0> (n, m)
    token = Cast <to = 1> (one)
    logits = Expand(token, sizes)
}"""


def test_sizes_are_read_from_the_right_axis_of_an_input():
    x, labels = np.ones((2, 5, 4), np.float32), np.ones((2, 5), np.int64)
    left = graphs.keep_outputs(parse(SIZES), ("logits",))
    assert names(left.graph.inputs) == ["labels"]
    model = graphs.keep_outputs(graphs.read_sizes_from_inputs(parse(SIZES), "labels"), ("logits",))
    assert names(model.graph.inputs) == ["x"]
    assert run(model, {"x": x})["logits"].shape == run(left, {"labels": labels})["logits"].shape == (2, 5)


def test_a_size_that_only_the_targets_have_stays():
    model = parse(SIZES.replace("float[batch, length, 4]", "float[batch, 4]"))
    graphs.keep_outputs(graphs.read_sizes_from_inputs(model, "labels"), ("logits",))
    assert names(model.graph.inputs) == ["x", "labels"]


INDICES = """g (float[4, 6] w, int32[r] rows, int32[a, b] table, float[s] z)
    => (float[4, r] kept, float[a, b, 6] two, float[s, 6] cut, float[r, 6] some)
<int64[1] flat = {-1}> {
    list = Reshape(rows, flat)
    i = Cast <to = 7> (list)
    kept = Gather <axis = 1> (w, i)
    j = Cast <to = 7> (table)
    two = Gather <axis = 0> (w, j)
    k = Cast <to = 7> (z)
    cut = Gather <axis = 0> (w, k)
    any = Cast <to = 9> (rows)
    l = Cast <to = 7> (any)
    some = Gather <axis = 0> (w, l)
}"""


def test_lists_of_indices_are_read_as_they_are_fed():
    model = parse(INDICES)
    for node in model.graph:
        if node.op_type == "Gather":
            size = {"kept": [4, "r"], "two": ["a", "b", 6], "cut": ["s", 6], "some": ["r", 6]}[
                node.outputs[0].name
            ]
            node.outputs[0].shape = ir.Shape(size)
    graphs.read_indices_as_fed(model)
    read = {node.outputs[0].name: node.inputs[1].name for node in model.graph if node.op_type == "Gather"}
    # a table is no list, a float no index, and what is true no number
    assert read == {"kept": "rows", "two": "j", "cut": "k", "some": "l"}
    feeds = {
        "w": np.arange(24, dtype=np.float32).reshape(4, 6),
        "rows": np.array([5, 0], np.int32),
        "table": np.array([[3], [1]], np.int32),
        "z": np.array([2.9], np.float32),
    }
    before, after = run(parse(INDICES), feeds), run(model, feeds)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)


FACTORS = """g (float[b, 2] x, int64[b] labels, float[r, r] core) => (float loss, float[b, 2] logits)
<float[2, 1] left = {1, 2}, float[1, 2] right = {3, 4}> {
    h = MatMul(x, left)
    u = MatMul(h, core)
    dw = MatMul(u, right)
    logits = Add(x, dw)
    f = Cast <to = 1> (labels)
    m = ReduceMean <keepdims = 0> (logits)
    n = ReduceMean <keepdims = 0> (f)
    loss = Sub(m, n)
}"""


def test_keep_outputs_drops_what_only_the_others_need():
    model = graphs.keep_outputs(parse(FACTORS), ("logits",))
    assert names(model.graph.outputs) == ["logits"]
    assert names(model.graph.inputs) == ["x", "core"]
    assert [node.op_type for node in model.graph] == ["MatMul", "MatMul", "MatMul", "Add"]
    through = parse("g (float[b] x, float[b] y, float[b] z) => (float[b] x, float[b] s) { s = Neg(y) }")
    assert names(graphs.keep_outputs(through, ("x",)).graph.inputs) == ["x"]


def test_nothing_fed_is_the_base():
    model = graphs.keep_outputs(parse(FACTORS), ("logits",))
    assert graphs.add_defaults(model, {"core": np.zeros((1, 1), np.float32)}) is model
    x = np.float32([[1, -2], [0.5, 3]])
    np.testing.assert_array_equal(run(model, {"x": x})["logits"], x)
    core = np.float32([[2]])
    expected = x + x @ np.float32([[1], [2]]) @ core @ np.float32([[3, 4]])
    np.testing.assert_allclose(run(model, {"x": x, "core": core})["logits"], expected)


def test_inputs_become_initializers():
    core = np.float32([[2]])
    model = graphs.inputs_to_initializers(parse(FACTORS), {"core": core})
    assert names(model.graph.inputs) == ["x", "labels"]
    assert model.graph.initializers["core"].shape == ir.Shape((1, 1))
    feeds = {"x": np.float32([[1, -2]]), "labels": np.array([1])}
    found = run(model, feeds)["logits"]
    np.testing.assert_array_equal(found, run(parse(FACTORS), {**feeds, "core": core})["logits"])


NORM = """g (float[b, 4] x) => (float loss, float[b, 4] logits)
<float[4, 4] w = {1, 2, 0, 1, 0, 1, 0, 3, 0, 0, 1, 0, 2, 0, 0, 1}, float[4] s = {1, 1, 1, 1},
 float[4] b0 = {0, 0, 0, 0}> {
    h = MatMul(x, w)
    logits = LayerNormalization(h, s, b0)
    p = Mul(logits, logits)
    loss = ReduceMean <keepdims = 0> (p)
}"""


def test_onnx_runtime_training_needs_every_output_of_a_layer_norm(tmp_path):
    model = parse(NORM)
    for place, node in enumerate(model.graph):
        node.name = f"n{place}"
    with pytest.raises(ExportError, match=r"GradientBuilderBase::O\("):
        _generate(graphs.to_proto(model), ["w"], tmp_path, "adamw")
    x = {"x": np.float32([[1, 2, 3, -4]])}
    before = run(model, x)
    graphs.declare_layer_norm_outputs(model)
    norm = next(node for node in model.graph if node.op_type == "LayerNormalization")
    assert names(norm.outputs) == ["logits", "logits.mean", "logits.inv_std_dev"]
    np.testing.assert_array_equal(run(model, x)["logits"], before["logits"])
    _generate(graphs.to_proto(model), ["w"], tmp_path, "adamw")
    assert (tmp_path / "training_model.onnx").is_file()
    assert names(graphs.declare_layer_norm_outputs(model).graph.outputs) == [
        "loss",
        "logits",
    ]  # changes nothing
    assert len(norm.outputs) == 3


def test_clone_is_independent_and_shares_large_tensors(tied):
    copy = graphs.clone(tied)
    (name,) = large(tied)
    assert copy.graph.initializers[name].const_value is tied.graph.initializers[name].const_value
    graphs.keep_outputs(copy, ("logits",))
    assert names(tied.graph.outputs) == ["loss", "logits"]
