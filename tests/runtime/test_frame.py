"""Frames without torch: what `tests/method` proves against torch, proved here with numpy alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_tcur_runtime.frame import Frame, build_frame
from edge_tcur_runtime.transform import TRANSFORMS, from_domain, to_domain

KINDS = st.sampled_from(["raw", "orthonormal"])
SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 5), st.integers(0, 5))
CASES = [(kind, blocks) for kind in TRANSFORMS for blocks in (1, 2, 4)]


@st.composite
def algebras(draw):
    """Arguments of `build_frame` beside C and R."""
    return {
        "transform": draw(st.sampled_from(TRANSFORMS)),
        "blocks": draw(st.integers(1, 3)),
        "alpha": draw(st.sampled_from([0.25, 1.0, 8.0])),
    }


@st.composite
def factors(draw):
    """An algebra; columns [n3, n1, r], rows [n3, r, n2] and a core [n3, r, r] of full rank."""
    algebra = draw(algebras())
    size, rank, more1, more2 = draw(SHAPES)
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n3 = algebra["blocks"] * size
    shapes = (n3, rank + more1, rank), (n3, rank, rank + more2), (n3, rank, rank)
    return algebra, *(generator.normal(size=shape) for shape in shapes)


def in_domain(algebra, value):
    """Slices [n3, ...] in the transform's domain, [b, f, ...]."""
    return to_domain(algebra["transform"], value.reshape(algebra["blocks"], -1, *value.shape[1:]))


def product(algebra, *values):
    """The product of stacks of slices [n3, ...], back from the transform's domain."""
    result = in_domain(algebra, values[0])
    for value in values[1:]:
        result = result @ in_domain(algebra, value)
    found = from_domain(algebra["transform"], result, len(values[0]) // algebra["blocks"])
    return found.reshape(-1, *found.shape[2:])


def adjoint(value):
    return value.conj().swapaxes(-1, -2)


@given(factors(), KINDS)
def test_a_core_comes_back_through_its_frame(parts, kind):
    algebra, columns, rows, core = parts
    frame = build_frame(kind, columns, rows, **algebra)
    scale = np.abs(core).max()
    # The Gram matrix squares the condition of the columns; random ones may be badly conditioned.
    np.testing.assert_allclose(frame.to_raw(frame.from_raw(core)), core, atol=1e-4 * scale)
    np.testing.assert_allclose(frame.from_raw(frame.to_raw(core)), core, atol=1e-4 * scale)


@given(factors(), KINDS, st.integers(0, 2**32 - 1))
def test_the_pulled_back_gradient_agrees_with_finite_differences(parts, kind, seed):
    """Of a function of the raw core, along a random direction of the frame's core."""
    algebra, columns, rows, core = parts
    frame = build_frame(kind, columns, rows, **algebra)
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


@given(factors(), KINDS, st.integers(0, 2**32 - 1))
def test_pulling_back_is_the_adjoint_of_going_to_raw_coordinates(parts, kind, seed):
    algebra, columns, rows, core = parts
    frame = build_frame(kind, columns, rows, **algebra)
    other = np.random.default_rng(seed).normal(size=core.shape)
    raw, back = frame.to_raw(core), frame.pull_back(other)
    scale = np.linalg.norm(raw) * np.linalg.norm(other)
    assert np.vdot(raw, other) == pytest.approx(np.vdot(core, back), abs=1e-10 * scale)


@given(factors())
def test_columns_and_rows_are_orthonormal_in_their_frame(parts):
    algebra, columns, rows, _ = parts
    frame = build_frame("orthonormal", columns, rows, **algebra)
    c, r = in_domain(algebra, columns), in_domain(algebra, rows)
    # The ridge of 1e-9 of the largest frequency is felt where a frequency is all but empty.
    weakest = min(np.linalg.svd(part, compute_uv=False).min() for part in (c, r))
    strongest = max(np.abs(part).max() for part in (c, r))
    tolerance = 1e-6 * max(1.0, (strongest / weakest) ** 2 * 1e-2)
    c, r = c @ frame.left, frame.right @ r
    identity = np.broadcast_to(np.eye(c.shape[-1]), (*c.shape[:2], c.shape[-1], c.shape[-1]))
    np.testing.assert_allclose(adjoint(c) @ c, identity, atol=tolerance)
    np.testing.assert_allclose(r @ adjoint(r), identity, atol=tolerance)
    np.testing.assert_allclose(frame.left @ frame.left_inverse, identity, atol=tolerance)
    np.testing.assert_allclose(frame.right_inverse @ frame.right, identity, atol=tolerance)


@pytest.mark.parametrize(("transform", "blocks"), CASES)
def test_an_update_is_as_long_as_its_core_in_the_frame(transform, blocks):
    """Of all slices together: C * S and T * R are isometries of the algebra."""
    generator = np.random.default_rng(1)
    shapes = (8, 9, 3), (8, 3, 7), (8, 3, 3)
    columns, rows, core = (generator.normal(size=shape) for shape in shapes)
    algebra = {"transform": transform, "blocks": blocks}
    for alpha in (0.5, 1.0, 4.0):
        frame = build_frame("orthonormal", columns, rows, alpha=alpha, **algebra)
        update = product(algebra, columns, frame.to_raw(core), rows)
        assert np.linalg.norm(update) == pytest.approx(alpha * np.linalg.norm(core), rel=1e-6)


@pytest.mark.parametrize(("transform", "blocks"), CASES)
def test_blocks_have_frames_of_their_own_and_never_mix(transform, blocks):
    generator = np.random.default_rng(2)
    columns, rows = generator.normal(size=(8, 9, 3)), generator.normal(size=(8, 3, 7))
    core = generator.normal(size=(8, 3, 3))
    whole = build_frame("orthonormal", columns, rows, transform=transform, blocks=blocks, alpha=2.0)
    for block in range(blocks):
        part = slice(block * 8 // blocks, (block + 1) * 8 // blocks)
        alone = build_frame("orthonormal", columns[part], rows[part], transform=transform, alpha=2.0)
        for name in ("to_raw", "from_raw", "pull_back"):
            found = getattr(whole, name)(core)[part]
            np.testing.assert_allclose(found, getattr(alone, name)(core[part]), atol=1e-12)


@pytest.mark.parametrize("kind", ["raw", "orthonormal"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_alpha_scales_the_way_there_and_back(kind, transform):
    generator = np.random.default_rng(3)
    columns, rows = generator.normal(size=(4, 9, 3)), generator.normal(size=(4, 3, 7))
    core = generator.normal(size=(4, 3, 3))
    one, eight = (build_frame(kind, columns, rows, transform=transform, alpha=alpha) for alpha in (1.0, 8.0))
    np.testing.assert_array_equal(eight.to_raw(core), 8 * one.to_raw(core))
    np.testing.assert_array_equal(eight.pull_back(core), 8 * one.pull_back(core))
    np.testing.assert_array_equal(8 * eight.from_raw(core), one.from_raw(core))


def test_slices_alone_have_the_same_frame_under_every_transform():
    """Coupling none: a block of one slice is its own transform."""
    generator = np.random.default_rng(4)
    columns, rows = generator.normal(size=(5, 9, 3)), generator.normal(size=(5, 3, 7))
    core = generator.normal(size=(5, 3, 3))
    found = [
        build_frame("orthonormal", columns, rows, transform=transform, blocks=5).to_raw(core)
        for transform in TRANSFORMS
    ]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-12)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_scale_of_the_base_does_not_reach_the_frames_step(transform):
    """The update C * U * R of a unit step in the frame is as long whatever the scale of C and R."""
    generator = np.random.default_rng(0)
    columns, rows = generator.normal(size=(4, 9, 3)), generator.normal(size=(4, 3, 7))
    step = generator.normal(size=(4, 3, 3))
    algebra = {"transform": transform, "blocks": 1}
    lengths = []
    for scale in (1e-3, 1.0, 1e3):
        frame = build_frame("orthonormal", scale * columns, rows / scale, **algebra)
        lengths.append(np.linalg.norm(product(algebra, scale * columns, frame.to_raw(step), rows / scale)))
    np.testing.assert_allclose(lengths, np.linalg.norm(step), rtol=1e-6)


@pytest.mark.parametrize(("transform", "blocks"), CASES)
@pytest.mark.parametrize("kind", ["zero", "equal columns", "one empty frequency", "one empty block"])
def test_a_base_without_full_rank_still_has_a_frame(kind, transform, blocks):
    generator = np.random.default_rng(0)
    columns, rows = generator.normal(size=(4, 9, 3)), generator.normal(size=(4, 3, 7))
    if kind == "zero":
        columns[:] = 0
    elif kind == "equal columns":
        columns[:, :, 1] = columns[:, :, 0]
    elif kind == "one empty frequency":
        columns[:] = columns[0]
    else:
        columns[: 4 // blocks] = 0
    algebra = {"transform": transform, "blocks": blocks}
    frame = build_frame("orthonormal", columns, rows, **algebra)
    core = generator.normal(size=(4, 3, 3))
    for value in (frame.to_raw(core), frame.from_raw(core), frame.pull_back(core)):
        assert np.isfinite(value).all()
    update = product(algebra, columns, frame.to_raw(core), rows)
    assert np.linalg.norm(update) <= 1.01 * np.linalg.norm(core)


def test_the_raw_frame_changes_nothing():
    core = np.random.default_rng(0).normal(size=(3, 2, 2)).astype(np.float32)
    columns, rows = np.ones((3, 4, 2)), np.ones((3, 2, 4))
    for frame in (
        Frame(),
        *(build_frame("raw", columns, rows, transform=kind, blocks=3) for kind in TRANSFORMS),
    ):
        for value in (frame.to_raw(core), frame.from_raw(core), frame.pull_back(core)):
            assert value.dtype == np.float64
            np.testing.assert_array_equal(value, core)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_core_in_float32_is_computed_with_in_float64(transform):
    generator = np.random.default_rng(5)
    frame = build_frame(
        "orthonormal", generator.normal(size=(4, 9, 3)), generator.normal(size=(4, 3, 7)), transform=transform
    )
    core = generator.normal(size=(4, 3, 3)).astype(np.float32)
    for name in ("to_raw", "from_raw", "pull_back"):
        found = getattr(frame, name)(core)
        assert found.dtype == np.float64
        np.testing.assert_array_equal(found, getattr(frame, name)(core.astype(np.float64)))


@pytest.mark.parametrize(
    ("kind", "transform"), [("skew", "dft"), ("raw", "wavelet"), ("orthonormal", "wavelet")]
)
def test_an_unknown_frame_or_transform_is_refused(kind, transform):
    unknown = "frame 'skew'" if kind == "skew" else "transform 'wavelet'"
    with pytest.raises(ValueError, match=f"unknown {unknown}"):
        build_frame(kind, np.zeros((1, 2, 1)), np.zeros((1, 1, 2)), transform=transform)
