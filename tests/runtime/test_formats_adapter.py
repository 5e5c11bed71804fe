"""The adapter file: what is written can be read, of every released version, and nothing else is written."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_tcur_runtime.errors import (
    BadInputError,
    FileFormatError,
)
from edge_tcur_runtime.formats import adapter as module
from edge_tcur_runtime.formats.adapter import (
    Adapter,
    AdapterHeader,
    parse_adapter,
    read_adapter,
    read_bounded,
    serialize_adapter,
    write_adapter,
)
from edge_tcur_runtime.formats.digest import digest_bytes
from edge_tcur_runtime.formats.factors import FACTOR_PARTS, Factors, GroupSpec, SketchFactors
from edge_tcur_runtime.transform import TRANSFORMS
from forged_adapters import (
    BASE,
    SKETCH,
    SMALL,
    f32,
    small_adapter,
    small_sketch,
    u8,
)

DATA = Path(__file__).parents[1] / "data"
V1, SKETCH_V1 = DATA / "adapter-v1.safetensors", DATA / "sketch-v1" / "adapter.safetensors"


# --- what is written can be read -------------------------------------------------------------------


TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
NAME = st.from_regex(r"[a-zA-Zé_][a-z0-9_.]{0,12}", fullmatch=True).filter(
    lambda name: name.rpartition(".")[2] not in FACTOR_PARTS
)


def blocks_of(draw, coupling, n3):
    """A number of blocks that n3 slices may have."""
    if coupling == "layer":
        return draw(st.sampled_from([count for count in range(1, n3 + 1) if n3 % count == 0]))
    return {"none": n3, "all": 1}[coupling]


def indices(draw, blocks, rank, size):
    """Rows or columns i32 [blocks, rank] below `size`."""
    one = st.sets(st.integers(0, size - 1), min_size=rank, max_size=rank)
    return np.array([sorted(draw(one)) for _ in range(blocks)], np.int32)


@st.composite
def adapters(draw):
    groups, factors = {}, {}
    frame = draw(st.sampled_from(module.FRAMES))
    coupling = "none" if frame == "sketch" else draw(st.sampled_from(module.COUPLINGS))
    for name in draw(st.lists(NAME, min_size=1, max_size=3, unique=True)):
        n1, n2, n3 = (draw(st.integers(1, 9)) for _ in range(3))
        rank = draw(st.integers(1, min(n1, n2)))
        groups[name] = GroupSpec(tuple(f"{name}.{i}" for i in range(n3)), n1, n2)
        seed = draw(st.integers(0, 2**16))
        generator = np.random.default_rng(seed)
        core = generator.normal(size=(n3, rank, rank)).astype(np.float32)
        if frame == "sketch":
            shapes = (n3, n1, rank), (n3, rank, n2)
            factors[name] = SketchFactors.pack(
                core, *(generator.integers(-1, 2, shape, np.int8) for shape in shapes)
            )
        else:
            blocks = blocks_of(draw, coupling, n3)
            factors[name] = Factors(core, *(indices(draw, blocks, rank, n) for n in (n1, n2)))
    extras = {
        f"extra.{name}": np.full(draw(st.sampled_from([(), (3,), (2, 2), (0,)])), 0.5, np.float32)
        for name in draw(st.lists(NAME, max_size=2, unique=True))
    }
    header = AdapterHeader(
        draw(TEXT), groups, draw(TEXT), tuple(draw(st.lists(TEXT, max_size=3))),
        coupling, draw(st.sampled_from(TRANSFORMS)), frame, draw(st.floats(1e-6, 1e5)),
        provenance=draw(st.dictionaries(TEXT, TEXT, max_size=2)),
    )  # fmt: skip
    return Adapter(header, factors, extras)


@settings(max_examples=60)
@given(adapters())
def test_what_is_written_reads_back_as_it_was(adapter):
    raw = serialize_adapter(adapter)
    found = parse_adapter(raw)
    assert found.header == adapter.header
    written, read = adapter.tensors(), found.tensors()
    fed, feeds = adapter.feeds(), found.feeds()
    assert {name: value.shape for name, value in found.extras.items()} == {
        name: value.shape for name, value in adapter.extras.items()
    }
    for old, new in ((written, read), (fed, feeds)):
        assert set(new) == set(old)
        for name, value in old.items():
            np.testing.assert_array_equal(new[name], value)
            assert new[name].dtype == value.dtype
    assert serialize_adapter(found) == raw


def test_the_same_adapter_gives_the_same_bytes():
    assert {serialize_adapter(small_adapter()) for _ in range(20)} == {SMALL}
    assert {serialize_adapter(small_sketch()) for _ in range(20)} == {SKETCH}


def test_sketches_take_two_bits_an_entry_and_are_fed_as_unit_vectors():
    adapter = small_sketch()
    stored, feeds, part = adapter.tensors(), adapter.feeds(), adapter.factors["q"]
    assert {name: value.dtype for name, value in stored.items() if name != "head"} == {
        "q.core": np.float32, "q.left": np.uint8, "q.right": np.uint8,
    }  # fmt: skip
    assert stored["q.left"].shape == (2, 2)  # 4 x 2 entries a slice
    assert stored["q.right"].shape == (2, 3)  # 2 x 5 entries and two bits of padding
    for name, vectors, axis in (("left", part.left, 1), ("right", part.right, 2)):
        fed = feeds[f"q.{name}"]
        assert (fed.shape, fed.dtype) == (vectors.shape, np.float32)
        np.testing.assert_array_equal(np.sign(fed), vectors)
        empty = ~vectors.any(axis=axis)
        np.testing.assert_allclose(np.linalg.norm(fed, axis=axis), np.where(empty, 0, 1), rtol=1e-6)


def test_another_core_leaves_the_frozen_factors_as_they_are():
    core = np.full((2, 2, 2), 7, np.float32)
    for adapter in (small_adapter(), small_sketch()):
        part = adapter.factors["q"]
        other = part.with_core(core)
        assert other.core is core
        before, after = part.stored(), other.stored()
        assert set(before) == set(after)
        for name in set(before) - {"core"}:
            np.testing.assert_array_equal(before[name], after[name])
        assert (other.rank, other.blocks) == (part.rank, part.blocks)


@pytest.mark.parametrize(("coupling", "blocks"), [("none", 6), ("layer", 3), ("layer", 1), ("all", 1)])
def test_every_block_has_rows_and_columns_of_its_own(coupling, blocks):
    header = AdapterHeader(BASE, {"q": GroupSpec(tuple("abcdef"), 4, 5)}, "t", ("0", "1"), coupling)
    rows = np.array([[0, 3], [1, 2], [0, 1], [2, 3], [0, 2], [1, 3]], np.int32)[:blocks]
    factors = Factors(np.ones((6, 2, 2), np.float32), rows, rows + 1)
    assert factors.blocks == blocks
    found = parse_adapter(serialize_adapter(Adapter(header, {"q": factors}))).factors["q"]
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_array_equal(found.cols, rows + 1)


def test_the_order_of_groups_and_provenance_does_not_change_the_bytes():
    first = small_adapter(provenance={"a": "1", "b": "2"})
    part, spec = first.factors["q"], first.header.groups["q"]
    both = replace(first.header, groups={"q": spec, "a": spec}), {"q": part, "a": part}
    turned = (
        replace(first.header, groups={"a": spec, "q": spec}, provenance={"b": "2", "a": "1"}),
        {"a": part, "q": part},
    )
    assert serialize_adapter(Adapter(*both)) == serialize_adapter(Adapter(*turned))


def test_writing_returns_the_digest_and_keeps_a_personal_file_private(tmp_path):
    path = tmp_path / "a.safetensors"
    digest = write_adapter(path, small_adapter(), private=True)
    assert digest == digest_bytes(path.read_bytes())
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_adapter(path).header == small_adapter().header


def test_counts_of_trained_numbers_keep_the_head_apart():
    adapter = small_adapter()
    assert (adapter.trained_numbers, adapter.extra_numbers) == (8, 2)


# --- every released version keeps loading ----------------------------------------------------------


def test_the_file_of_version_1_keeps_loading():
    adapter = read_adapter(V1)
    header = adapter.header
    assert (header.coupling, header.transform, header.frame, header.alpha) == (
        "layer",
        "dft",
        "orthonormal",
        1,
    )
    assert adapter.header.task == "image-classification"
    assert adapter.header.labels == ("0", "1", "2", "3")
    assert adapter.header.base_digest.startswith("sha256:602d2cf7b2eafde9")
    assert (adapter.trained_numbers, adapter.extra_numbers) == (108, 0)
    assert {factors.rank for factors in adapter.factors.values()} == {3}
    shapes = {name: (len(part.core), part.blocks) for name, part in adapter.factors.items()}
    assert shapes == {"16x16": (8, 2), "32x16": (2, 2), "16x32": (2, 2)}
    assert digest_bytes(V1.read_bytes()) == (
        "sha256:2411ead7fefb585ba9100aeae58684a91bb7bd77f34ec01a62f0578497b7057d"
    )
    assert serialize_adapter(adapter) == V1.read_bytes()


def test_the_sketch_of_version_1_keeps_loading():
    adapter = read_adapter(SKETCH_V1)
    header = adapter.header
    assert (header.coupling, header.transform, header.frame, header.alpha) == (
        "none",
        "identity",
        "sketch",
        2,
    )
    assert (adapter.trained_numbers, adapter.extra_numbers) == (24, 68)
    assert {name: part.left.shape for name, part in adapter.factors.items()} == {
        "16x16": (4, 16, 2), "32x16": (1, 32, 2), "16x32": (1, 16, 2),
    }  # fmt: skip
    assert all(part.left.any() and part.right.any() for part in adapter.factors.values())
    assert digest_bytes(SKETCH_V1.read_bytes()) == (
        "sha256:32eda1b34eda5cac30b7e91d25d6bdb2e07ba5379ba429219c6bd7c65eadcb5d"
    )
    assert serialize_adapter(adapter) == SKETCH_V1.read_bytes()


# --- what cannot be read is not written ------------------------------------------------------------


def with_factors(**parts):
    adapter = small_adapter()
    return Adapter(adapter.header, {"q": replace(adapter.factors["q"], **parts)}, adapter.extras)


def with_sketches(**changes):
    adapter = small_sketch()
    header = {key: changes.pop(key) for key in ("frame", "coupling") if key in changes}
    factors = {"q": replace(adapter.factors["q"], **changes)}
    return Adapter(replace(adapter.header, **header), factors, adapter.extras)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (with_factors(core=np.full((2, 2, 2), np.nan, np.float32)), "NaN"),
        (with_factors(core=np.zeros((2, 2, 2))), "float64"),
        (with_factors(rows=np.array([[3, 0]], np.int32)), "strictly increasing"),
        (with_factors(cols=np.array([[0, 1]])), "int64"),
        (with_factors(rows=np.array([0, 3], np.int32)), r"expected \[b, 2\]"),
        (
            with_factors(**{name: np.array(3 * [[0, 3]], np.int32) for name in ("rows", "cols")}),
            "b dividing 2",
        ),
        (small_adapter(coupling="none"), "coupling 'none' has 2"),
        (small_adapter(frame="sketch"), "not those of the frame 'sketch'"),
        (with_sketches(frame="raw"), "not those of the frame 'raw'"),
        (with_sketches(coupling="layer"), "'sketch' has coupling 'none', not 'layer'"),
        (with_sketches(n1=3), r"of weights \[3, 5\], not \[4, 5\]"),
        (with_sketches(packed_left=np.zeros((2, 3), np.uint8)), r"left has shape .2, 3. .* uint8 \[2, 2\]"),
        (with_sketches(packed_left=np.zeros((1, 2), np.uint8)), r"left has shape .1, 2. .* uint8 \[2, 2\]"),
        (with_sketches(packed_right=np.zeros((2, 3), np.int8)), "right has .* dtype int8; expected uint8"),
        (with_sketches(packed_left=u8([3, 0], [0, 0])), "left holds something else than -1, 0 and 1"),
        (with_sketches(packed_right=u8([0, 0, 0], [0, 0, 16])), "right holds something else"),
        (small_adapter(alpha=0.0), "'alpha' is 0.0"),
        (small_adapter(alpha=-1.0), "'alpha' is -1.0"),
        (small_adapter(alpha=float("nan")), "NaN is not JSON"),
        (Adapter(small_adapter().header, {}, {}), "do not name the same groups"),
        (Adapter(replace(small_adapter().header, groups={}), {}, {}), "are empty"),
        (replace(small_adapter(), extras={"head": np.array([np.inf], np.float32)}), "NaN or infinity"),
        (replace(small_adapter(), extras={"head": np.array([1.0])}), "float64"),
        (replace(small_adapter(), extras={"q.core": f32(2, 2, 2)}), "'q.core'"),
        (replace(small_adapter(), extras={"v.rows": f32(2)}), "'v.rows'"),
        (replace(small_adapter(), extras={"v.left": f32(2)}), "'v.left'"),
        (replace(small_adapter(), extras={"v.right": f32(2)}), "'v.right'"),
        (replace(small_adapter(), extras={"a/b": f32(2)}), "not allowed"),
        (replace(small_adapter(), extras={"__metadata__": f32(2)}), "not allowed"),
        (small_adapter(labels=("\ud800",)), "not Unicode text"),
        (small_adapter(frame="skew"), "expected one of raw, orthonormal"),
        (small_adapter(coupling="ring"), "expected one of none, layer, all"),
        (small_adapter(transform="wavelet"), "expected one of dft, dct, identity"),
    ],
)
def test_an_adapter_that_could_not_be_read_is_not_written(adapter, message):
    with pytest.raises(BadInputError, match=message):
        serialize_adapter(adapter)


@pytest.mark.parametrize(
    ("sides", "error", "message"),
    [
        ({"left": np.zeros((2, 4, 3), np.int8)}, FileFormatError, "the sketches have the shapes"),
        ({"left": np.zeros((1, 4, 2), np.int8)}, FileFormatError, "the sketches have the shapes"),
        ({"left": np.zeros((2, 8), np.int8)}, FileFormatError, "the sketches have the shapes"),
        ({"right": np.zeros((2, 5, 2), np.int8)}, FileFormatError, "the sketches have the shapes"),
        ({"right": np.zeros((10,), np.int8)}, FileFormatError, "the sketches have the shapes"),
        ({"left": np.full((2, 4, 2), 0.5)}, FileFormatError, "dtypes float64 and int8; expected int8"),
        ({"left": np.full((2, 4, 2), 2, np.int8)}, BadInputError, "something else than -1, 0 and 1"),
        ({"right": np.full((2, 2, 5), -2, np.int8)}, BadInputError, "something else than -1, 0 and 1"),
        ({"right": np.full((2, 2, 5), -128, np.int8)}, BadInputError, "something else than -1, 0 and 1"),
    ],
)
def test_what_is_no_sketch_is_not_packed(sides, error, message):
    part = small_sketch().factors["q"]
    with pytest.raises(error, match=message):
        SketchFactors.pack(part.core, **{"left": part.left, "right": part.right, **sides})


# --- reading files ---------------------------------------------------------------------------------


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo"):
        with pytest.raises(BadInputError, match="not a regular file"):
            read_adapter(path)


@pytest.mark.parametrize("name", ["missing", "file/below", "x" * 300])
def test_what_is_not_there_is_refused_with_its_path(tmp_path, name):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BadInputError, match="cannot read") as caught:
        read_adapter(tmp_path / name)
    assert caught.value.where == str(tmp_path / name)


def test_reading_is_bounded(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(b"12345")
    assert read_bounded(path, 5) == b"12345"
    with pytest.raises(FileFormatError, match="5 bytes; the limit is 4"):
        read_bounded(path, 4)


def test_a_sparse_file_of_a_gigabyte_is_not_read(tmp_path):
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(FileFormatError, match="the limit is"):
        read_adapter(path)
