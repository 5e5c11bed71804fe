"""Updates that a block computes together: fresh for every pass, whatever order layers ask in."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from edge_tcur.method.config import TCurConfig
from edge_tcur.method.spectral import Spectrum
from edge_tcur.method.tproduct import coupling_constants, coupling_matrix, dense_update


@pytest.fixture
def model(kit):
    """Four coupled layers in a row, computed in the spectral form."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
    config = TCurConfig(rank=2, grouping="shape", coupling="all", selection="norm")
    net.injection = kit.adapt(net, config)
    kit.stir(net.injection, std=0.3)
    for layer in net.injection.layers().values():
        layer.form = "spectral"
    return net


def core_of(model):
    (group,) = model.injection.groups.values()
    return group.core


def reference(model, x):
    """Outputs and the core's gradient in the factored form."""
    other = copy.deepcopy(model)
    for layer in other.injection.layers().values():
        layer.form = "factored"
    output = other(x)
    output.square().sum().backward()
    return output.detach(), core_of(other).grad


@pytest.mark.parametrize("kind", ["dft", "dct"])
@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_updates_are_those_of_the_single_slices(kind, size):
    torch.manual_seed(size)
    columns, rows = torch.randn(size, 7, 3), torch.randn(size, 3, 5)
    core = torch.randn(size, 3, 3)
    constants = coupling_constants(kind, size)
    together = Spectrum(kind, columns, rows).updates(core)
    for place in range(size):
        alone = dense_update(
            rows.reshape(-1, 5).T,
            coupling_matrix(core, constants[place]),
            columns.transpose(1, 2).reshape(-1, 7),
        )
        torch.testing.assert_close(together[place], alone, rtol=1e-4, atol=1e-4)


def test_pass_after_pass(model):
    """Several passes before a backward, a step in between, evaluation without gradients."""
    x = torch.randn(5, 6)
    for _ in range(2):
        output, gradient = reference(model, x)
        for _ in range(2):
            core_of(model).grad = None
            found = model(x)
            found.square().sum().backward()
            torch.testing.assert_close(found, output)
            torch.testing.assert_close(core_of(model).grad, gradient, rtol=1e-4, atol=1e-5)
        first, second = model(x), model(x)
        core_of(model).grad = None
        (first.square().sum() + second.square().sum()).backward()
        torch.testing.assert_close(core_of(model).grad, 2 * gradient, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(model(x), output)
            core_of(model).add_(0.1)


def test_a_pass_that_uses_some_layers_leaves_nothing_behind(model):
    """A part of the layers, its backward, then the whole; and gradients wanted after a pass without."""
    x = torch.randn(5, 6)
    output, gradient = reference(model, x)
    model[0](x).sum().backward()
    with torch.no_grad():
        model[1](x)
    core_of(model).grad = None
    found = model(x)
    found.square().sum().backward()
    torch.testing.assert_close(found, output)
    torch.testing.assert_close(core_of(model).grad, gradient, rtol=1e-4, atol=1e-5)


def test_a_core_changed_in_the_middle_of_a_pass_counts_from_there(model):
    x = torch.randn(5, 6)
    with torch.no_grad():
        before = [layer(x) for layer in model]
        first = model[0](x)
        core_of(model).zero_()
        rest = [layer(x) for layer in list(model)[1:]]
    torch.testing.assert_close(first, before[0])
    for layer, found in zip(list(model)[1:], rest, strict=True):
        torch.testing.assert_close(found, layer.base(x))


def test_a_copy_made_in_the_middle_of_a_pass_computes_alone(model):
    x = torch.randn(5, 6)
    model[0](x)
    other = copy.deepcopy(model)
    torch.testing.assert_close(other(x), reference(model, x)[0])


def test_layers_called_twice_and_backwards(model):
    x = torch.randn(5, 6)
    expected = {}
    for form in ("factored", "spectral"):
        for layer in model.injection.layers().values():
            layer.form = form
        core_of(model).grad = None
        output = x
        for place in (3, 1, 1, 0, 2, 3):
            output = torch.tanh(model[place](output))
        output.sum().backward()
        expected[form] = output.detach(), core_of(model).grad
    for one, two in zip(*expected.values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_checkpointed_layers(model):
    """Computed again in the backward pass, last layer first."""
    x = torch.randn(5, 6, requires_grad=True)
    _, gradient = reference(model, x)
    output = x
    for layer in model:
        output = torch.utils.checkpoint.checkpoint(layer, output, use_reentrant=False)
    output.square().sum().backward()
    torch.testing.assert_close(core_of(model).grad, gradient, rtol=1e-4, atol=1e-5)


def test_a_model_that_was_cast_computes_in_its_dtype(model):
    model(torch.randn(2, 6))
    model.double()
    (group,) = model.injection.groups.values()
    group.double()
    x = torch.randn(5, 6, dtype=torch.float64)
    output, _ = reference(model, x)
    torch.testing.assert_close(model(x), output, rtol=1e-10, atol=1e-10)
