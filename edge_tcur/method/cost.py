"""Which form of an adapted layer is cheapest: a small cost model, from shapes alone.

Each product [m, k] x [k, n] is charged ``2 m k n`` operations at the speed of a full-size product, its
operands' bytes at memory speed, and a fixed price for the call. Only what a form adds to the frozen
layer's own forward and input-gradient counts. The constants are of one CPU core; only their ratios
matter, and tests/benchmarks/forms.py holds the choice against measurement.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from math import inf

OPERATIONS_PER_SECOND = 6.0e10
BYTES_PER_SECOND = 1.0e10
SECONDS_PER_CALL = 4.0e-6
SECONDS_PER_FUNCTION = 1.0e-4  # of a backward pass that is written in Python
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Sizes:
    """What the cost of one adapted layer depends on.

    Attributes:
        tokens: rows of the layer's input.
        n1, n2: output and input features.
        inner: m, the size of the coupling matrix: p * r with a transform, r without.
        rank: r.
    """

    tokens: int
    n1: int
    n2: int
    inner: int
    rank: int


def _product(m: int, k: int, n: int) -> float:
    traffic = _FLOAT * (m * k + k * n + m * n)
    return 2.0 * m * k * n / OPERATIONS_PER_SECOND + traffic / BYTES_PER_SECOND + SECONDS_PER_CALL


def _pass(*counts: int) -> float:
    """Seconds of element-wise work over arrays of these sizes."""
    return sum(_FLOAT * count / BYTES_PER_SECOND + SECONDS_PER_CALL for count in counts)


def _coupling(sizes: Sizes) -> float:
    """Building the coupling matrix and scattering its gradient."""
    return 0.0 if sizes.inner == sizes.rank else _pass(*[sizes.inner * sizes.inner] * 4)


def _gather(s: Sizes) -> float:
    small = 2 * _product(s.tokens, s.rank, s.rank) * 2
    wide = _product(s.tokens, s.rank, s.n1) + _product(s.tokens, s.n1, s.rank)
    core = _product(s.rank, s.tokens, s.rank)
    return small + wide + core + _pass(*[s.tokens * s.n1] * 4) + SECONDS_PER_FUNCTION


def _factored(s: Sizes) -> float:
    forward = _product(s.tokens, s.n2, s.inner) + _product(s.tokens, s.inner, s.n1)
    middle = 3 * _product(s.tokens, s.inner, s.inner)
    return 2 * forward + middle + _pass(*[s.tokens * s.n1] * 3, *[s.tokens * s.n2] * 2) + _coupling(s)


def _dense(s: Sizes) -> float:
    """Building W + dW once."""
    inner = _product(s.n2, s.inner, s.inner) + _product(s.n1, s.inner, s.n2)
    return inner + _pass(*[s.n1 * s.n2] * 3)


def _merged(s: Sizes) -> float:
    gradient = _product(s.tokens, s.n2, s.inner) + _product(s.tokens, s.n1, s.inner)
    core = _product(s.inner, s.tokens, s.inner)
    return 2 * _dense(s) + gradient + core + _coupling(s) + SECONDS_PER_FUNCTION


def _materialised(s: Sizes) -> float:
    gradient = _product(s.n1, s.tokens, s.n2) + 2 * _product(s.n1, s.n2, s.inner)
    return _dense(s) + gradient + _product(s.n2, s.inner, s.inner) + _coupling(s)


def _spectral(s: Sizes) -> float:
    if 2 * s.inner < max(s.n1, s.n2):
        return inf  # it would keep an update of every weight where small products do
    frequencies = 2 * _product(s.n1, s.rank, s.n2)  # half as many as slices, four real products each
    transform = _product(s.inner // s.rank, s.inner // s.rank, s.n1 * s.n2) / (s.inner // s.rank)
    dense = 3 * frequencies + 2 * transform + _pass(*[s.n1 * s.n2] * 8)
    return dense + _product(s.n1, s.tokens, s.n2) + SECONDS_PER_FUNCTION


_COSTS = {
    "gather": _gather,
    "factored": _factored,
    "merged": _merged,
    "materialised": _materialised,
    "spectral": _spectral,
}


def predict_seconds(form: str, sizes: Sizes) -> float:
    """Predicted seconds that the form adds to the frozen layer's forward and backward pass."""
    return _COSTS[form](sizes)


@lru_cache(maxsize=4096)
def _cheapest(forms: tuple[str, ...], sizes: Sizes) -> str:
    return min(forms, key=lambda form: predict_seconds(form, sizes))


def cheapest_form(forms: Collection[str], sizes: Sizes) -> str:
    """The form with the lowest predicted cost."""
    return _cheapest(tuple(forms), sizes)
