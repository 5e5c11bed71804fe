"""Readers of text and images: formats, limits, labels, splits, and every error with its place."""

from __future__ import annotations

import csv
import io
import json
import re
import struct
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_tcur_runtime.data import (
    DataLimits,
    Dataset,
    Layout,
    check_trainable,
    encode_labels,
    label_names,
    load_dataset,
    read_dataset,
    split,
)
from edge_tcur_runtime.errors import DataError, ExitCode, MissingEngineError, UsageError

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
# NUL is left out because Python 3.10's csv refuses it; surrogates are no characters.
CHARACTERS = st.characters(exclude_characters="\0", exclude_categories=("Cs",))
TEXTS = st.text(CHARACTERS, min_size=1).filter(str.strip)
ROWS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=8)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def labelled(labels) -> Dataset:
    samples = tuple(f"sample {i}" for i in range(len(labels)))
    return Dataset(
        "text", samples, tuple(labels), "d.csv", tuple(f"d.csv:{i + 2}" for i in range(len(labels)))
    )


# --- text ---------------------------------------------------------------------------------------


def test_csv_reads_columns_by_name_and_remembers_lines(tmp_path):
    path = write(
        tmp_path / "d.csv", '\ufeffid,label,text\r\n\r\n1,a,"two\r\nlines"\r\n\r\n2,b,"say ""hi"", you"\r\n'
    )
    data = load_dataset(path, "text")
    assert data.samples == ("two\r\nlines", 'say "hi", you')
    assert data.labels == ("a", "b")
    assert data.places == (f"{path}:3", f"{path}:6")
    assert (data.kind, data.source, len(data)) == ("text", str(path), 2)


def test_jsonl_takes_strings_and_integer_labels_and_ignores_other_keys(tmp_path):
    path = write(
        tmp_path / "d.JSONL",
        '\ufeff{"text": "x", "label": 3, "extra": [1]}\n\n{"text": "é\\u2028", "label": "q"}',
    )
    data = load_dataset(path, "text")
    assert data.samples == ("x", "é\u2028")
    assert data.labels == ("3", "q")
    assert data.places == (f"{path}:1", f"{path}:3")


@given(rows=ROWS)
@settings(max_examples=60)
def test_csv_round_trip(tmp_path_factory, rows):
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([("text", "label"), *rows])
    data = load_dataset(write(tmp_path_factory.mktemp("csv") / "d.csv", buffer.getvalue()), "text")
    assert list(zip(data.samples, data.labels, strict=True)) == rows


@given(rows=ROWS, escaped=st.booleans())
@settings(max_examples=60)
def test_jsonl_round_trip(tmp_path_factory, rows, escaped):
    lines = [json.dumps({"text": text, "label": label}, ensure_ascii=escaped) for text, label in rows]
    path = write(tmp_path_factory.mktemp("jsonl") / "d.jsonl", "\n".join(lines))
    data = load_dataset(path, "text")
    assert list(zip(data.samples, data.labels, strict=True)) == rows
    assert data.places == tuple(f"{path}:{i + 1}" for i in range(len(rows)))


@given(raw=st.binary(max_size=200) | st.text(alphabet='text,label"\n\r{}:1\\', max_size=80).map(str.encode))
@settings(max_examples=200)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".npz"])
def test_arbitrary_bytes_load_or_are_refused_with_a_place(tmp_path_factory, suffix, raw):
    path = write(tmp_path_factory.mktemp("raw") / f"d{suffix}", raw)
    refused = None
    try:
        load_dataset(path, "image" if suffix == ".npz" else "text")
    except DataError as error:
        refused = error
    assert refused is None or (refused.where.startswith(str(path)) and refused.hint)


@pytest.mark.parametrize(
    ("name", "content", "place", "message", "hint"),
    [
        ("d.csv", "", ":1", "empty", "header"),
        ("d.csv", "text,label\n", "", "empty", "row"),
        ("d.csv", "text,label\na,b\n,c\n", ":3", "no text", "column"),
        ("d.csv", "text,label\na,b\n  ,c\n", ":3", "no text", "column"),
        ("d.csv", "text,label\na,b\nc,\n", ":3", "no label", "column"),
        ("d.csv", "text,category\na,b\n", ":1", "'text', 'category'", "--label-column category"),
        ("d.csv", "text,lable\na,b\n", ":1", "no column 'label'", "--label-column lable"),
        ("d.csv", "sentence,label\na,b\n", ":1", "no column 'text'", "--text-column sentence"),
        ("d.csv", "text,zz\na,b\n", ":1", "no column 'label'", "with --label-column"),
        ("d.csv", "text;label\na;b\n", ":1", "'text;label'", "commas"),
        ("d.csv", "text,label,text\na,b,c\n", ":1", "twice", "rename"),
        ("d.csv", "text,label\na,b,c\n", ":2", "3 fields; the header has 2", "comma"),
        ("d.csv", 'text,label\na,b\n"a"x,b\n', ":3", "malformed CSV", '""'),
        ("d.csv", 'text,label\na,b\n"a,b\nc\n', ":3", "malformed CSV", '""'),
        (
            "d.csv",
            b"text,label\nok,b\nok,b\nd\xe9j\xe0,b\n",
            ":4",
            "not UTF-8: byte 0xe9 at position 2",
            "UTF-8",
        ),
        ("d.csv", "text,label\na,b\n".encode("utf-16"), ":1", "not UTF-8", "UTF-8"),
        ("d.jsonl", "", "", "empty", "row"),
        ("d.jsonl", "\n\n", "", "empty", "row"),
        ("d.jsonl", '{"text": "a", "label": "b"}\n{"text": ', ":2", "not a valid JSON", "one JSON object"),
        ("d.jsonl", '{"text": "a", "text": "b", "label": "b"}', ":1", "twice", "one JSON object"),
        ("d.jsonl", "[1]", ":1", "object", "one JSON object"),
        ("d.jsonl", "[" * 100_000, ":1", "not a valid JSON", "one JSON object"),
        ("d.jsonl", '{"label": "a"}', ":1", "no column 'text'", "--text-column"),
        ("d.jsonl", '{"text": "a", "category": "a"}', ":1", "no column 'label'", "--label-column category"),
        ("d.jsonl", "{}", ":1", "columns are none", "--text-column"),
        ("d.jsonl", '{"text": null, "label": "a"}', ":1", "no text", "column"),
        ("d.jsonl", '{"text": "a", "label": null}', ":1", "no label", "column"),
        ("d.jsonl", '{"text": 5, "label": "a"}', ":1", "'text' must be a string, not int", "quotes"),
        ("d.jsonl", '{"text": "a", "label": 1.5}', ":1", "string or an integer, not float", "quotes"),
        ("d.jsonl", '{"text": "a", "label": true}', ":1", "string or an integer, not bool", "quotes"),
        ("d.jsonl", '{"text": "a\\ud800", "label": "a"}', ":1", "surrogate", "halves"),
        ("d.jsonl", b'{"text": "a", "label": "b"}\n\xff', ":2", "not UTF-8", "UTF-8"),
        ("d.txt", "a", "", "the extension '.txt'", ".csv"),
        ("d", "a", "", "the extension ''", ".csv"),
        ("d.npz", "a", "", "not a form of text data", ".csv"),
    ],
)
def test_text_errors_name_the_place_and_what_to_do(tmp_path, name, content, place, message, hint):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        load_dataset(path, "text")
    assert caught.value.where == f"{path}{place}"
    assert hint in caught.value.hint
    assert caught.value.exit_code == ExitCode.BAD_INPUT


def test_columns_are_chosen_by_option(tmp_path):
    path = write(tmp_path / "d.csv", "sentence,category\na,b\n")
    data = load_dataset(path, "text", text_column="sentence", label_column="category")
    assert (data.samples, data.labels) == (("a",), ("b",))


@pytest.mark.parametrize(
    ("name", "content", "labels"),
    [
        ("d.csv", "text\na\nb\n", None),
        ("d.csv", "text,label\na,x\nb,\n", None),
        ("d.csv", "text,label\na,x\nb,y\n", ("x", "y")),
        ("d.jsonl", '{"text": "a"}\n{"text": "b", "label": "y"}', None),
        ("d.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": 2}', ("1", "2")),
    ],
)
def test_labels_may_be_absent_when_not_required(tmp_path, name, content, labels):
    data = load_dataset(write(tmp_path / name, content), "text", require_labels=False)
    assert data.samples == ("a", "b")
    assert data.labels == labels


def test_missing_unreadable_and_special_paths(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        load_dataset(tmp_path / "none.csv", "text")
    with pytest.raises(DataError, match="a folder is not a form of text data"):
        load_dataset(tmp_path, "text")
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    with pytest.raises(DataError, match="cannot read"):
        load_dataset(tmp_path / "loop.csv", "text")
    (tmp_path / "dev.csv").symlink_to("/dev/null")
    with pytest.raises(DataError, match="not a regular file"):
        load_dataset(tmp_path / "dev.csv", "text")
    with pytest.raises(UsageError, match="unknown kind"):
        load_dataset(tmp_path, "audio")


def test_a_file_that_cannot_be_opened(tmp_path, monkeypatch):
    path = write(tmp_path / "d.csv", "text,label\na,b\n")

    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match="cannot read: Permission denied"):
        load_dataset(path, "text")


def test_a_field_longer_than_csvs_own_limit_is_read(tmp_path):
    text = "x" * 500_000
    path = write(tmp_path / "d.csv", f"text,label\n{text},b\n")
    assert load_dataset(path, "text").samples == (text,)


@pytest.mark.parametrize(
    ("name", "content", "limits", "place", "message"),
    [
        ("d.csv", f"text,label\na,b\n{'x' * 40},b\n", DataLimits(line_bytes=20), ":3", "more than 20 bytes"),
        ("d.csv", 'text,label\na,b\n"' + "x\n" * 20, DataLimits(line_bytes=20), ":3", "more than 20 bytes"),
        ("d.jsonl", '{"text": "a"}\n' + "x" * 40, DataLimits(line_bytes=20), ":2", "more than 20 bytes"),
        ("d.csv", "text,label\na,b\nc,d\n", DataLimits(samples=1), ":3", "more than 1 rows"),
        ("d.csv", "text,label\na,b\nc,d\n", DataLimits(decoded_bytes=16), ":3", "more than 16 bytes"),
    ],
)
def test_text_limits(tmp_path, name, content, limits, place, message):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(path, "text", limits=limits, require_labels=False)
    assert caught.value.where == f"{path}{place}"


def test_limits_are_inclusive(tmp_path):
    content = "text,label\nab,cd\nef,gh\n"
    path = write(tmp_path / "d.csv", content)
    limits = DataLimits(line_bytes=len("text,label\n"), samples=2, decoded_bytes=len(content))
    assert len(load_dataset(path, "text", limits=limits)) == 2


# --- npz ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(("dtype", "kept"), [("u1", "u1"), (">f8", "f4"), ("f4", "f4"), ("f2", "f4")])
@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 4, 5, 2)])
def test_npz(tmp_path, save, dtype, kept, shape):
    images = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    path = tmp_path / "d.npz"
    save(path, images=np.asfortranarray(images), labels=np.array([7, 10, 7]), other=np.zeros(3))
    data = load_dataset(path, "image", image_size=(4, 5))
    assert data.samples.dtype == kept
    np.testing.assert_array_equal(data.samples, images)
    assert data.labels == ("7", "10", "7")
    assert data.places[2] == f"{path}[2]"


def test_npz_string_labels_and_no_labels(tmp_path):
    path = tmp_path / "d.npz"
    np.savez(path, images=np.zeros((2, 3, 3), np.uint8), labels=np.array(["chat", "é"]))
    assert load_dataset(path, "image").labels == ("chat", "é")
    np.savez(path, images=np.zeros((2, 3, 3), np.uint8))
    assert load_dataset(path, "image", require_labels=False).labels is None


IMAGES = np.zeros((2, 3, 4), np.uint8)
LABELS = np.array([0, 1])


@pytest.mark.parametrize(
    ("arrays", "place", "message", "hint"),
    [
        ({"labels": LABELS}, "", "'images' is missing", "np.savez"),
        ({"images": IMAGES}, "", "'labels' is missing", "np.savez"),
        ({"images": IMAGES, "labels": LABELS[:1]}, "", "2 images but 1 labels", "one label per image"),
        ({"images": IMAGES.astype("i8"), "labels": LABELS}, ": images", "dtype int64", "uint8"),
        ({"images": IMAGES.astype("c8"), "labels": LABELS}, ": images", "dtype complex64", "uint8"),
        ({"images": IMAGES.astype(object), "labels": LABELS}, ": images", "dtype object", "uint8"),
        ({"images": IMAGES[0], "labels": LABELS}, ": images", "shape [3, 4]", "channels come last"),
        ({"images": IMAGES[:, :0], "labels": LABELS}, ": images", "shape [2, 0, 4]", "channels come last"),
        ({"images": np.uint8(3), "labels": LABELS}, ": images", "shape []", "channels come last"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "", "empty", "image"),
        ({"images": IMAGES, "labels": LABELS[:, None]}, ": labels", "shape [2, 1]", "one integer or string"),
        ({"images": IMAGES, "labels": np.int64(3)}, ": labels", "shape []", "one integer or string"),
        ({"images": IMAGES, "labels": LABELS * 1.0}, ": labels", "dtype float64", "one integer or string"),
        ({"images": IMAGES, "labels": LABELS.astype(object)}, ": labels", "dtype object", "one integer"),
        ({"images": IMAGES, "labels": np.array(["a", " "])}, "[1]", "label is empty", "label"),
    ],
)
def test_npz_errors(tmp_path, arrays, place, message, hint):
    path = tmp_path / "d.npz"
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        load_dataset(path, "image")
    assert caught.value.where == f"{path}{place}"
    assert hint in caught.value.hint


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_npz_names_the_image_that_is_not_finite(tmp_path, value):
    images = np.zeros((3, 2, 2))
    images[1, 1, 0] = value
    np.savez(tmp_path / "d.npz", images=images, labels=np.arange(3))
    with pytest.raises(DataError, match="NaN, infinity") as caught:
        load_dataset(tmp_path / "d.npz", "image")
    assert caught.value.where == f"{tmp_path / 'd.npz'}[1]"


def npy_header(shape: str, descr: str = "|u1", version: bytes = b"\x01\x00") -> bytes:
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text


def npz_of(path: Path, content: bytes, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("images.npy", content)
        archive.writestr("labels.npy", npy_header("(1,)", "<i8") + b"\0" * 8)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy_header(f"({2**40}, 8, 8)"), "over the limit"),
        (npy_header("(1, 2, 2)") + b"\0" * 2**22, "over the limit"),
        (npy_header("(1, 8, 8)"), "plain arrays"),
        (npy_header("(-1, 8, 8)"), "negative size"),
        (npy_header("(1, 8, 8)", version=b"\x03\x00"), "array format"),
        (npy_header("(" * 400), "plain arrays"),
        (npy_header("1L, '"), "plain arrays"),
        (b"pickle", "plain arrays"),
        (b"", "plain arrays"),
    ],
)
@pytest.mark.filterwarnings("ignore:Reading `.npy`")
def test_npz_with_a_lying_or_damaged_array_is_refused(tmp_path, content, message):
    path = npz_of(tmp_path / "d.npz", content)
    with pytest.raises(DataError, match=message):
        load_dataset(path, "image", limits=DataLimits(decoded_bytes=2**20))


def test_npz_more_samples_than_the_limit(tmp_path):
    np.savez(tmp_path / "d.npz", images=IMAGES, labels=LABELS)
    with pytest.raises(DataError, match="over the limit of 1 images"):
        load_dataset(tmp_path / "d.npz", "image", limits=DataLimits(samples=1))


def test_npz_damage_anywhere_is_a_data_error(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (4, 6, 6)).astype(np.uint8)
    path = tmp_path / "d.npz"
    np.savez_compressed(path, images=images, labels=np.arange(4))
    good = path.read_bytes()
    generator = np.random.default_rng(1)
    refused = 0
    for _ in range(300):
        raw = bytearray(good[: generator.integers(1, len(good))] if generator.random() < 0.2 else good)
        raw[generator.integers(len(raw))] ^= 1 << generator.integers(8)
        path.write_bytes(raw)
        try:
            load_dataset(path, "image")
        except DataError:
            refused += 1
    assert refused > 150


def test_npz_compressed_otherwise_is_refused(tmp_path):
    path = npz_of(tmp_path / "d.npz", npy_header("(1, 1, 1)") + b"\0", zipfile.ZIP_LZMA)
    with pytest.raises(DataError, match="encrypted, or compressed"):
        load_dataset(path, "image")


def test_npz_channels_are_checked_not_converted(tmp_path):
    path = tmp_path / "d.npz"
    np.savez(path, images=IMAGES, labels=LABELS)
    assert load_dataset(path, "image", channels=1).samples.shape == (2, 3, 4)
    with pytest.raises(DataError, match="1 channels; expected 3"):
        load_dataset(path, "image", channels=3)


@pytest.mark.parametrize("dtype", ["u1", "f4"])
@pytest.mark.parametrize("channels", [None, 3, 5])
def test_npz_is_resized(tmp_path, dtype, channels):
    pytest.importorskip("PIL")
    shape = (2, 8, 4) if channels is None else (2, 8, 4, channels)
    path = tmp_path / "d.npz"
    np.savez(path, images=np.full(shape, 9, dtype), labels=LABELS)
    data = load_dataset(path, "image", image_size=(3, 6))
    assert data.samples.shape == (2, 3, 6, *shape[3:])
    assert data.samples.dtype == dtype
    assert (data.samples == 9).all()


def test_without_pillow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    np.savez(tmp_path / "d.npz", images=IMAGES, labels=LABELS)
    assert len(load_dataset(tmp_path / "d.npz", "image", image_size=(3, 4))) == 2
    with pytest.raises(MissingEngineError, match="from 3x4 to 8x8 needs Pillow") as caught:
        load_dataset(tmp_path / "d.npz", "image", image_size=(8, 8))
    assert "edge-tcur-runtime[image]" in caught.value.hint
    with pytest.raises(MissingEngineError, match="reading image files") as caught:
        load_dataset(tmp_path, "image", image_size=(8, 8), channels=1)
    assert "edge-tcur-runtime[image]" in caught.value.hint


# --- folders ------------------------------------------------------------------------------------


def folder_of(root: Path, names) -> Path:
    image_module = pytest.importorskip("PIL.Image")
    for index, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image_module.new("RGB", (6, 4), (index * 10, 0, 255)).save(root / name)
    return root


def read_folder(root: Path, **options) -> Dataset:
    return load_dataset(root, "image", **{"image_size": (2, 3), "channels": 3, **options})


def test_folder_is_sorted_resized_and_labelled_by_folder(tmp_path):
    root = folder_of(tmp_path, ["dog/b.png", "cat/z.BMP", "dog/a.png", ".hidden/a.png", "cat/._z.png"])
    write(root / "cat" / "notes.txt", "x")
    write(root / "readme.md", "x")
    data = read_folder(root)
    assert data.labels == ("cat", "dog", "dog")
    assert [Path(place).name for place in data.places] == ["z.BMP", "a.png", "b.png"]
    assert data.samples.shape == (3, 2, 3, 3)
    assert data.samples.dtype == np.uint8
    assert data.samples[:, 0, 0].tolist() == [[10, 0, 255], [20, 0, 255], [0, 0, 255]]
    assert read_folder(root, channels=1).samples.shape == (3, 2, 3, 1)
    assert read_folder(root, channels=4).samples[0, 0, 0].tolist() == [10, 0, 255, 255]


def test_folder_turns_photographs_upright(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    image = image_module.new("L", (4, 2))
    image.putpixel((0, 0), 255)
    exif = image_module.Exif()
    exif[0x0112] = 6  # turn clockwise by a quarter
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / "p.png", exif=exif)
    upright = read_folder(tmp_path, image_size=(4, 2), channels=1).samples[0, ..., 0]
    assert np.argwhere(upright == 255).tolist() == [[0, 1]]


def test_flat_folder_without_labels(tmp_path):
    root = folder_of(tmp_path, ["b.png", "a.jpeg"])
    data = read_folder(root, require_labels=False)
    assert data.labels is None
    assert len(data) == 2
    with pytest.raises(DataError, match="beside the class folders") as caught:
        read_folder(root)
    assert caught.value.where == str(root / "a.jpeg")
    (root / "cat").mkdir()
    with pytest.raises(DataError, match="beside the class folders"):
        read_folder(root, require_labels=False)


def test_folder_errors(tmp_path):
    with pytest.raises(DataError, match="needs the size and the number of channels"):
        load_dataset(tmp_path, "image")
    with pytest.raises(DataError, match="2 channels"):
        read_folder(tmp_path, channels=2)
    pytest.importorskip("PIL")
    with pytest.raises(DataError, match="empty"):
        read_folder(tmp_path)
    root = folder_of(tmp_path, ["cat/a.png"])
    (root / "dog").mkdir()
    with pytest.raises(DataError, match="holds no") as caught:
        read_folder(root)
    assert caught.value.where == str(root / "dog")
    with pytest.raises(DataError, match=r"the extension '\.png'"):
        load_dataset(root / "cat" / "a.png", "image")


def test_folder_limits(tmp_path):
    root = folder_of(tmp_path, ["cat/a.png", "dog/a.png"])
    with pytest.raises(DataError, match="more images than the limit"):
        read_folder(root, limits=DataLimits(samples=1))
    with pytest.raises(DataError, match="over the limit of 35 bytes"):
        read_folder(root, limits=DataLimits(decoded_bytes=35))
    with pytest.raises(DataError, match="6x4 pixels; the limit is 23") as caught:
        read_folder(root, limits=DataLimits(image_pixels=23))
    assert caught.value.where == str(root / "cat" / "a.png")
    assert len(read_folder(root, limits=DataLimits(samples=2, decoded_bytes=36, image_pixels=24))) == 2


def test_folder_image_that_cannot_be_decoded(tmp_path):
    root = folder_of(tmp_path, ["cat/a.png"])
    good = (root / "cat" / "a.png").read_bytes()
    for raw in (b"", b"GIF89a", good[:40], good[:50], good[:20] + b"\xff" * 8 + good[28:]):
        bad = write(root / "cat" / "b.png", raw)
        with pytest.raises(DataError, match="cannot decode") as caught:
            read_folder(root)
        assert caught.value.where == str(bad)


def test_folder_refuses_a_decompression_bomb_and_16_bit_images(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    root = folder_of(tmp_path, ["cat/a.png"])
    image_module.new("1", (10_000, 10_000)).save(root / "cat" / "b.png")
    with pytest.raises(DataError, match="cannot decode"):
        read_folder(root)
    image_module.fromarray(np.zeros((4, 4), np.uint16)).save(root / "cat" / "b.png")
    with pytest.raises(DataError, match="more than 8 bits"):
        read_folder(root)


# --- labels and splits --------------------------------------------------------------------------


def test_label_names_sort_integers_numerically():
    assert label_names(labelled(["10", "9", "-1", "9"])) == ("-1", "9", "10")
    assert label_names(labelled(["10", "9", "a"])) == ("10", "9", "a")
    assert label_names(labelled(["01", "1", "0"])) == ("0", "01", "1")


def test_encode_labels():
    codes = encode_labels(labelled(["b", "a", "b"]), ("a", "b"))
    assert codes.dtype == np.int64
    assert codes.tolist() == [1, 0, 1]
    with pytest.raises(DataError, match="unknown label 'card_lots'") as caught:
        encode_labels(labelled(["card_lost", "card_lots"]), ("card_lost", "refund"))
    assert caught.value.where == "d.csv:3"
    assert caught.value.hint == "did you mean 'card_lost'?"
    with pytest.raises(DataError) as caught:
        encode_labels(labelled(["zzz"]), [f"intent {i}" for i in range(12)])
    assert "intent 9, …" in caught.value.hint


def test_unlabelled_data_have_no_label_functions():
    data = Dataset("text", ("a",), None, "d.csv", ("d.csv:1",))
    assert data.select([0]).labels is None
    for call in (
        label_names,
        check_trainable,
        lambda d: encode_labels(d, ("a",)),
        lambda d: split(d, 0.5, 0),
    ):
        with pytest.raises(DataError, match="no labels"):
            call(data)


def test_check_trainable():
    check_trainable(labelled(["a", "b"]))
    with pytest.raises(DataError, match="at least two classes"):
        check_trainable(labelled(["a", "a"]))
    with pytest.raises(DataError, match="empty"):
        check_trainable(labelled([]))


def test_select_keeps_samples_labels_and_places_together():
    chosen = labelled(["a", "b", "c"]).select(np.array([2, 0]))
    assert (chosen.samples, chosen.labels) == (("sample 2", "sample 0"), ("c", "a"))
    assert chosen.places == ("d.csv:4", "d.csv:2")
    assert len(chosen.select([])) == 0
    images = Dataset("image", np.arange(12).reshape(3, 2, 2), None, "d", ("0", "1", "2"))
    np.testing.assert_array_equal(images.select([1]).samples, [[[4, 5], [6, 7]]])
    assert images.select([]).samples.shape == (0, 2, 2)


@given(
    labels=st.lists(st.sampled_from("abcde"), min_size=1, max_size=60),
    fraction=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 2**64),
)
@settings(max_examples=200)
def test_split_is_a_stratified_partition(labels, fraction, seed):
    data = labelled(labels)
    train, held = split(data, fraction, seed)
    assert sorted((*train.places, *held.places)) == sorted(data.places)
    assert dict(zip(data.places, data.labels, strict=True)) == {
        **dict(zip(train.places, train.labels, strict=True)),
        **dict(zip(held.places, held.labels, strict=True)),
    }
    kept, out = Counter(train.labels), Counter(held.labels)
    for label, count in Counter(labels).items():
        assert kept[label] >= 1
        assert abs(out[label] - count * fraction) <= 1
    wanted = max(round(len(labels) * fraction), 1 if fraction else 0)
    assert len(held) <= wanted
    if all(count * (1 - fraction) >= 2 for count in Counter(labels).values()):
        assert len(held) == wanted
    assert split(data, fraction, seed)[0].places == train.places


def test_split_keeps_single_samples_in_training_and_uses_the_seed():
    data = labelled(["a"] * 40 + ["b"] * 40 + ["c"])
    train, held = split(data, 0.25, 3)
    assert Counter(held.labels) == {"a": 10, "b": 10}
    assert "c" in train.labels
    assert split(data, 0.25, 4)[1].places != held.places
    assert len(split(data, 0, 3)[1]) == 0
    assert [len(part) for part in split(labelled(["a", "b"]), 0.5, 0)] == [2, 0]


@pytest.mark.parametrize(("fraction", "seed"), [(1, 0), (-0.1, 0), (float("nan"), 0), (0.5, -1)])
def test_split_refuses_a_fraction_or_seed_out_of_range(fraction, seed):
    with pytest.raises(UsageError, match="cannot split"):
        split(labelled(["a", "b"]), fraction, seed)


# --- the documentation --------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["csv", "jsonl"])
def test_documented_text_examples_load(tmp_path, language):
    blocks = re.findall(rf"```{language}\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        reads = "values" if "price" in block else "labels" if "|" in block else "label"
        columns = "price,rooms" if reads == "values" else "label"
        layout = Layout("text", reads, label_column=columns)
        check_trainable(read_dataset(write(tmp_path / f"d.{language}", block), layout))


def test_documented_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(DOCS), "exec"), {})


def test_importing_the_readers_needs_neither_torch_nor_the_extras():
    code = (
        "import sys, edge_tcur_runtime.data, edge_tcur_runtime.preprocess\n"
        "print({'torch', 'PIL', 'tokenizers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
