"""Readers of pictures, in an .npz file and in folders, and every error with its place."""

from __future__ import annotations

import re
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from edge_tcur_runtime.data import (
    DataLimits,
    Dataset,
    load_dataset,
)
from edge_tcur_runtime.errors import DataError, MissingEngineError

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
    (root / "cat" / "notes.txt").write_text("x")
    (root / "readme.md").write_text("x")
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
        bad = root / "cat" / "b.png"
        bad.write_bytes(raw)
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
