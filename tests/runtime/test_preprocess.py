"""Preprocessing: exact pixels and tokens, and every refused specification and sample."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_tcur_runtime.errors import BadInputError, DataError, FileFormatError, MissingEngineError
from edge_tcur_runtime.preprocess import build_preprocessor

IMAGE = {
    "kind": "image", "input": "pixel_values", "height": 3, "width": 2, "channels": 1,
    "scale": 0.0625, "mean": [0.0], "std": [1.0],
}  # fmt: skip
COLOUR = {**IMAGE, "channels": 3, "scale": 0.5, "mean": [1, 2.0, 3.0], "std": [1.0, 2.0, 4.0]}
TEXT = {
    "kind": "text", "tokenizer": "tokenizer.json", "max_length": 8, "pad_id": 9,
    "inputs": ["input_ids", "attention_mask"], "buckets": [4, 8],
}  # fmt: skip
VOCABULARY = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "b": 4}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A directory with a word tokenizer that adds [CLS] and [SEP] and has its own padding set."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(3)
    path = tmp_path_factory.mktemp("bundle")
    tokenizer.save(str(path / "tokenizer.json"))
    return path


# --- images -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["u1", "f4", ">f8", "f2"])
@pytest.mark.parametrize("last", [(), (1,)])
def test_grey_images(tmp_path, dtype, last):
    images = np.arange(12).reshape(2, 3, 2, *last).astype(dtype)
    inputs = build_preprocessor(IMAGE, tmp_path)(images)
    assert list(inputs) == ["pixel_values"]
    pixels = inputs["pixel_values"]
    assert pixels.dtype == np.float32
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, np.arange(12, dtype=np.float32).reshape(2, 1, 3, 2) / 16)


def test_colour_images_are_normalised_per_channel_and_left_untouched(tmp_path):
    images = np.random.default_rng(0).random((4, 3, 2, 3), np.float32)
    before = images.copy()
    pixels = build_preprocessor(COLOUR, tmp_path)(images)["pixel_values"]
    expected = (before.astype(np.float64) * 0.5 - [1, 2, 3]) / [1, 2, 4]
    np.testing.assert_allclose(pixels, expected.transpose(0, 3, 1, 2), rtol=1e-6)
    np.testing.assert_array_equal(images, before)


def test_no_images_give_an_empty_batch(tmp_path):
    pixels = build_preprocessor(IMAGE, tmp_path)(np.zeros((0, 3, 2), np.uint8))["pixel_values"]
    assert pixels.shape == (0, 1, 3, 2)


@pytest.mark.parametrize(
    ("spec", "samples", "message"),
    [
        (
            IMAGE,
            np.zeros((2, 2, 3), np.uint8),
            "shape [2, 2, 3]; expected [n, 3, 2, 1] or without the last axis",
        ),
        (IMAGE, np.zeros((2, 3, 2, 3), np.uint8), "shape [2, 3, 2, 3]; expected [n, 3, 2, 1]"),
        (COLOUR, np.zeros((2, 3, 2), np.uint8), "shape [2, 3, 2]; expected [n, 3, 2, 3]"),
        (IMAGE, np.zeros((3, 2), np.uint8), "shape [3, 2]"),
        (IMAGE, np.zeros((2, 3, 2), np.int64), "not int64"),
        (IMAGE, ["text"], "not list"),
        (IMAGE, np.full((1, 3, 2), np.nan), "NaN"),
        (IMAGE, np.full((1, 3, 2), 1e300), "too large"),
    ],
)
def test_images_that_do_not_fit_are_refused(tmp_path, spec, samples, message):
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        build_preprocessor(spec, tmp_path)(samples)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "sound"}, "'sound'"),
        ({"heigth": 3}, "unknown field 'heigth'"),
        ({"height": 0}, "'height' is 0"),
        ({"width": 10**9}, "'width'"),
        ({"channels": True}, "'channels' must be an integer"),
        ({"scale": float("inf")}, "finite"),
        ({"scale": "1"}, "'scale' must be a number"),
        ({"mean": [0.0, 0.0]}, "'mean' must hold 1 finite numbers"),
        ({"mean": [float("nan")]}, "'mean' must hold 1 finite"),
        ({"mean": ["0"]}, "'mean' must hold 1 finite"),
        ({"mean": [True]}, "'mean' must hold 1 finite"),
        ({"std": [0.0]}, "'std' must hold numbers above 0"),
        ({"input": 3}, "'input' must be a string"),
    ],
)
def test_image_specification_errors(tmp_path, change, message):
    with pytest.raises(FileFormatError, match=re.escape(message)) as caught:
        build_preprocessor({**IMAGE, **change}, tmp_path)
    assert caught.value.where.endswith("manifest.json: preprocessing")


@pytest.mark.parametrize("spec", [IMAGE, TEXT])
def test_every_field_is_required(root, spec):
    for key in spec:
        with pytest.raises(FileFormatError, match=f"'{key}' is missing"):
            build_preprocessor({k: v for k, v in spec.items() if k != key}, root)


# --- text ---------------------------------------------------------------------------------------


def test_text_is_padded_to_the_smallest_bucket(root):
    inputs = build_preprocessor(TEXT, root)(["a b", "", "zzz"])
    assert list(inputs) == ["input_ids", "attention_mask"]
    assert all(value.dtype == np.int64 for value in inputs.values())
    assert inputs["input_ids"].tolist() == [[1, 3, 4, 2], [1, 2, 9, 9], [1, 0, 2, 9]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert build_preprocessor(TEXT, root)(["a b a"])["input_ids"].shape == (1, 8)


def test_truncation_keeps_the_special_tokens(root):
    ids = build_preprocessor(TEXT, root)(["a " * 50])["input_ids"]
    assert ids.tolist() == [[1, 3, 3, 3, 3, 3, 3, 2]]


def test_inputs_come_in_the_models_order(root):
    spec = {**TEXT, "inputs": ["token_type_ids", "input_ids"]}
    inputs = build_preprocessor(spec, root)(["a"])
    assert list(inputs) == ["token_type_ids", "input_ids"]
    assert inputs["token_type_ids"].tolist() == [[0, 0, 0, 0]]


def test_no_texts_give_an_empty_batch(root):
    assert build_preprocessor(TEXT, root)([])["input_ids"].shape == (0, 4)


@given(
    texts=st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=40), min_size=1, max_size=6)
)
@settings(max_examples=60)
def test_a_sample_gives_the_same_tokens_alone_and_in_a_batch(root, texts):
    preprocessor = build_preprocessor(TEXT, root)
    batch = preprocessor(texts)
    assert batch["input_ids"].shape[1] in TEXT["buckets"]
    for index, text in enumerate(texts):
        alone = preprocessor([text])
        length = int(alone["attention_mask"].sum())
        assert batch["attention_mask"][index].sum() == length
        ids = batch["input_ids"][index]
        assert ids[:length].tolist() == alone["input_ids"][0, :length].tolist()
        assert (ids[length:] == TEXT["pad_id"]).all()


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ("one text", "not one text"),
        (["a", 3], "sample 1 of the batch is int"),
        (np.zeros((2, 2)), "sample 0 of the batch is ndarray"),
        (["a", "\udce9"], "sample 1 of the batch is not Unicode"),
    ],
)
def test_samples_that_are_no_text_are_refused(root, samples, message):
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        build_preprocessor(TEXT, root)(samples)
    assert caught.value.hint


def test_a_sample_without_tokens_is_refused(tmp_path, root):
    document = json.loads((root / "tokenizer.json").read_text())
    document["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="sample 1 of the batch gives no token"):
        build_preprocessor(TEXT, tmp_path)(["a", " "])


def test_a_tokenizer_that_fails_on_a_word_is_a_data_error(tmp_path, root):
    document = json.loads((root / "tokenizer.json").read_text())
    document["model"]["unk_token"] = "[GONE]"
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="the tokenizer fails"):
        build_preprocessor(TEXT, tmp_path)(["zzz"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokeniser": "x"}, "unknown field 'tokeniser'"),
        ({"tokenizer": "../tokenizer.json"}, "expected the name of a file"),
        ({"tokenizer": "/etc/passwd"}, "expected the name of a file"),
        ({"tokenizer": "a\\b"}, "expected the name of a file"),
        ({"tokenizer": ".."}, "expected the name of a file"),
        ({"tokenizer": ""}, "expected the name of a file"),
        ({"max_length": 0}, "'max_length' is 0"),
        ({"max_length": 2, "buckets": [2]}, "the tokenizer adds 2 special tokens"),
        ({"pad_id": -1}, "'pad_id' is -1"),
        ({"inputs": []}, "'inputs'"),
        ({"inputs": ["attention_mask"]}, "'inputs'"),
        ({"inputs": ["input_ids", "input_ids"]}, "'inputs'"),
        ({"inputs": ["input_ids", "labels"]}, "'inputs'"),
        ({"buckets": []}, "'buckets'"),
        ({"buckets": [4]}, "'buckets'"),
        ({"buckets": [4, 16]}, "'buckets'"),
        ({"buckets": [8, 4]}, "'buckets'"),
        ({"buckets": [4, 4, 8]}, "'buckets'"),
        ({"buckets": [0, 8]}, "'buckets'"),
        ({"buckets": ["4", 8]}, "'buckets'"),
    ],
)
def test_text_specification_errors(root, change, message):
    with pytest.raises(FileFormatError, match=re.escape(message)) as caught:
        build_preprocessor({**TEXT, **change}, root)
    assert caught.value.where.startswith(str(root))


@pytest.mark.parametrize("raw", [b"", b"{}", b"\xff", b"[1]"])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, raw):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_bytes(raw)
    with pytest.raises(FileFormatError, match="not a tokenizer"):
        build_preprocessor(TEXT, tmp_path)


def test_a_missing_tokenizer_file(tmp_path):
    pytest.importorskip("tokenizers")
    with pytest.raises(BadInputError, match="cannot read"):
        build_preprocessor(TEXT, tmp_path)


def test_without_tokenizers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingEngineError, match="needs the library tokenizers") as caught:
        build_preprocessor(TEXT, tmp_path)
    assert "edge-tcur-runtime[text]" in caught.value.hint
