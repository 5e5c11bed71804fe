"""Frames without torch: what `tests/method` proves against torch, proved here with numpy alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_tcur_runtime.frame import Frame, build_frame, t_product, t_transpose

SHAPES = st.tuples(st.integers(1, 7), st.integers(1, 4), st.integers(0, 5), st.integers(0, 5))


@st.composite
def factors(draw):
    """Columns [n3, n1, r], rows [n3, r, n2] and a core [n3, r, r] of full rank."""
    n3, rank, more1, more2 = draw(SHAPES)
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shapes = (n3, rank + more1, rank), (n3, rank, rank + more2), (n3, rank, rank)
    return tuple(generator.normal(size=shape) for shape in shapes)


def slow_product(a, b):
    """Definition 3.1 of Kilmer and Martin 2011, as it is written."""
    n3 = len(a)
    out = np.zeros((n3, a.shape[1], b.shape[2]))
    for i in range(n3):
        for j in range(n3):
            out[(i + j) % n3] += a[i] @ b[j]
    return out


@settings(deadline=None)
@given(factors())
def test_the_t_product_is_the_circular_convolution_of_its_definition(parts):
    columns, rows, core = parts
    np.testing.assert_allclose(t_product(columns, core), slow_product(columns, core), atol=1e-10)
    twice = t_product(t_product(columns, core), rows)
    np.testing.assert_allclose(twice, slow_product(columns, slow_product(core, rows)), atol=1e-9)


@settings(deadline=None)
@given(factors())
def test_the_transpose_turns_products_around_and_undoes_itself(parts):
    columns, _, core = parts
    left = t_transpose(t_product(columns, core))
    np.testing.assert_allclose(left, t_product(t_transpose(core), t_transpose(columns)), atol=1e-10)
    np.testing.assert_array_equal(t_transpose(t_transpose(columns)), columns)


@settings(deadline=None)
@given(factors(), st.sampled_from(["raw", "orthonormal"]))
def test_a_core_comes_back_through_its_frame(parts, kind):
    columns, rows, core = parts
    frame = build_frame(kind, columns, rows)
    scale = np.abs(core).max()
    # The Gram matrix squares the condition of the columns; random ones may be badly conditioned.
    np.testing.assert_allclose(frame.to_raw(frame.from_raw(core)), core, atol=1e-4 * scale)
    np.testing.assert_allclose(frame.from_raw(frame.to_raw(core)), core, atol=1e-4 * scale)


@settings(deadline=None)
@given(factors(), st.sampled_from(["raw", "orthonormal"]), st.integers(0, 2**32 - 1))
def test_the_pulled_back_gradient_agrees_with_finite_differences(parts, kind, seed):
    """Of a function of the raw core, along a random direction of the frame's core."""
    columns, rows, core = parts
    frame = build_frame(kind, columns, rows)
    generator = np.random.default_rng(seed)
    target, direction = generator.normal(size=core.shape), generator.normal(size=core.shape)

    def loss(value):
        return float(np.square(frame.to_raw(value) - target).sum())

    gradient = frame.pull_back(2 * (frame.to_raw(core) - target))
    step = 1e-4
    difference = (loss(core + step * direction) - loss(core - step * direction)) / (2 * step)
    expected = float((gradient * direction).sum())
    scale = float(np.linalg.norm(gradient) * np.linalg.norm(direction)) + abs(loss(core)) * 1e-6
    assert difference == pytest.approx(expected, abs=1e-5 * scale + 1e-9)


@settings(deadline=None)
@given(factors())
def test_columns_and_rows_are_orthonormal_in_their_frame(parts):
    columns, rows, _ = parts
    frame = build_frame("orthonormal", columns, rows)
    rank = columns.shape[2]
    identity = np.zeros((len(columns), rank, rank))
    identity[0] = np.eye(rank)
    c, r = t_product(columns, frame.left), t_product(frame.right, rows)
    # The ridge of 1e-9 of the largest frequency is felt where a frequency is all but empty.
    weakest = min(
        np.linalg.svd(np.fft.rfft(part, axis=0), compute_uv=False).min() for part in (columns, rows)
    )
    strongest = max(np.abs(np.fft.rfft(part, axis=0)).max() for part in (columns, rows))
    tolerance = 1e-6 * max(1.0, (strongest / weakest) ** 2 * 1e-2)
    np.testing.assert_allclose(t_product(t_transpose(c), c), identity, atol=tolerance)
    np.testing.assert_allclose(t_product(r, t_transpose(r)), identity, atol=tolerance)


def test_the_scale_of_the_base_does_not_reach_the_frames_step():
    """The update C * U * R of a unit step in the frame is as long whatever the scale of C and R."""
    generator = np.random.default_rng(0)
    columns, rows = generator.normal(size=(4, 9, 3)), generator.normal(size=(4, 3, 7))
    step = generator.normal(size=(4, 3, 3))
    lengths = []
    for scale in (1e-3, 1.0, 1e3):
        frame = build_frame("orthonormal", scale * columns, rows / scale)
        lengths.append(
            np.linalg.norm(t_product(t_product(scale * columns, frame.to_raw(step)), rows / scale))
        )
    np.testing.assert_allclose(lengths, np.linalg.norm(step), rtol=1e-6)


@pytest.mark.parametrize("kind", ["zero", "equal columns", "one empty frequency"])
def test_a_base_without_full_rank_still_has_a_frame(kind):
    generator = np.random.default_rng(0)
    columns, rows = generator.normal(size=(4, 9, 3)), generator.normal(size=(4, 3, 7))
    if kind == "zero":
        columns[:] = 0
    elif kind == "equal columns":
        columns[:, :, 1] = columns[:, :, 0]
    else:
        columns[:] = columns[0]
    frame = build_frame("orthonormal", columns, rows)
    core = generator.normal(size=(4, 3, 3))
    for value in (frame.to_raw(core), frame.from_raw(core), frame.pull_back(core)):
        assert np.isfinite(value).all()
    update = t_product(t_product(columns, frame.to_raw(core)), rows)
    assert np.linalg.norm(update) <= 1.01 * np.linalg.norm(core)


def test_the_raw_frame_changes_nothing():
    core = np.random.default_rng(0).normal(size=(3, 2, 2)).astype(np.float32)
    for value in (Frame().to_raw(core), Frame().from_raw(core), Frame().pull_back(core)):
        assert value.dtype == np.float64
        np.testing.assert_array_equal(value, core)


def test_an_unknown_frame_is_refused():
    with pytest.raises(ValueError, match="unknown frame 'skew'"):
        build_frame("skew", np.zeros((1, 2, 1)), np.zeros((1, 1, 2)))
