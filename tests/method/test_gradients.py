"""Mean gradients of the frozen weights: of every kind of layer, against plain autograd."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from edge_tcur.method.config import TCurConfig
from edge_tcur.method.gradients import mean_gradients
from edge_tcur.method.quantized import quantize_linears
from edge_tcur.method.targets import find_targets
from edge_tcur_runtime.errors import BadInputError


class Mixed(nn.Module):
    """A convolution, GPT-2's Conv1D and linear layers, one of which is used twice and one never."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        self.convolution = nn.Conv2d(1, 4, 2, stride=2)
        self.conv1d = Conv1D(6, 4)
        self.linear = nn.Linear(6, 6)
        self.unused = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.convolution(x).flatten(2).transpose(1, 2).contiguous()
        x = torch.tanh(self.conv1d(x))
        return self.head(torch.tanh(self.linear(torch.tanh(self.linear(x)))).mean(dim=1))


PATTERNS = "convolution,conv1d,linear,unused"


def batches(n=3):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(5, 1, 4, 4, generator=generator), torch.randint(0, 3, (5,), generator=generator))
        for _ in range(n)
    ]


def losses(model, data):
    for x, y in data:
        yield lambda x=x, y=y: nn.functional.cross_entropy(model(x), y)


def targets_of(model, patterns=PATTERNS):
    return find_targets(model, TCurConfig(rank=1, targets=patterns))


def test_against_autograd():
    model, data = Mixed(), batches()
    plain = copy.deepcopy(model)
    for loss in losses(plain, data):
        (loss() / len(data)).backward()
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # as in training: the base is frozen
    found = mean_gradients(model, targets_of(model), losses(model, data))
    assert set(found) == set(PATTERNS.split(","))
    expected = {
        "convolution": plain.convolution.weight.grad.flatten(1),
        "conv1d": plain.conv1d.weight.grad.T,
        "linear": plain.linear.weight.grad,
        "unused": torch.zeros(6, 6),
    }
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


def test_the_model_is_unchanged():
    model, data = Mixed(), batches()
    x, _ = data[0]
    state, expected = copy.deepcopy(model.state_dict()), model(x)
    mean_gradients(model, targets_of(model), losses(model, data))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(x), expected)
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(value.requires_grad and value.grad is None for value in model.parameters())


def test_a_loss_that_fails_leaves_the_model_as_it_was():
    model, (x, _), *_ = Mixed(), *batches()
    expected = model(x)

    def fails():
        model(x)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        mean_gradients(model, targets_of(model), [fails])
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(x), expected)


def test_of_int8_layers():
    model, data = Mixed(), batches()
    quantize_linears(model, keep=("head",))
    plain = copy.deepcopy(model)
    for name in ("linear", "unused"):
        layer = nn.Linear(6, 6)
        layer.weight.data, layer.bias.data = (
            getattr(model, name).dequantize(),
            getattr(model, name).bias.clone(),
        )
        setattr(plain, name, layer)
    for loss in losses(plain, data):
        (loss() / len(data)).backward()
    found = mean_gradients(model, targets_of(model), losses(model, data))
    torch.testing.assert_close(found["linear"], plain.linear.weight.grad, rtol=1e-5, atol=1e-7)


def test_of_a_bfloat16_base(kit):
    model, config = kit.Net(), TCurConfig(rank=2)
    expected = mean_gradients(model, find_targets(model, config), [lambda: kit.loss_of(model)])
    model.bfloat16()
    found = mean_gradients(model, find_targets(model, config), [lambda: kit.loss_of(model)])
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(
            gradient, expected[name], rtol=0.1, atol=0.05 * float(expected[name].abs().max())
        )


def test_gradients_inside_no_grad():
    model, data = Mixed(), batches(1)
    expected = mean_gradients(model, targets_of(model), losses(model, data))
    with torch.no_grad():
        found = mean_gradients(model, targets_of(model), losses(model, data))
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_a_gradient_that_is_not_finite():
    model, data = Mixed(), batches(1)
    with pytest.raises(FloatingPointError, match="the gradient of convolution is not finite"):
        mean_gradients(model, targets_of(model), [lambda: float("inf") * model(data[0][0]).sum()])


def test_a_forward_that_a_hook_put_there_is_called_and_stays(kit):
    model = kit.Net()
    targets = find_targets(model, TCurConfig(rank=1))
    expected = mean_gradients(model, targets, [lambda: kit.loss_of(model)])
    layer, calls = model.blocks[0].up, []
    own = layer.forward

    def hooked(x):
        calls.append(len(x))
        return own(x)

    layer.forward = hooked
    found = mean_gradients(model, targets, [lambda: kit.loss_of(model)])
    assert calls == [16]
    assert layer.forward is hooked
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_no_batch_gives_no_gradient(kit):
    model = kit.Net()
    with pytest.raises(BadInputError, match="no batch"):
        mean_gradients(model, find_targets(model, TCurConfig(rank=1)), iter([]))
