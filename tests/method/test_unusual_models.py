"""What models and their users do besides a plain call: hooks, autocast, second derivatives, processes."""

from __future__ import annotations

import copy
import dataclasses
import io

import numpy as np
import pytest
import torch
from torch import nn

from edge_tcur.method.config import TCurConfig
from edge_tcur.method.gradients import mean_gradients
from edge_tcur.method.rehearsal import Rehearsal
from edge_tcur.method.targets import find_targets
from edge_tcur_runtime.errors import BadInputError, EdgeError

ALONE = TCurConfig(rank=2, selection="norm")
ALL = TCurConfig(rank=2, selection="norm", grouping="shape", coupling="all", transform="dct")
FORMS = [(ALONE, form) for form in ("gather", "factored", "merged", "materialised")]
FORMS += [(ALL, form) for form in ("factored", "merged", "materialised", "spectral")]
formed = pytest.mark.parametrize(
    ("config", "form"), FORMS, ids=[f"{config.coupling}-{form}" for config, form in FORMS]
)


def adapted(kit, config, form, model=None):
    model = kit.Net() if model is None else model
    injection = kit.adapt(model, config)
    kit.stir(injection, std=0.3)
    for layer in injection.layers().values():
        layer.form = form
    return model, injection


def gradients(model, injection, kit, **options):
    with torch.autocast("cpu", **options):
        loss = kit.loss_of(model)
    return torch.cat([value.flatten() for value in torch.autograd.grad(loss, injection.parameters())])


@formed
def test_autocast_gives_the_gradients_of_its_precision(kit, config, form):
    """As `transformers.Trainer` trains with ``bf16=True``: wherever a layer's input is float32 or cast."""
    model, injection = adapted(kit, config, form)
    expected = gradients(model, injection, kit, enabled=False)
    found = gradients(model, injection, kit, dtype=torch.bfloat16)
    assert not torch.equal(found, expected)  # it was cast
    assert float((found - expected).norm()) < 0.05 * float(expected.norm())


@formed
def test_autocast_takes_a_float32_input(kit, config, form):
    model, injection = adapted(kit, config, form)
    x, layer = torch.randn(5, 6), model.blocks[1].up
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x)
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.03, atol=0.03)
    found.float().square().sum().backward()
    assert any(value.grad is not None and value.grad.abs().max() > 0 for value in injection.parameters())


@formed
def test_hooks_on_a_layer_are_called_in_every_form(kit, config, form):
    model, x = kit.Net(), kit.batch()[0]
    layer, calls = model.blocks[1].up, []
    plain, _ = adapted(kit, config, form, copy.deepcopy(model))
    layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    layer.register_forward_hook(lambda *_: calls.append("after"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    model, _ = adapted(kit, config, form, model)
    found = model(x.requires_grad_())
    torch.testing.assert_close(found, plain(x), rtol=1e-4, atol=1e-5)
    found.sum().backward()
    assert calls == ["before", "after", "backward"]


@formed
def test_a_forward_put_on_a_layer_is_called_in_every_form(kit, config, form):
    model, x, calls = kit.Net(), kit.batch()[0], []
    plain, _ = adapted(kit, config, form, copy.deepcopy(model))
    own = model.blocks[1].up.forward
    model.blocks[1].up.forward = lambda x: calls.append(1) or own(x)
    model, _ = adapted(kit, config, form, model)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    assert calls == [1]


def test_hooks_on_a_convolution_are_called(kit):
    torch.manual_seed(0)
    model, calls, x = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1)), [], torch.randn(2, 2, 5, 5)
    config = TCurConfig(rank=2, selection="norm", targets="0")
    kit.stir(kit.adapt(model, config))
    expected = model(x)
    model[0].base.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(model(x), expected)
    assert calls == [1]


@formed
def test_second_derivatives_are_right_or_refused(kit, config, form):
    """Silence would be wrong numbers: a gradient penalty would lack the part through what was kept."""
    model, injection = adapted(kit, config, form, kit.Net().double())
    for group in injection.groups.values():
        group.double()
    core, x = injection.parameters()[0], kit.batch()[0].double()

    def penalty():
        (found,) = torch.autograd.grad(model(x).square().sum(), core, create_graph=True)
        return found.square().sum()

    if form in ("gather", "factored"):
        with pytest.raises(RuntimeError, match="once_differentiable"):
            penalty().backward()
        return
    (slope,) = torch.autograd.grad(penalty(), core)
    step = torch.randn(core.shape, dtype=torch.float64)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            core.add_(sign * 1e-6 * step)
        values.append(penalty().item())
        with torch.no_grad():
            core.sub_(sign * 1e-6 * step)
    expected = (values[0] - values[1]) / 2e-6
    assert (slope * step).sum().item() == pytest.approx(expected, rel=1e-4)


def through_bytes(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@formed
def test_an_adapted_model_goes_to_another_process_and_a_copy_lives_alone(kit, config, form):
    model, injection = adapted(kit, config, form)
    model.injection = injection
    x = kit.batch()[0]
    model.blocks[0].up(torch.randn(2, 6))  # in the middle of a pass
    expected = model(x)
    for other in (through_bytes(model), copy.deepcopy(model)):
        assert torch.equal(other(x), expected)
        kit.stir(other.injection, seed=9)
        assert not torch.equal(other(x), expected)
        other.injection.activate(None)
        other.injection.remove()
    assert torch.equal(model(x), expected)


class Named(nn.Module):
    """Calls its layer by the name of its input, and reads its sizes."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        assert (self.layer.in_features, self.layer.weight.shape) == (4, (4, 4))
        return self.head(self.layer(input=x))


def test_a_layer_that_is_called_by_name_and_asked_for_its_sizes(kit):
    config = TCurConfig(rank=2, selection="norm", targets="layer")
    model = Named()
    targets = find_targets(model, config)
    assert set(mean_gradients(model, targets, [lambda: kit.loss_of(model)])) == {"layer"}
    with Rehearsal(model, targets, 2).active():
        kit.loss_of(model)
    kit.stir(kit.adapt(model, config))
    kit.loss_of(model).backward()
    with pytest.raises(AttributeError, match="no attribute 'typo'"):
        model.layer.typo  # noqa: B018


class Shared(nn.Module):
    """One module under two names, as recurrent blocks have it, and a layer that is run twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.ModuleDict({"up": nn.Linear(4, 4)})
        self.first, self.layers = nn.Linear(4, 4), nn.ModuleList([layer, layer])
        self.again, self.head = self.first, nn.Linear(4, 3)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        for layer in self.layers:
            x = x + torch.tanh(layer["up"](x))
        return self.head(torch.tanh(self.again(x)))


def test_a_module_under_two_names_is_adapted_under_both(kit):
    model, x = Shared(), kit.batch()[0]
    config = TCurConfig(rank=2, selection="norm", targets="first,layers.*")
    expected, before = model(x), kit.bits(model)
    injection = kit.adapt(model, config)
    assert sorted(injection.layers()) == ["first", "layers.0.up"]
    assert model.first is model.again
    kit.stir(injection, std=0.5)
    adapted = model(x)
    dense = Shared()
    with torch.no_grad():
        for group in injection.groups.values():
            for position, name in enumerate(group.spec.modules):
                dense.get_submodule(name).weight += group.slice(position).dense()
    torch.testing.assert_close(adapted, dense(x))
    injection.merge()
    torch.testing.assert_close(model(x), adapted)
    injection.unmerge()
    assert torch.equal(model(x), adapted)
    injection.remove()
    assert torch.equal(model(x), expected)
    assert kit.bits(model) == before
    assert model.first is model.again
    assert type(model.again) is nn.Linear


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_a_core_that_was_cast_and_not_trained_keeps_its_file(kit, kind):
    _, injection = adapted(kit, ALL, None)
    for group in injection.groups.values():
        group.load(group.factors())
        before = group.factors().core
        group.to(kind)
        assert group.factors().core is before
        with torch.no_grad():
            group.core.mul_(2)
        assert not (group.factors().core == before).all()


@formed
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transform", ["dft", "dct"])
def test_half_precision_of_base_and_core(kit, config, form, kind, transform):
    if config is ALL:
        config = dataclasses.replace(config, transform=transform)
    model, injection = adapted(kit, config, form)
    x = kit.batch()[0]
    expected = model(x)
    expected.square().sum().backward()
    slopes = [value.grad for value in injection.parameters()]
    for group in injection.groups.values():
        group.to(kind).zero_grad()
    found = model.to(kind)(x.to(kind))
    assert found.dtype is kind
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.1)
    found.square().sum().backward()
    for value, slope in zip(injection.parameters(), slopes, strict=True):
        assert value.grad.dtype is kind
        assert float((value.grad.float() - slope).norm()) < 0.1 * float(slope.norm())


@pytest.mark.parametrize("value", [1e6, float("nan")])
def test_a_sum_that_is_not_finite_is_not_merged(kit, value):
    model, injection = adapted(kit, ALONE, None, kit.Net().half())
    before = kit.bits(model)
    with torch.no_grad():
        injection.groups["down"].core[1].fill_(value)
    with pytest.raises(BadInputError, match=r"blocks\.1\.down.*no finite number in torch.float16"):
        injection.merge()
    assert not injection.is_merged
    assert kit.bits(model) == before


@pytest.mark.parametrize(
    ("part", "value", "error"),
    [
        ("rows", [[1, 1]] * 3, "strictly increasing"),
        ("cols", [[3, 1]] * 3, "strictly increasing"),
        ("rows", [[-1, 1]] * 3, "strictly increasing"),
        ("cols", [[1, 99]] * 3, "cols of block 0 hold the index 99"),
        ("core", [[[float("nan")] * 2] * 2] * 3, "NaN"),
        ("core", [[[0.0] * 5] * 5] * 3, "rows have shape"),
    ],
)
def test_factors_that_no_file_holds_are_refused(kit, part, value, error):
    model = kit.Net()
    injection = kit.adapt(model, ALONE)
    factors = injection.factors()
    injection.remove()
    own = factors["down"]
    kind = getattr(own, part).dtype
    factors["down"] = dataclasses.replace(own, **{part: np.array(value, kind)})
    names = [name for name, _ in model.named_modules()]
    model.requires_grad_(True)
    with pytest.raises(EdgeError, match=f"down.*{error}"):
        kit.adapt(model, ALONE, factors=factors)
    assert [name for name, _ in model.named_modules()] == names
    assert all(value.requires_grad for value in model.parameters())


@pytest.mark.parametrize("frame", ["orthonormal", "raw"])
@pytest.mark.parametrize("form", ["gather", "factored", "merged", "materialised"])
@pytest.mark.parametrize("selection", ["norm", "leverage", "gradient"])
def test_a_weight_of_zeros_beside_others_leaves_the_gradients_finite(kit, frame, form, selection):
    """As residual branches begin: none of its rows and columns reaches anything, the others' do."""
    model, config = kit.Net(), dataclasses.replace(ALONE, frame=frame, selection=selection)
    with torch.no_grad():
        model.blocks[1].down.weight.zero_()
        model.blocks[2].gate.weight.zero_()
    injection = kit.adapt(model, config)
    for layer in injection.layers().values():
        layer.form = form
    losses = kit.train(model, injection.parameters())
    assert losses[-1] < losses[0]
    assert all(torch.isfinite(value).all() for value in injection.parameters())
    assert all(torch.isfinite(value.grad).all() for value in injection.parameters())
    kit.stored(injection, config)
