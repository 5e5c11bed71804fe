"""Frozen tensors in the targets: shared by several places, larger than a protobuf file may be."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edge_tcur.errors import ExportError
from edge_tcur_export import saved
from edge_tcur_export.base_file import BaseFile
from edge_tcur_export.bundle import export_run
from edge_tcur_export.frozen import name_each_reader, put_back, take_out
from edge_tcur_export.ort_training import write_artifacts
from edge_tcur_export.plan import PlanRequest, plan_run
from edge_tcur_export.saved import save_graph
from edge_tcur_export.settings import ExportSettings
from edge_tcur_runtime.formats.bundle import ADAMW, BASE_FILE

MODELS = """
import torch
from torch import nn

class Base(nn.Module):
    preprocessing = {
        "kind": "image", "input": "pixel_values", "height": 4, "width": 4, "channels": 1, "scale": 1 / 255,
        "mean": [0.5], "std": [0.25],
    }
    width = 16

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        width = self.width
        self.stem = nn.Linear(16, width)
        self.blocks = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width)])
        self.norm = nn.LayerNorm(width)
        self.norm.weight.data += 0.1 * torch.randn(width)
        self.norm.bias.data += 0.1 * torch.randn(width)
        self.head = nn.Linear(width, 3)

    def between(self, x):
        return self.norm(x)

    def forward(self, pixel_values):
        x = self.stem(pixel_values.flatten(1))
        for block in self.blocks:
            x = torch.tanh(self.between(block(x)))
        return self.head(self.norm(x))

class Albert(Base):
    # one layer in all places, with a convolution
    width = 128

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([self.blocks[0]])
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, pixel_values):
        x = self.stem(pixel_values.flatten(1))
        for _ in range(3):
            x = self.norm(x + torch.tanh(self.blocks[0](self.norm(x))))
            x = self.conv(x.unsqueeze(1)).squeeze(1)
        return self.head(x)
"""
HEADER = '<ir_version: 10, opset_import: ["" : 20]>\n'
# Two readers of one scale and one bias: as a module's own operator, and written out in the forms of which
# ONNX Runtime makes such an operator; a shared convolution.
NORM = "{y} = LayerNormalization({x}, scale, bias)"
ROOT = """m{y} = ReduceMean({x}, axes)
        c{y} = Sub({x}, m{y})
        s{y} = Pow(c{y}, two)
        v{y} = ReduceMean(s{y}, axes)
        e{y} = Add(v{y}, small)
        r{y} = Sqrt(e{y})
        n{y} = Div(c{y}, r{y})
        f{y} = Mul(n{y}, scale)
        {y} = Add(f{y}, bias)"""
SQUARE = """s{y} = Pow({x}, two)
        v{y} = ReduceMean(s{y}, axes)
        e{y} = Add(v{y}, small)
        r{y} = Sqrt(e{y})
        n{y} = Div({x}, r{y})
        {y} = Mul(n{y}, scale)"""
CONVOLUTION = """u{y} = Unsqueeze({x}, second)
        w{y} = Conv <pads = [1, 1]> (u{y}, kernel, single)
        {y} = Squeeze(w{y}, second)"""


@pytest.fixture
def run_of(train_module):
    """Trains a run on one of the classes of `MODELS`."""
    return lambda name: train_module(MODELS, "frozen_models", name, targets="*blocks*")


def graph_of(form):
    """A loss of a trained core under `form` in two places."""
    model = ir.from_onnx_text(
        f"""{HEADER}g (float[batch, 16] x) => (float loss) {{
        a = MatMul(x, core)
        {form.format(x="a", y="b")}
        t = Tanh(b)
        {form.format(x="t", y="d")}
        q = Mul(d, d)
        loss = ReduceMean <keepdims = 0> (q)
        }}"""
    )
    generator = np.random.default_rng(0)
    tensors = {
        "core": generator.normal(size=(16, 16)).astype(np.float32),
        "scale": generator.normal(1, 0.1, 16).astype(np.float32),
        "bias": generator.normal(0, 0.1, 16).astype(np.float32),
        "kernel": generator.normal(size=(1, 1, 3)).astype(np.float32),
        "single": generator.normal(size=1).astype(np.float32),
        "axes": np.array([-1]),
        "second": np.array([1]),
        "two": np.array(2, np.float32),
        "small": np.array(1e-5, np.float32),
    }
    for name, array in tensors.items():
        if f" {name}" in form or f", {name}" in form or name == "core":
            value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
            value.shape, value.type = ir.Shape(array.shape), ir.TensorType(value.const_value.dtype)
            for node in model.graph:
                for place, given in enumerate(node.inputs):
                    if given is not None and given.name == name:
                        node.replace_input_with(place, value)
            model.graph.initializers[name] = value
    return model


@pytest.mark.parametrize("form", [NORM, ROOT, SQUARE, CONVOLUTION])
def test_the_builder_takes_shared_frozen_tensors(tmp_path, form):
    base_file = BaseFile(tmp_path)
    write_artifacts(graph_of(form), ["core"], base_file, tmp_path, ADAMW)
    found = onnx.load(str(tmp_path / "train.onnx"), load_external_data=False)
    made = [name for node in found.graph.node for name in node.output if name]
    assert len(made) == len(set(made))
    assert "core_grad" in made
    assert [value.name for value in found.graph.input][:2] == ["x", "core"]


def test_each_reader_of_a_norm_has_its_own_names():
    model = graph_of(NORM)
    name_each_reader(model, ["core"])
    read = [[value.name for value in node.inputs] for node in model.graph if "Norm" in node.op_type]
    assert read == [["a", "scale", "bias"], ["t", "scale.reader.1", "bias.reader.1"]]
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    assert tensors["scale.reader.1"] is tensors["scale"]
    trained = graph_of(NORM)
    name_each_reader(trained, ["core", "scale"])
    assert "scale.reader.1" not in trained.graph.initializers


def test_what_is_taken_out_comes_back():
    model, before = graph_of(ROOT), graph_of(ROOT)
    model.graph.initializers["bias"].const_value = ir.tensor(np.zeros(100, np.float32), name="bias")
    taken = take_out(model, ["core"])
    assert set(taken) == {"bias"}  # the others are small, or trained
    assert [value.name for value in model.graph.inputs] == ["x", "bias"]
    put_back(model, taken)
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert set(model.graph.initializers) == set(before.graph.initializers)
    assert model.graph.initializers["bias"].const_value is taken["bias"]


def test_one_layer_in_all_places_and_a_base_that_no_file_can_hold(run_of, tmp_path, monkeypatch):
    """With the limit of a file lowered to less than the base: every graph that is written, or handed on to
    the builder, is checked."""
    monkeypatch.setattr(saved, "LARGEST", 50_000)
    run = run_of("Albert")
    plan = plan_run(run, ExportSettings(), PlanRequest())
    assert plan.impossible == {}
    report = export_run(run, tmp_path / "bundle", ExportSettings())
    assert set(report.parity) == {"infer", "step", "train"}
    assert report.parity["train"]["gradients"] <= 1e-4
    assert report.base_bytes == plan.files[BASE_FILE] > saved.LARGEST > max(report.graph_bytes.values())
    assert report.base_bytes < 100_000  # one copy of what several places read


def test_a_graph_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(saved, "LARGEST", 1100)
    with pytest.raises(ExportError, match=r"g\.onnx would hold 1,168 bytes of its own") as caught:
        save_graph(graph_of(ROOT), tmp_path / "g.onnx")
    assert caught.value.message.endswith("are core (1,024), scale (64), bias (64)")
    assert list(tmp_path.iterdir()) == []
