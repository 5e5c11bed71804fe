"""Rehearsals: a low-rank update of every kind of layer, and adapters that start from it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from edge_tcur.method.adapted import inject
from edge_tcur.method.config import TCurConfig, preset
from edge_tcur.method.gradients import mean_gradients
from edge_tcur.method.quantized import quantize_linears
from edge_tcur.method.rehearsal import Rehearsal
from edge_tcur.method.targets import find_targets
from edge_tcur.tcur_model import rehearsal as practise_with
from edge_tcur_runtime.errors import ConfigError


class Mixed(nn.Module):
    """A convolution, GPT-2's Conv1D and a linear layer."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        self.convolution = nn.Conv2d(1, 4, 2, stride=2)
        self.conv1d = Conv1D(6, 4)
        self.linear = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.convolution(x).flatten(2).transpose(1, 2).contiguous()
        return self.head(torch.tanh(self.linear(torch.tanh(self.conv1d(x)))).mean(dim=1))


PATTERNS = "convolution,conv1d,linear"


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 1, 4, 4, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def practise(model, config, *, rank=2, steps=10):
    """A rehearsal trained for a few steps, and the losses."""
    model.requires_grad_(False)
    rehearsal = Rehearsal(model, find_targets(model, config), rank)
    optimizer, (x, y), losses = torch.optim.AdamW(rehearsal.parameters(), lr=0.02), data(), []
    with rehearsal.active():
        for _ in range(steps):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        with torch.no_grad():
            outputs = model(x)
    return rehearsal, losses, outputs


@pytest.mark.parametrize("kind", ["float", "int8", "bfloat16"])
def test_what_is_learnt_is_the_update_and_the_model_is_as_before(kind):
    model = Mixed().to(torch.bfloat16) if kind == "bfloat16" else Mixed()
    if kind == "int8":
        assert quantize_linears(model, keep=("head",)) == ["linear"]
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        x = data()[0].to(model.head.weight.dtype)
        expected = model(x)
    if kind == "bfloat16":
        rehearsal = Rehearsal(model, find_targets(model, TCurConfig(rank=1, targets=PATTERNS)), 2)
        with rehearsal.active():
            assert torch.equal(model(x), expected)  # B is zero
        return
    rehearsal, losses, outputs = practise(model, TCurConfig(rank=1, targets=PATTERNS))
    assert losses[-1] < losses[0]
    assert torch.equal(model(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    updates = rehearsal.updates()
    assert set(updates) == set(PATTERNS.split(","))
    assert all(0 < torch.linalg.matrix_rank(update) <= 2 for update in updates.values())
    dense = copy.deepcopy(model)
    with torch.no_grad():
        dense.convolution.weight += updates["convolution"].reshape(4, 1, 2, 2)
        dense.conv1d.weight += updates["conv1d"].T
        if kind == "int8":
            dense.linear = nn.Linear(6, 6)
            dense.linear.bias.copy_(model.linear.bias)
            dense.linear.weight.copy_(model.linear.dequantize())
        dense.linear.weight += updates["linear"]
        torch.testing.assert_close(dense(x), outputs, rtol=1e-4, atol=1e-5)


def test_an_update_that_is_not_finite_is_refused():
    model = Mixed()
    rehearsal = Rehearsal(model, find_targets(model, TCurConfig(rank=1, targets=PATTERNS)), 2)
    with torch.no_grad():
        rehearsal.parameters()[0][0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="the update of convolution is not finite"):
        rehearsal.updates()


@pytest.mark.parametrize("alpha", [1.0, 4.0])
@pytest.mark.parametrize(
    "options",
    [
        {"selection": "update", "rank": 4},
        {"selection": "update", "rank": 4, "frame": "raw"},
        {"selection": "update", "rank": 4, "grouping": "weight", "frame": "sketch"},
        {"selection": "update", "rank": 4, "grouping": "convolution,conv1d,linear"},
    ],
)
def test_an_adapter_starts_with_the_core_nearest_to_the_update(options, alpha):
    """Closer to the update than a core of zero, and no step of any core's entry brings it closer."""
    config = TCurConfig(targets=PATTERNS, alpha=alpha, **options)
    model = Mixed()
    rehearsal, *_ = practise(model, config)
    updates = rehearsal.updates()
    injection = inject(model, config, directions=updates)

    def errors():
        found = {}
        for group in injection.groups.values():
            for position, name in enumerate(group.spec.modules):
                part = group.slice(position)
                found[name] = float((part.dense() - updates[name]).norm())
        return sum(value**2 for value in found.values()), found

    with torch.no_grad():
        total, each = errors()
        for name, error in each.items():
            assert error < float(updates[name].norm())
        for group in injection.groups.values():
            for step in (-1e-3, 1e-3):
                group.core[0, 0, 0] += step
                assert errors()[0] >= total - 1e-9
                group.core[0, 0, 0] -= step


def test_the_full_rank_keeps_the_whole_update():
    config = preset("update", rank=6, targets="linear")
    model = Mixed()
    rehearsal, _, outputs = practise(model, config)
    inject(model, config, directions=rehearsal.updates())
    with torch.no_grad():
        torch.testing.assert_close(model(data()[0]), outputs, rtol=1e-4, atol=1e-5)


def test_a_forward_that_a_hook_put_there_is_called_and_comes_back():
    model = Mixed().requires_grad_(False)
    calls, own = [], model.linear.forward

    def hooked(x):
        calls.append(len(x))
        return own(x)

    model.linear.forward = hooked
    rehearsal = Rehearsal(model, find_targets(model, TCurConfig(rank=1, targets=PATTERNS)), 2)
    with rehearsal.active(), torch.no_grad():
        model(data()[0])
    assert calls == [8]
    assert model.linear.forward is hooked
    assert "forward" not in vars(model.conv1d)


def random_rehearsal(model):
    rehearsal = Rehearsal(model, find_targets(model, TCurConfig(rank=1, targets=PATTERNS)), 2)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in rehearsal.parameters():
            value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    return rehearsal


@torch.no_grad()
def test_active_inside_itself_counts_once_and_an_exception_ends_it():
    model, x = Mixed(), data()[0]
    base, rehearsal = model(x), random_rehearsal(model)
    with rehearsal.active():
        once = model(x)
        with rehearsal.active():
            assert torch.equal(model(x), once)
        assert torch.equal(model(x), once)
    assert not torch.equal(once, base)
    with pytest.raises(ZeroDivisionError), rehearsal.active():
        raise ZeroDivisionError
    assert torch.equal(model(x), base)
    assert not any("forward" in vars(module) for module in model.modules())
    with rehearsal.active():
        assert torch.equal(model(x), once)


def counted(own, name, calls):
    def forward(x):
        calls.append(name)
        return own(x)

    return forward


@torch.no_grad()
def test_updates_are_the_same_beside_a_forward_that_a_hook_put_there():
    """Of a convolution too, whose own forward must be called: an offloaded weight comes with it."""
    model, x = Mixed(), data()[0]
    rehearsal, calls = random_rehearsal(model), []
    with rehearsal.active():
        expected = model(x)
    for name in PATTERNS.split(","):
        module = model.get_submodule(name)
        module.forward = counted(module.forward, name, calls)
    with rehearsal.active():
        torch.testing.assert_close(model(x), expected)
    assert calls == PATTERNS.split(",")


@pytest.mark.parametrize("what", ["rehearsal", "gradients"])
def test_running_statistics_stay(kit, what):
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 3))
    before, targets = kit.bits(model), find_targets(model, TCurConfig(rank=1))
    names, own = list(model.state_dict()), model[1].running_mean
    if what == "gradients":
        mean_gradients(model, targets, [lambda: kit.loss_of(model)])
    else:
        with Rehearsal(model, targets, 2).active():
            kit.loss_of(model).backward()
            assert kit.bits(model) != before
    assert kit.bits(model) == before
    assert model.training
    assert list(model.state_dict()) == names
    assert model[1].running_mean is own


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rehearsal_of_no_rank_is_refused(rank):
    model = Mixed()
    with pytest.raises(ConfigError, match="expected at least 1"):
        practise_with(model, TCurConfig(rank=1, targets=PATTERNS), rank)
    with pytest.raises(ConfigError, match="matches no module"):
        practise_with(model, TCurConfig(rank=1, targets="typo.*"), 2)
    assert all(value.requires_grad for value in model.parameters())


@torch.no_grad()
def test_the_same_seed_gives_the_same_start_and_a_checkpointed_layer_the_same_gradient():
    model = Mixed().requires_grad_(False)
    targets, x = find_targets(model, TCurConfig(rank=1, targets=PATTERNS)), data()[0]
    first, second = (Rehearsal(model, targets, 2, seed=4) for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    plain, kept = random_rehearsal(model), random_rehearsal(model)
    with torch.enable_grad():
        with plain.active():
            model(x).square().sum().backward()
        with kept.active():
            hidden = torch.utils.checkpoint.checkpoint(
                lambda x: model.convolution(x).flatten(2).mT.contiguous(), x, use_reentrant=False
            )
            inner = torch.utils.checkpoint.checkpoint(model.conv1d, hidden, use_reentrant=False)
            model.head(torch.tanh(model.linear(torch.tanh(inner))).mean(dim=1)).square().sum().backward()
    for a, b in zip(plain.parameters(), kept.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_under_autocast():
    """As `transformers.Trainer` does with ``bf16=True``."""
    model = Mixed().requires_grad_(False)
    plain, cast = random_rehearsal(model), random_rehearsal(model)
    x, y = data()
    with plain.active():
        nn.functional.cross_entropy(model(x), y).backward()
    with cast.active(), torch.autocast("cpu", dtype=torch.bfloat16):
        nn.functional.cross_entropy(model(x), y).backward()
    for a, b in zip(plain.parameters(), cast.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0.1, atol=0.02)
