"""Adapted layers: the core trains, the base does not, and what is saved is what was trained."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from edge_tcur.method.adapted import inject
from edge_tcur.method.config import PRESETS, TCurConfig, preset
from edge_tcur.method.forms import possible_forms
from edge_tcur.method.layer import AdaptedLayer
from edge_tcur.models import base_digest
from edge_tcur_runtime.errors import BaseMismatchError, ConfigError
from edge_tcur_runtime.formats.factors import Factors

AXES = {
    "grouping": ("projection", "shape", "layer", "*.up,*.gate,*.down"),
    "coupling": ("none", "layer", "all"),
    "transform": ("dft", "dct", "identity"),
    "frame": ("raw", "orthonormal", "sketch"),
}


def combinations():
    """Every combination of the axes that `TCurConfig` takes."""
    result = []
    for values in itertools.product(*AXES.values()):
        options = dict(zip(AXES, values, strict=True))
        try:
            TCurConfig(**options)
        except ConfigError:
            continue
        result.append(options)
    return result


COMBINATIONS = combinations()
NAMES = ["-".join(options.values()) for options in COMBINATIONS]
every_combination = pytest.mark.parametrize("options", COMBINATIONS, ids=NAMES)


def test_the_combinations_that_there_are():
    """4 groupings; without coupling only the identity, of 3 frames; coupled 3 transforms of 2 frames, but
    not of a projection's one weight a layer."""
    assert len(COMBINATIONS) == 4 * 3 + (4 * 2 - 1) * 3 * 2


@pytest.mark.parametrize(
    ("frame", "form"),
    [
        (frame, form)
        for frame in ("raw", "orthonormal", "sketch")
        for form in ("gather", "factored", "materialised", "merged", None)
        if (frame, form) != ("sketch", "gather")  # a sketch has no rows to gather
    ],
)
def test_the_core_trains_and_the_base_does_not(kit, frame, form):
    """The authors' public code fails here: their U is in a plain list, applied once through
    `param.data`, and the optimiser is given the (frozen) model's parameters; nothing moves."""
    model = kit.Net()
    before = base_digest(model)
    injection = kit.adapt(model, TCurConfig(rank=2, frame=frame))
    for layer in injection.layers().values():
        layer.form = form
    starts = [core.detach().clone() for core in injection.parameters()]
    losses = kit.train(model, injection.parameters(), steps=20)
    assert losses[-1] < losses[0]
    for core, start in zip(injection.parameters(), starts, strict=True):
        assert core.grad is not None
        assert core.grad.abs().max() > 0
        assert not torch.equal(core.detach(), start)
    injection.remove()
    assert base_digest(model) == before
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@every_combination
def test_gradient_of_the_core_against_finite_differences(kit, options):
    model = kit.Net()
    injection = kit.adapt(model, TCurConfig(rank=2, **options))
    kit.stir(injection, std=0.05)
    model.double()
    for group in injection.groups.values():
        group.double()
    x, y = kit.batch()

    def loss():
        return nn.functional.cross_entropy(model(x.double()), y)

    directions = {
        name: torch.randn(group.core.shape, generator=torch.Generator().manual_seed(4)).double()
        for name, group in injection.groups.items()
    }
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for name, group in injection.groups.items():
                group.core.add_(sign * 1e-4 * directions[name])
            values.append(loss().item())
            for name, group in injection.groups.items():
                group.core.sub_(sign * 1e-4 * directions[name])
    difference = (values[0] - values[1]) / 2e-4
    of = {module: group for group in injection.groups.values() for module in group.spec.modules}
    for form in ("gather", "factored", "materialised", "merged"):
        for name, layer in injection.layers().items():
            possible = possible_forms(layer.view, has_rows=of[name].has_rows)
            layer.form = form if form in possible else "factored"
        for group in injection.groups.values():
            group.core.grad = None
        loss().backward()
        slopes = [
            float((group.core.grad * directions[name]).sum()) for name, group in injection.groups.items()
        ]
        assert sum(slopes) == pytest.approx(difference, rel=1e-6, abs=1e-9)
        assert all(abs(slope) > 1e-12 for slope in slopes)


def test_a_zero_core_is_the_base_exactly(kit):
    model = kit.Net()
    x, _ = kit.batch()
    with torch.no_grad():
        expected = model(x)
    injection = kit.adapt(model, TCurConfig(rank=2))
    with torch.no_grad():
        assert torch.equal(model(x), expected)
        next(iter(injection.groups.values())).core.fill_(1.0)
        assert not torch.equal(model(x), expected)
        injection.activate(None)
        assert torch.equal(model(x), expected)


@every_combination
def test_from_zero_through_a_file_and_back(kit, options):
    """A zero core is the base; trained, saved and loaded again the outputs are the same, and so is every bit
    of indices, sketches and cores."""
    config = TCurConfig(rank=2, alpha=0.5, **options)
    model, x = kit.Net(), kit.batch(seed=9)[0]
    with torch.no_grad():
        expected = model(x)
    injection = kit.adapt(model, config)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    losses = kit.train(model, injection.parameters())
    assert losses[-1] < losses[0]
    loaded = kit.stored(injection, config)
    for name, factors in injection.factors().items():
        assert loaded.factors[name].blocks == injection.groups[name].spec.blocks
        for part, value in factors.stored().items():
            saved = loaded.factors[name].stored()[part]
            assert saved.dtype == value.dtype
            assert saved.tobytes() == value.tobytes()
    other = kit.Net()
    again = inject(other, config, factors=loaded.factors)
    with torch.no_grad():
        assert (model(x) - expected).abs().max() > 1e-3
        torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-5)
    # Once through the frame and back, the raw core may differ in its last bits only.
    for name, factors in again.factors().items():
        np.testing.assert_allclose(factors.core, loaded.factors[name].core, rtol=1e-4, atol=1e-6)
    if options["frame"] == "raw":
        assert all(np.array_equal(f.core, loaded.factors[name].core) for name, f in again.factors().items())


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets(kit, name):
    config = preset(name, rank=2, seed=1)
    model, x = kit.Net(), kit.batch(seed=9)[0]
    before = kit.bits(model)
    with torch.no_grad():
        expected = model(x)
    injection = kit.adapt(model, config)
    if config.selection != "update":  # which starts from what was learnt before
        with torch.no_grad():
            assert torch.equal(model(x), expected)
    losses = kit.train(model, injection.parameters(), rate={"paper": 1.0, "curlora": 1.0}.get(name, 0.05))
    assert losses[-1] < losses[0]
    other = kit.Net()
    inject(other, config, factors=kit.stored(injection, config).factors)
    with torch.no_grad():
        assert (model(x) - expected).abs().max() > 1e-3
        torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-5)
    sizes = {group.spec.name: (group.spec.size, group.spec.blocks) for group in injection.groups.values()}
    if name == "paper":
        assert sizes == {"12x6": (6, 1), "6x12": (3, 1)}
    else:
        assert sizes == {"up": (1, 3), "gate": (1, 3), "down": (1, 3)}
    injection.remove()
    assert kit.bits(model) == before


def test_remove_restores_every_layer(kit):
    model = kit.Net()
    modules, parameters, bits = dict(model.named_modules()), dict(model.named_parameters()), kit.bits(model)
    injection = kit.adapt(model, TCurConfig(rank=2, modules_to_save=("embed",)))
    assert isinstance(model.blocks[0].up, AdaptedLayer)
    assert model.embed.weight is not parameters["embed.weight"]
    kit.stir(injection)
    kit.train(model, injection.parameters())
    injection.remove()
    assert dict(model.named_modules()) == modules
    assert all(value is parameters[name] for name, value in model.named_parameters())
    assert kit.bits(model) == bits


def test_the_shared_core_is_no_parameter_of_the_model(kit):
    model = kit.Net()
    names = set(model.state_dict())
    injection = kit.adapt(model, TCurConfig(rank=2))
    assert {name.replace(".base.", ".") for name in model.state_dict()} == names
    assert len(injection.parameters()) == 3
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_layer_shows_its_weight_and_bias(kit):
    model = kit.Net()
    linear = model.blocks[0].up
    kit.adapt(model, TCurConfig(rank=2))
    assert model.blocks[0].up.weight is linear.weight
    assert model.blocks[0].up.bias is linear.bias


@pytest.mark.parametrize(("first", "second"), [("raw", "orthonormal"), ("orthonormal", "raw")])
@pytest.mark.parametrize("options", [{}, {"grouping": "shape", "coupling": "layer", "transform": "dct"}])
def test_a_core_survives_a_change_of_frame(kit, first, second, options):
    model, other = kit.Net(), kit.Net()
    injection = kit.adapt(model, TCurConfig(rank=2, frame=first, **options))
    kit.train(model, injection.parameters(), rate=0.5)
    inject(other, TCurConfig(rank=2, frame=second, alpha=0.25, **options), factors=injection.factors())
    x, _ = kit.batch(seed=9)
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frame", ["raw", "orthonormal", "sketch"])
def test_factors_of_another_rank_than_the_settings_are_taken(kit, frame):
    model, other = kit.Net(), kit.Net()
    injection = kit.adapt(model, TCurConfig(rank=3, frame=frame))
    kit.stir(injection)
    again = inject(other, TCurConfig(rank=2, frame=frame), factors=injection.factors())
    x, _ = kit.batch(seed=9)
    with torch.no_grad():
        for form in ("gather" if frame != "sketch" else "factored", "merged", None):
            for layer in again.layers().values():
                layer.form = form
            torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", ["group", "slices", "index", "blocks", "kind", "sketch sizes"])
def test_factors_of_another_model_are_refused(kit, change):
    frame = "sketch" if "sketch" in change else "orthonormal"
    factors = kit.adapt(kit.Net(), TCurConfig(rank=2, frame=frame)).factors()
    up = factors.pop("up")
    if change == "slices":
        factors["up"] = Factors(up.core[:2], up.rows[:2], up.cols[:2])
    elif change == "index":
        factors["up"] = Factors(up.core, up.rows, np.full((3, 2), 99, np.int32))
    elif change == "blocks":
        factors["up"] = Factors(up.core, up.rows[:1], up.cols[:1])
    elif change == "kind":
        factors["up"] = kit.adapt(kit.Net(), TCurConfig(rank=2, frame="sketch")).factors()["up"]
    elif change == "sketch sizes":
        factors["up"] = type(up).pack(up.core, up.left[:, 1:], up.right)
    model = kit.Net()
    with pytest.raises(BaseMismatchError) as caught:
        inject(model, TCurConfig(rank=2, frame=frame), factors=factors)
    assert caught.value.where == ("up" if change != "group" else None)
    assert all(parameter.requires_grad for parameter in model.parameters())  # nothing was touched
    assert not any(isinstance(module, AdaptedLayer) for module in model.modules())


def test_index_factors_in_the_sketch_frame_are_refused(kit):
    factors = kit.adapt(kit.Net(), TCurConfig(rank=2)).factors()
    with pytest.raises(BaseMismatchError, match="not of the frame sketch"):
        inject(kit.Net(), TCurConfig(rank=2, frame="sketch"), factors=factors)


@pytest.mark.parametrize("selection", ["random", "inverse-norm"])
def test_blocks_draw_rows_and_columns_of_their_own(selection):
    """Of equal weights, so that nothing but the draw can differ; the same seed draws the same again."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(40, 50) for _ in range(3)))
    for layer in model:
        layer.weight.data = model[0].weight.detach().clone()
    picks = []
    for seed in (0, 0, 1):
        injection = inject(model, TCurConfig(rank=6, selection=selection, seed=seed))
        (factors,) = injection.factors().values()
        picks.append((factors.rows.tolist(), factors.cols.tolist()))
        injection.remove()
    assert picks[0] == picks[1]
    for part in range(2):
        assert len({tuple(indices) for indices in picks[0][part] + picks[2][part]}) == 6
        assert all(len({tuple(indices) for indices in pick[part]}) == 3 for pick in picks)


def test_a_selection_without_its_gradients_is_refused(kit):
    model = kit.Net()
    with pytest.raises(ConfigError, match=r"no direction was given for blocks\.0\.up and 8 more") as caught:
        inject(model, TCurConfig(rank=2))
    assert (caught.value.where, "mean_gradients" in caught.value.hint) == ("selection", True)
    gradients = {f"blocks.{n}.{leaf}": torch.ones(12, 6) for n in range(3) for leaf in ("up", "gate")}
    with pytest.raises(ConfigError, match=r"no direction was given for blocks\.0\.down and 2 more"):
        inject(model, TCurConfig(rank=2, frame="sketch"), directions=gradients)
    del gradients["blocks.1.up"]
    with pytest.raises(ConfigError, match=r"no direction was given for blocks\.1\.up$"):
        inject(model, TCurConfig(rank=2, targets="*.up"), directions=gradients)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(isinstance(module, AdaptedLayer) for module in model.modules())
