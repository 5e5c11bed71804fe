"""Ranks by energy: what a core reaches, and how a budget is shared out."""

from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edge_tcur.method.allocation import MAX_RANK, allocate_ranks, energies_by_rank
from edge_tcur.method.selection import Choice, select_by_directions
from edge_tcur_runtime.errors import ConfigError


def pair(seed, shape=(12, 9)):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("rank", [1, 3, 7, 9])
def test_the_energy_is_that_of_the_core_gradient_between_the_selected_rows_and_columns(rank):
    """At the full number of columns everything is held; below, what the selection of that rank holds,
    as long as its rows are chosen on the same columns."""
    weight, gradient = pair(0)
    reached = energies_by_rank(weight, gradient, "orthonormal")
    rows, columns = select_by_directions(weight[None], Choice(rank, directions=gradient[None]))
    c, _ = torch.linalg.qr(weight[:, columns])
    r, _ = torch.linalg.qr(weight[rows].T)
    own = float((c.T @ gradient @ r).square().sum())
    assert reached[rank] == pytest.approx(own, rel=0.35)
    assert reached[9] <= float(gradient.square().sum()) * (1 + 1e-9)


def test_singular_vectors_reach_their_singular_values():
    weight, gradient = pair(1)
    values = torch.linalg.svdvals(gradient).square().cumsum(0)
    assert energies_by_rank(weight, gradient, "sketch")[1:] == pytest.approx(values.tolist())


@pytest.mark.parametrize("frame", ["orthonormal", "sketch"])
def test_more_rank_never_reaches_less(frame):
    reached = energies_by_rank(*pair(2, (40, 50)), frame)
    assert len(reached) == MAX_RANK + 1
    assert all(low <= high + 1e-9 for low, high in pairwise(reached))


@given(
    st.dictionaries(
        st.text("abc", min_size=1, max_size=3),
        st.lists(st.floats(0, 10), min_size=1, max_size=12),
        min_size=1,
    ),
    st.integers(0, 300),
)
def test_a_budget_is_kept_and_spent(gains, more):
    energies = {}
    for name, steps in gains.items():
        energies[name] = [0.0]
        for step in steps:
            energies[name].append(energies[name][-1] + step)
    budget = len(energies) + more
    ranks = allocate_ranks(energies, budget)
    spent = sum(rank * rank for rank in ranks.values())
    assert spent <= budget
    assert all(1 <= rank < len(energies[name]) for name, rank in ranks.items())
    cheapest = [2 * rank + 1 for name, rank in ranks.items() if rank + 1 < len(energies[name])]
    assert not cheapest or budget - spent < min(cheapest)


def test_the_numbers_go_where_the_energy_is():
    flat = [0.0, *(0.1 * rank for rank in range(1, 9))]
    steep = [0.0, *(10.0 * rank for rank in range(1, 9))]
    ranks = allocate_ranks({"flat": flat, "steep": steep}, 40)
    assert ranks["steep"] == 6
    assert ranks["flat"] == 2


def test_too_small_a_budget_names_the_smallest():
    with pytest.raises(ConfigError) as caught:
        allocate_ranks({"a": [0.0, 1.0], "b": [0.0, 1.0]}, 1)
    assert "at least 2" in caught.value.hint


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=8), min_size=1, max_size=4),
    st.integers(0, 60),
    st.sampled_from([0.25, 1024.0]),
)
def test_nothing_more_fits_and_the_unit_of_energy_does_not_count(gains, more, factor):
    energies = {str(n): [0.0, *accumulate(own)] for n, own in enumerate(gains)}
    budget = len(energies) + more
    ranks = allocate_ranks(energies, budget)
    left = budget - sum(rank * rank for rank in ranks.values())
    assert left >= 0
    for name, rank in ranks.items():
        assert 1 <= rank < len(energies[name])
        assert rank == len(energies[name]) - 1 or 2 * rank + 1 > left
    assert allocate_ranks(energies, budget) == ranks
    same = {name: [factor * value for value in own] for name, own in energies.items()}
    assert allocate_ranks(same, budget) == ranks
    richer = energies | {"0": [4 * value for value in energies["0"]]}
    assert allocate_ranks(richer, budget)["0"] >= ranks["0"]
