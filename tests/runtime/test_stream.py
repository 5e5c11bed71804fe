"""Answers to samples as they come: in order, in bounded memory, and up to the first that cannot be used."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_tcur_runtime.data.limits import DataLimits
from edge_tcur_runtime.data.text import stream_jsonl
from edge_tcur_runtime.errors import DataError, UsageError
from edge_tcur_runtime.installed import find_onnxruntime
from edge_tcur_runtime.predict import Model

V1 = Path(__file__).parents[1] / "data" / "bundle-v1"
needs_onnxruntime = pytest.mark.skipif(find_onnxruntime() is None, reason="ONNX Runtime is not installed")


# --- the model -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(bundle):
    return Model(bundle, threads=1, check=False)


@needs_onnxruntime
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_stream_answers_as_predict_does_in_the_same_order(model, user, batch_size):
    found = list(model.stream(iter(user.samples[:10]), batch_size=batch_size))
    expected = model.predict(user.samples[:10], batch_size=batch_size)
    assert [answer.to_dict() for answer in found] == [answer.to_dict() for answer in expected]


@needs_onnxruntime
def test_no_more_than_one_batch_is_read_ahead(model, user):
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield user.samples[read % 3]

    answers = model.stream(endless(), batch_size=4)
    for number in range(1, 10):
        next(answers)
        assert read == 4 * -(-number // 4)


@needs_onnxruntime
def test_what_came_before_an_exception_is_answered_first(model, user):
    def breaking():
        yield from user.samples[:5]
        raise DataError("broken", where="line 6")

    answers = model.stream(breaking(), batch_size=4)
    assert len([next(answers) for _ in range(5)]) == 5
    with pytest.raises(DataError, match="broken"):
        next(answers)


@needs_onnxruntime
def test_an_empty_stream_has_no_answers(model):
    assert list(model.stream(iter(()))) == []


@needs_onnxruntime
def test_a_stream_of_what_cannot_be_is_refused(model, user):
    with pytest.raises(UsageError, match="batch of 0"):
        model.stream(user.samples, batch_size=0)
    with pytest.raises(DataError, match="different shapes"):
        list(model.stream([np.zeros((8, 8), np.uint8), np.zeros((9, 9), np.uint8)]))


# --- the lines -------------------------------------------------------------------------------------


def lines_of(content, **limits):
    return list(stream_jsonl(io.BytesIO(content), "standard input", "text", DataLimits(**limits)))


def test_each_text_has_the_number_of_its_line():
    content = b'\xef\xbb\xbf{"text": "a", "label": 3}\n\n{"label": null, "text": "b"}\n{"text": "c"}'
    assert lines_of(content) == [(1, "a"), (3, "b"), (4, "c")]


def test_a_stream_may_be_larger_than_a_file():
    assert len(lines_of(b'{"text": "a"}\n' * 50, decoded_bytes=100, samples=3)) == 50


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"junk", "JSON"),
        (b'["a"]', "object"),
        (b'{"txt": "a"}', "no column 'text'"),
        (b'{"text": 3}', "must be a string"),
        (b'{"text": "  "}', "no text"),
        (b'{"text": null}', "no text"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "' + b"a" * 200 + b'"}', "more than 100 bytes"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(line, message):
    source = stream_jsonl(
        io.BytesIO(b'{"text": "a"}\n\n' + line + b"\n"), "standard input", "text", DataLimits(line_bytes=100)
    )
    assert next(source) == (1, "a")
    with pytest.raises(DataError, match=message) as caught:
        next(source)
    assert caught.value.where == "standard input:3"


# --- the command; with a text model: tests/export/test_stream.py -----------------------------------


@needs_onnxruntime
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--data", "-"), 2, "answers images"),
        (("--data", "x.jsonl", "--batch-size", "4"), 2, "--batch-size is of a stream"),
        (("--text", "x", "--stream"), 2, "--stream goes with --data"),
        (("--text", "x", "--data", "-"), 2, "either --text or --data"),
        (("--data", "-", "--batch-size", "0"), 2, "0 is not in the range"),
    ],
)
def test_a_stream_that_cannot_be_is_refused(arguments, code, message):
    command = [sys.executable, "-m", "edge_tcur_runtime", "predict", V1, "--adapter", "base", "--json"]
    done = subprocess.run(
        [*map(str, command), *arguments],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == code, done.stderr
    assert message in json.loads(done.stdout)["error"]["message"]
