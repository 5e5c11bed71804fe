"""The rules that pick rows and columns, each against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_tcur.method.selection import SELECTIONS, Choice, select_by_directions, select_by_norm
from edge_tcur_runtime.transform import TRANSFORMS

SEEDS = st.integers(0, 2**32 - 1)
quick = settings(deadline=None, max_examples=60, derandomize=True)


def largest(energy, count):
    return np.sort(np.argsort(-energy, kind="stable")[:count])


def random_stack(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@quick
@given(
    name=st.sampled_from(sorted(SELECTIONS)),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    transform=st.sampled_from(TRANSFORMS),
    kind=st.sampled_from(("normal", "zero", "rank one", "one entry", "equal", "huge")),
    dtype=st.sampled_from((torch.float32, torch.float64, torch.bfloat16)),
    data=st.data(),
    seed=SEEDS,
)
def test_indices_are_what_the_format_takes(name, shape, transform, kind, dtype, data, seed):
    """Whatever the weights: `rank` strictly increasing int64 indices in range, the same at every call."""
    n1, n2 = shape[1:]
    rank = data.draw(st.integers(1, min(n1, n2)))
    stack = random_stack(seed, *shape)
    if kind == "rank one":
        stack = stack[:, :, :1] * stack[:, :1, :]
    elif kind in ("zero", "equal"):
        stack = np.full_like(stack, kind == "equal")
    elif kind == "one entry":
        stack = np.zeros_like(stack)
        stack[0, -1, -1] = 1
    elif kind == "huge":
        stack *= 1e30
    weights = torch.from_numpy(stack).to(dtype)
    gradient = torch.from_numpy(random_stack(seed + 1, *shape)) * (kind != "equal")
    choice = Choice(rank, transform, seed, gradient)
    before = weights.clone()
    picks = SELECTIONS[name](weights, choice)
    for indices, size in zip(picks, (n1, n2), strict=True):
        assert indices.dtype == torch.int64
        assert len(indices) == rank
        assert (indices >= 0).all()
        assert (indices < size).all()
        assert (indices.diff() > 0).all()
    again = SELECTIONS[name](weights, choice)
    assert all(torch.equal(a, b) for a, b in zip(picks, again, strict=True))
    assert torch.equal(weights, before)


@quick
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), SEEDS)
def test_the_papers_rule_in_the_fourier_domain(p, n1, n2, seed):
    """Norms of columns, not their squares, summed over all frequencies; then rows on those columns."""
    stack = random_stack(seed, p, n1, n2)
    rank = 1 + seed % min(n1, n2)
    size = np.abs(np.fft.fft(stack.astype(np.float64), axis=0))[: p // 2 + 1]
    expected_columns = largest(np.linalg.norm(size, axis=1).sum(axis=0), rank)
    expected_rows = largest(np.linalg.norm(size[:, :, expected_columns], axis=2).sum(axis=0), rank)
    rows, columns = select_by_norm(torch.from_numpy(stack), Choice(rank, "dft"))
    np.testing.assert_array_equal(columns.numpy(), expected_columns)
    np.testing.assert_array_equal(rows.numpy(), expected_rows)


@quick
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.sampled_from(TRANSFORMS), SEEDS)
def test_squared_norms_are_the_same_in_every_domain(p, n1, n2, transform, seed):
    stack = random_stack(seed, p, n1, n2)
    rank = 1 + seed % min(n1, n2)
    energy = np.abs(np.fft.fft(stack.astype(np.float64), axis=0)) ** 2
    expected_columns = largest(energy.sum(axis=(0, 1)), rank)
    expected_rows = largest(energy[:, :, expected_columns].sum(axis=(0, 2)), rank)
    rows, columns = SELECTIONS["squared-norm"](torch.from_numpy(stack), Choice(rank, transform))
    np.testing.assert_array_equal(columns.numpy(), expected_columns)
    np.testing.assert_array_equal(rows.numpy(), expected_rows)


def test_the_papers_rule_by_hand():
    """Two slices. Their sum and difference are the two frequencies; the columns' norms there are

        frequency 0: [5, 3, 0]     frequency 1: [0, 3, 8]      sum: [5, 6, 8]

    so columns 1 and 2 are taken. On these the rows' norms are 3 + 3 and 0 + 8: row 1, then row 0. In the
    slices themselves (the identity) the columns' norms are [2.5 + 2.5, 3 + 0, 4 + 4]: columns 0 and 2.
    """
    zero, one = (
        torch.tensor([[4.0, 3.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
        torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, 8.0], [0.0, 0.0, 0.0]]),
    )
    stack = torch.stack([(zero + one) / 2, (zero - one) / 2])
    assert [index.tolist() for index in select_by_norm(stack, Choice(2, "dft"))] == [[0, 1], [1, 2]]
    assert [index.tolist() for index in select_by_norm(stack, Choice(1, "dft"))] == [[1], [2]]
    assert [index.tolist() for index in select_by_norm(stack, Choice(2, "identity"))] == [[0, 1], [0, 2]]
    # Squared, [25, 18, 64]: here the two rules differ.
    assert [index.tolist() for index in SELECTIONS["squared-norm"](stack, Choice(2))] == [[0, 1], [0, 2]]


def test_indices_are_sorted_int64_and_ties_go_to_the_lower_index():
    for name in ("norm", "squared-norm"):
        rows, columns = SELECTIONS[name](torch.ones(2, 5, 4), Choice(3))
        assert rows.dtype == columns.dtype == torch.int64
        assert rows.tolist() == columns.tolist() == [0, 1, 2]


def test_bfloat16_weights_are_compared_in_float64():
    stack = torch.tensor([[[1.0, 3.0, 2.0], [0.0, 1.0, 5.0]]], dtype=torch.bfloat16)
    assert [index.tolist() for index in SELECTIONS["norm"](stack, Choice(1))] == [[1], [2]]


def test_inverse_norms_prefer_what_is_small():
    """First draws in proportion to the inverse squared norms; 2000 of them, four standard deviations."""
    lengths = np.array([1.0, 2.0, 4.0, 0.5])
    stack = torch.from_numpy(np.diag(lengths)[None])
    draws = 2000
    counts = np.zeros((2, 4))
    for seed in range(draws):
        for side, index in enumerate(SELECTIONS["inverse-norm"](stack, Choice(1, seed=seed))):
            counts[side, int(index)] += 1
    expected = lengths**-2 / (lengths**-2).sum()
    bound = 4 * np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(counts / draws - expected) <= bound).all()


def test_inverse_norms_leave_empty_rows_and_columns_to_the_last():
    stack = torch.zeros(1, 5, 4)
    stack[0, [1, 3]] = torch.tensor([[1e-20, 2.0, 0.0, 3.0], [4e-20, 1.0, 0.0, 1.0]])
    for seed in range(20):
        rows, columns = SELECTIONS["inverse-norm"](stack, Choice(2, seed=seed))
        assert (rows.tolist(), columns.tolist()) == ([1, 3], [1, 3])
        rows, columns = SELECTIONS["inverse-norm"](stack, Choice(4, seed=seed))
        assert len(rows) == len(columns) == 4


@quick
@given(st.integers(1, 4), st.integers(2, 9), st.integers(2, 9), SEEDS)
def test_leverage_scores_against_the_singular_vectors(p, n1, n2, seed):
    stack = random_stack(seed, p, n1, n2).astype(np.float64)
    rank = 1 + seed % min(n1, n2)
    *_, right = np.linalg.svd(stack.reshape(p * n1, n2))
    *_, left = np.linalg.svd(stack.transpose(0, 2, 1).reshape(p * n2, n1))
    rows, columns = SELECTIONS["leverage"](torch.from_numpy(stack), Choice(rank))
    for found, vectors in ((columns, right), (rows, left)):
        scores = np.sum(vectors[:rank] ** 2, axis=0)
        assert scores[found.numpy()].sum() == pytest.approx(np.sort(scores)[::-1][:rank].sum(), abs=1e-9)


def test_random_indices_depend_on_the_seed_alone():
    stack = torch.ones(2, 40, 30)
    picks = [
        SELECTIONS["random"](stack * scale, Choice(5, seed=seed)) for scale, seed in ((1, 0), (3, 0), (1, 1))
    ]
    assert all(torch.equal(a, b) for a, b in zip(picks[0], picks[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(picks[0], picks[2], strict=True))
    counts = np.zeros(40)
    for seed in range(1000):
        counts[SELECTIONS["random"](stack, Choice(5, seed=seed))[0].numpy()] += 1
    assert (np.abs(counts - 125) < 5 * np.sqrt(125)).all()


def captured(stack, gradient, rows, columns):
    """Energy of the gradient between the spans of the chosen columns and rows, by pseudo-inverses."""
    total = 0.0
    for weight, own in zip(stack, gradient, strict=True):
        left, right = weight[:, columns], weight[rows]
        total += np.linalg.norm(left @ np.linalg.pinv(left) @ own @ np.linalg.pinv(right) @ right) ** 2
    return total


@pytest.mark.parametrize("p", [1, 3])
def test_the_gradient_rule_finds_what_the_gradient_is_made_of(p):
    """A gradient made of three columns and three rows of the weights: these are found, all energy is held."""
    generator = np.random.default_rng(0)
    stack = generator.normal(size=(p, 24, 20))
    rows, columns = [2, 9, 17], [0, 5, 13]
    gradient = stack[:, :, columns] @ generator.normal(size=(p, 3, 3)) @ stack[:, rows, :]
    choice = Choice(3, "identity", 0, torch.from_numpy(gradient))
    found = [index.tolist() for index in select_by_directions(torch.from_numpy(stack), choice)]
    assert found == [rows, columns]
    assert captured(stack, gradient, *found) == pytest.approx(np.linalg.norm(gradient) ** 2)


@pytest.mark.parametrize("seed", range(5))
def test_the_gradient_rule_holds_more_than_the_others(seed):
    """A planted gradient with noise: more energy than any rule that does not look at it, over five seeds."""
    generator = np.random.default_rng(seed)
    stack = generator.normal(size=(2, 32, 24))
    planted = stack[:, :, [1, 7, 11, 20]] @ generator.normal(size=(2, 4, 4)) @ stack[:, [3, 4, 25, 30], :]
    noise = generator.normal(size=planted.shape)
    gradient = planted + 0.3 * noise * np.linalg.norm(planted) / np.linalg.norm(noise)
    weights = torch.from_numpy(stack)
    choice = Choice(4, "identity", seed, torch.from_numpy(gradient))
    energies = {
        name: captured(stack, gradient, *(index.numpy() for index in rule(weights, choice)))
        for name, rule in SELECTIONS.items()
    }
    best = energies.pop("gradient")
    assert energies.pop("update") == best
    assert best > 0.85 * np.linalg.norm(gradient) ** 2
    assert best > 2 * max(energies.values())


def test_the_gradient_rule_is_greedy_by_added_energy():
    """Column by column against a search by least squares."""
    generator = np.random.default_rng(4)
    weight, gradient = generator.normal(size=(2, 1, 10, 8))
    taken = []
    for _ in range(3):
        held = {}
        for column in set(range(8)) - set(taken):
            basis = weight[0][:, [*taken, column]]
            held[column] = np.linalg.norm(basis @ np.linalg.lstsq(basis, gradient[0])[0])
        taken.append(max(held, key=held.get))
    choice = Choice(3, "identity", 0, torch.from_numpy(gradient))
    assert select_by_directions(torch.from_numpy(weight), choice)[1].tolist() == sorted(taken)


def test_the_gradient_rule_passes_copies_by():
    """A second copy of a column adds nothing to the span, however well it is aligned."""
    generator = np.random.default_rng(2)
    stack = generator.normal(size=(1, 8, 6))
    stack[0, :, 3] = 2 * stack[0, :, 0]
    gradient = np.outer(stack[0, :, 0], generator.normal(size=6))[None]
    choice = Choice(2, "identity", 0, torch.from_numpy(gradient))
    columns = select_by_directions(torch.from_numpy(stack), choice)[1].tolist()
    assert len({0, 3} & set(columns)) == 1


def test_the_gradient_rule_needs_a_gradient():
    with pytest.raises(ValueError, match="needs its directions"):
        select_by_directions(torch.ones(1, 3, 3), Choice(1))


@quick
@given(
    name=st.sampled_from(["norm", "squared-norm", "leverage", "gradient", "update"]),
    shape=st.tuples(st.integers(1, 4), st.integers(2, 8), st.integers(2, 8)),
    transform=st.sampled_from(TRANSFORMS),
    scale=st.sampled_from([1e-18, 1e-3, 1e18]),
    data=st.data(),
    seed=SEEDS,
)
def test_rows_and_columns_do_not_depend_on_order_and_scale(name, shape, transform, scale, data, seed):
    """A base whose features change places has its rows and columns at the new places.

    Below the full rank: there the last one may be any, all span what is left.
    """
    n1, n2 = shape[1:]
    rank = data.draw(st.integers(1, min(n1, n2) - 1))
    weights, directions = (torch.from_numpy(random_stack(seed + n, *shape)) for n in range(2))
    order = np.random.default_rng(seed + 2)
    lines, cols = (torch.from_numpy(order.permutation(size)) for size in (n1, n2))

    def picks(weights, directions):
        return SELECTIONS[name](weights, Choice(rank, transform, 0, directions))

    def moved(stack):
        return stack[:, lines][:, :, cols]

    rows, columns = picks(weights, directions)
    new_rows, new_columns = picks(moved(weights), moved(directions))
    assert sorted(lines[new_rows].tolist()) == rows.tolist()
    assert sorted(cols[new_columns].tolist()) == columns.tolist()
    for pair in ((weights * scale, directions), (weights, directions * scale)):
        again = picks(*pair)
        assert (again[0].tolist(), again[1].tolist()) == (rows.tolist(), columns.tolist())
