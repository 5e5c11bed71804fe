"""Operators written out in a traced program: it computes the same, and the operator is gone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim

from edge_tcur_export.rewrites import write_batch_norms, write_instance_norms, write_transposed_convolutions


def traced(module, x):
    return torch.export.export(module.eval(), (x,), dynamic_shapes=({0: Dim("batch", max=64)},))


def operators(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("affine", [True, False])
def test_instance_norms_are_written_out(axes, affine):
    module = getattr(nn, f"InstanceNorm{axes}d")(4, affine=affine)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    program = traced(module, torch.randn(3, 4, *[5] * axes))
    assert "aten.instance_norm.default" in operators(program)
    write_instance_norms(program)
    assert "aten.instance_norm.default" not in operators(program)
    for batch in (1, 5):
        x = torch.randn(batch, 4, *[5] * axes) * 3 + 1
        torch.testing.assert_close(program.module()(x), module(x), rtol=1e-5, atol=1e-5)


def test_an_instance_norm_with_running_statistics_is_left():
    module = nn.InstanceNorm2d(4, track_running_stats=True)
    program = write_instance_norms(traced(module, torch.randn(3, 4, 5, 5)))
    assert "aten.instance_norm.default" in operators(program)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norms_are_written_out(axes, affine):
    module = getattr(nn, f"BatchNorm{axes}d")(4, affine=affine)
    for value in (*module.parameters(), module.running_mean, module.running_var):
        nn.init.uniform_(value, 0.5, 2)
    x = torch.randn(3, 4, *[5] * (axes - 1 if axes == 1 else axes))
    program = traced(module, x)
    assert "aten.batch_norm.default" in operators(program)
    write_batch_norms(program)
    assert "aten.batch_norm.default" not in operators(program)
    torch.testing.assert_close(program.module()(x + 1), module(x + 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_transposed_convolutions_are_written_as_products(axes, bias):
    kernel = (2, 3, 2)[:axes]
    module = getattr(nn, f"ConvTranspose{axes}d")(4, 5, kernel, stride=kernel, bias=bias)
    program = write_transposed_convolutions(traced(module, torch.randn(3, 4, *(3, 4, 2)[:axes])))
    assert not [name for name in operators(program) if "conv" in name]
    for batch in (1, 5):
        x = torch.randn(batch, 4, *(3, 4, 2)[:axes])
        torch.testing.assert_close(program.module()(x), module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"stride": 1}, {"stride": 2, "padding": 1}, {"stride": 2, "groups": 2}])
def test_other_transposed_convolutions_are_left(options):
    module = nn.ConvTranspose2d(4, 4, 2, **options)
    program = write_transposed_convolutions(traced(module, torch.randn(3, 4, 5, 5)))
    assert [name for name in operators(program) if "conv" in name]
