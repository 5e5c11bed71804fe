"""Ternary sketches of a gradient: the best rounding, of the leading directions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edge_tcur.method.sketch import round_ternary, sketch_gradient, sketch_update

quick = settings(deadline=None, max_examples=60, derandomize=True)


def cosine(a, b):
    length = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / length) if length else 0.0


@quick
@given(arrays.arrays(np.float64, st.integers(1, 7), elements=st.floats(-4, 4, allow_subnormal=False)))
def test_no_ternary_vector_is_nearer(vector):
    """Against all 3^n of them; the search over k alone is therefore enough."""
    found = round_ternary(torch.from_numpy(vector)[:, None])
    assert found.dtype == torch.int8
    assert found.shape == (len(vector), 1)
    best = max(cosine(vector, np.array(signs)) for signs in itertools.product((-1, 0, 1), repeat=len(vector)))
    assert cosine(vector, found[:, 0].numpy().astype(float)) == pytest.approx(best, abs=1e-9)


@quick
@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_columns_are_rounded_each_on_its_own(n, r, seed):
    vectors = np.random.default_rng(seed).standard_cauchy(size=(n, r))
    found = round_ternary(torch.from_numpy(vectors)).numpy()
    for column in range(r):
        sizes = np.sort(np.abs(vectors[:, column]))[::-1]
        best = max(sizes[:k].sum() / np.sqrt(k) for k in range(1, n + 1)) / np.linalg.norm(sizes)
        assert cosine(vectors[:, column], found[:, column].astype(float)) == pytest.approx(best)
        kept = found[:, column] != 0
        assert (found[kept, column] == np.sign(vectors[kept, column])).all()


def test_an_empty_column_stays_empty():
    assert not round_ternary(torch.zeros(5, 2)).any()


@pytest.mark.parametrize(("n1", "n2", "rank"), [(7, 5, 3), (5, 7, 5), (1, 4, 1), (6, 1, 1)])
def test_sketches_are_of_the_leading_singular_vectors(n1, n2, rank):
    gradient = np.random.default_rng(n1).normal(size=(n1, n2))
    left, right = sketch_gradient(torch.from_numpy(gradient), rank)
    assert (left.shape, right.shape) == ((n1, rank), (rank, n2))
    assert left.dtype == right.dtype == torch.int8
    u, _, v = np.linalg.svd(gradient, full_matrices=False)
    for position in range(rank):
        expected = [
            round_ternary(torch.from_numpy(vector[:, None].copy()))[:, 0]
            for vector in (u[:, position], v[position])
        ]
        found = (left[:, position], right[position])
        # A pair's sign is free: u s v = (-u) s (-v); here the largest entry of u is positive.
        sign = int(np.sign(u[np.abs(u[:, position]).argmax(), position]))
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, sign * other)
    assert right.is_contiguous()


def held(matrix, left, right):
    """Part of the energy of a matrix between the spans of the vectors."""
    spans = (np.linalg.qr(np.asarray(value, np.float64))[0] for value in (left, right.T))
    u, v = spans
    return np.linalg.norm(u.T @ matrix @ v) ** 2 / np.linalg.norm(matrix) ** 2


@pytest.mark.parametrize(("n1", "n2", "rank"), [(7, 5, 3), (5, 7, 5), (1, 4, 1), (6, 1, 1)])
def test_the_first_vectors_are_those_of_the_leading_direction(n1, n2, rank):
    gradient = np.random.default_rng(n1).normal(size=(n1, n2))
    left, right = sketch_update(torch.from_numpy(gradient), rank)
    assert (left.shape, right.shape) == ((n1, rank), (rank, n2))
    assert left.dtype == right.dtype == torch.int8
    assert left.is_contiguous()
    assert right.is_contiguous()
    first = round_ternary(torch.from_numpy(np.linalg.svd(gradient)[0][:, :1].copy()))
    assert torch.equal(left[:, :1], first) or torch.equal(left[:, :1], -first)
    for vector in (*left.T, *right):
        assert vector[vector.nonzero()[0]] == 1


@pytest.mark.parametrize("rank", [4, 8, 16])
@pytest.mark.parametrize("seed", range(3))
def test_later_vectors_hold_what_rounding_lost(rank, seed):
    """More than the roundings of the leading singular vectors, and more with every vector."""
    generator = np.random.default_rng(seed)
    update = generator.normal(size=(64, 16)) * np.geomspace(1, 0.05, 16) @ generator.normal(size=(16, 96))
    u, _, v = np.linalg.svd(update, full_matrices=False)
    plain = held(update, round_ternary(torch.tensor(u[:, :rank])), round_ternary(torch.tensor(v[:rank].T)).T)
    left, right = sketch_update(torch.from_numpy(update), rank)
    parts = [held(update, left[:, :count], right[:count]) for count in range(1, rank + 1)]
    assert parts == sorted(parts)
    assert parts[-1] > plain
    assert np.linalg.cond(left.double() / left.double().norm(dim=0)) < 5


@pytest.mark.parametrize("sketch", [sketch_gradient, sketch_update])
def test_a_sketch_of_a_ternary_matrix_is_exact(sketch):
    """Orthogonal ternary vectors are their own sketches: the core between them holds the whole gradient."""
    left = np.array([[1, 0], [1, 0], [0, 1], [0, -1], [0, 0]])
    right = np.array([[1, -1, 0, 0], [0, 0, 1, 0]])
    gradient = torch.from_numpy(left @ np.diag([5.0, 2.0]) @ right)
    found_left, found_right = sketch(gradient.float(), 2)
    for position in range(2):  # signs are free
        found = np.outer(found_left[:, position], found_right[position])
        np.testing.assert_array_equal(abs(found), abs(np.outer(left[:, position], right[position])))
    assert held(gradient.numpy(), found_left, found_right) == pytest.approx(1)


def test_a_sketch_does_not_depend_on_the_signs_that_the_driver_chose(monkeypatch):
    gradient = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 4)))
    expected = sketch_update(gradient, 3)
    eigh = torch.linalg.eigh

    def other(*arguments):
        values, vectors = eigh(*arguments)
        return values, -vectors

    monkeypatch.setattr(torch.linalg, "eigh", other)
    for one, two in zip(expected, sketch_update(gradient, 3), strict=True):
        assert torch.equal(one, two)


def test_a_sketch_of_a_gradient_does_not_depend_on_the_sign_that_the_driver_chose(monkeypatch):
    gradient = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 4)))
    expected = sketch_gradient(gradient, 3)
    svd = torch.linalg.svd

    def other(*arguments, **options):
        left, sizes, right = svd(*arguments, **options)
        return -left, sizes, -right

    monkeypatch.setattr(torch.linalg, "svd", other)
    for one, two in zip(expected, sketch_gradient(gradient, 3), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("sketch", [sketch_gradient, sketch_update])
def test_a_matrix_of_zeros_gives_valid_sketches(sketch):
    left, right = sketch(torch.zeros(4, 3), 2)
    for value in (left, right):
        assert set(value.unique().tolist()) <= {-1, 0, 1}
