"""ExecuTorch's programs that differ from torch: the operator that is named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edge_tcur.errors import ExportError
from edge_tcur_export import lowering, program_divergence, trace
from edge_tcur_export.bundle import export_run
from edge_tcur_export.lowering import PORTABLE, XNNPACK, import_executorch
from edge_tcur_export.program_divergence import ProgramSource, find_program_difference, traces_otherwise
from edge_tcur_export.quiet import quiet_torch
from edge_tcur_export.settings import ExportSettings, ProgramSettings
from edge_tcur_runtime.formats.bundle import open_bundle

POOLED = """
import torch
from torch import nn

class Net(nn.Module):
    preprocessing = {
        "kind": "image", "input": "pixel_values", "height": 4, "width": 4, "channels": 1, "scale": 1 / 255,
        "mean": [0.5], "std": [0.25],
    }

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.out = nn.Linear(16, 16), nn.Linear(9, 3)
        self.pool = nn.MaxPool2d(2, 1)

    def forward(self, pixel_values):
        x = self.mix(pixel_values.flatten(1)).reshape(-1, 1, 4, 4)
        return self.out(self.pool(x).flatten(1))
"""
TOLERANCES = (1e-4, 1e-3)


def test_a_wrong_kernel_of_executorch_is_named_and_its_program_removed(train_module, tmp_path, monkeypatch):
    """The portable backward pass of max pooling is wrong in ExecuTorch 1.5.1; without our decomposition it is
    in the program."""
    run = train_module(POOLED, "pooled_models", "Net")
    pool = torch.ops.aten.max_pool2d_with_indices_backward.default
    table = {target: by for target, by in trace.BACKWARD.items() if target != pool}
    assert len(table) == len(trace.BACKWARD) - 1
    monkeypatch.setattr(trace, "BACKWARD", table)
    settings = ExportSettings(("onnx", "executorch"), programs=ProgramSettings((PORTABLE,)))
    with pytest.raises(ExportError, match="train-portable: the gradients differ from torch by") as caught:
        export_run(run, tmp_path / "bundle", settings)
    assert "first operator that differs is max_pool2d_with_indices_backward (node" in caught.value.message
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert manifest.verified.targets == ("infer", "infer-portable")


class Chain(nn.Module):
    """Forty operators, a frozen matrix among them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        for _ in range(6):
            x = (x @ self.weight).tanh() + x.sin()
        y = x.sigmoid()
        for _ in range(6):
            y = (y @ self.weight).cos() * y.sin()
        return y


@pytest.fixture
def chain():
    with quiet_torch():
        program = torch.export.export(Chain(), (torch.randn(3, 8),)).run_decompositions()
    return ProgramSource(lowering.Lowering(program).program, ("x",), ("logits",), XNNPACK)


@pytest.fixture
def feeds():
    return {"x": np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)}


def swap(module):
    """A pass gone wrong: the sigmoid becomes a tanh."""
    import_executorch()
    from executorch.exir.dialects._ops import ops

    for node in module.graph.nodes:
        if node.target == ops.edge.aten.sigmoid.default:
            node.target = ops.edge.aten.tanh.default
    module.recompile()
    return module


@pytest.mark.parametrize("most", [3, 128])
def test_a_wrong_pass_is_found_in_few_programs(chain, feeds, monkeypatch, most):
    """With few outputs at once it takes several: between right values and a wrong one."""
    monkeypatch.setitem(lowering._PASSES, XNNPACK, (*lowering._PASSES[XNNPACK], swap))
    monkeypatch.setattr(program_divergence, "_MOST", most)
    sizes, exposed = [], program_divergence.exposed

    def noted(program, names):
        result = exposed(program, names)
        sizes.append(len(result.graph_module.graph.nodes))
        return result

    monkeypatch.setattr(program_divergence, "exposed", noted)
    found = find_program_difference(chain, feeds, TOLERANCES)
    assert (found.operator, found.node) == ("sigmoid", "sigmoid")
    assert found.error > 0.1
    assert len(sizes) == (1 if most == 128 else len(sizes)) <= 4
    assert sizes == sorted(sizes, reverse=True)


def test_a_program_that_agrees_has_no_first_operator(chain, feeds):
    assert find_program_difference(chain, feeds, TOLERANCES) is None
    expected = Chain()(torch.from_numpy(feeds["x"])).numpy()
    assert not traces_otherwise(chain, feeds, expected)
    assert traces_otherwise(chain, feeds, expected + 1)


def test_what_cannot_be_lowered_or_is_too_large_is_not_looked_into(chain, feeds, monkeypatch):
    monkeypatch.setattr(program_divergence, "_LARGEST_BASE", 100)
    assert find_program_difference(chain, feeds, TOLERANCES) is None
    monkeypatch.undo()
    monkeypatch.setitem(lowering._PASSES, XNNPACK, (lambda module: 1 / 0,))
    assert find_program_difference(chain, feeds, TOLERANCES) is None
