"""Bases that are not float32: what training takes, an export takes too."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from edge_tcur.errors import ExportError
from edge_tcur.method.views import LINEAR
from edge_tcur_export.bundle import export_run
from edge_tcur_export.convolution import Updates
from edge_tcur_export.settings import ExportSettings
from edge_tcur_export.trace import FrozenLinear
from edge_tcur_runtime.formats.adapter import read_adapter
from edge_tcur_runtime.formats.bundle import open_bundle
from edge_tcur_runtime.predict import Model

MODELS = """
import torch
from torch import nn

class Asks(nn.Module):
    preprocessing = {
        "kind": "image", "input": "pixel_values", "height": 4, "width": 4, "channels": 1, "scale": 1 / 255,
        "mean": [0.5], "std": [0.25],
    }

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.norm = nn.LayerNorm(16)
        self.out = nn.Linear(16, 3)
        self.bfloat16()

    def dtype(self):
        return self.blocks[0].weight.dtype

    def forward(self, pixel_values):
        x = pixel_values.flatten(1).to(self.dtype())
        for block in self.blocks:
            x = torch.tanh(self.norm(block(x)))
        return self.out(x)

class Fixed(Asks):
    def dtype(self):
        return torch.bfloat16
"""


@pytest.fixture
def run_of(train_module):
    """Trains a run on one of the classes of `MODELS`."""
    return lambda name: train_module(MODELS, "dtype_models", name)


def test_a_bfloat16_base_is_exported_in_float32(run_of, tmp_path):
    """Exactly: a bfloat16 number is a float32 number; the adapter's digest of the base still fits."""
    run = run_of("Asks")
    report = export_run(run, tmp_path / "bundle", ExportSettings(("onnx",)))
    assert report.converted == {"bfloat16": 8}
    assert json.loads(json.dumps(report.to_dict()))["converted"] == {"bfloat16": 8}
    bundle = open_bundle(tmp_path / "bundle")
    assert bundle.manifest.base_digest == run.base_digest
    model = Model(bundle, threads=1)
    model.attach(read_adapter(run.adapter_path))
    for place in bundle.manifest.tensors.values():
        stored = np.fromfile(bundle.path("base.bin"), "<u4", 256, offset=place.offset)
        assert not (stored & 0xFFFF).any()  # the lower half of a float32 that was a bfloat16


def test_a_model_that_casts_to_a_dtype_of_its_own_is_refused(run_of, tmp_path):
    run = run_of("Fixed")
    with pytest.raises(ExportError, match=r"module\.blocks\.0\.weight from bfloat16\) it fails") as caught:
        export_run(run, tmp_path / "bundle", ExportSettings(("onnx",)))
    assert "x.to(self.layer.weight.dtype)" in caught.value.hint
    assert (caught.value.where, caught.value.exit_code) == ("dtype_models:Fixed", 4)
    assert not (tmp_path / "bundle").exists()


def test_the_weight_of_a_frozen_layer_can_be_asked():
    linear = nn.Linear(3, 5)
    frozen = FrozenLinear(linear, LINEAR)
    assert torch.equal(frozen.weight, linear.weight)
    frozen.adapt(Updates(), "group", 0)
    assert (frozen.weight.dtype, frozen.weight.shape) == (torch.float32, (5, 3))
    assert frozen.weight.isnan().all()  # a product with it would leave the update out
