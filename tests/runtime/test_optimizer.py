"""The optimisers against their definitions, and the schedule. tests/workstation compares it with torch's."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_tcur_runtime.errors import ConfigError
from edge_tcur_runtime.optimizer import AdamW, build_optimizer, schedule
from edge_tcur_runtime.settings import AdamWSettings, SGDSettings


def reference(value, gradients, rate, settings):
    """Loshchilov and Hutter 2019, algorithm 2, number by number."""
    value, first, second = value.copy(), np.zeros_like(value), np.zeros_like(value)
    for step, gradient in enumerate(gradients, start=1):
        for place in np.ndindex(value.shape):
            g = gradient[place]
            first[place] = settings.beta1 * first[place] + (1 - settings.beta1) * g
            second[place] = settings.beta2 * second[place] + (1 - settings.beta2) * g * g
            m = first[place] / (1 - settings.beta1**step)
            v = second[place] / (1 - settings.beta2**step)
            value[place] -= rate * settings.weight_decay * value[place] + rate * m / (
                v**0.5 + settings.epsilon
            )
    return value


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)])
def test_the_update_is_the_definitions(decay, betas):
    settings = AdamWSettings(weight_decay=decay, beta1=betas[0], beta2=betas[1], max_gradient_norm=0.0)
    generator = np.random.default_rng(0)
    values = {"a": generator.normal(size=(2, 3)), "b": generator.normal(size=4)}
    gradients = [
        {name: generator.normal(size=value.shape) for name, value in values.items()} for _ in range(12)
    ]
    rates = {"a": 0.02, "b": 0.005}
    optimizer, moved = AdamW(settings), values
    for gradient in gradients:
        moved = optimizer.step(moved, gradient, rates)
    for name, value in values.items():
        expected = reference(value, [gradient[name] for gradient in gradients], rates[name], settings)
        np.testing.assert_allclose(moved[name], expected, rtol=1e-12)
    assert optimizer.steps == 12


def test_the_first_step_is_as_long_as_the_rate_whatever_the_gradient():
    for scale in (1e-6, 1.0, 1e6):
        moved = AdamW(AdamWSettings()).step({"a": np.zeros(1)}, {"a": np.full(1, scale)}, {"a": 0.02})
        assert moved["a"][0] == pytest.approx(-0.02, rel=2e-2)


def test_a_step_leaves_its_arguments_alone_and_is_the_same_every_time():
    values, gradients = {"a": np.ones(3)}, {"a": np.array([1.0, -2.0, 3.0])}
    first = AdamW(AdamWSettings()).step(values, gradients, {"a": 0.1})
    again = AdamW(AdamWSettings()).step(values, gradients, {"a": 0.1})
    np.testing.assert_array_equal(first["a"], again["a"])
    np.testing.assert_array_equal(values["a"], 1)
    np.testing.assert_array_equal(gradients["a"], [1, -2, 3])


def test_it_walks_to_the_minimum():
    target = np.array([3.0, -1.0])
    optimizer, values = AdamW(AdamWSettings()), {"a": np.zeros(2)}
    for step in range(400):
        values = optimizer.step(values, {"a": 2 * (values["a"] - target)}, {"a": 0.1 * schedule(step, 400)})
    np.testing.assert_allclose(values["a"], target, atol=1e-2)


@pytest.mark.parametrize("settings", [AdamWSettings(), SGDSettings(), SGDSettings(momentum=0)])
def test_an_optimiser_goes_on_from_its_state_bit_for_bit(settings):
    generator = np.random.default_rng(0)
    gradients = [{"a": generator.normal(size=3)} for _ in range(6)]
    whole, values = build_optimizer(settings), {"a": np.ones(3)}
    for number, gradient in enumerate(gradients):
        if number == 3:
            other = build_optimizer(settings, dict(whole.first), dict(whole.second), whole.steps)
            moved = values
        values = whole.step(values, gradient, {"a": 0.1})
    for gradient in gradients[3:]:
        moved = other.step(moved, gradient, {"a": 0.1})
    assert values["a"].tobytes() == moved["a"].tobytes()
    assert type(other) is type(whole)


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
def test_a_momentum_that_makes_no_sense_is_refused(momentum):
    with pytest.raises(ConfigError, match="expected 0 or more and less than 1") as caught:
        SGDSettings(momentum=momentum)
    assert caught.value.where == "momentum"


@given(st.floats(0, 0.99), st.floats(0.01, 1.0))
def test_a_constant_gradient_brings_the_velocity_to_its_limit(momentum, gradient):
    optimizer = build_optimizer(SGDSettings(momentum=momentum, max_gradient_norm=0.0))
    for _ in range(3000):
        values = optimizer.step({"a": np.zeros(1)}, {"a": np.full(1, gradient)}, {"a": 1.0})
    assert values["a"][0] == pytest.approx(-gradient / (1 - momentum), rel=1e-6)


# --- clipping --------------------------------------------------------------------------------------


FINITE = st.floats(-1e6, 1e6).map(lambda x: x if abs(x) > 1e-6 else 1.0)


@given(st.lists(FINITE, min_size=2, max_size=6), st.floats(1e-3, 1e3))
def test_gradients_are_clipped_to_their_global_norm(numbers, limit):
    """Over all parameters together: the second moment after one step shows what was used."""
    settings = AdamWSettings(max_gradient_norm=limit)
    optimizer = AdamW(settings)
    gradients = {str(index): np.array([number]) for index, number in enumerate(numbers)}
    optimizer.step({name: np.zeros(1) for name in gradients}, gradients, dict.fromkeys(gradients, 0.1))
    used = np.array([optimizer.first[name][0] / (1 - settings.beta1) for name in gradients])
    norm = np.linalg.norm(numbers)
    np.testing.assert_allclose(used, np.array(numbers) * min(1.0, limit / norm), rtol=1e-9)


def test_clipping_can_be_switched_off():
    optimizer = AdamW(AdamWSettings(max_gradient_norm=0.0))
    optimizer.step({"a": np.zeros(1)}, {"a": np.array([1e6])}, {"a": 0.1})
    assert optimizer.first["a"][0] == pytest.approx(1e5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_a_gradient_that_is_not_finite_updates_nothing(bad):
    optimizer = AdamW(AdamWSettings())
    optimizer.step({"a": np.zeros(2)}, {"a": np.ones(2)}, {"a": 0.1})
    first, second = optimizer.first["a"].copy(), optimizer.second["a"].copy()
    with pytest.raises(FloatingPointError, match="not finite"):
        optimizer.step({"a": np.zeros(2)}, {"a": np.array([1.0, bad])}, {"a": 0.1})
    np.testing.assert_array_equal(optimizer.first["a"], first)
    np.testing.assert_array_equal(optimizer.second["a"], second)
    assert optimizer.steps == 1


def test_a_gradient_of_zero_moves_nothing_but_by_decay():
    moved = AdamW(AdamWSettings()).step({"a": np.ones(2)}, {"a": np.zeros(2)}, {"a": 0.1})
    np.testing.assert_array_equal(moved["a"], 1)
    decayed = AdamW(AdamWSettings(weight_decay=0.5)).step({"a": np.ones(2)}, {"a": np.zeros(2)}, {"a": 0.1})
    np.testing.assert_allclose(decayed["a"], 0.95)


# --- the schedule ----------------------------------------------------------------------------------


@given(st.integers(1, 5000), st.floats(0.0, 1.0))
def test_the_schedule_rises_to_one_and_falls_towards_zero(total, fraction):
    factors = [schedule(step, total, fraction) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) == 1
    peak = factors.index(1.0)
    assert all(a < b for a, b in pairwise(factors[: peak + 1]))
    assert all(a >= b for a, b in pairwise(factors[peak:]))
    assert peak + 1 <= max(1, round(total * fraction))
    assert schedule(total, total, fraction) == 0 or round(total * fraction) > total


@given(st.integers(11, 5000))
def test_the_last_step_is_small(total):
    assert schedule(total - 1, total) == pytest.approx(1 / (total - max(1, round(total * 0.1))))


def test_one_step_has_the_peak_rate():
    assert schedule(0, 1) == 1


# --- the settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, -1.0, 100.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["learning_rate", "head_learning_rate"])
def test_a_rate_that_makes_no_sense_is_refused_and_named(name, rate):
    with pytest.raises(ConfigError, match="expected above 0 and below 100") as caught:
        AdamWSettings(**{name: rate})
    assert caught.value.where == name


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (SGDSettings, {"max_gradient_norm": -1.0}),
        (AdamWSettings, {"max_gradient_norm": float("nan")}),
        (AdamWSettings, {"beta1": 1.0}),
        (AdamWSettings, {"beta2": -0.1}),
        (AdamWSettings, {"epsilon": 0.0}),
    ],
)
def test_settings_that_would_be_ignored_or_divide_by_nothing_are_refused(kind, values):
    with pytest.raises(ConfigError) as caught:
        kind(**values)
    assert caught.value.where == next(iter(values))
