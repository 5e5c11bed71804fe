"""Behaviours of libraries that docs/traps.md tells of and that no other test would notice: each as it is, and
what we do about it. Where one of these fails, the library has changed, and our way around it may go."""

from __future__ import annotations

import importlib
import json
import logging
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.onnx._internal.exporter import _onnx_program

from edge_tcur.models import load_base
from edge_tcur.tasks import find_task
from edge_tcur_export import graph as graphs
from edge_tcur_export.convolution import Updates
from edge_tcur_export.lowering import vulkan
from edge_tcur_export.quiet import quiet_torch
from edge_tcur_export.trace import Signature, Traced

MIB = 2**20


class Own:
    """As `Updates`: state in an object of a class of its own."""

    def __init__(self):
        self.by_group = {}


class Reader(nn.Module):
    def __init__(self, shared):
        super().__init__()
        self.shared = shared

    def forward(self, x):
        held = self.shared if isinstance(self.shared, dict) else self.shared.by_group
        return x * held["factor"]


class Owner(nn.Module):
    """Hands a value to another module through what both hold."""

    def __init__(self, shared):
        super().__init__()
        self.shared, self.reader = shared, Reader(shared)

    def forward(self, x, factor):
        held = self.shared if isinstance(self.shared, dict) else self.shared.by_group
        held["factor"] = factor
        result = self.reader(x)
        held.clear()
        return result


@pytest.mark.parametrize("make", [dict, Own, Updates])
def test_torch_export_copies_a_dict_that_two_modules_hold(make):
    owner, x = Owner(make()), torch.ones(2)
    assert owner.shared is owner.reader.shared
    torch.export.export(owner, (x, x))
    assert (owner.shared is owner.reader.shared) == (make is not dict)
    if make is not dict:
        assert torch.equal(owner(x, 3 * x), 3 * x)
    else:
        with pytest.raises(KeyError):
            owner(x, 3 * x)


class Chain(nn.Module):
    def forward(self, x, labels):
        return (x.mean(dim=1) - labels).square().mean(), x.sigmoid()


def test_the_exporter_rewrites_patterns_unless_it_is_told_not_to(monkeypatch):
    """That takes most of the time of a conversion with a backward pass, and ONNX Runtime does it anyway."""
    calls = []
    monkeypatch.setattr(_onnx_program.onnxscript_apis, "optimize", lambda model: calls.append(1) or model)
    with quiet_torch():
        program = torch.export.export(Chain(), (torch.ones(3, 4), torch.ones(3)))
        torch.onnx.export(program, dynamo=True, opset_version=graphs.OPSET, verbose=False)
        assert calls == [1]
        graphs.to_graph(Traced(program, Signature(("x", "labels"), ("loss", "logits"))))
    assert calls == [1]


def test_importing_the_partitioner_for_vulkan_makes_the_root_logger_talk():
    root = logging.getLogger()
    before = root.level
    try:
        root.setLevel(logging.WARNING)
        with quiet_torch():
            vulkan()
            assert root.level == logging.WARNING
            importlib.reload(sys.modules["executorch.backends.vulkan.partitioner.vulkan_partitioner"])
        assert root.level == logging.INFO
    finally:
        root.setLevel(before)


class Doubled(nn.Linear):
    """A layer that computes something else than its weights say, as an adapted one does."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_torchs_fused_transformer_layer_passes_a_layers_own_forward_by(vit_dir):
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.ones(2, 3, 8)
    enabled = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(True)
        with torch.no_grad():
            plain = layer(x)
            layer.linear1.__class__ = Doubled
            torch.testing.assert_close(layer(x), plain)
            load_base(str(vit_dir), find_task("image-classification"), ("0", "1", "2"), {})  # switches it off
            assert (layer(x) - plain).abs().max() > 1e-3
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


MAPPED = """
import json, sys
import numpy as np
from pathlib import Path
from edge_tcur_runtime.budget import read_memory
from edge_tcur_runtime.engines.session import open_session
session = open_session(Path(sys.argv[1]), threads=1)
session.run(None, {"x": np.ones(1, np.float32)})
print(json.dumps(read_memory().peak))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_onnx_runtime_maps_each_external_tensor_by_itself(tmp_path):
    """Two names for the same bytes of a file are resident twice."""
    size = 48 * MIB
    np.ones(size // 4, np.float32).tofile(tmp_path / "base.bin")
    peaks = []
    for names in (("a",), ("a", "b")):
        nodes = "\n".join(f"s_{name} = ReduceSum<keepdims = 0>({name})" for name in names)
        model = onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["" : 20]> g (float[1] x) => (float[1] y) {'
            f"{nodes}\ny = Sum(x, {', '.join(f's_{name}' for name in names)})}}"
        )
        for name in names:
            tensor = onnx.TensorProto(name=name, data_type=1, dims=[size // 4], data_location=1)
            for key, value in (("location", "base.bin"), ("offset", "0"), ("length", str(size))):
                tensor.external_data.add(key=key, value=value)
            model.graph.initializer.append(tensor)
        path = tmp_path / f"{len(names)}.onnx"
        path.write_bytes(model.SerializeToString())
        done = subprocess.run(
            [sys.executable, "-c", MAPPED, str(path)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        peaks.append(json.loads(done.stdout))
    assert peaks[0] > size
    assert 0.8 * size < peaks[1] - peaks[0] < 1.2 * size
