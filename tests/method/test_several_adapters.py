"""Several named adapters of one model, modules trained in full with them, and merging."""

from __future__ import annotations

import pytest
import torch

from edge_tcur.method.adapted import DEFAULT, Injection
from edge_tcur.method.config import TCurConfig
from edge_tcur.method.forms import possible_forms
from edge_tcur_runtime.errors import ConfigError, UsageError


@pytest.fixture
def two(kit):
    """A net under two adapters of different settings, ``b`` active; outputs of each and of the base."""
    model, x = kit.Net(), kit.batch()[0]
    outputs = {}
    with torch.no_grad():
        outputs[None] = model(x)
    injection = Injection(model)
    injection.add("a", TCurConfig(rank=2, selection="norm", modules_to_save=("head", "embed")))
    kit.stir(injection, seed=1)
    with torch.no_grad():
        model.head.weight.add_(0.5)
        model.embed.bias.sub_(0.25)
        outputs["a"] = model(x)
    config = TCurConfig(
        rank=3,
        grouping="shape",
        coupling="all",
        targets="*.up,*.gate",
        selection="random",
        modules_to_save=("head",),
    )
    injection.add("b", config)
    with torch.no_grad():
        assert torch.equal(model(x), outputs[None])  # a new adapter starts at the base, whatever was active
    kit.stir(injection, seed=2)
    with torch.no_grad():
        model.head.bias.add_(1.0)
        outputs["b"] = model(x)
    return injection, x, outputs


def same(injection, x, expected):
    with torch.no_grad():
        return torch.equal(injection.model(x), expected)


def test_several_adapters(two):
    injection, x, outputs = two
    assert injection.active == "b"
    assert not torch.equal(outputs["a"], outputs["b"])
    for name in ("a", "b", None, "a", None, "b"):
        injection.activate(name)
        assert injection.active == name
        assert same(injection, x, outputs[name])
    with injection.disabled():
        assert same(injection, x, outputs[None])
        assert injection.active is None
    assert injection.active == "b"
    with pytest.raises(ZeroDivisionError), injection.disabled():
        raise ZeroDivisionError
    assert same(injection, x, outputs["b"])


def test_only_the_active_adapter_gets_gradients(two, kit):
    injection, _, _ = two
    cores, saved = injection.trained()
    assert len(cores) == 1
    assert [tuple(value.shape) for value in saved] == [(3, 6), (3,)]
    assert [id(value) for value in injection.parameters()] == [id(value) for value in cores + saved]
    kit.loss_of(injection.model).backward()
    assert all(parameter.grad is not None for parameter in injection.parameters())
    assert all(parameter.grad is None for parameter in injection.adapters["a"].parameters())


def test_saved_modules_belong_to_their_adapter(two, kit):
    injection, _, _ = two
    model = injection.model
    injection.activate("a")
    assert set(injection.adapters["a"].saved) == {"head.weight", "head.bias", "embed.weight", "embed.bias"}
    assert model.head.weight is injection.adapters["a"].saved["head.weight"]
    assert model.head.weight.requires_grad
    injection.activate("b")
    assert model.head.weight is injection.adapters["b"].saved["head.weight"]
    assert not model.embed.weight.requires_grad
    injection.activate(None)
    assert torch.equal(model.head.weight, kit.Net().head.weight)
    assert not model.head.weight.requires_grad


def test_delete(two):
    injection, x, outputs = two
    injection.delete("a")
    assert list(injection.adapters) == ["b"]
    assert same(injection, x, outputs["b"])
    injection.delete("b")
    assert injection.active is None
    assert same(injection, x, outputs[None])
    for call in (injection.parameters, injection.factors, injection.merge, injection.trained):
        with pytest.raises(UsageError, match="no adapter is active"):
            call()
    injection.add("a", TCurConfig(rank=1, selection="norm"))  # the name is free again
    assert same(injection, x, outputs[None])


def test_names_that_are_wrong(two):
    injection, x, outputs = two
    with pytest.raises(UsageError, match="there is an adapter 'a' already"):
        injection.add("a", TCurConfig(rank=2, selection="norm"))
    for call in (injection.activate, injection.delete):
        with pytest.raises(UsageError, match="there is no adapter 'c'; loaded: a, b"):
            call("c")
    assert same(injection, x, outputs["b"])


def test_an_adapter_that_cannot_be_added_leaves_the_others_as_they_were(two):
    injection, x, outputs = two
    for config, error in (
        (TCurConfig(rank=99, selection="norm"), "rank"),
        (TCurConfig(rank=2), "selection"),
        (TCurConfig(rank=2, selection="norm", modules_to_save=("tail",)), "modules_to_save"),
    ):
        with pytest.raises(ConfigError) as caught:
            injection.add("c", config)
        assert caught.value.where == error
        assert (list(injection.adapters), injection.active) == (["a", "b"], "b")
        assert same(injection, x, outputs["b"])


def test_what_one_adapter_adapts_another_may_train_in_full(kit):
    model, x = kit.Net(), kit.batch()[0]
    bits = kit.bits(model)
    injection = Injection(model)
    injection.add("adapts", TCurConfig(rank=2, selection="norm"))
    kit.stir(injection)
    injection.add("trains", TCurConfig(rank=2, selection="norm", targets="*.down", modules_to_save=("*.up",)))
    layer = injection.layers()["blocks.1.up"]
    assert layer.weight is injection.adapters["trains"].saved["blocks.1.up.weight"]
    losses = kit.train(model, injection.parameters())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        trained = model(x)
        injection.activate("adapts")
        assert not torch.equal(model(x), trained)
        injection.activate("trains")
        assert torch.equal(model(x), trained)
    injection.remove()
    assert kit.bits(model) == bits


def test_a_module_saved_whole_is_not_adapted_inside(kit):
    model = kit.Net()
    injection = kit.adapt(model, TCurConfig(rank=2, modules_to_save=("blocks.1",)))
    assert injection.groups["up"].spec.modules == ("blocks.0.up", "blocks.2.up")
    assert injection.targets.skipped["blocks.1.up"] == "trained in full (modules_to_save)"
    assert set(injection.adapters["default"].saved) == {
        f"blocks.1.{leaf}.{kind}" for leaf in ("norm", "up", "gate", "down") for kind in ("weight", "bias")
    }
    losses = kit.train(model, injection.parameters())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"frame": "sketch"},
        {"grouping": "shape", "coupling": "all"},
        {"grouping": "shape", "coupling": "layer", "transform": "dct"},
        {"modules_to_save": ("head",)},
    ],
)
def test_merge_and_unmerge(kit, options):
    model, x = kit.Net(), kit.batch()[0]
    bits = kit.bits(model)
    injection = kit.adapt(model, TCurConfig(rank=2, **options))
    kit.stir(injection)
    with torch.no_grad():
        expected = model(x)
        injection.merge()
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
        merged = kit.bits(model)
        changed = {
            name.replace(".base.", ".")
            for name in merged
            if merged[name] != bits[name.replace(".base.", ".")]
        }
        assert changed == {f"blocks.{n}.{leaf}.weight" for n in range(3) for leaf in ("up", "gate", "down")}
        for call in (injection.merge, lambda: injection.activate(None), lambda: injection.delete("default")):
            with pytest.raises(UsageError, match="'default' is merged"):
                call()
        with pytest.raises(UsageError, match="is merged"), injection.disabled():
            pass
        injection.unmerge()
        assert torch.equal(model(x), expected)
        with pytest.raises(UsageError, match="no adapter is merged"):
            injection.unmerge()
    injection.remove()
    assert kit.bits(model) == bits


def test_a_merged_model_keeps_its_sums_when_the_adapters_are_removed(kit):
    model, x = kit.Net(), kit.batch()[0]
    modules = dict(model.named_modules())
    injection = kit.adapt(model, TCurConfig(rank=2, modules_to_save=("head",)))
    kit.stir(injection)
    with torch.no_grad():
        injection.adapters["default"].saved["head.bias"].add_(3)
        expected = model(x)
        injection.merge()
        injection.remove()
        assert dict(model.named_modules()) == modules
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
        injection.add("next", TCurConfig(rank=1, selection="norm"))  # upon the merged model
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


def test_merging_leaves_a_module_with_a_tied_weight_alone(kit):
    model, x = kit.Net(), kit.batch()[0]
    model.blocks[2].up.weight = model.blocks[0].up.weight
    injection = kit.adapt(model, TCurConfig(rank=2))
    assert injection.groups["up"].spec.modules == ("blocks.0.up", "blocks.1.up")
    kit.stir(injection)
    with torch.no_grad():
        expected = model(x)
        injection.merge()
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
        injection.unmerge()
        assert torch.equal(model(x), expected)
    injection.remove()
    assert model.blocks[2].up.weight is model.blocks[0].up.weight


def test_a_float64_base_is_merged_in_float64(kit):
    model = kit.Net().double()
    x = kit.batch()[0].double()
    injection = kit.adapt(model, TCurConfig(rank=2))
    with torch.no_grad():
        expected = model(x)
        injection.merge()  # of a zero core
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("options", [{}, {"coupling": "all"}, {"frame": "sketch"}])
def test_a_bias_of_an_adapted_layer_is_trained_whatever_its_form(kit, options):
    """Against the same model with weights plus updates, and with the biases as parameters of its own."""
    model = kit.Net()
    before = kit.bits(model)
    names = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    injection = kit.adapt(model, TCurConfig(rank=2, modules_to_save=("*.bias",), **options))
    kit.stir(injection)
    saved = injection.adapters[DEFAULT].saved
    assert set(saved) == names
    with torch.no_grad():
        for value in saved.values():
            value.add_(torch.linspace(0.1, 0.4, len(value)))
    plain = kit.Net()
    with torch.no_grad():
        for name, value in saved.items():
            plain.get_parameter(name).copy_(value)
        for group in injection.groups.values():
            for position, module in enumerate(group.spec.modules):
                plain.get_parameter(f"{module}.weight").add_(group.slice(position).dense())
    loss = kit.loss_of(plain)
    loss.backward()
    forms = {
        form
        for layer in injection.layers().values()
        for form in possible_forms(
            layer.view, has_rows=injection.groups["up"].has_rows, in_block=injection.groups["up"].in_block
        )
    }
    for form in (None, *sorted(forms)):
        for layer in injection.layers().values():
            layer.form = form
        for value in saved.values():
            value.grad = None
        own = kit.loss_of(model)
        own.backward()
        torch.testing.assert_close(own, loss)
        for name, value in saved.items():
            torch.testing.assert_close(value.grad, plain.get_parameter(name).grad, msg=f"{form}: {name}")
    injection.remove()
    assert kit.bits(model) == before
