"""The adapter file: what is written can be read, and nothing else is ever accepted."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_tcur_runtime.errors import (
    BadInputError,
    EdgeError,
    FileFormatError,
    FormatVersionError,
    IntegrityError,
)
from edge_tcur_runtime.formats import adapter as module
from edge_tcur_runtime.formats.adapter import (
    MAX_FILE_BYTES,
    MAX_HEADER_BYTES,
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

DATA = Path(__file__).parents[1] / "data"
V1, SKETCH_V1 = DATA / "adapter-v1.safetensors", DATA / "sketch-v1" / "adapter.safetensors"
BASE = "sha256:" + "b" * 64
KEY = "edge_tcur"


def small_adapter(**header):
    """One group of two 4 x 5 weights in rank 2, and a head."""
    core = np.arange(8, dtype=np.float32).reshape(2, 2, 2) / 8
    factors = Factors(core, np.array([[0, 3]], np.int32), np.array([[1, 4]], np.int32))
    fields = {"task": "image-classification", "labels": ("ja", "né"), "provenance": {"tool": "test"}}
    document = AdapterHeader(BASE, {"q": GroupSpec(("q.0", "q.1"), 4, 5)}, **{**fields, **header})
    return Adapter(document, {"q": factors}, {"head": np.array([0.5, -1.0], np.float32)})


def small_sketch(**header):
    """The same weights in the frame `sketch`, coupling none."""
    generator = np.random.default_rng(0)
    own = small_adapter(coupling="none", transform="identity", frame="sketch", **header)
    left, right = (generator.integers(-1, 2, shape, np.int8) for shape in ((2, 4, 2), (2, 2, 5)))
    return replace(own, factors={"q": SketchFactors.pack(own.factors["q"].core, left, right)})


SMALL = serialize_adapter(small_adapter())
SKETCH = serialize_adapter(small_sketch())


def unpack(raw):
    """(document, tensors) of an adapter file, nothing checked."""
    length = int.from_bytes(raw[:8], "little")
    document = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"][KEY])
    return document, dict(safetensors.numpy.load(raw))


def forge(edit=None, tensors=None, *, sign=True, raw=SMALL):
    """A file with an edited document and other tensors, whose digest is right: only rules refuse it."""
    document, arrays = unpack(raw)
    arrays |= tensors or {}
    arrays = {name: np.asarray(value, order="C") for name, value in arrays.items() if value is not None}
    document.pop("sha256")
    if edit is not None:
        edit(document)
    if sign:
        document["sha256"] = module._content_digest(document, arrays)
    return safetensors.numpy.save(arrays, {KEY: module._compact(document)})


def with_header(text, data=b""):
    """A safetensors file with this header, given as text or bytes."""
    raw = text if isinstance(text, bytes) else text.encode()
    return len(raw).to_bytes(8, "little") + raw + data


def with_metadata(text):
    """A file whose one metadata value is `text`."""
    return safetensors.numpy.save(unpack(SMALL)[1], {KEY: text})


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


# --- damage ----------------------------------------------------------------------------------------


def refused(raw):
    """Whether `raw` is refused with an error for the user."""
    try:
        parse_adapter(raw)
    except EdgeError:
        return True
    return False


@pytest.mark.parametrize("raw", [SMALL, SKETCH], ids=["indices", "sketch"])
def test_every_flipped_bit_is_refused(raw):
    accepted = []
    for position in range(len(raw)):
        damaged = bytearray(raw)
        for bit in range(8):
            damaged[position] ^= 1 << bit
            if not refused(bytes(damaged)):
                accepted.append((position, bit))
            damaged[position] ^= 1 << bit
    assert accepted == []


@pytest.mark.parametrize("path", [V1, SKETCH_V1], ids=["indices", "sketch"])
def test_a_flipped_bit_anywhere_in_the_file_of_version_1_is_refused(path):
    raw = path.read_bytes()
    for position in range(len(raw)):
        damaged = bytearray(raw)
        damaged[position] ^= 1 << (position % 8)
        assert refused(bytes(damaged)), position


def test_a_file_cut_at_any_byte_is_refused():
    for length in range(len(SMALL)):
        assert refused(SMALL[:length]), length


@pytest.mark.parametrize("tail", [b"\0", b" ", SMALL])
def test_bytes_after_the_end_are_refused(tail):
    with pytest.raises(FileFormatError):
        parse_adapter(SMALL + tail)


@pytest.mark.parametrize("data", [b"", b"\0" * 7, b"\x80\x04pickle", b"PK\3\4" + b"\0" * 64, b"\xff" * 64])
def test_files_of_other_kinds_are_refused(data):
    with pytest.raises(FileFormatError):
        parse_adapter(data)


@settings(max_examples=200)
@given(st.binary(max_size=200), st.booleans())
def test_arbitrary_bytes_never_raise_anything_but_our_errors(data, framed):
    assert refused(with_header(data) if framed else data)


@settings(max_examples=200)
@given(st.data())
def test_arbitrary_json_headers_never_raise_anything_but_our_errors(data):
    value = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    )
    entry = st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F32", "I32", "U8", "F64"]),
            "shape": value,
            "data_offsets": value,
        },
    )
    table = data.draw(st.dictionaries(st.text(max_size=5), entry | value, max_size=3))
    metadata = data.draw(st.just({KEY: "{}"}) | st.dictionaries(st.just(KEY), value) | value)
    assert refused(with_header(json.dumps({"__metadata__": metadata, **table}), b"\0" * 16))


# --- the header ------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [len(SMALL) - 7, 2**31, 2**63, 2**64 - 1])
def test_an_absurd_header_length_is_refused(length):
    with pytest.raises(FileFormatError, match="the header claims"):
        parse_adapter(length.to_bytes(8, "little") + SMALL[8:])


def test_an_over_long_header_is_refused_before_it_is_parsed(monkeypatch):
    monkeypatch.setattr(module, "parse_document", lambda *_: pytest.fail("parsed"))
    with pytest.raises(FileFormatError, match=f"limit is {MAX_HEADER_BYTES}"):
        parse_adapter(with_header("{}" + " " * MAX_HEADER_BYTES))


def test_an_over_long_header_is_not_written():
    with pytest.raises(BadInputError, match="the limits are"):
        serialize_adapter(small_adapter(labels=("x" * MAX_HEADER_BYTES,)))


def test_an_over_large_file_is_refused_before_it_is_read():
    with pytest.raises(FileFormatError, match=f"limit is {MAX_FILE_BYTES}"):
        parse_adapter(SMALL + bytes(MAX_FILE_BYTES))


@pytest.mark.parametrize(
    "header",
    [b"\xff\xfe{}", b'{"a":', b"[]", b"3", b'{"__metadata__":NaN}', b"[" * 30000, b"{" + b'"a":{' * 9000],
)
def test_a_header_that_is_no_utf8_json_object_is_refused(header):
    with pytest.raises(FileFormatError):
        parse_adapter(with_header(header))


def test_a_duplicate_tensor_name_is_refused():
    text = SMALL[8 : 8 + int.from_bytes(SMALL[:8], "little")].decode().rstrip()
    doubled = text[:-1] + ',"head":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    with pytest.raises(FileFormatError, match="'head' appears twice"):
        parse_adapter(with_header(doubled, SMALL[8 + len(text) :]))


@pytest.mark.parametrize("metadata", [None, {}, {"other": "{}"}, {KEY: "{}", "more": "x"}])
def test_another_safetensors_file_is_named_as_such(metadata):
    with pytest.raises(FileFormatError, match="not an edge-tcur adapter"):
        parse_adapter(safetensors.numpy.save({"x": np.zeros(2, np.float32)}, metadata))


# --- the document ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a valid JSON"),
        ("[1]", "expected a JSON object"),
        ('{"format_version":1,"format_version":1}', "'format_version' appears twice"),
        ('{"format_version":1,"groups":{"q":{"n1":1,"n1":2}}}', "'n1' appears twice"),
        ('{"format_version":1,"x":NaN}', "NaN is not JSON"),
        ('{"format_version":1,"x":1e999}', "too large"),
        ('{"format_version":1,"x":' + "9" * 400 + "}", "too large"),
        ('{"format_version":1,"x":"\\ud800"}', "not Unicode text"),
        ('{"format_version":1,"\\udfff":0}', "not Unicode text"),
    ],
)
def test_a_document_that_is_no_plain_json_is_refused(text, message):
    with pytest.raises(FileFormatError, match=message):
        parse_adapter(with_metadata(text))


@pytest.mark.parametrize("escape", ["", "\\u00e9"])
def test_nesting_of_any_depth_is_refused(escape):
    for depth in (10, 100, *range(800, 1020), 5000):
        nested = '{"format_version":1,"sha256":"' + escape + '","x":' + "[" * depth + "]" * depth + "}"
        assert refused(with_metadata(nested)), depth


def test_half_a_character_in_the_metadata_or_in_a_tensor_name_is_refused():
    for header in (
        '{"__metadata__":{"edge_tcur":"\\ud800"}}',
        '{"__metadata__":{"edge_tcur":"{}"},"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
    ):
        with pytest.raises(FileFormatError, match="not Unicode text"):
            parse_adapter(with_header(header))


def test_an_altered_document_breaks_the_digest():
    document, _ = unpack(SMALL)
    document["labels"] = ["né", "ja"]
    with pytest.raises(IntegrityError, match="the content was altered") as caught:
        parse_adapter(with_metadata(module._compact(document)), "a.safetensors")
    assert caught.value.where == "a.safetensors"
    assert caught.value.hint


def test_the_same_document_written_otherwise_is_refused():
    document, _ = unpack(SMALL)
    with pytest.raises(IntegrityError):
        parse_adapter(with_metadata(json.dumps(document)))


def rewritten(edit):
    """SMALL with its header's text edited and padded, the tensors as they were."""
    length = int.from_bytes(SMALL[:8], "little")
    text = edit(SMALL[8 : 8 + length].decode().rstrip()).encode()
    return with_header(text + b" " * (-len(text) % 8), SMALL[8 + length :])


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace(":", ": "),
        lambda text: text + " " * 8,
        lambda text: text[:-1] + "\n}",
        lambda text: text.replace('"head"', '"\\u0068ead"'),
        lambda text: text.replace('"dtype":"F32","shape":[2]', '"shape":[2],"dtype":"F32"'),
        lambda text: json.dumps(dict(reversed(json.loads(text).items())), separators=(",", ":")),
    ],
)
def test_the_same_tensors_under_another_header_are_refused(edit):
    """The digest covers what the header says; the file would be another, with another digest of its bytes."""
    assert rewritten(lambda text: text) == SMALL
    with pytest.raises(FileFormatError):
        parse_adapter(rewritten(edit))


def test_the_same_tensors_in_another_order_are_refused():
    document, tensors = unpack(SMALL)
    table, data, end = {"__metadata__": {KEY: module._compact(document)}}, b"", 0
    for name in ("q.core", "head", "q.cols", "q.rows"):
        raw, kind = tensors[name].tobytes(), "F32" if tensors[name].dtype == np.float32 else "I32"
        place = [end, end := end + len(raw)]
        table[name] = {"dtype": kind, "shape": list(tensors[name].shape), "data_offsets": place}
        data += raw
    text = module._compact(table).encode()
    with pytest.raises(FileFormatError, match="not in the format's order"):
        parse_adapter(with_header(text + b" " * (-len(text) % 8), data))


@pytest.mark.parametrize(
    "edit",
    [
        lambda document: document.update(dict(sorted((key, document.pop(key)) for key in list(document)))),
        lambda document: document.update(alpha=1),
        lambda document: document["groups"].update(q=dict(reversed(document["groups"]["q"].items()))),
        lambda document: document.update(provenance={"z": "", "a": ""}),
    ],
)
def test_a_signed_document_in_another_order_or_form_is_refused(edit):
    with pytest.raises(FileFormatError, match="not written in the format's order"):
        parse_adapter(forge(edit))


def test_a_file_without_a_digest_is_refused():
    with pytest.raises(FileFormatError, match="'sha256' is missing"):
        parse_adapter(forge(sign=False))


def edited(key, value):
    return lambda document: document.update({key: value})


def removed(key):
    return lambda document: document.pop(key)


@pytest.mark.parametrize("key", [key for key in unpack(SMALL)[0] if key != "sha256"])
def test_every_field_is_needed(key):
    with pytest.raises(FileFormatError, match=f"'{key}' is missing"):
        parse_adapter(forge(removed(key)))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edited("format_version", 0), "'format_version' is 0"),
        (edited("format_version", True), "must be an integer, not bool"),
        (edited("format_version", 1.0), "must be an integer, not float"),
        (edited("method", "lora"), "expected one of tcurlora"),
        (edited("coupling", "ring"), "expected one of none, layer, all"),
        (edited("coupling", ["all"]), "'coupling' must be a string"),
        (edited("transform", "wavelet"), "expected one of dft, dct, identity"),
        (edited("frame", "skew"), "expected one of raw, orthonormal, sketch"),
        (edited("alpha", 0), "'alpha' is 0.0; expected above 0"),
        (edited("alpha", -0.5), "'alpha' is -0.5; expected above 0"),
        (edited("alpha", 1e6), "'alpha' is 1000000.0; expected above 0, below 1000000.0"),
        (edited("alpha", float("nan")), "NaN is not JSON"),
        (edited("alpha", float("inf")), "Infinity is not JSON"),
        (edited("alpha", "1"), "'alpha' must be a number"),
        (edited("alpha", True), "'alpha' must be a number"),
        (edited("alpha", None), "'alpha' must be a number"),
        (edited("labels", "ab"), "must be a list"),
        (edited("labels", ["a", 1]), "strings only"),
        (edited("groups", []), "must be an object"),
        (edited("provenance", {"tool": 1}), "must be a string"),
        (edited("groups", {"q": {"parameters": [], "n1": 4, "n2": 5}}), "at least one weight"),
        (edited("groups", {"q": {"parameters": ["q.0", "q.0"], "n1": 4, "n2": 5}}), "each once"),
        (edited("groups", {"q": {"parameters": ["q.0", "q.1"], "n1": 0, "n2": 5}}), "'n1' is 0"),
        (edited("groups", {"q": {"parameters": ["q.0", "q.1"], "n1": 4, "n2": 5, "n3": 2}}), "'n3'"),
    ],
)
def test_a_wrong_field_is_refused_and_named(edit, message):
    with pytest.raises(FileFormatError, match=message):
        parse_adapter(forge(edit))


def test_an_unknown_field_suggests_the_nearest_one():
    def rename(document):
        document["lables"] = document["labels"]

    with pytest.raises(FileFormatError, match="unknown field 'lables'") as caught:
        parse_adapter(forge(rename))
    assert caught.value.hint == "did you mean 'labels'?"


def test_a_newer_version_is_refused_as_newer_whatever_else_it_holds():
    def renew(document):
        document.update(format_version=2, sketch="2-bit", frame="sketch")

    for raw in (
        forge(renew),
        forge(renew, {"q.packed": np.zeros(4, np.uint8)}),
        forge(renew, {"q.core": None}, sign=False),
    ):
        with pytest.raises(FormatVersionError, match="version 2 is newer than 1") as caught:
            parse_adapter(raw)
        assert "update edge-tcur-runtime" in caught.value.hint


# --- tensors ---------------------------------------------------------------------------------------


def f32(*shape):
    return np.zeros(shape, np.float32)


def i32(*values):
    return np.array(values, np.int32)


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
        ({"q.rows": i32([-1, 3])}, BadInputError, "rows must be strictly increasing indices from 0 to 3"),
        ({"q.rows": i32([1, 1])}, BadInputError, "rows must be strictly increasing"),
        ({"q.rows": i32([3, 0])}, BadInputError, "rows must be strictly increasing"),
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
    with pytest.raises(BadInputError, match="rows must be strictly increasing indices from 0 to 3"):
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


def u8(*rows):
    return np.array(rows, np.uint8)


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
    "shape", ["[4611686018427387904,0]", "[-1]", "[18446744073709551616]", "[1.5]", '"x"']
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
