"""Targets other than one label a sample: numbers, label lists, masks, and a language model's none."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_tcur_runtime.data import (
    Dataset,
    Layout,
    check_trainable,
    encode_targets,
    label_names,
    read_dataset,
    split,
)
from edge_tcur_runtime.errors import DataError, UsageError


def read(path, kind, reads, **settings):
    return read_dataset(path, Layout(kind, reads, **settings))


def test_numbers_of_a_csv_come_from_the_named_columns(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,price,note,weight\nred,1.5,x,-2e1\nblue, 3 ,y,0\n")
    data = read(path, "text", "values", label_column="weight, price")
    assert data.names == label_names(data) == ("weight", "price")
    assert data.targets.dtype == np.float32
    assert data.targets.tolist() == [[-20, 1.5], [0, 3]]
    assert encode_targets(data, ("weight", "price")).tolist() == data.targets.tolist()
    assert data.select([1]).targets.tolist() == [[0, 3]]
    with pytest.raises(DataError, match="the data have weight, price; the outputs are price, weight"):
        encode_targets(data, ("price", "weight"))


@pytest.mark.parametrize("cell", ["nan", "inf", "-Infinity", "1e39", "3,5", "1_000", "12 kg", "٣", "0x10"])
@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_cell_that_is_no_finite_number_is_named(tmp_path, cell, form):
    path = tmp_path / f"a.{form}"
    if form == "csv":
        path.write_text(f'text,price\nred,1\nblue,"{cell}"\n', encoding="utf-8")
        expected, where = re.escape(f"{cell!r} in the column 'price' is not a finite number"), f"{path}:3"
    else:
        path.write_text('{"text": "red", "price": 1}\n' + json.dumps({"text": "b", "price": cell}) + "\n")
        expected, where = "'price' must be a number, not str", f"{path}:2"
    with pytest.raises(DataError, match=expected) as caught:
        read(path, "text", "values", label_column="price")
    assert caught.value.where == where


def test_an_empty_number_is_named_unless_the_row_needs_none(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,a,b\nred,1,2\nblue,,\n")
    with pytest.raises(DataError, match="no label in the column 'a'") as caught:
        read(path, "text", "values", label_column="a,b")
    assert caught.value.where == f"{path}:3"
    assert not read(path, "text", "values", label_column="a,b", require_labels=False).has_targets
    path.write_text("text,a,b\nred,1,2\nblue,1,\n")  # half of a row is a mistake
    with pytest.raises(DataError, match="no label in the column 'b'"):
        read(path, "text", "values", label_column="a,b", require_labels=False)
    with pytest.raises(DataError, match="no column 'c'"):
        read(path, "text", "values", label_column="a,c")
    assert not read(path, "text", "values", label_column="a,c", require_labels=False).has_targets


@pytest.mark.parametrize("columns", ["a,,b", "a,a", ""])
def test_columns_are_named_once_each(columns):
    with pytest.raises(UsageError, match="are not names, each given once"):
        Layout("text", "values", label_column=columns)


def test_an_unknown_form_of_targets_is_refused():
    for kind, reads in (("text", "masks"), ("image", "boxes")):
        with pytest.raises(UsageError, match=f"{kind} data are not read with '{reads}' as targets"):
            Layout(kind, reads)


@pytest.mark.parametrize("form", ["csv", "jsonl", "list", "npz"])
def test_label_lists(tmp_path, form):
    """Any number of labels a sample, none of them too, in every kind of file."""
    lists = ["red|big", "", "10", "big|red"]
    path = tmp_path / f"a.{'jsonl' if form == 'list' else form}"
    if form == "csv":
        path.write_text("text,label\n" + "".join(f"t,{item}\n" for item in lists))
    elif form == "npz":
        np.savez(path, images=np.zeros((4, 2, 2), np.uint8), labels=np.array(lists))
    else:
        values = [item.split("|") if item else [] for item in lists] if form == "list" else lists
        path.write_text("".join(json.dumps({"text": "t", "label": value}) + "\n" for value in values))
    data = read(path, "image" if form == "npz" else "text", "labels")
    assert label_names(data) == ("10", "big", "red")
    codes = encode_targets(data, ("red", "big", "10"))
    assert codes.dtype == np.float32
    assert codes.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1], [1, 1, 0]]
    with pytest.raises(DataError, match="unknown label 'big'") as caught:
        encode_targets(data, ("red", "bog"))
    assert caught.value.where == data.places[0]
    assert caught.value.hint == "did you mean 'bog'?"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a||b", "a label in 'a||b' is empty"),
        ("a|", "a label in 'a|' is empty"),
        ("a|b|a", "the label 'a' is named twice"),
        (["a|b"], r"the label 'a\|b' is empty or holds '\|'"),
        ([1.5], "'label' must be a string or an integer, not float"),
        ({"a": 1}, "'label' must be a string or an integer, or a list of them, not dict"),
    ],
)
def test_malformed_label_lists_are_named(tmp_path, value, message):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "t", "label": value}) + "\n")
    with pytest.raises(DataError, match=message.replace("||", r"\|\|").replace("a|'", r"a\|'")) as caught:
        read(path, "text", "labels")
    assert caught.value.where == f"{path}:1"


def test_data_of_a_language_model_are_text_alone(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\nred,\nblue,x\n")
    data = read(path, "text", "nothing")
    assert data.labels is None
    assert data.has_targets
    assert label_names(data) == ()
    assert encode_targets(data, ()).shape == (2, 0)
    check_trainable(data)
    assert [len(part) for part in split(data, 0.5, 0)] == [1, 1]


def test_numbers_of_pictures(tmp_path):
    path = tmp_path / "a.npz"
    images = np.zeros((2, 2, 2), np.uint8)
    np.savez(path, images=images, targets=np.array([1, 2]))
    assert read(path, "image", "values", label_column="age").targets.tolist() == [[1], [2]]
    np.savez(path, images=images, targets=np.array([[1.5, 2], [np.nan, 0]]))
    with pytest.raises(DataError, match="a target is NaN") as caught:
        read(path, "image", "values", label_column="a,b")
    assert caught.value.where == f"{path}[1]"
    np.savez(path, images=images, targets=np.zeros((2, 2)))
    with pytest.raises(DataError, match="the array 'targets' has 2 columns; 1 are named: label"):
        read(path, "image", "values")
    np.savez(path, images=images, targets=np.zeros(3))
    with pytest.raises(DataError, match="2 images but 3 targets"):
        read(path, "image", "values")
    np.savez(path, images=images, targets=np.array(["1", "2"]))
    with pytest.raises(DataError, match="expected \\[n\\] or \\[n, columns\\] numbers"):
        read(path, "image", "values")


def test_masks(tmp_path):
    path = tmp_path / "a.npz"
    images, masks = np.zeros((2, 4, 2, 3), np.uint8), np.zeros((2, 4, 2), np.uint8)
    masks[1, 0, 0] = 2
    np.savez(path, images=images, masks=masks)
    data = read(path, "image", "masks", image_size=(4, 2), channels=3)
    assert data.targets.dtype == np.int64
    assert label_names(data) == ("0", "1", "2")
    np.testing.assert_array_equal(encode_targets(data, ("a", "b", "c")), masks)
    with pytest.raises(DataError, match="the class 2; the classes are 0 to 1") as caught:
        encode_targets(data, ("a", "b"))
    assert caught.value.where == f"{path}[1]"
    np.savez(path, images=images, masks=masks, names=np.array(["sky", "sea", "sun", "none"]))
    named = read(path, "image", "masks", image_size=(4, 2))
    assert label_names(named) == ("sky", "sea", "sun", "none")
    with pytest.raises(DataError, match="the data have sky, sea, sun, none; the outputs are a, b, c, d"):
        encode_targets(named, tuple("abcd"))


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (np.zeros((2, 4, 3), np.int32), r"masks of shape \[2, 4, 3\]; expected \[2, 4, 2\]"),
        (np.zeros((3, 4, 2), np.int32), "2 images but 3 masks"),
        (np.zeros((2, 4, 2), np.float32), "expected \\[n, height, width\\] integers"),
        (np.array([[[0, 0]] * 4, [[0, -1]] * 4]), "the class -1; classes are numbered from 0"),
    ],
)
def test_wrong_masks_are_named(tmp_path, masks, message):
    path = tmp_path / "a.npz"
    np.savez(path, images=np.zeros((2, 4, 2), np.uint8), masks=masks)
    with pytest.raises(DataError, match=message):
        read(path, "image", "masks", image_size=(4, 2))


def test_masks_are_resized_with_their_pictures_and_hold_no_other_classes(tmp_path):
    pytest.importorskip("PIL")
    path = tmp_path / "a.npz"
    masks = np.arange(4).reshape(1, 2, 2).repeat(3, axis=1).repeat(3, axis=2) * 7
    np.savez(path, images=np.zeros((1, 6, 6), np.uint8), masks=masks)
    data = read(path, "image", "masks", image_size=(4, 2))
    assert data.samples.shape == (1, 4, 2)
    assert data.targets.tolist() == [[[0, 7], [0, 7], [14, 21], [14, 21]]]


def test_volumes_are_read_but_not_resized(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, images=np.zeros((2, 3, 4, 2), np.uint8), masks=np.zeros((2, 3, 4, 2), np.uint8))
    data = read(path, "image", "masks", image_size=(3, 4, 2), channels=1)
    assert data.targets.shape == (2, 3, 4, 2)
    with pytest.raises(DataError, match="volumes of 3x4x2; expected 3x4x4"):
        read(path, "image", "masks", image_size=(3, 4, 4), channels=1)
    with pytest.raises(DataError, match="the images have 2 channels; expected 1"):
        read(path, "image", "masks", image_size=(3, 4), channels=1)
    with pytest.raises(DataError, match="every pixel has the same class"):
        check_trainable(data)


def test_what_nothing_can_be_learnt_from_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,\nb,\n")
    with pytest.raises(DataError, match="no sample has a label"):
        check_trainable(read(path, "text", "labels"))
    with pytest.raises(DataError, match="a folder of images gives one label an image; the task takes masks"):
        read(tmp_path, "image", "masks", image_size=(2, 2), channels=1)


@given(count=st.integers(1, 30), fraction=st.floats(0, 0.99), seed=st.integers(0, 9))
def test_data_without_one_label_a_sample_are_split_at_random(count, fraction, seed):
    texts = tuple(map(str, range(count)))
    data = Dataset(
        "text", texts, None, "made", texts, np.arange(count, dtype=np.float32)[:, None], "values", ("x",)
    )
    kept, held = split(data, fraction, seed)
    assert sorted([*kept.samples, *held.samples], key=int) == list(texts)
    assert len(kept) >= 1
    assert len(held) == min(max(round(count * fraction), fraction > 0), count - 1)
    assert [int(text) for text in held.samples] == held.targets[:, 0].tolist()
