"""Adapter files whose tensors are wrong: none is accepted."""

from __future__ import annotations

import numpy as np
import pytest

from edge_tcur_runtime.errors import (
    BadInputError,
    FileFormatError,
)
from edge_tcur_runtime.formats.adapter import (
    parse_adapter,
)
from forged_adapters import (
    SKETCH,
    SMALL,
    edited,
    f32,
    forge,
    i32,
    small_sketch,
    u8,
    with_header,
)


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({"q.core": None}, FileFormatError, "'q.core' is missing"),
        ({"q.rows": None}, FileFormatError, "'q.rows' is missing"),
        ({"q.cols": None}, FileFormatError, "'q.cols' is missing"),
        ({"v.core": f32(2, 2, 2)}, FileFormatError, r"'v.core' .float32. belongs to no group"),
        ({"v.rows": i32(0, 1)}, FileFormatError, r"'v.rows' .int32. belongs to no group"),
        ({"more": i32(0, 1)}, FileFormatError, r"'more' .int32. belongs to no group"),
        ({"q.core": np.zeros((2, 2, 2))}, FileFormatError, "'dtype' is 'F64'"),
        ({"q.core": np.zeros((2, 2, 2), np.float16)}, FileFormatError, "'dtype' is 'F16'"),
        ({"q.rows": np.array([0, 3])}, FileFormatError, "'dtype' is 'I64'"),
        ({"q.core": np.zeros((2, 2, 2), np.int32)}, FileFormatError, "dtype int32; expected float32"),
        ({"q.rows": f32(1, 2)}, FileFormatError, "rows have shape .1, 2. and dtype float32"),
        ({"q.core": f32(2, 2)}, FileFormatError, r"expected float32 \[2, r, r\]"),
        ({"q.core": f32(2, 2, 3)}, FileFormatError, "the core has shape"),
        ({"q.core": f32(3, 2, 2)}, FileFormatError, "the core has shape"),
        (
            {"q.core": f32(2, 0, 0), "q.rows": i32().reshape(1, 0), "q.cols": i32().reshape(1, 0)},
            FileFormatError,
            "r of at least 1",
        ),
        ({"q.core": f32()}, FileFormatError, "the core has shape"),
        ({"q.rows": i32([0])}, FileFormatError, r"expected int32 \[1, 2\]"),
        ({"q.cols": i32([0, 1, 2])}, FileFormatError, r"expected int32 \[1, 2\]"),
        ({"q.cols": i32(0, 1)}, FileFormatError, r"cols have shape .2,. .* expected int32 \[1, 2\]"),
        ({"q.cols": i32([[0, 1]])}, FileFormatError, r"expected int32 \[1, 2\]"),
        ({"q.cols": i32([0, 1], [0, 1])}, FileFormatError, r"expected int32 \[1, 2\]"),
        ({"q.rows": i32(0, 1)}, FileFormatError, r"rows have shape .2,.; expected \[b, 2\]"),
        ({"q.rows": i32([[0, 1]])}, FileFormatError, r"expected \[b, 2\] with b dividing 2"),
        ({"q.rows": i32().reshape(0, 2)}, FileFormatError, r"expected \[b, 2\] with b dividing 2"),
        (
            {"q.rows": i32(*3 * [[0, 1]]), "q.cols": i32(*3 * [[0, 1]])},
            FileFormatError,
            r"rows have shape .3, 2.; expected \[b, 2\] with b dividing 2",
        ),
        (
            {"q.rows": i32([0, 1], [0, 1]), "q.cols": i32([0, 1], [0, 1])},
            FileFormatError,
            "2 sets of rows and columns; coupling 'all' has 1",
        ),
        ({"q.left": np.zeros((2, 2), np.uint8)}, FileFormatError, "'q.left' .uint8. belongs to no group"),
        ({"q.rows": np.zeros((1, 2), np.uint8)}, FileFormatError, "dtype uint8; expected int32"),
        ({"q.core": np.zeros((2, 2, 2), np.uint8)}, FileFormatError, "dtype uint8; expected float32"),
        ({"more": np.zeros(2, np.uint8)}, FileFormatError, r"'more' .uint8. belongs to no group"),
        ({"q.core": np.full((2, 2, 2), np.nan, np.float32)}, BadInputError, "core holds NaN"),
        ({"q.core": np.full((2, 2, 2), -np.inf, np.float32)}, BadInputError, "core holds NaN"),
        ({"head": np.array([1, np.inf], np.float32)}, BadInputError, "holds NaN or infinity"),
        (
            {"q.rows": i32([-1, 3])},
            BadInputError,
            "rows must be strictly increasing indices from 0 to 3; block 0 has -1 at place 0",
        ),
        ({"q.rows": i32([1, 1])}, BadInputError, "rows must be strictly increasing"),
        (
            {"q.rows": i32([3, 0])},
            BadInputError,
            "rows must be strictly increasing indices from 0 to 3; block 0 has 0 at place 1",
        ),
        ({"q.rows": i32([0, 4])}, BadInputError, "from 0 to 3"),
        ({"q.rows": i32([-(2**31), 2**31 - 1])}, BadInputError, "from 0 to 3"),
        ({"q.cols": i32([0, 5])}, BadInputError, "from 0 to 4"),
        ({"q.cols": i32([2**31 - 1, -(2**31)])}, BadInputError, "from 0 to 4"),
    ],
)
def test_wrong_tensors_are_refused_with_the_reason(tensors, error, message):
    with pytest.raises(error, match=message):
        parse_adapter(forge(tensors=tensors))


PER_SLICE = {"q.rows": i32([0, 1], [2, 3]), "q.cols": i32([0, 1], [3, 4])}


@pytest.mark.parametrize("bad", [[-1, 1], [2, 2], [3, 2], [2, 4]])
def test_every_block_is_checked_and_not_the_first_alone(bad):
    alone = edited("coupling", "none")
    assert parse_adapter(forge(alone, PER_SLICE)).factors["q"].blocks == 2
    with pytest.raises(
        BadInputError, match="rows must be strictly increasing indices from 0 to 3; block 1 has"
    ):
        parse_adapter(forge(alone, {**PER_SLICE, "q.rows": i32([0, 1], bad)}))


@pytest.mark.parametrize(
    ("coupling", "tensors", "message"),
    [
        ("none", {}, "1 sets of rows and columns; coupling 'none' has 2"),
        ("all", PER_SLICE, "2 sets of rows and columns; coupling 'all' has 1"),
    ],
)
def test_blocks_that_the_coupling_does_not_have_are_refused(coupling, tensors, message):
    with pytest.raises(FileFormatError, match=message):
        parse_adapter(forge(edited("coupling", coupling), tensors))
    parse_adapter(forge(edited("coupling", "layer"), tensors))  # which may have any that divides


# --- sketches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", ["layer", "all"])
def test_sketches_are_never_coupled(coupling):
    with pytest.raises(FileFormatError, match=f"'sketch' has coupling 'none', not '{coupling}'"):
        parse_adapter(forge(edited("coupling", coupling), raw=SKETCH))


@pytest.mark.parametrize(
    ("frame", "raw", "missing"),
    [("sketch", SMALL, "q.left"), ("raw", SKETCH, "q.rows"), ("orthonormal", SKETCH, "q.rows")],
)
def test_the_factors_of_another_frame_are_refused(frame, raw, missing):
    with pytest.raises(FileFormatError, match=f"'{missing}' is missing"):
        parse_adapter(forge(edited("frame", frame), raw=raw))


LEFT, RIGHT = small_sketch().tensors()["q.left"], small_sketch().tensors()["q.right"]


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({"q.left": None}, FileFormatError, "'q.left' is missing"),
        ({"q.right": None}, FileFormatError, "'q.right' is missing"),
        ({"q.rows": i32([0, 1], [0, 1])}, FileFormatError, "'q.rows' .int32. belongs to no group"),
        ({"q.left": LEFT[:, :1]}, FileFormatError, r"left has shape .2, 1. .* expected uint8 \[2, 2\]"),
        ({"q.left": LEFT[:1]}, FileFormatError, r"left has shape .1, 2. .* expected uint8 \[2, 2\]"),
        ({"q.left": LEFT.ravel()}, FileFormatError, r"left has shape .4,. .* expected uint8 \[2, 2\]"),
        ({"q.right": RIGHT[:, :2]}, FileFormatError, r"right has shape .2, 2. .* expected uint8 \[2, 3\]"),
        (
            {"q.right": np.pad(RIGHT, ((0, 0), (0, 1)))},
            FileFormatError,
            r"right has shape .2, 4. .* \[2, 3\]",
        ),
        ({"q.left": LEFT.astype(np.int32)}, FileFormatError, "left has .* dtype int32; expected uint8"),
        ({"q.left": f32(2, 2)}, FileFormatError, "left has .* dtype float32; expected uint8"),
        ({"q.left": LEFT.astype(np.int8)}, FileFormatError, "'dtype' is 'I8'"),
        ({"q.core": f32(2, 3, 3)}, FileFormatError, r"left has shape .2, 2. .* \[2, 3\]"),
        ({"q.core": f32(2, 2)}, FileFormatError, "the core has shape"),
        ({"q.core": np.full((2, 2, 2), np.nan, np.float32)}, BadInputError, "core holds NaN"),
        ({"q.left": u8([3, 0], [0, 0])}, BadInputError, "left holds something else than -1, 0 and 1"),
        ({"q.left": u8([0, 0], [0, 0b11000000])}, BadInputError, "left holds something else"),
        ({"q.right": u8([0, 0, 0b00010000], [0, 0, 0])}, BadInputError, "right holds something else"),
        ({"q.right": u8([0, 0, 0], [0, 0, 0b10000000])}, BadInputError, "right holds something else"),
    ],
)
def test_wrong_sketches_are_refused_with_the_reason(tensors, error, message):
    with pytest.raises(error, match=message):
        parse_adapter(forge(tensors=tensors, raw=SKETCH))


def test_sketches_are_of_the_sizes_of_the_weights():
    def taller(document):
        document["groups"]["q"]["n1"] = 8

    with pytest.raises(FileFormatError, match=r"left has shape .2, 2. .* expected uint8 \[2, 4\]"):
        parse_adapter(forge(taller, raw=SKETCH))


@pytest.mark.parametrize("name", ["../../x", "a/b", "a\\b", "", "x\0y", "x\n", "x\x1b[2J"])
def test_tensor_names_that_could_do_harm_are_refused(name):
    with pytest.raises(FileFormatError, match="not allowed"):
        parse_adapter(forge(tensors={name: f32(1)}))


@pytest.mark.parametrize(
    "shape", ["[4611686018427387904,0]", "[-1]", "[18446744073709551616]", "[1.5]", "[true]", "true", '"x"']
)
def test_an_absurd_shape_is_refused(shape):
    document = '"__metadata__":{"edge_tcur":"{\\"format_version\\":1}"}'
    header = f'{{{document},"x":{{"dtype":"F32","shape":{shape},"data_offsets":[0,0]}}}}'
    with pytest.raises(FileFormatError):
        parse_adapter(with_header(header))


@pytest.mark.parametrize("offsets", ["[0,4]", "[4,8]", "[8,4]", "[0,16]", "[-4,4]", "[0]", "[]", "null"])
def test_tensors_that_overlap_or_leave_the_file_are_refused(offsets):
    document = '"__metadata__":{"edge_tcur":"{\\"format_version\\":1}"}'
    header = f'{{{document},"x":{{"dtype":"F32","shape":[2],"data_offsets":{offsets}}}}}'
    with pytest.raises(FileFormatError):
        parse_adapter(with_header(header, b"\0" * 8))
