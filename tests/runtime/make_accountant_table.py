"""Makes tests/runtime/accountant_table.json: epsilons by Google's dp-accounting, for test_accountant.py.

In an environment of its own, because nothing else here needs that library:

    pip install dp-accounting==0.6.0
    PYTHONPATH=runtime python tests/runtime/make_accountant_table.py

Integer orders alone: at fractional ones dp-accounting adds an alternating series by the sizes of its
terms, or leaves an order out; those are checked against mpmath's quadrature.
"""

from __future__ import annotations

import itertools
import json
from importlib.metadata import version
from pathlib import Path

import mpmath
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant

from edge_tcur_runtime.accountant import ORDERS

NOISES = (0.5, 0.7, 1.0, 1.5, 2.0, 5.0, 20.0)
RATES = (0.001, 0.01, 0.1, 0.25, 0.5, 1.0)
STEPS = (1, 20, 400, 10000)
DELTAS = (1e-2, 1e-5)
MOMENTS = itertools.product((0.6, 1.0, 4.0, 20.0), (0.01, 0.2, 0.5, 0.9), (1.1, 2.5, 7.9))


def epsilons() -> list[list[float]]:
    """Noise, rate, steps, delta, and dp-accounting's epsilon."""
    orders = [order for order in ORDERS if order.is_integer()]
    rows = []
    for noise, rate, steps in itertools.product(NOISES, RATES, STEPS):
        accountant = RdpAccountant(orders=orders)
        accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), steps)
        rows += [[noise, rate, steps, delta, accountant.get_epsilon(delta)] for delta in DELTAS]
    return rows


def moment(noise: float, rate: float, order: float) -> float:
    """Logarithm of the mean of ((1 - q) + q exp((2 z - 1) / (2 sigma^2)))^order over z ~ N(0, sigma^2)."""
    mpmath.mp.dps = 40

    def density(z: mpmath.mpf) -> mpmath.mpf:
        mixed = 1 - rate + rate * mpmath.exp((2 * z - 1) / (2 * noise**2))
        return mixed**order * mpmath.npdf(z, 0, noise)

    places = [-40 * noise, -5 * noise, 0, 1, order, order + 5 * noise, order + 40 * noise]
    return float(mpmath.log(mpmath.quad(density, places)))


def main() -> None:
    table = {
        "dp-accounting": version("dp-accounting"),
        "epsilons": epsilons(),
        "moments": [[*place, moment(*place)] for place in MOMENTS],
    }
    text = json.dumps(table).replace("[[", "[\n[").replace("], [", "],\n[").replace("]]", "]\n]")
    Path(__file__).with_name("accountant_table.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
