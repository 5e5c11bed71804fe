"""`predict --data -` and `--stream` with a text model: a line of JSON for each line, at once."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from edge_tcur_runtime.predict import Model

COMMAND = "import sys; sys.modules['torch'] = None; from edge_tcur_runtime.cli import main; main()"
TEXTS = ("where is my card", "send money", "please send my money again", "card", "where is it")


def command(bundle, *arguments):
    return [sys.executable, "-c", COMMAND, "predict", str(bundle.root), "--adapter", "bundle", *arguments]


def stream(bundle, *arguments, given="", code=0):
    done = subprocess.run(
        command(bundle, *arguments), input=given, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == code, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def lines(texts):
    return "".join(json.dumps({"text": text, "label": "card"}) + "\n" for text in texts)


def test_a_file_is_answered_as_without_a_stream(bert, tmp_path):
    path = tmp_path / "large.jsonl"
    path.write_text(lines(TEXTS))
    found, _ = stream(bert.bundle, "--data", str(path), "--stream", "--batch-size", "2")
    assert [line["line"] for line in found] == [1, 2, 3, 4, 5]
    (whole,), _ = stream(bert.bundle, *(part for text in TEXTS for part in ("--text", text)), "--json")
    assert [line["label"] for line in found] == [answer["label"] for answer in whole["predictions"]]
    for line, answer in zip(found, whole["predictions"], strict=True):
        assert line["scores"] == pytest.approx(answer["scores"], abs=1e-5)


def test_standard_input_is_answered_line_by_line_before_the_next_comes(bert):
    running = subprocess.Popen(
        command(bert.bundle, "--data", "-"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    for number, text in enumerate(TEXTS, 1):
        running.stdin.write(lines([text]))
        running.stdin.flush()
        assert json.loads(running.stdout.readline())["line"] == number  # the input is still open
    running.stdin.close()
    assert running.stdout.read() == ""
    running.stdout.close()
    assert running.wait(60) == 0


def test_a_bad_line_ends_the_stream_after_the_answers_before_it(bert):
    given = lines(TEXTS[:3]) + "junk\n" + lines(TEXTS[3:])
    found, said = stream(bert.bundle, "--data", "-", "--batch-size", "16", "--json", given=given, code=3)
    assert [line.get("line") for line in found] == [1, 2, 3, None]
    assert found[-1]["error"]["where"] == "standard input:4"
    assert "standard input:4" in said


@pytest.mark.parametrize(("name", "where"), [("missing.jsonl", "missing.jsonl"), ("table.csv", "table.csv")])
def test_a_file_that_cannot_be_streamed_is_bad_input(bert, tmp_path, name, where):
    (tmp_path / "table.csv").write_text("text\na\n")
    found, _ = stream(bert.bundle, "--data", str(tmp_path / name), "--stream", "--json", code=3)
    assert found[0]["error"]["where"] == str(tmp_path / where)


def test_the_model_streams_texts(bert):
    model = Model(bert.bundle, threads=1)
    found = list(model.stream(iter(TEXTS), batch_size=2))
    assert [answer.label for answer in found] == [answer.label for answer in model.predict(TEXTS)]
