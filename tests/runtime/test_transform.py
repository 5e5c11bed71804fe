"""Transforms and the product they define, against explicit loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_tcur_runtime.transform import TRANSFORMS, dct_matrix, from_domain, structure, to_domain

KINDS = st.sampled_from(TRANSFORMS)
SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.integers(1, 6)
quick = settings(deadline=None, max_examples=60)


@st.composite
def blocks(draw):
    """Slices [b, p, n1, n2] and their transform."""
    shape = draw(st.integers(1, 3)), draw(SIZES), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return draw(KINDS), np.random.default_rng(draw(SEEDS)).normal(size=shape)


@st.composite
def triples(draw):
    """A transform; C [p, n1, r], U [p, r, r] and R [p, r, n2] of one block."""
    size, rank, n1, n2 = (
        draw(SIZES),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 4)),
    )
    generator = np.random.default_rng(draw(SEEDS))
    shapes = (size, n1, rank), (size, rank, rank), (size, rank, n2)
    return draw(KINDS), *(generator.normal(size=shape) for shape in shapes)


def product(kind, *values):
    """The product of slices [p, ...] in the domain."""
    result = to_domain(kind, values[0][None])
    for value in values[1:]:
        result = result @ to_domain(kind, value[None])
    return from_domain(kind, result, len(values[0]))[0]


def t_product(a, b):
    """Definition 3.1 of Kilmer and Martin 2011, as it is written."""
    n3 = len(a)
    out = np.zeros((n3, a.shape[1], b.shape[2]))
    for i in range(n3):
        for j in range(n3):
            out[(i + j) % n3] += a[i] @ b[j]
    return out


@quick
@given(blocks())
def test_the_way_back_undoes_the_transform(case):
    kind, value = case
    found = from_domain(kind, to_domain(kind, value), value.shape[1])
    assert found.shape == value.shape
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, value, atol=1e-12)


@quick
@given(blocks())
def test_a_block_is_transformed_as_if_it_were_alone(case):
    kind, value = case
    whole = to_domain(kind, value)
    for block, alone in enumerate(value):
        np.testing.assert_allclose(whole[block], to_domain(kind, alone[None])[0], atol=1e-12)


@quick
@given(triples())
def test_the_structure_constants_give_the_product(case):
    kind, columns, core, rows = case
    size = len(core)
    constants = structure(kind, size)
    assert constants.shape == 4 * (size,)
    expected = np.zeros((size, columns.shape[1], rows.shape[2]))
    for slice_, i, j, k in np.ndindex(constants.shape):
        expected[slice_] += constants[slice_, i, j, k] * columns[i] @ core[j] @ rows[k]
    np.testing.assert_allclose(product(kind, columns, core, rows), expected, atol=1e-11)


@quick
@given(triples())
def test_the_dft_gives_the_t_product_of_its_definition(case):
    _, columns, core, rows = case
    np.testing.assert_allclose(product("dft", columns, core), t_product(columns, core), atol=1e-11)
    twice = t_product(columns, t_product(core, rows))
    np.testing.assert_allclose(product("dft", columns, core, rows), twice, atol=1e-11)


@quick
@given(triples())
def test_the_identity_gives_slice_by_slice_products(case):
    _, columns, core, rows = case
    np.testing.assert_array_equal(product("identity", columns, core, rows), columns @ core @ rows)


@pytest.mark.parametrize("size", range(1, 7))
def test_the_constants_of_dft_and_identity_are_zeros_and_ones(size):
    places = np.indices(4 * (size,))
    slice_, i, j, k = places
    np.testing.assert_array_equal(structure("dft", size), (i + j + k) % size == slice_)
    np.testing.assert_array_equal(structure("identity", size), (places == slice_).all(axis=0))


@pytest.mark.parametrize("size", range(1, 9))
def test_the_dct_is_orthonormal_and_is_the_one_of_its_definition(size):
    matrix = dct_matrix(size)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-14)
    for frequency in range(size):
        scale = np.sqrt((1 if frequency == 0 else 2) / size)
        row = [scale * np.cos(np.pi * frequency * (2 * step + 1) / (2 * size)) for step in range(size)]
        np.testing.assert_allclose(matrix[frequency], row, atol=1e-14)


def test_the_dct_does_not_wrap_around():
    """A smooth stack has nothing in the high frequencies of the DCT; its jump from the last slice to the
    first has in those of the DFT."""
    ramp = np.linspace(0, 1, 8)[None, :, None]
    cosine, fourier = (np.abs(to_domain(kind, ramp)).ravel() for kind in ("dct", "dft"))
    assert cosine[-1] / cosine[1] < 0.01 < 0.1 < fourier[-1] / fourier[1]


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_one_slice_alone_is_multiplied_as_it_is(kind):
    """Coupling none, whatever the transform is called."""
    np.testing.assert_allclose(structure(kind, 1), np.ones((1, 1, 1, 1)))
    value = np.arange(6.0).reshape(3, 1, 2)
    np.testing.assert_allclose(to_domain(kind, value), value)


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_float32_is_transformed_in_double_precision_by_every_numpy(kind):
    value = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    found = to_domain(kind, value)
    assert found.dtype == (np.complex128 if kind == "dft" else np.float64)
    np.testing.assert_array_equal(found, to_domain(kind, value.astype(np.float64)))


def test_an_unknown_transform_is_refused():
    for call in (
        lambda: to_domain("fft", np.ones((1, 2, 3))),
        lambda: from_domain("fft", np.ones((1, 2, 3)), 2),
        lambda: structure("fft", 2),
    ):
        with pytest.raises(ValueError, match="unknown transform 'fft'"):
            call()
