"""Adapter files that are damaged, or say what they may not: none is accepted."""

from __future__ import annotations

import json
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
    parse_adapter,
    serialize_adapter,
)
from forged_adapters import (
    KEY,
    SKETCH,
    SMALL,
    edited,
    forge,
    removed,
    small_adapter,
    unpack,
    with_header,
    with_metadata,
)

DATA = Path(__file__).parents[1] / "data"
V1, SKETCH_V1 = DATA / "adapter-v1.safetensors", DATA / "sketch-v1" / "adapter.safetensors"


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
