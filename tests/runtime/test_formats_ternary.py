"""Two bits an entry: what is packed is unpacked, and nothing else is ever taken for it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_tcur_runtime.formats.ternary import is_valid, pack, packed_size, unit_vectors, unpack


@st.composite
def entries(draw):
    """int8 [n, m] of -1, 0 and 1."""
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 13))
    values = st.lists(st.sampled_from([-1, 0, 1]), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1])
    return np.array(draw(values), np.int8).reshape(shape)


@given(entries())
def test_what_is_packed_is_unpacked(values):
    packed = pack(values)
    assert packed.dtype == np.uint8
    assert packed.shape == (len(values), packed_size(values.shape[1]))
    found = unpack(packed, values.shape[1])
    assert found.dtype == np.int8
    np.testing.assert_array_equal(found, values)
    assert is_valid(packed, values.shape[1])


@given(st.data())
def test_whatever_bytes_are_valid_are_those_that_pack_writes(data):
    rows, count = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    raw = data.draw(st.binary(min_size=rows * packed_size(count), max_size=rows * packed_size(count)))
    packed = np.frombuffer(raw, np.uint8).reshape(rows, -1)
    values = unpack(packed, count)
    assert values.shape == (rows, count)
    codes = (packed[:, :, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
    used, rest = np.split(codes.reshape(rows, -1), [count], axis=1)
    # The padding is written as the code 0, that is the entry -1, and read by nobody.
    assert is_valid(packed, count) == bool((used <= 2).all() and (rest == 0).all())


def test_the_layout_is_four_entries_a_byte_the_first_in_the_lowest_bits():
    packed = pack(np.array([[-1, 0, 1, 0, 1], [1, 1, 1, 1, -1]], np.int8))
    np.testing.assert_array_equal(packed, [[0b01100100, 0b10], [0b10101010, 0b00]])


@pytest.mark.parametrize(("count", "size"), [(1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_four_entries_share_a_byte(count, size):
    assert packed_size(count) == size
    assert pack(np.zeros((2, count), np.int8)).shape == (2, size)


@pytest.mark.parametrize("place", range(8))
def test_the_invalid_pattern_is_refused_at_every_place(place):
    packed = pack(np.zeros((2, 8), np.int8))
    packed[1, place // 4] |= 3 << (2 * (place % 4))
    values = unpack(packed, 8)
    assert values[1, place] == 2
    assert (values == 2).sum() == 1
    assert not is_valid(packed, 8)


@pytest.mark.parametrize("bit", range(2, 8))
def test_stray_bits_behind_the_last_entry_are_refused(bit):
    values = np.array([[0, 1, -1, 0, 1]], np.int8)
    packed = pack(values)
    packed[0, 1] ^= 1 << bit
    np.testing.assert_array_equal(unpack(packed, 5), values)
    assert not is_valid(packed, 5)


@given(entries(), st.integers(0, 1))
def test_unit_vectors_have_length_one_and_the_signs_that_are_stored(values, axis):
    units = unit_vectors(values, axis)
    assert units.dtype == np.float32
    np.testing.assert_array_equal(np.sign(units), values)
    lengths = np.linalg.norm(units.astype(np.float64), axis=axis)
    np.testing.assert_allclose(lengths, values.any(axis=axis), atol=1e-6)


@pytest.mark.parametrize(("shape", "axis"), [((3, 50, 4), 1), ((3, 4, 50), 2), ((2, 0, 3), 1)])
def test_unit_vectors_are_those_of_a_division_of_each_entry_bit_for_bit(shape, axis):
    values = np.random.default_rng(0).integers(-1, 2, shape, np.int8)
    values[..., 0] = 0  # an empty vector too
    lengths = np.sqrt((values != 0).sum(axis=axis, keepdims=True))
    expected = (values / np.maximum(lengths, 1)).astype(np.float32)
    np.testing.assert_array_equal(unit_vectors(values, axis), expected)


def test_unit_vectors_of_stacks():
    values = np.array([[[1, 0], [-1, 0], [0, 0]], [[1, 1], [1, 0], [1, 0]]], np.int8)  # [n3, n1, r]
    half, third = 2**-0.5, 3**-0.5
    expected = [[[half, 0], [-half, 0], [0, 0]], [[third, 1], [third, 0], [third, 0]]]
    np.testing.assert_allclose(unit_vectors(values, axis=1), expected, rtol=1e-6)
