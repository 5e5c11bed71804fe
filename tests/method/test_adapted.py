"""Adapted layers: the core trains, the base does not, and what is saved is what was trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edge_tcur.method.adapted import AdaptedLinear, inject
from edge_tcur.method.config import TCurConfig
from edge_tcur.method.targets import find_targets
from edge_tcur.models import base_digest
from edge_tcur_runtime.errors import BadInputError, BaseMismatchError, ConfigError
from edge_tcur_runtime.formats.adapter import (
    Adapter,
    AdapterHeader,
    Factors,
    GroupSpec,
    parse_adapter,
    serialize_adapter,
)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Three numbered blocks of two projections, an embedding layer and a head beside them."""

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


def train(model, parameters, steps=5, rate=0.05):
    """A plain training loop, none of ours."""
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    x, y = batch()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("frame", ["raw", "orthonormal"])
def test_the_core_trains_and_the_base_does_not(frame):
    """The authors' public code fails here: their U is in a plain list, applied once through
    `param.data`, and the optimiser is given the (frozen) model's parameters; nothing moves."""
    model = Net()
    before = base_digest(model)
    injection = inject(model, TCurConfig(rank=2, frame=frame))
    starts = [core.detach().clone() for core in injection.parameters()]
    losses = train(model, injection.parameters(), steps=20)
    assert losses[-1] < losses[0]
    for core, start in zip(injection.parameters(), starts, strict=True):
        assert core.grad is not None
        assert core.grad.abs().max() > 0
        assert not torch.equal(core.detach(), start)
    injection.remove()
    assert base_digest(model) == before
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("frame", ["raw", "orthonormal"])
@pytest.mark.parametrize("grouping", ["projection", "shape"])
def test_gradient_of_the_core_against_finite_differences(frame, grouping):
    model = Net()
    injection = inject(model, TCurConfig(rank=2, frame=frame, grouping=grouping))
    model.double()
    x, y = batch()
    for group in injection.groups.values():
        group.double()
        with torch.no_grad():
            group.core.normal_(std=0.05, generator=torch.Generator().manual_seed(3))

    def loss():
        return nn.functional.cross_entropy(model(x.double()), y)

    loss().backward()
    for group in injection.groups.values():
        direction = torch.randn(group.core.shape, generator=torch.Generator().manual_seed(4)).double()
        slope = float((group.core.grad * direction).sum())
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                group.core.add_(sign * 1e-4 * direction)
                values.append(loss().item())
                group.core.sub_(sign * 1e-4 * direction)
        assert slope == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-6, abs=1e-9)


def test_a_zero_core_is_the_base_exactly():
    model = Net()
    x, _ = batch()
    with torch.no_grad():
        expected = model(x)
        injection = inject(model, TCurConfig(rank=2))
        assert torch.equal(model(x), expected)
        next(iter(injection.groups.values())).core.fill_(1.0)
        assert not torch.equal(model(x), expected)
        injection.enable(False)
        assert torch.equal(model(x), expected)


def test_remove_restores_every_layer():
    model = Net()
    modules = dict(model.named_modules())
    injection = inject(model, TCurConfig(rank=2))
    assert isinstance(model.blocks[0].up, AdaptedLinear)
    injection.remove()
    assert dict(model.named_modules()) == modules


def test_the_shared_core_is_no_parameter_of_the_model():
    model = Net()
    names = set(model.state_dict())
    injection = inject(model, TCurConfig(rank=2))
    assert {name.replace(".base.", ".") for name in model.state_dict()} == names
    assert len(injection.parameters()) == 2


@pytest.mark.parametrize("frame", ["raw", "orthonormal"])
def test_save_and_load(frame):
    config = TCurConfig(rank=2, frame=frame)
    model = Net()
    digest = base_digest(model)
    injection = inject(model, config)
    train(model, injection.parameters())
    groups = {
        g.name: GroupSpec(tuple(f"{name}.weight" for name in g.modules), g.n1, g.n2)
        for g in injection.targets.groups
    }
    header = AdapterHeader(digest, groups, "image-classification", ("a", "b", "c"), frame=frame)
    raw = serialize_adapter(Adapter(header, injection.factors()))
    assert serialize_adapter(Adapter(header, injection.factors())) == raw
    loaded = parse_adapter(raw)
    for name, factors in injection.factors().items():
        for part in ("core", "rows", "cols"):
            saved = getattr(loaded.factors[name], part)
            assert saved.tobytes() == getattr(factors, part).tobytes()
    other = Net()
    inject(other, config, factors=loaded.factors)
    x, _ = batch(seed=9)
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_core_survives_a_change_of_frame():
    model, other = Net(), Net()
    injection = inject(model, TCurConfig(rank=2, frame="raw"))
    train(model, injection.parameters(), rate=0.5)
    inject(other, TCurConfig(rank=2, frame="orthonormal"), factors=injection.factors())
    x, _ = batch(seed=9)
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", ["group", "slices", "index"])
def test_factors_of_another_model_are_refused(change):
    factors = inject(Net(), TCurConfig(rank=2)).factors()
    up = factors.pop("up")
    if change == "slices":
        factors["up"] = Factors(up.core[:2], up.rows, up.cols)
    elif change == "index":
        factors["up"] = Factors(up.core, np.array([0, 99], np.int32), up.cols)
    model = Net()
    with pytest.raises(BaseMismatchError):
        inject(model, TCurConfig(rank=2), factors=factors)
    assert all(parameter.requires_grad for parameter in model.parameters())  # nothing was touched


def test_projection_groups_and_the_reasons_for_the_rest():
    targets = find_targets(Net(), TCurConfig(rank=2), keep=("head",))
    assert [(g.name, len(g.modules), g.n1, g.n2) for g in targets.groups] == [
        ("up", 3, 12, 6),
        ("down", 3, 6, 12),
    ]
    assert targets.groups[0].modules == ("blocks.0.up", "blocks.1.up", "blocks.2.up")
    assert targets.skipped["head"] == "part of the head"
    assert targets.skipped["embed"] == "not inside a numbered layer"
    assert targets.skipped["blocks.0.norm"] == "LayerNorm, not nn.Linear"
    assert "blocks.0.up" not in targets.skipped


def test_shape_groups():
    targets = find_targets(Net(width=4), TCurConfig(rank=2, grouping="shape", targets="embed,blocks.*"))
    assert [(g.name, g.modules) for g in targets.groups] == [
        ("4x4", ("embed",)),
        ("8x4", ("blocks.0.up", "blocks.1.up", "blocks.2.up")),
        ("4x8", ("blocks.0.down", "blocks.1.down", "blocks.2.down")),
    ]


def test_patterns_choose_and_skip():
    targets = find_targets(Net(), TCurConfig(rank=2, targets="blocks.?.down, embed"))
    assert [g.name for g in targets.groups] == ["embed", "down"]
    assert targets.skipped["blocks.0.up"] == "matched by no target pattern"


def test_group_names_of_sequential_models_are_distinct_and_plain():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    targets = find_targets(model, TCurConfig(rank=2))
    assert [(g.name, g.modules) for g in targets.groups] == [("linear-0", ("0",)), ("linear-1", ("2", "4"))]
    same_leaf = nn.ModuleDict({"a": nn.ModuleList([Block(4)]), "b": nn.ModuleList([Block(4)])})
    assert [g.name for g in find_targets(same_leaf, TCurConfig(rank=2)).groups] == [
        "a.up", "a.down", "b.up", "b.down",
    ]  # fmt: skip


def test_without_numbered_layers_every_linear_is_adapted():
    model = nn.ModuleDict({"first": nn.Linear(4, 6), "second": nn.Linear(6, 4)})
    assert [g.name for g in find_targets(model, TCurConfig(rank=2)).groups] == ["first", "second"]


def test_a_tied_weight_is_adapted_once():
    model = Net()
    model.blocks[2].up.weight = model.blocks[0].up.weight
    targets = find_targets(model, TCurConfig(rank=2))
    assert targets.groups[0].modules == ("blocks.0.up", "blocks.1.up")
    assert targets.skipped["blocks.2.up"] == "its weight is tied to blocks.0.up"


def test_a_rank_larger_than_a_weight():
    with pytest.raises(
        ConfigError, match=r"rank 7 is larger than the weight blocks\.0\.up \[12, 6\]"
    ) as caught:
        find_targets(Net(), TCurConfig(rank=7))
    assert "at most 6" in caught.value.hint


def test_nothing_to_adapt():
    with pytest.raises(BadInputError, match="no weight that can be adapted") as caught:
        find_targets(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), TCurConfig())
    assert "Conv2d, not nn.Linear" in caught.value.hint


def test_a_pattern_that_matches_nothing():
    with pytest.raises(ConfigError, match=r"'\*\.query' matches no linear module") as caught:
        find_targets(Net(), TCurConfig(rank=2, targets="*.up,*.query"))
    assert "blocks.0.up" in caught.value.hint


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(value):
    model = Net()
    with torch.no_grad():
        model.blocks[1].down.weight[0, 0] = value
    with pytest.raises(BadInputError, match=r"blocks\.1\.down: the weight holds NaN or infinity"):
        find_targets(model, TCurConfig(rank=2))


def test_mixed_dtypes_in_a_group():
    model = Net()
    model.blocks[1].up.half()
    with pytest.raises(BadInputError, match="different dtypes"):
        find_targets(model, TCurConfig(rank=2))


@pytest.mark.parametrize(
    ("field", "value", "guess"),
    [("grouping", "projektion", "projection"), ("selection", "nrom", "norm"), ("frame", "Raw", "raw")],
)
def test_method_settings_are_checked(field, value, guess):
    with pytest.raises(ConfigError, match=f"{field}: '{value}' is not known") as caught:
        TCurConfig(**{field: value})
    assert caught.value.hint == f"did you mean {guess!r}?"
    with pytest.raises(ConfigError, match="rank: the rank is 0"):
        TCurConfig(rank=0)
