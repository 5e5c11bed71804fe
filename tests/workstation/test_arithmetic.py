"""Adapter arithmetic against dense updates built slice by slice."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_tcur.arithmetic import combine, frozen_vectors, move_to_base, reduce_rank, refit
from edge_tcur_runtime.errors import BaseMismatchError, ConfigError, IncompatibleError
from edge_tcur_runtime.formats.adapter import Adapter, AdapterHeader
from edge_tcur_runtime.formats.factors import Factors, GroupSpec, SketchFactors
from edge_tcur_runtime.transform import structure

N3, N1, N2, RANK = 6, 9, 7, 4
COUPLINGS = {"all": (1, "dft"), "layer": (2, "dct"), "none": (6, "identity")}


def weights(seed=0):
    return np.random.default_rng(seed).normal(size=(N3, N1, N2))


def index_factors(seed, blocks, *, pick=0):
    generator, chooser = np.random.default_rng(seed), np.random.default_rng(pick)
    rows = np.stack([np.sort(chooser.permutation(N1)[:RANK]) for _ in range(blocks)]).astype(np.int32)
    cols = np.stack([np.sort(chooser.permutation(N2)[:RANK]) for _ in range(blocks)]).astype(np.int32)
    return Factors(generator.normal(size=(N3, RANK, RANK)).astype(np.float32), rows, cols)


def sketch_factors(seed, *, pick=0):
    generator, chooser = np.random.default_rng(seed), np.random.default_rng(pick)
    left = chooser.integers(-1, 2, size=(N3, N1, RANK)).astype(np.int8)
    right = chooser.integers(-1, 2, size=(N3, RANK, N2)).astype(np.int8)
    return SketchFactors.pack(generator.normal(size=(N3, RANK, RANK)).astype(np.float32), left, right)


def dense(factors, transform, stack):
    """The update [n3, n1, n2] by the structure constants, block by block."""
    columns, rows = frozen_vectors(factors, stack)
    size = N3 // factors.blocks
    constants = structure(transform, size)
    result = np.zeros((N3, N1, N2))
    for start in range(0, N3, size):
        part = slice(start, start + size)
        result[part] = np.einsum(
            "lijk,iar,jrs,ksb->lab",
            constants,
            columns[part],
            factors.core[part].astype(np.float64),
            rows[part],
        )
    return result


def adapter(factors, *, coupling="all", transform="dft", frame="orthonormal", digest="sha256:a", extras=None):
    spec = GroupSpec(tuple(f"w{n}" for n in range(N3)), N1, N2)
    header = AdapterHeader(digest, {"g": spec}, "text-classification", ("a", "b"), coupling, transform, frame)
    return Adapter(header, {"g": factors}, extras or {})


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=4), st.sampled_from(sorted(COUPLINGS)))
def test_the_update_of_a_combination_is_the_combination_of_the_updates(scales, coupling):
    blocks, transform = COUPLINGS[coupling]
    stack, parts = weights(), [index_factors(seed, blocks) for seed in range(len(scales))]
    result = combine([adapter(part, coupling=coupling, transform=transform) for part in parts], scales)
    expected = sum(w * dense(part, transform, stack) for w, part in zip(scales, parts, strict=True))
    np.testing.assert_allclose(dense(result.factors["g"], transform, stack), expected, atol=2e-4)


def test_heads_are_averaged_and_never_added():
    one, two = (
        adapter(index_factors(seed, 1), extras={"head.weight": np.full((2, 3), seed, np.float32)})
        for seed in (1, 3)
    )
    mean = combine([one, two], [0.5, 0.5])
    np.testing.assert_array_equal(mean.extras["head.weight"], np.full((2, 3), 2, np.float32))
    with pytest.raises(ConfigError, match="sum to 2"):
        combine([one, two], [1, 1])
    total = combine([one, two], [1, 1], extras_from=1)
    np.testing.assert_array_equal(total.extras["head.weight"], two.extras["head.weight"])


@pytest.mark.parametrize(
    ("other", "error", "text"),
    [
        (adapter(index_factors(1, 1), digest="sha256:b"), BaseMismatchError, "sha256:a.*sha256:b"),
        (adapter(index_factors(1, 1, pick=9)), IncompatibleError, "other rows"),
        (adapter(index_factors(1, 1), transform="dct"), IncompatibleError, "transform"),
        (
            adapter(index_factors(1, 1), extras={"h": np.zeros(2, np.float32)}),
            IncompatibleError,
            "other heads",
        ),
    ],
)
def test_adapters_that_do_not_belong_together_are_refused(other, error, text):
    with pytest.raises(error, match=text):
        combine([adapter(index_factors(0, 1)), other], [0.5, 0.5])


@pytest.mark.parametrize("scales", [[], [float("nan")], [1.0, 2.0]])
def test_weights_that_fit_no_adapters_are_refused(scales):
    with pytest.raises(ConfigError):
        combine([adapter(index_factors(0, 1))], scales)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_migrating_to_the_same_base_changes_nothing(coupling):
    blocks, transform = COUPLINGS[coupling]
    stack, factors = weights(), index_factors(3, blocks)
    fit = move_to_base(factors, transform, stack, stack)
    np.testing.assert_allclose(fit.factors.core, factors.core, atol=1e-4)
    assert fit.residual < 1e-6


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_migrating_is_the_least_squares_fit(coupling):
    """No other core over the new rows and columns comes nearer, and the residual says how near it is."""
    blocks, transform = COUPLINGS[coupling]
    old, factors = weights(), index_factors(3, blocks)
    new = old + 0.05 * weights(1)
    fit = move_to_base(factors, transform, old, new)
    target = dense(factors, transform, old)
    distance = np.linalg.norm(target - dense(fit.factors, transform, new))
    assert fit.residual == pytest.approx(distance / np.linalg.norm(target), rel=1e-3)
    assert distance < np.linalg.norm(target - dense(factors, transform, new))
    generator = np.random.default_rng(5)
    for _ in range(20):
        nudge = 1e-2 * generator.normal(size=fit.factors.core.shape).astype(np.float32)
        other = fit.factors.with_core(fit.factors.core + nudge)
        assert np.linalg.norm(target - dense(other, transform, new)) > distance


def test_a_sketch_migrates_as_it_is():
    factors = sketch_factors(0)
    fit = move_to_base(factors, "identity", weights(), weights(1))
    assert fit.factors is factors
    assert fit.residual == 0.0


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_the_same_rank_keeps_everything(coupling):
    blocks, transform = COUPLINGS[coupling]
    stack, factors = weights(), index_factors(3, blocks)
    fit = reduce_rank(factors, transform, stack, RANK)
    np.testing.assert_array_equal(fit.factors.rows, factors.rows)
    np.testing.assert_allclose(fit.factors.core, factors.core, atol=1e-4)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_a_lower_rank_finds_the_rows_and_columns_that_matter(coupling):
    """A core that uses two of its rows and columns alone is carried over whole."""
    blocks, transform = COUPLINGS[coupling]
    stack, factors = weights(), index_factors(3, blocks)
    core = np.zeros_like(factors.core)
    core[:, np.ix_([1, 3], [0, 2])[0], np.ix_([1, 3], [0, 2])[1]] = 1 + np.arange(4).reshape(2, 2)
    fit = reduce_rank(factors.with_core(core), transform, stack, 2)
    np.testing.assert_array_equal(fit.factors.cols, factors.cols[:, [1, 3]])
    np.testing.assert_array_equal(fit.factors.rows, factors.rows[:, [0, 2]])
    np.testing.assert_allclose(
        dense(fit.factors, transform, stack), dense(factors.with_core(core), transform, stack), atol=1e-3
    )


def test_a_sketch_loses_vectors_with_a_lower_rank():
    fit = reduce_rank(sketch_factors(1), "identity", weights(), 2)
    assert fit.factors.left.shape == (N3, N1, 2)
    assert fit.factors.right.shape == (N3, 2, N2)
    assert 0 < fit.residual < 1


@pytest.mark.parametrize("rank", [0, RANK + 1])
def test_a_rank_out_of_range_is_refused(rank):
    with pytest.raises(ConfigError, match="expected 1 to 4"):
        reduce_rank(index_factors(0, 1), "dft", weights(), rank)


def test_refitting_names_the_new_base():
    stack = weights()
    fits = {"g": move_to_base(index_factors(0, 1), "dft", stack, stack)}
    assert refit(adapter(index_factors(0, 1)), fits, "sha256:new").header.base_digest == "sha256:new"


def test_weights_beyond_float32_are_refused():
    one = adapter(index_factors(1, 1))
    with pytest.raises(ConfigError, match="no float32 holds"):
        combine([one, one], [1e300, -1e299])
    assert not combine([one, one], [1e300, -1e300]).factors["g"].core.any()


@pytest.mark.parametrize("place", [-1, 2])
def test_the_adapter_whose_head_is_taken_is_one_of_them(place):
    one = adapter(index_factors(1, 1))
    with pytest.raises(ConfigError, match="expected 0 to 1"):
        combine([one, one], [1, 1], extras_from=place)


@settings(max_examples=20)
@given(st.integers(0, 2**16), st.sampled_from(sorted(COUPLINGS)))
def test_sums_may_be_taken_in_any_order_and_averages_are_those_of_the_updates(seed, coupling):
    blocks, transform = COUPLINGS[coupling]
    three = [
        adapter(index_factors(seed + n, blocks), coupling=coupling, transform=transform) for n in range(3)
    ]

    def core(found):
        return found.factors["g"].core

    first = combine([combine(three[:2], [1, 1]), three[2]], [1, 1])
    last = combine([three[0], combine(three[1:], [1, 1])], [1, 1])
    np.testing.assert_allclose(core(first), core(last), atol=1e-5)
    np.testing.assert_allclose(core(first), core(combine(three[::-1], [1, 1, 1])), atol=1e-5)
    mean, stack = combine(three, [1 / 3] * 3), weights(seed)
    updates = [dense(one.factors["g"], transform, stack) for one in three]
    np.testing.assert_allclose(
        dense(mean.factors["g"], transform, stack), np.mean(updates, axis=0), rtol=1e-4, atol=1e-3
    )


@settings(max_examples=30)
@given(st.integers(0, 2**16), st.sampled_from(sorted(COUPLINGS)))
def test_a_higher_rank_never_loses_more(seed, coupling):
    blocks, transform = COUPLINGS[coupling]
    factors = index_factors(seed, blocks, pick=seed)
    lost = [reduce_rank(factors, transform, weights(seed), rank).residual for rank in range(1, RANK + 1)]
    assert all(later <= earlier + 1e-6 for earlier, later in pairwise(lost))
    assert lost[-1] < 1e-5


@pytest.mark.parametrize("coupling", sorted(COUPLINGS))
def test_columns_that_moved_in_the_new_base_are_found_at_their_indices(coupling):
    """Where the chosen rows and columns stay and the others change places, the update is kept on them."""
    blocks, transform = COUPLINGS[coupling]
    old, factors = weights(1), index_factors(2, blocks)
    new = old.copy()
    others = np.setdiff1d(np.arange(N2), factors.cols)
    new[:, :, others] = old[:, :, np.roll(others, 1)]
    fit = move_to_base(factors, transform, old, new)
    moved, before = dense(fit.factors, transform, new), dense(factors, transform, old)
    assert np.linalg.norm(moved - before) / np.linalg.norm(before) == pytest.approx(fit.residual, abs=1e-6)
    assert 0 <= fit.residual < 1 + 1e-9
