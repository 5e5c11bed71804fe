"""The operators that ONNX Runtime Training cannot differentiate, and where they matter."""

from __future__ import annotations

import json
import subprocess
import sys

import onnx.parser
import onnx_ir as ir
import pytest

from edge_tcur_export.operators import MODULE, NO_GRADIENT, find_undifferentiable, remember_modules

HEADER = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>\n'
# Built by the library itself: one node between a trained weight and the loss.
PROBE = """
import contextlib, io, json, os, sys, tempfile, warnings
warnings.simplefilter("ignore")
sys.modules["torch"] = None
from edge_tcur_runtime.engines.ort_training import import_training_api
import_training_api()
from onnxruntime.training import artifacts
import onnx.parser
refused = []
for op in sys.argv[1:]:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[b, 4] x) => (float loss)'
        ' <float[4, 4] w = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}>'
        ' { h = MatMul(x, w)  y = ' + op + '(h)  loss = ReduceMean <keepdims = 0> (y) }'
    )
    for place, node in enumerate(model.graph.node):
        node.name = f"n{place}"
    with tempfile.TemporaryDirectory() as work, contextlib.redirect_stdout(io.StringIO()):
        try:
            artifacts.generate_artifacts(model, requires_grad=["w"], artifact_directory=work)
        except RuntimeError as error:
            assert "has not been registered" in str(error), (op, error)
            refused.append(op)
print(json.dumps(refused))
"""
# A gradient is written, and no training session can be made of it.
TRANSPOSED = """
import contextlib, io, os, sys, tempfile, warnings
warnings.simplefilter("ignore")
sys.modules["torch"] = None
from edge_tcur_runtime.engines.ort_training import import_training_api
api = import_training_api()
from onnxruntime.training import artifacts
import onnx.parser
model = onnx.parser.parse_model(
    '<ir_version: 10, opset_import: ["" : 20]> g (float[b, 4] x) => (float loss)'
    ' <float[4, 4] w = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}, int64[4] s = {-1, 1, 2, 2},'
    ' float[1, 1, 2, 2] k = {1, 2, 3, 4}>'
    ' { h = MatMul(x, w)  r = Reshape(h, s)  c = ConvTranspose(r, k)  loss = ReduceMean <keepdims = 0> (c) }'
)
for place, node in enumerate(model.graph.node):
    node.name = f"n{place}"
with tempfile.TemporaryDirectory() as work:
    with contextlib.redirect_stdout(io.StringIO()):
        artifacts.generate_artifacts(model, requires_grad=["w"], artifact_directory=work)
    for name in ("training_model.onnx", "eval_model.onnx"):
        graph = onnx.load(f"{work}/{name}")
        graph.ir_version = 10
        onnx.save(graph, f"{work}/{name}")
    from onnxruntime.training.api import CheckpointState, Module
    state = CheckpointState.load_checkpoint(f"{work}/checkpoint")
    try:
        Module(f"{work}/training_model.onnx", state, f"{work}/eval_model.onnx")
    except RuntimeError as error:
        print("ConvTransposeGrad" in str(error) and "Could not find an implementation" in str(error))
"""
DIFFERENTIABLE = ("Abs", "Cos", "Erf", "Exp", "Gelu", "LeakyRelu", "Log", "LogSoftmax", "Reciprocal",
                  "Relu", "ReduceL2", "ReduceSum", "Sigmoid", "Sin", "Softmax", "Sqrt", "Tanh")  # fmt: skip
SINGLE_INPUT = (
    "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Ceil", "Celu", "Cosh", "Det", "Elu", "Floor",
    "HardSigmoid", "HardSwish", "Hardmax", "LpNormalization", "Mean", "Mish", "ReduceL1", "ReduceLogSum",
    "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSumSquare", "Round", "Selu", "Shrink", "Sign", "Sinh",
    "Softplus", "Softsign", "Sum", "Tan", "ThresholdedRelu",
)  # fmt: skip


def parse(text):
    model = ir.from_proto(onnx.parser.parse_model(HEADER + text))
    for place, node in enumerate(model.graph):
        node.name = f"{node.op_type.lower()}_{place}"
    return model


def test_the_table_says_what_the_library_does():
    assert set(SINGLE_INPUT) <= NO_GRADIENT
    assert not NO_GRADIENT.intersection(DIFFERENTIABLE)
    command = [sys.executable, "-c", PROBE, *DIFFERENTIABLE, *SINGLE_INPUT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == list(SINGLE_INPUT)


def test_the_gradient_of_a_transposed_convolution_has_no_kernel():
    assert "ConvTranspose" in NO_GRADIENT
    done = subprocess.run([sys.executable, "-c", TRANSPOSED], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["True"], done.stdout + done.stderr


def test_only_nodes_between_a_trained_value_and_the_loss_count():
    model = parse(
        """g (float[b, 4] x, float[4, 4] core) => (float loss, float[b, 4] logits) {
            before = Softplus(x)
            h = MatMul(before, core)
            inside = Elu(h)
            aside = Selu(h)
            loss = ReduceMean <keepdims = 0> (inside)
            logits = Softsign(aside)
        }"""
    )
    found = find_undifferentiable(model, ["core"])
    assert [(entry.operator, entry.node, entry.module) for entry in found] == [("Elu", "elu_2", None)]
    assert str(found[0]) == "Elu (node elu_2)"
    assert [entry.operator for entry in find_undifferentiable(model, ["core"], "logits")] == [
        "Selu",
        "Softsign",
    ]
    assert find_undifferentiable(model, ["another"]) == []


def test_integers_end_a_path():
    model = parse(
        """g (float[b, 4] x, float[4, 4] core) => (float loss) <int64[1] minus = {-1}> {
            shape = Shape(core)
            other = Mod(shape, shape)
            h = MatMul(x, core)
            loss = ReduceMean(h, other)
        }"""
    )
    for node in model.graph:
        if node.op_type in {"Shape", "Mod"}:
            node.outputs[0].dtype = ir.DataType.INT64
    assert find_undifferentiable(model, ["core"]) == []


@pytest.mark.parametrize(("mode", "count"), [("constant", 0), ("reflect", 1)])
def test_padding_has_a_gradient_in_one_mode(mode, count):
    model = parse(
        f"""g (float[b, 4] core) => (float loss) <int64[4] pads = {{0, 1, 0, 1}}> {{
            h = Pad <mode = "{mode}"> (core, pads)
            loss = ReduceMean <keepdims = 0> (h)
        }}"""
    )
    assert len(find_undifferentiable(model, ["core"])) == count


def test_other_domains_are_named():
    model = parse(
        """g (float[b, 4] core) => (float loss) {
            h = com.microsoft.MultiHeadAttention <num_heads = 1> (core, core, core)
            loss = ReduceMean <keepdims = 0> (h)
        }"""
    )
    assert str(find_undifferentiable(model, ["core"])[0]).startswith(
        "com.microsoft.MultiHeadAttention (node "
    )


def test_the_module_of_a_node_is_remembered():
    model = parse("g (float[b, 4] core) => (float[b, 4] loss) { a = Elu(core)  b = Selu(a)  loss = Sum(b) }")
    scopes = ("['', 'model', 'model.layers.0', 'elu']", "['', 'model', 'selu']", None)
    for node, names in zip(model.graph, scopes, strict=True):
        if names is not None:
            node.metadata_props["pkg.torch.onnx.name_scopes"] = names
    remember_modules(model, "model.")
    assert [node.meta.get(MODULE) for node in model.graph] == ["layers.0", None, None]
    assert str(find_undifferentiable(model, ["core"])[0]) == "Elu (node elu_0, from the module layers.0)"
