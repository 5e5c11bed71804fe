"""The core nearest to an update: exact where it is in reach, and the best where it is not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_tcur.method.fit import fit_core
from edge_tcur_runtime.transform import TRANSFORMS, from_domain, to_domain


def product(transform, blocks, *parts):
    """The product of stacks [n3, ...] in the algebra of the transform."""
    left, *others = (to_domain(transform, part.reshape(blocks, -1, *part.shape[1:])) for part in parts)
    for other in others:
        left = left @ other
    size = len(parts[0]) // blocks
    return from_domain(transform, left, size).reshape(-1, parts[0].shape[1], parts[-1].shape[2])


@given(
    transform=st.sampled_from(sorted(TRANSFORMS)),
    blocks=st.integers(1, 3),
    size=st.integers(1, 3),
    rank=st.integers(1, 4),
    seed=st.integers(0, 10**6),
)
def test_the_nearest_core(transform, blocks, size, rank, seed):
    generator = np.random.default_rng(seed)
    n3 = blocks * size
    columns, rows = generator.normal(size=(n3, 7, rank)), generator.normal(size=(n3, rank, 5))
    core = generator.normal(size=(n3, rank, rank))
    options = {"transform": transform, "blocks": blocks}
    within = product(transform, blocks, columns, core, rows)
    np.testing.assert_allclose(fit_core(within, columns, rows, **options), core, atol=1e-8)
    update = within + generator.normal(size=within.shape)
    best = fit_core(update, columns, rows, **options)

    def error(value):
        return np.linalg.norm(update - product(transform, blocks, columns, value, rows))

    assert best.shape == core.shape
    for _ in range(3):
        assert error(best) <= error(best + 0.01 * generator.normal(size=core.shape)) + 1e-12


def test_copies_among_the_columns_share_the_update():
    generator = np.random.default_rng(0)
    columns, rows = generator.normal(size=(1, 6, 1)), generator.normal(size=(1, 2, 5))
    update = columns @ np.ones((1, 1, 2)) @ rows
    core = fit_core(update, np.repeat(columns, 2, axis=2), rows, transform="identity", blocks=1)
    assert core == pytest.approx(np.full((1, 2, 2), 0.5))


@given(
    transform=st.sampled_from(sorted(TRANSFORMS)),
    blocks=st.integers(1, 3),
    size=st.integers(1, 3),
    copies=st.sampled_from(["columns", "rows", "both", "empty"]),
    seed=st.integers(0, 10**6),
)
def test_without_full_rank_the_core_is_still_the_nearest_and_fitting_again_changes_nothing(
    transform, blocks, size, copies, seed
):
    generator = np.random.default_rng(seed)
    n3, options = blocks * size, {"transform": transform, "blocks": blocks}
    columns, rows = generator.normal(size=(n3, 7, 3)), generator.normal(size=(n3, 3, 5))
    if copies in ("columns", "both"):
        columns[:, :, 2] = columns[:, :, 0]
    if copies in ("rows", "both"):
        rows[:, 1] = -2 * rows[:, 0]
    if copies == "empty":
        columns[:, :, 1], rows[:, 1] = 0, 0
    update = generator.normal(size=(n3, 7, 5))
    best = fit_core(update, columns, rows, **options)
    assert np.abs(best).max() < 1e3  # the smallest of those that are nearest
    reached = product(transform, blocks, columns, best, rows)
    error = np.linalg.norm(update - reached)
    for _ in range(5):
        other = best + 1e-2 * generator.normal(size=best.shape)
        assert np.linalg.norm(update - product(transform, blocks, columns, other, rows)) >= error - 1e-9
    np.testing.assert_allclose(fit_core(reached, columns, rows, **options), best, atol=1e-7)
