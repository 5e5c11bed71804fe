"""The step graph on the WebGPU provider, for real.

`EDGE_TCUR_WEBGPU_PYTHON` names the Python of an environment with onnxruntime-webgpu; docs/providers.md says
how to make one, and that software Vulkan does.
"""

import json
import os
import subprocess
from pathlib import Path

import onnx
import pytest

PYTHON = os.environ.get("EDGE_TCUR_WEBGPU_PYTHON", "")
ROOT = Path(__file__).parents[2]
SECONDS = 600  # software Vulkan compiles each kernel for a tenth of a second
CODE = """
import json, sys
from pathlib import Path
from edge_tcur_runtime.engines.checks import distance, run_pass
from edge_tcur_runtime.engines.providers import ON_CPU, PROVIDERS, Placement
from edge_tcur_runtime.engines.session import open_session
from edge_tcur_runtime.formats.bundle import open_bundle

bundle = open_bundle(Path(sys.argv[1]))
webgpu = PROVIDERS["webgpu"]

def on_cpu(placement):
    def opener(path, **more):
        import onnxruntime
        original = onnxruntime.SessionOptions
        def options():
            made = original()
            made.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
            return made
        onnxruntime.SessionOptions = options
        session = open_session(path, **more)
        onnxruntime.SessionOptions = original
        for part in session.get_provider_graph_assignment_info():
            if part.ep_name == "CPUExecutionProvider":
                found.extend((node.op_type, node.name) for node in part.get_nodes())
        return session
    found = []
    values, _ = run_pass(bundle, "step", placement, 1, opener)
    return found, values

expected, _ = run_pass(bundle, "step", ON_CPU, 1)
plain, values = on_cpu(Placement(webgpu))
names = sys.argv[2].split(",")
pinned, again = on_cpu(Placement(webgpu, tuple(names)))
print(json.dumps({
    "errors": {name: distance(values[name], value) for name, value in expected.items()},
    "pinned_errors": {name: distance(again[name], value) for name, value in expected.items()},
    "cpu": sorted(plain),
    "pinned": [name for _, name in pinned if name in names],
    "plain": [name for _, name in plain if name in names],
}))
"""
# What may run on the CPU: sizes, indices and masks, in integers and booleans, and what joins them.
FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE}
SHAPES = {
    "Cast", "Concat", "Equal", "Expand", "GatherElements", "GatherND", "GreaterOrEqual", "Max", "Mul",
    "Range", "Reshape", "Shape", "Slice", "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip


def run(*command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "runtime")}
    done = subprocess.run(
        [PYTHON, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def webgpu():
    if not PYTHON:
        pytest.skip(
            "EDGE_TCUR_WEBGPU_PYTHON does not name the Python of an environment with onnxruntime-webgpu"
        )
    found = run("-c", "import onnxruntime; print(onnxruntime.get_available_providers())").stdout
    assert "WebGpuExecutionProvider" in found, found


@pytest.fixture(scope="module")
def result(webgpu, vit):
    nodes = vit.graph("step").graph.node
    names = [node.name for node in nodes if node.op_type in ("Softmax", "Gemm")]
    return names, json.loads(run("-c", CODE, vit.bundle.root, ",".join(names)).stdout.splitlines()[-1])


def test_loss_and_gradients_are_the_cpus(result):
    errors = result[1]["errors"]
    assert len(errors) > 4
    assert max(errors.values()) < 1e-4, errors


def floating(model):
    """Names of the nodes that compute with floating-point numbers: a cast of a size to one does not."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.value_info, *graph.input, *graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {value.name: value.data_type for value in graph.initializer}
    found = set()
    for node in graph.node:
        names = [name for name in (*node.input, *(() if node.op_type == "Cast" else node.output)) if name]
        assert all(types.get(name) for name in names), f"no type of a value of {node.name}"
        if any(types[name] in FLOATS for name in names):
            found.add(node.name)
    return found


def misplaced(on_cpu, model):
    """What runs on the CPU and is not known to be of sizes, indices and masks alone."""
    floats, known = floating(model), {node.name for node in model.graph.node}
    return [
        (kind, name)
        for kind, name in map(tuple, on_cpu)
        if kind not in SHAPES or name not in known or name in floats
    ]


def test_only_sizes_indices_and_masks_run_on_the_cpu(result, vit):
    assert result[1]["cpu"]
    assert misplaced(result[1]["cpu"], vit.graph("step")) == []


@pytest.mark.parametrize("kind", ["Mul", "Transpose", "Expand", "Reshape", "Softmax"])
def test_a_floating_point_operator_on_the_cpu_would_be_noticed(vit, kind):
    """Most of these kinds are allowed for sizes: the element types of the node decide."""
    model = vit.graph("step")
    floats = floating(model)
    name = next(node.name for node in model.graph.node if node.op_type == kind and node.name in floats)
    assert misplaced([[kind, name]], model) == [(kind, name)]


def test_pinned_nodes_run_on_the_cpu(result):
    names, found = result
    assert not found["plain"]
    assert sorted(found["pinned"]) == sorted(names)
    assert max(found["pinned_errors"].values()) < 1e-4


def test_personalisation_end_to_end(webgpu, vit, digits_npz, tmp_path):
    command = [
        "personalize",
        vit.bundle.root,
        "--data",
        digits_npz,
        "--provider",
        "webgpu",
        "--epochs",
        1,
        "--batch-size",
        32,
    ]
    store = ["--store", tmp_path / "store", "--json", "--threads", 1]
    found = json.loads(run("-m", "edge_tcur_runtime", *command, *store).stdout)
    assert (found["engine"], found["provider"]) == ("ort-step", "webgpu"), found["provider_reason"]
    assert "agree with the CPU's" in found["provider_reason"]
    assert found["losses"][-1] < found["losses"][0] * 1.5
    assert found["base_digest_before"] == found["base_digest_after"]
