"""A weight of `base.bin` in float32, int8 and int4: packing, places, rows and columns."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_tcur_runtime.errors import FileFormatError
from edge_tcur_runtime.formats.schema import Fields
from edge_tcur_runtime.formats.weights import (
    TensorPlace,
    pack_int4,
    parse_place,
    read_columns_and_rows,
    stored_bytes,
    unpack_int4,
)

SMALL = settings(max_examples=40)


@SMALL
@given(st.lists(st.integers(-8, 7), max_size=9))
def test_int4_survives_packing(values):
    array = np.array(values, np.int8)
    packed = pack_int4(array)
    assert packed.size == stored_bytes("int4", array.shape) == (len(values) + 1) // 2
    np.testing.assert_array_equal(unpack_int4(packed, array.shape), array)


def test_the_first_of_two_int4_lies_in_the_low_half():
    assert pack_int4(np.array([[1, -2], [-8, 7]], np.int8)).tolist() == [0xE1, 0x78]
    assert pack_int4(np.array([3, 4, -1], np.int8)).tolist() == [0x43, 0x0F]


def write(path, weight, dtype, transposed, block):
    """A base file with a weight [n1, n2] of integers, and scales; the place, and the weight as floats."""
    generator = np.random.default_rng(weight.size)
    n1, n2 = weight.shape
    stored = np.ascontiguousarray(weight.T if transposed else weight)
    head = b"\1" * 12
    if dtype == "float32":
        path.write_bytes(head + stored.astype("<f4").tobytes())
        return TensorPlace(12, dtype, stored.shape, transposed), weight.astype(np.float32)
    if dtype == "int8":
        scales = generator.random(n1).astype(np.float32)
        raw, full = stored.astype(np.int8).tobytes(), scales[:, None]
    else:
        scales = generator.random((n1, -(-n2 // block))).astype(np.float32)
        raw, full = pack_int4(stored.astype(np.int8)).tobytes(), scales[:, np.arange(n2) // block]
        scales = scales.T if transposed else scales
    path.write_bytes(head + raw + np.ascontiguousarray(scales).tobytes())
    place = TensorPlace(12, dtype, stored.shape, transposed, 12 + len(raw), block)
    assert place.scale_shape() == scales.shape
    assert place.end() == path.stat().st_size
    return place, weight.astype(np.float32) * full


@SMALL
@given(
    st.sampled_from([("float32", None), ("int8", None), ("int4", 2), ("int4", 3), ("int4", 32)]),
    st.booleans(),
    st.integers(1, 7),
    st.integers(1, 9),
    st.data(),
)
def test_rows_and_columns_are_those_of_the_dequantised_weight(tmp_path_factory, kind, turned, n1, n2, data):
    dtype, block = kind
    weight = np.random.default_rng(n1 * n2).integers(-7, 8, (n1, n2))
    path = tmp_path_factory.mktemp("weights") / "base.bin"
    place, floats = write(path, weight, dtype, turned, block)
    rows = np.array(data.draw(st.lists(st.integers(0, n1 - 1), min_size=1)), np.int32)
    cols = np.array(data.draw(st.lists(st.integers(0, n2 - 1), min_size=1)), np.int32)
    found = read_columns_and_rows(path, place, rows, cols)
    for part, expected in zip(found, (floats[:, cols], floats[rows, :]), strict=True):
        assert part.dtype == np.float32
        assert not isinstance(part, np.memmap)
        np.testing.assert_array_equal(part, expected)


DOCUMENT = {"offset": 0, "dtype": "int4", "shape": [64, 5], "transposed": True, "scales": 160, "block": 32}


def test_a_place_survives_its_document():
    for names, dtype in (((), "float32"), (("scales",), "int8"), (("scales", "block"), "int4")):
        idle = {"scales", "block"} - set(names)
        document = {key: value for key, value in DOCUMENT.items() if key not in idle} | {"dtype": dtype}
        place = parse_place(Fields(document, "m.json"))
        assert {**place.document(), "shape": list(place.shape)} == document
    assert place.end() == 160 + 4 * 2 * 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float32"}, "unknown field 'scales'"),
        ({"dtype": "int8"}, "unknown field 'block'"),
        ({"dtype": "int2"}, "'dtype' is 'int2'"),
        ({"block": 0}, "'block' is 0"),
        ({"block": None}, "'block' must be an integer"),
        ({"scales": -4}, "'scales' is -4"),
        ({"shape": [320]}, "must be a matrix"),
    ],
)
def test_places_that_are_not_valid_are_refused(change, message):
    with pytest.raises(FileFormatError, match=message):
        parse_place(Fields(DOCUMENT | change, "m.json"))


@pytest.mark.parametrize("name", ["scales", "block"])
def test_a_quantised_place_names_its_scales(name):
    document = {key: value for key, value in DOCUMENT.items() if key != name}
    with pytest.raises(FileFormatError, match=f"'{name}' is missing"):
        parse_place(Fields(document, "m.json"))
