"""A small net, and what the tests of the method do with it again and again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from edge_tcur.method.adapted import inject
from edge_tcur.method.gradients import mean_gradients
from edge_tcur.method.targets import find_targets
from edge_tcur_runtime.formats.adapter import Adapter, AdapterHeader, parse_adapter, serialize_adapter
from edge_tcur_runtime.formats.factors import GroupSpec


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.gate = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        inner = self.norm(x)
        return x + self.down(torch.tanh(self.up(inner)) * torch.sigmoid(self.gate(inner)))


class Net(nn.Module):
    """Three numbered blocks of three projections, two of one shape; an embedding layer and a head beside."""

    def __init__(self, width=6, classes=3, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Linear(4, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batch(seed=1, n=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def loss_of(model, seed=1):
    x, y = batch(seed)
    return nn.functional.cross_entropy(model(x.to(next(model.parameters()).dtype)), y)


def adapt(model, config, *, loss=loss_of, **options):
    """`inject`, with gradients of `loss` as directions where the selection needs them."""
    if config.needs_directions and "factors" not in options:
        targets = find_targets(model, config, keep=options.get("keep", ()))
        options["directions"] = mean_gradients(model, targets, [lambda: loss(model)])
    return inject(model, config, **options)


def stir(injection, std=0.1, seed=3):
    """Gives the active adapter's cores random values."""
    generator = torch.Generator().manual_seed(seed)
    for group in injection.groups.values():
        with torch.no_grad():
            group.core.copy_(std * torch.randn(group.core.shape, generator=generator))


def train(model, parameters, steps=5, rate=0.05):
    """A plain training loop, none of ours."""
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def stored(injection, config, extras=None):
    """The active adapter through the bytes of its file."""
    groups = {
        group.name: GroupSpec(tuple(f"{name}.weight" for name in group.modules), group.n1, group.n2)
        for group in injection.targets.groups
    }
    header = AdapterHeader(
        "sha256:" + "0" * 64,
        groups,
        "image-classification",
        ("a", "b", "c"),
        coupling=config.coupling,
        transform=config.domain,
        frame=config.frame,
        alpha=config.alpha,
    )
    adapter = Adapter(header, injection.factors(), extras or {})
    raw = serialize_adapter(adapter)
    assert serialize_adapter(adapter) == raw
    return parse_adapter(raw)


def bits(model):
    """Every tensor of a model, as bytes."""
    return {
        name: value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for name, value in model.state_dict().items()
    }


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tensors of a few numbers are no work for several."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@pytest.fixture(scope="session")
def kit():
    """The functions of this file, for the tests."""
    return SimpleNamespace(
        Block=Block,
        Net=Net,
        batch=batch,
        loss_of=loss_of,
        adapt=adapt,
        stir=stir,
        train=train,
        stored=stored,
        bits=bits,
    )
