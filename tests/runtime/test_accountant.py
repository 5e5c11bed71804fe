"""The accountant against dp-accounting and quadrature (make_accountant_table.py made the table), and laws."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_tcur_runtime.accountant import ORDERS, _log_moment, epsilon, noise_for

TABLE = json.loads(Path(__file__).with_name("accountant_table.json").read_text(encoding="utf-8"))
WHOLE = tuple(order for order in ORDERS if order.is_integer())
NOISE = st.floats(0.5, 20).map(lambda value: round(value, 1))
RATE = st.sampled_from((0.001, 0.01, 0.1, 0.25, 0.5, 1.0))
STEPS = st.integers(1, 5000)
DELTA = st.floats(1e-8, 0.1)
SOME = settings(max_examples=40)


@pytest.mark.parametrize("row", TABLE["epsilons"], ids=str)
def test_at_integer_orders_it_is_googles_and_with_all_orders_never_above(row):
    *place, expected = row
    assert epsilon(*place, WHOLE) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert epsilon(*place) <= expected * (1 + 1e-9)


@pytest.mark.parametrize("row", TABLE["moments"], ids=str)
def test_fractional_orders_agree_with_quadrature(row):
    noise, rate, order, expected = row
    assert _log_moment(rate, noise, order) == pytest.approx(expected, rel=1e-8, abs=1e-12)


def test_the_table_covers_what_it_should():
    assert TABLE["dp-accounting"] == "0.6.0"
    assert len(TABLE["epsilons"]) > 300
    assert len(TABLE["moments"]) == 48


@given(NOISE, RATE, STEPS, STEPS, DELTA)
@SOME
def test_more_steps_spend_more(noise, rate, one, other, delta):
    low, high = sorted((one, other))
    assert epsilon(noise, rate, low, delta) <= epsilon(noise, rate, high, delta)


@given(NOISE, NOISE, RATE, STEPS, DELTA)
@SOME
def test_more_noise_spends_less(one, other, rate, steps, delta):
    low, high = sorted((one, other))
    assert epsilon(high, rate, steps, delta) <= epsilon(low, rate, steps, delta) * (1 + 1e-9)


@given(NOISE, RATE, RATE, STEPS, DELTA)
@SOME
def test_a_higher_sampling_rate_spends_more(noise, one, other, steps, delta):
    low, high = sorted((one, other))
    assert epsilon(noise, low, steps, delta) <= epsilon(noise, high, steps, delta) * (1 + 1e-9)


@given(NOISE, RATE, STEPS, DELTA, DELTA)
@SOME
def test_a_smaller_delta_spends_more(noise, rate, steps, one, other):
    low, high = sorted((one, other))
    assert epsilon(noise, rate, steps, high) <= epsilon(noise, rate, steps, low)


@given(NOISE, RATE, STEPS, STEPS, DELTA)
@SOME
def test_composition_adds_and_one_account_of_both_is_tighter(noise, rate, one, other, delta):
    """Basic composition: two runs spend at most the sum, at the sum of their deltas."""
    together = epsilon(noise, rate, one + other, 2 * delta)
    assert together <= epsilon(noise, rate, one, delta) + epsilon(noise, rate, other, delta) + 1e-9


@given(NOISE, RATE, DELTA)
@SOME
def test_no_step_spends_nothing_and_no_noise_everything(noise, rate, delta):
    assert epsilon(noise, rate, 0, delta) == 0
    assert epsilon(0.0, rate, 1, delta) == math.inf
    assert epsilon(noise, 0.0, 10, delta) == 0


@given(st.floats(0.2, 20), RATE, st.integers(1, 500), st.floats(1e-6, 0.05))
@settings(max_examples=15)
def test_the_noise_for_a_target_spends_it_and_hardly_less_noise_would_not(target, rate, steps, delta):
    noise = noise_for(target, rate, steps, delta)
    assert epsilon(noise, rate, steps, delta) <= target
    assert epsilon(noise * 0.998, rate, steps, delta) > target or noise < 1e-2


def test_a_target_beyond_reach_is_an_error():
    with pytest.raises(ValueError, match="no noise multiplier up to 10000"):
        noise_for(1e-9, 1.0, 1000, 1e-9)
