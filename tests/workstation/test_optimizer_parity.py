"""The device's optimisers and clipping against torch's, with which the workstation trains."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edge_tcur_runtime.optimizer import AdamW, build_optimizer, schedule
from edge_tcur_runtime.settings import AdamWSettings, SGDSettings

STEPS = 25


@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("limit", [0.0, 0.7])
def test_the_devices_adamw_takes_torchs_steps(decay, limit):
    settings = AdamWSettings(weight_decay=decay, max_gradient_norm=limit)
    generator = np.random.default_rng(0)
    values = {"core": generator.normal(size=(2, 3, 3)), "head": generator.normal(size=(4,))}
    rates = {"core": settings.learning_rate, "head": settings.head_learning_rate}
    tensors = {name: torch.tensor(value, requires_grad=True) for name, value in values.items()}
    theirs = torch.optim.AdamW(
        [{"params": [tensor], "peak": rates[name]} for name, tensor in tensors.items()],
        lr=1.0,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=decay,
    )
    ours = AdamW(settings)
    for step in range(STEPS):
        factor = schedule(step, STEPS)
        gradients = {name: generator.normal(size=value.shape) for name, value in values.items()}
        for name, tensor in tensors.items():
            tensor.grad = torch.from_numpy(gradients[name].copy())
        for group in theirs.param_groups:
            group["lr"] = group["peak"] * factor
        if limit:
            torch.nn.utils.clip_grad_norm_(list(tensors.values()), limit)
        theirs.step()
        values = ours.step(values, gradients, {name: rate * factor for name, rate in rates.items()})
        for name, tensor in tensors.items():
            # torch divides by the norm plus 1e-6 where it clips
            np.testing.assert_allclose(values[name], tensor.detach().numpy(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_devices_gradient_descent_takes_torchs_steps(decay, momentum):
    settings = SGDSettings(weight_decay=decay, momentum=momentum, max_gradient_norm=0.0)
    generator = np.random.default_rng(1)
    values = {"core": generator.normal(size=(2, 3, 3)), "head": generator.normal(size=(4,))}
    rates = {"core": 0.3, "head": 0.02}
    tensors = {name: torch.tensor(value, requires_grad=True) for name, value in values.items()}
    theirs = torch.optim.SGD(
        [{"params": [tensor], "lr": rates[name]} for name, tensor in tensors.items()],
        lr=1.0,
        momentum=momentum,
        weight_decay=decay,
    )
    ours = build_optimizer(settings)
    for step in range(STEPS):
        for group, rate in zip(theirs.param_groups, rates.values(), strict=True):
            group["lr"] = rate * schedule(step, STEPS)
        gradients = {name: generator.normal(size=value.shape) for name, value in values.items()}
        for name, tensor in tensors.items():
            tensor.grad = torch.from_numpy(gradients[name].copy())
        theirs.step()
        factor = schedule(step, STEPS)
        values = ours.step(values, gradients, {name: rate * factor for name, rate in rates.items()})
        for name, tensor in tensors.items():
            np.testing.assert_allclose(values[name], tensor.detach().numpy(), rtol=1e-6, atol=1e-9)
    assert bool(ours.first) is bool(momentum)  # no state where none is needed
