"""Readers of text, labels and splits, and every error with its place."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
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
from edge_tcur_runtime.errors import DataError, ExitCode, UsageError

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
