"""`personalize` on data, losses and checkpoints that are no good: exit code, clear line, nothing changed."""

from __future__ import annotations

import json
import shutil
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_tcur_runtime import personalize as module
from edge_tcur_runtime.checkpoint import FILES
from edge_tcur_runtime.cli import device
from edge_tcur_runtime.cli.framework import run
from edge_tcur_runtime.engines import open_engine
from edge_tcur_runtime.errors import BudgetError
from edge_tcur_runtime.formats.bundle import MANIFEST, open_bundle, serialize_manifest
from edge_tcur_runtime.installed import find_onnxruntime

DATA = Path(__file__).parents[1] / "data"
V1, SKETCH_V1, USER = DATA / "bundle-v1", DATA / "sketch-v1", DATA / "user.npz"
HEAD = b"text,label\n"
PREPROCESSING = {
    "kind": "text", "tokenizer": "tokenizer.json", "max_length": 8, "pad_id": 0, "inputs": ["input_ids"],
    "buckets": [8],
}  # fmt: skip


@pytest.fixture
def cli(tmp_path, capsys):
    """Runs `personalize` in this process; exit code, error, and whether the store holds any file."""

    def call(bundle, data, *arguments):
        store = tmp_path / "store"
        with pytest.raises(SystemExit) as caught:
            run(device, ["personalize", str(bundle), "--data", str(data), "--store", str(store), "--threads",
                         "1", "--engine", "ort-step", "--json", *map(str, arguments)])  # fmt: skip
        found = [path for path in store.rglob("*") if path.is_file()]
        return caught.value.code, json.loads(capsys.readouterr().out).get("error"), found

    return call


@pytest.fixture
def text_bundle(tmp_path):
    """The committed bundle, said to take text: what is wrong with the data shows before a model is loaded."""
    root = shutil.copytree(V1, tmp_path / "text")
    manifest = open_bundle(V1).manifest
    manifest = replace(manifest, task="text-classification", preprocessing=PREPROCESSING)
    (root / MANIFEST).write_bytes(serialize_manifest(manifest))
    return root


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b"", ":1", "empty"),
        (HEAD, "", "empty"),
        (HEAD + b"a,1\n", "", "every sample has the label '1'; training needs at least two classes"),
        (HEAD + b"a,1\nb,1\nc,1\n", "", "every sample has the label '1'"),
        (HEAD + b"a,1\n\xff,2\n", ":3", "not UTF-8: byte 0xff"),
        (HEAD + b"a,1\nb,99\n", ":3", "unknown label '99'"),
        (HEAD + b"a,1\nb,-1\n", ":3", "unknown label '-1'"),
        (HEAD + b"a,1\n" + b"x" * 10_000_000 + b",2\n", ":3", "a line or record of more than 1048576 bytes"),
        (HEAD + b"a,1\nb\n", ":3", ""),
        (b"text\na\n", ":1", "label"),
    ],
    ids=[
        "empty", "header", "one-sample", "one-class", "utf-8", "label", "negative", "10-MB-line", "short",
        "column",
    ],
)  # fmt: skip
def test_text_that_nothing_can_be_learnt_from(cli, text_bundle, tmp_path, content, line, message):
    path = tmp_path / "mine.csv"
    path.write_bytes(content)
    code, error, found = cli(text_bundle, path)
    assert code == 3
    assert error["code"] == "bad-data"
    assert message in error["message"]
    assert error["where"] == f"{path}{line}"
    assert error["hint"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 300
    assert not found


def test_a_10_mb_line_takes_bounded_time_and_memory(cli, text_bundle, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_bytes(HEAD + b"a,1\n" + b"x" * 10_000_000 + b",2\n")
    tracemalloc.start()
    started = time.perf_counter()
    code, _, _ = cli(text_bundle, path)
    seconds, (_, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert code == 3
    assert seconds < 5  # a second, and the bundle's digests under a tracing allocator
    assert peak < 8 * 2**20


def arrays(**changes):
    with np.load(USER) as data:
        values = dict(data)
    return {**values, **changes}


@pytest.mark.parametrize("what", ["empty", "one-sample", "label", "not-finite", "no-file"])
def test_pictures_that_nothing_can_be_learnt_from(cli, tmp_path, what):
    names = list(arrays())
    labels = next(name for name in names if name.startswith(("label", "y", "target")))
    images = next(name for name in names if name != labels)
    values, path = arrays(), tmp_path / "mine.npz"
    message = {
        "empty": "empty", "one-sample": "training needs at least two classes", "label": "unknown label '99'",
        "not-finite": "NaN", "no-file": "",
    }[what]  # fmt: skip
    if what == "empty":
        values = {name: value[:0] for name, value in values.items()}
    elif what == "one-sample":
        values = {name: value[:1] for name, value in values.items()}
    elif what == "label":
        values[labels] = np.where(np.arange(len(values[labels])) == 7, 99, values[labels].astype(int))
    elif what == "not-finite":
        values[images] = values[images].astype(np.float32)
        values[images][3] = np.nan
    if what != "no-file":
        np.savez(path, **values)
    code, error, found = cli(V1, path)
    assert code == 3
    assert error["code"] == "bad-data"
    assert message in error["message"]
    assert not found


needs_engine = pytest.mark.skipif(find_onnxruntime() is None, reason="ONNX Runtime is not installed")


@needs_engine
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number(cli, monkeypatch, bad):
    def opened(*arguments, **options):
        engine = open_engine(*arguments, **options)
        step = engine.step
        engine.step = lambda *batch: replace(step(*batch), loss=bad)
        return engine

    monkeypatch.setattr(module, "open_engine", opened)
    code, error, found = cli(V1, USER)
    assert code == 3
    assert (error["code"], error["where"]) == ("bad-config", "learning_rate")
    assert f"training diverged: the loss is {bad}" in error["message"]
    assert "lower --learning-rate" in error["hint"]
    assert not found


@needs_engine
@pytest.mark.parametrize("other", ["base", "data", "settings"])
def test_a_checkpoint_of_another_base_data_or_configuration(cli, tmp_path, monkeypatch, other):
    real = module.Budget.check

    def crossed(self, what):
        if what == "at the end":
            raise BudgetError("crossed")
        return real(self, what)

    run_of = ("--epochs", "2", "--checkpoint-seconds", "0")
    with monkeypatch.context() as patch:
        patch.setattr(module.Budget, "check", crossed)
        code, _, found = cli(V1, USER, *run_of)
    assert code == 5
    assert {path.name for path in found} == set(FILES)
    before = {path: path.read_bytes() for path in found}
    bundle, data, arguments = V1, USER, run_of
    if other == "base":
        bundle = SKETCH_V1
    elif other == "data":
        data = tmp_path / "other.npz"
        np.savez(data, **{name: value[:-1] for name, value in arrays().items()})
    else:
        arguments = (*run_of, "--optimizer", "sgd")
    code, error, found = cli(bundle, data, "--resume", "yes", *arguments)
    assert code == 4
    assert error["code"] == "incompatible"
    named = error["message"].removeprefix("the checkpoint is of another run: ").removesuffix(" differ")
    assert other in named.split(", ")
    assert "--resume no" in error["hint"]
    assert {path: path.read_bytes() for path in found} == before
