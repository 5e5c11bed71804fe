"""The privacy that a run spends: Renyi differential privacy of the Poisson-subsampled Gaussian mechanism.

Mironov, Talwar, Zhang 2019, "Renyi Differential Privacy of the Sampled Gaussian Mechanism"
(arXiv:1908.10530): section 3.3 for integer and fractional orders. From Renyi to (epsilon, delta): Canonne,
Kamath, Steinke 2020 (arXiv:2004.00010), proposition 12. Pure; no scipy.

tests/runtime/test_accountant.py compares integer orders with Google's `dp-accounting` and fractional ones
with quadrature: there that library adds the terms of an alternating series by their sizes, and claims less.

Neighbours are data sets that differ by one sample being there or not.
"""

from __future__ import annotations

import math
from functools import lru_cache

ORDERS = (
    *(1 + tenth / 10 for tenth in range(1, 100)),
    *map(float, range(11, 64)),
    128.0,
    256.0,
    512.0,
    1024.0,
)
MAX_NOISE = 1e4
_SERIES_END = -30.0  # logarithm of what a term of the series may still add
_MAX_TERMS = 20_000  # an order whose series needs more is left out: the others bound epsilon too
_ASYMPTOTIC = 25.0  # `math.erfc` is exact to here and vanishes soon after


def epsilon(
    noise_multiplier: float, rate: float, steps: int, delta: float, orders: tuple[float, ...] = ORDERS
) -> float:
    """The epsilon that `steps` updates spend; infinity without noise.

    Args:
        noise_multiplier: standard deviation of the noise on the sum of clipped gradients, over their bound.
        rate: probability, 0 to 1, with which each sample takes part in an update.
        delta: above 0 and below 1.
        orders: Renyi orders to choose among, each above 1; every one of them gives a bound.
    """
    if steps == 0 or rate == 0:
        return 0.0
    if noise_multiplier**2 == 0:  # too small to square, too
        return math.inf
    moments = zip(orders, _rdp(noise_multiplier, rate, orders), strict=True)
    return max(0.0, min(_to_epsilon(order, steps * value, delta) for order, value in moments))


def noise_for(target: float, rate: float, steps: int, delta: float) -> float:
    """The smallest noise multiplier (to a thousandth) that spends at most `target`.

    Raises:
        ValueError: none up to `MAX_NOISE` does.
    """
    low, high = 0.0, 1.0
    while epsilon(high, rate, steps, delta) > target:
        low, high = high, 2 * high
        if high > MAX_NOISE:
            raise ValueError(f"no noise multiplier up to {MAX_NOISE:g} spends as little as {target:g}")
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        if epsilon(middle, rate, steps, delta) > target:
            low = middle
        else:
            high = middle
    return high


@lru_cache(maxsize=256)
def _rdp(noise: float, rate: float, orders: tuple[float, ...]) -> tuple[float, ...]:
    """Of one update at each order."""
    if rate == 1:
        return tuple(order / (2 * noise**2) for order in orders)
    result = []
    for order in orders:
        find = _log_moment_integer if order.is_integer() else _log_moment
        try:
            result.append(find(rate, noise, order) / (order - 1))
        except OverflowError:
            result.append(math.inf)
    return tuple(result)


def _to_epsilon(order: float, rdp: float, delta: float) -> float:
    if delta**2 + math.expm1(-rdp) > 0:  # delta is above the total variation (Bretagnolle and Huber 1978)
        return 0.0
    return rdp + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)


def _log_moment_integer(rate: float, noise: float, order: float) -> float:
    """Logarithm of A(order), equation 3.3 section 3.3.1: a sum over binomial terms."""
    whole, total = int(order), -math.inf
    for k in range(whole + 1):
        term = _log_binomial(order, k)[0] + k * math.log(rate) + (whole - k) * math.log1p(-rate)
        total = _log_add(total, term + (k * k - k) / (2 * noise**2))
    return total


def _log_moment(rate: float, noise: float, order: float) -> float:
    """Logarithm of A(order) for fractional orders, section 3.3.2: two series that meet where the densities
    of the mixture's parts are equal."""
    meet = noise**2 * math.log(1 / rate - 1) + 0.5
    below, above = _Signed(), _Signed()
    for i in range(_MAX_TERMS):
        log_size, sign = _log_binomial(order, i)
        rest = order - i
        first = _log_half(i - meet, noise) + i * math.log(rate) + rest * math.log1p(-rate)
        second = _log_half(meet - rest, noise) + rest * math.log(rate) + i * math.log1p(-rate)
        first += log_size + (i * i - i) / (2 * noise**2)
        second += log_size + (rest * rest - rest) / (2 * noise**2)
        below.add(first, sign)
        above.add(second, sign)
        if i >= order and max(first, second) < _SERIES_END:
            return _log_add(below.log(), above.log())
    return math.inf


def _log_half(distance: float, noise: float) -> float:
    """Logarithm of the part of a normal distribution (deviation `noise`) that lies above `distance`."""
    return _log_erfc(distance / (math.sqrt(2) * noise)) - math.log(2)


class _Signed:
    """A sum of signed numbers, given by the logarithms of their sizes."""

    def __init__(self) -> None:
        self._plus = self._minus = -math.inf

    def add(self, log_size: float, sign: int) -> None:
        if sign > 0:
            self._plus = _log_add(self._plus, log_size)
        else:
            self._minus = _log_add(self._minus, log_size)

    def log(self) -> float:
        """Of the sum, which is positive."""
        if self._minus == -math.inf:
            return self._plus
        difference = self._minus - self._plus
        return self._plus + (math.log1p(-math.exp(difference)) if difference < 0 else -math.inf)


def _log_add(one: float, other: float) -> float:
    low, high = sorted((one, other))
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def _log_binomial(order: float, k: int) -> tuple[float, int]:
    """Logarithm of the size, and the sign, of the generalised binomial coefficient."""
    rest = order - k + 1  # the gamma function is negative between every other pair of integers below 0
    sign = 1 if rest > 0 or math.floor(rest) % 2 == 0 else -1
    return math.lgamma(order + 1) - math.lgamma(k + 1) - math.lgamma(rest), sign


def _log_erfc(x: float) -> float:
    if x < _ASYMPTOTIC:
        return math.log(math.erfc(x))
    tail = 1 - 1 / (2 * x**2) + 3 / (4 * x**4) - 15 / (8 * x**6) + 105 / (16 * x**8)
    return -(x**2) + math.log(tail / (x * math.sqrt(math.pi)))
