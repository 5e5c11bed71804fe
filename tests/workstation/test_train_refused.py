"""Bases, data and directories that `train` and `eval` refuse, and that nothing is left behind."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from edge_tcur.data import prepare
from edge_tcur.errors import BaseModelError, RunDirectoryError
from edge_tcur.models import load_base
from edge_tcur.tasks import find_task
from edge_tcur.training import TrainConfig, evaluate_run, open_run, train
from edge_tcur.training.loop import LoopSettings, fit
from edge_tcur.training.run import new_directory
from edge_tcur.training.train import read_data
from edge_tcur_runtime.errors import (
    BadInputError,
    BaseMismatchError,
    ConfigError,
    DataError,
    DiskError,
    IncompatibleError,
    IntegrityError,
    NetworkError,
    OutputExistsError,
)
from edge_tcur_runtime.formats.adapter import Adapter, read_adapter
from training_runs import TEXT, image_config, refused, text_config


def test_bases_of_the_wrong_kind(vit_dir, bert_dir, digits_npz, texts_csv, tmp_path):
    out = tmp_path / "run"
    refused(image_config(bert_dir, digits_npz), out, BaseModelError, "does not take pictures")
    refused(text_config(vit_dir, texts_csv), out, BaseModelError, "no tokenizer can be loaded")


def test_bases_that_cannot_be_read(vit_dir, digits_npz, tmp_path):
    out = tmp_path / "out" / "run"
    out.parent.mkdir()
    refused(image_config("./missing", digits_npz), out, BaseModelError, "no such directory")
    refused(image_config("missing-model", digits_npz), out, NetworkError, "hub cannot be reached")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(image_config(empty, digits_npz), out, BaseModelError, "cannot be loaded")
    damaged = tmp_path / "damaged"
    shutil.copytree(vit_dir, damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(image_config(damaged, digits_npz), out, BaseModelError, "cannot load the weights")
    (damaged / "config.json").write_text("{")
    refused(image_config(damaged, digits_npz), out, BaseModelError, "cannot be loaded")


def test_a_checkpoint_that_lacks_weights(vit_dir, digits_npz, tmp_path):
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(vit_dir, base)
    tensors = load_file(base / "model.safetensors")
    name = next(key for key in tensors if "layernorm_before" in key or "mlp" in key)
    del tensors[name]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    refused(image_config(base, digits_npz), tmp_path / "run", BaseModelError, "lacks 1 weights")


def test_a_text_longer_than_the_model(bert_dir, texts_csv, tmp_path):
    config = text_config(bert_dir, texts_csv, max_length=25)
    error = refused(config, tmp_path / "run", ConfigError, "the base takes at most 24 tokens")
    assert error.where == "max_length"


def test_an_output_directory_that_is_not_empty(vit_dir, digits_npz, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    config = image_config(vit_dir, digits_npz, epochs=1)
    refused(config, out, OutputExistsError, "not empty")
    with pytest.raises(OutputExistsError, match="this is neither"):
        train(config, out, force=True)
    assert (out / "mine.txt").read_text() == "keep"
    (out / "run.json").write_text("an earlier run")
    train(config, out, force=True)
    assert sorted(path.name for path in out.iterdir()) == ["adapter.safetensors", "run.json"]
    assert list(tmp_path.iterdir()) == [out]


def test_force_keeps_the_old_directory_when_training_fails(vit_dir, digits_npz, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.json").write_text("keep")
    with pytest.raises(ConfigError):
        train(image_config(vit_dir, digits_npz, rank=99), out, force=True)
    assert (out / "run.json").read_text() == "keep"


def test_a_head_that_is_left_out_is_said(vit_dir, tmp_path):
    """A stray label must not silently replace the base's trained head."""
    images = np.random.default_rng(0).random((12, 8, 8)).astype(np.float32)
    data = tmp_path / "four.npz"
    np.savez(data, images=images, labels=np.arange(12) % 4)
    result = train(image_config(vit_dir, data, epochs=1), tmp_path / "run")
    assert len(result.notes) == 1
    assert "own head of 3 classes is left out" in result.notes[0]


def test_the_end_of_the_force_tests_leaves_one_directory(vit_dir, digits_npz, tmp_path):
    out = tmp_path / "run"
    train(image_config(vit_dir, digits_npz, epochs=1), out)
    assert train(image_config(vit_dir, digits_npz, epochs=1), out, force=True).notes == ()
    assert list(tmp_path.iterdir()) == [out]


def test_force_never_replaces_inputs_or_the_current_directory(vit_dir, digits_npz, tmp_path, monkeypatch):
    base = tmp_path / "work" / "vit"
    shutil.copytree(vit_dir, base)
    with pytest.raises(OutputExistsError, match="holds the base"):
        train(image_config(base, digits_npz), base.parent, force=True)
    monkeypatch.chdir(base.parent)
    for out in (".", ".."):
        with pytest.raises(OutputExistsError, match="current directory"):
            train(image_config(vit_dir, digits_npz), tmp_path / "work" / out, force=True)
    assert (base / "config.json").is_file()


def test_a_directory_that_cannot_be_written(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(DiskError), new_directory(blocker / "run"):
        pass
    with pytest.raises(FileNotFoundError), new_directory(tmp_path / "run"):
        raise FileNotFoundError("something else was missing")
    with pytest.raises(DiskError), new_directory(tmp_path / "run"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == [blocker]


def test_data_that_cannot_be_learnt(vit_dir, bert_dir, digits_npz, tmp_path):
    out = tmp_path / "out" / "run"
    out.parent.mkdir()
    with np.load(digits_npz) as data:
        images = data["images"]
    one = tmp_path / "one.npz"
    np.savez(one, images=images, labels=np.zeros(60, np.int64))
    refused(image_config(vit_dir, one), out, DataError, "every sample has the label '0'")
    refused(image_config(vit_dir, tmp_path / "missing.npz"), out, DataError, "cannot read")
    empty = tmp_path / "empty.csv"
    empty.write_text("text,label\n")
    refused(text_config(bert_dir, empty), out, DataError, "empty")
    hole = tmp_path / "hole.csv"
    hole.write_text("text,label\na,x\n,y\n")
    assert refused(text_config(bert_dir, hole), out, DataError, "no text").where == f"{hole}:3"


def test_an_unknown_label(image_run, vit_dir, digits_npz, tmp_path):
    with np.load(digits_npz) as data:
        arrays = dict(data)
    path = tmp_path / "more.npz"
    np.savez(path, images=arrays["images"][:4], labels=np.array([0, 1, 7, 2]))
    with pytest.raises(DataError, match="unknown label '7'") as caught:
        evaluate_run(image_run, path)
    assert caught.value.where == f"{path}[2]"
    config = image_config(vit_dir, digits_npz, eval_data=str(path))
    refused(config, tmp_path / "run", DataError, "unknown label '7'")


def test_pictures_of_another_size_and_in_folders(vit_dir, digits_npz, tmp_path):
    from PIL import Image

    with np.load(digits_npz) as data:
        arrays = dict(data)
    for index, (image, label) in enumerate(zip(arrays["images"][:12], arrays["labels"], strict=False)):
        folder = tmp_path / "pictures" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.kron(image, np.ones((2, 2), np.uint8))).convert("RGB").save(
            folder / f"{index}.png"
        )
    run = train(image_config(vit_dir, tmp_path / "pictures", epochs=1), tmp_path / "run").run
    assert run.labels == ("0", "1", "2")
    assert evaluate_run(run, tmp_path / "pictures").samples == 12
    colour = tmp_path / "colour.npz"
    np.savez(colour, images=np.zeros((4, 8, 8, 3), np.uint8), labels=np.arange(4) % 3)
    with pytest.raises(DataError, match="3 channels; expected 1"):
        evaluate_run(run, colour)
    single = tmp_path / "single" / "only"
    single.mkdir(parents=True)
    with pytest.raises(DataError, match="every sample has the label 'only'"):
        train(image_config(vit_dir, single.parent), tmp_path / "run2")


def test_a_base_that_changed_since_training(vit_dir, digits_npz, tmp_path):
    from safetensors.torch import load_file, save_file

    base = tmp_path / "vit"
    shutil.copytree(vit_dir, base)
    run = train(image_config(base, digits_npz, epochs=1), tmp_path / "run").run
    tensors = load_file(base / "model.safetensors")
    tensors["classifier.bias"][0] += 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseMismatchError) as caught:
        evaluate_run(open_run(run.root), digits_npz)
    assert run.base_digest in caught.value.message
    assert caught.value.message.count("sha256:") == 2
    shutil.rmtree(base)
    with pytest.raises(BaseModelError, match="no such directory"):
        evaluate_run(open_run(run.root), digits_npz)


def test_a_relative_base_is_found_from_elsewhere(vit_dir, digits_npz, tmp_path, monkeypatch):
    monkeypatch.chdir(vit_dir.parent)
    run = train(image_config(vit_dir.name, digits_npz, epochs=1), tmp_path / "run").run
    monkeypatch.chdir(tmp_path)
    assert evaluate_run(open_run(run.root), digits_npz).samples == 60


def test_adapters_that_do_not_belong(image_run, text_run, digits_npz, texts_csv):
    with pytest.raises(BaseMismatchError, match="made for the base"):
        evaluate_run(image_run, digits_npz, adapter=text_run.adapter())
    own = text_run.adapter()
    header = own.header
    swapped = Adapter(
        type(header)(**{**vars(header), "labels": header.labels[::-1]}), own.factors, own.extras
    )
    with pytest.raises(IncompatibleError, match="labels are money, card; the run's are card, money"):
        evaluate_run(text_run, texts_csv, adapter=swapped)
    with pytest.raises(BaseMismatchError, match="head"):
        evaluate_run(text_run, texts_csv, adapter=Adapter(header, own.factors))
    groups = dict(header.groups)
    name, other = list(groups)[:2]
    groups[name], groups[other] = groups[other], groups[name]
    renamed = Adapter(type(header)(**{**vars(header), "groups": groups}), own.factors, own.extras)
    with pytest.raises(BaseMismatchError, match="other weights"):
        evaluate_run(text_run, texts_csv, adapter=renamed)


def test_a_learning_rate_that_diverges(bert_dir, texts_csv, tmp_path, monkeypatch):
    """Real divergence needs a long run; here the loss turns to infinity after two steps."""
    calls = []
    task = find_task(TEXT)
    original = type(task).loss

    def loss(self, outputs, targets):
        calls.append(1)
        return original(self, outputs, targets) * (float("inf") if len(calls) > 2 else 1)

    monkeypatch.setattr(type(task), "loss", loss)
    config = text_config(bert_dir, texts_csv, learning_rate=5.0, frame="raw")
    error = refused(config, tmp_path / "run", ConfigError, "diverged at the learning rate 5")
    assert error.where == "learning_rate"
    assert "lower it" in error.hint


def test_a_gradient_that_is_not_finite_stops_the_loop(bert_dir, texts_csv, tmp_path, text_run):
    base = load_base(str(bert_dir), find_task(TEXT), ("card", "money"), {})
    task = find_task(TEXT)
    dataset = read_data(str(texts_csv), task, TrainConfig())
    data = prepare(dataset, base.labels, base.preprocessing, text_run.root, task)
    parameter = base.head_parameters()["head.weight"]
    parameter.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(FloatingPointError, match="gradient's norm nan at step 1"):
        fit(base.model, [([parameter], 0.1)], data, task, LoopSettings(1, 8, max_gradient_norm=0))
    assert torch.isfinite(parameter).all()


def test_run_directories(image_run, tmp_path):
    with pytest.raises(RunDirectoryError, match=r"has no run\.json"):
        open_run(tmp_path / "missing")
    root = tmp_path / "run"
    shutil.copytree(image_run.root, root)
    document = json.loads((root / "run.json").read_text())
    for change, match in (
        ({"format_version": 2}, "format version 2"),
        ({"config": {**document["config"], "rnak": 1}}, "unknown configuration key 'rnak'"),
        ({"labels": 3}, "'labels' must be a list"),
    ):
        (root / "run.json").write_text(json.dumps({**document, **change}))
        with pytest.raises(RunDirectoryError, match=match) as caught:
            open_run(root)
        assert caught.value.where.startswith(str(root / "run.json"))
    (root / "run.json").write_text("{")
    with pytest.raises(RunDirectoryError, match="not a valid JSON"):
        open_run(root)
    (root / "run.json").write_text(json.dumps(document))
    raw = bytearray((root / "adapter.safetensors").read_bytes())
    raw[-1] ^= 1
    (root / "adapter.safetensors").write_bytes(raw)
    with pytest.raises(IntegrityError):
        open_run(root).adapter()
    (root / "adapter.safetensors").unlink()
    with pytest.raises(BadInputError):
        read_adapter(root / "adapter.safetensors")


def test_missing_settings(vit_dir, tmp_path):
    refused(TrainConfig(data="x"), tmp_path / "run", ConfigError, "base: no value given")
    refused(TrainConfig(base=str(vit_dir)), tmp_path / "run", ConfigError, "data: no value given")
