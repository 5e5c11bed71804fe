"""`train` and `eval` on tiny bases: what is written, what is refused, and that nothing is left behind."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from edge_tcur.data import in_batches, prepare
from edge_tcur.errors import BaseModelError, RunDirectoryError
from edge_tcur.method.targets import Group, Targets, find_targets
from edge_tcur.models import base_digest, load_base
from edge_tcur.tasks import find_task
from edge_tcur.training import TrainConfig, evaluate_run, open_run, train
from edge_tcur.training.evaluate import apply_adapter
from edge_tcur.training.gradients import task_gradients
from edge_tcur.training.head import warm_head
from edge_tcur.training.loop import LoopSettings, fit
from edge_tcur.training.rehearsal import rehearsal_rate
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
from edge_tcur_runtime.formats.digest import digest_file

IMAGE = "image-classification"
TEXT = "text-classification"


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def image_config(vit_dir, digits_npz, **settings):
    values = {"rank": 2, "epochs": 2, "threads": 1, **settings}
    return TrainConfig(base=str(vit_dir), data=str(digits_npz), task=IMAGE, **values)


def text_config(bert_dir, texts_csv, **settings):
    values = {"rank": 2, "epochs": 2, "threads": 1, **settings}
    return TrainConfig(base=str(bert_dir), data=str(texts_csv), **values)


@pytest.fixture(scope="module")
def image_run(vit_dir, digits_npz, tmp_path_factory):
    """A finished run on pictures; tests read it and never write to it."""
    root = tmp_path_factory.mktemp("runs") / "image"
    return train(image_config(vit_dir, digits_npz, epochs=6), root).run


@pytest.fixture(scope="module")
def text_run(bert_dir, texts_csv, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs") / "text"
    return train(text_config(bert_dir, texts_csv, epochs=15, batch_size=4, head_learning_rate=0.05), root).run


def refused(config, out, error, match):
    """`train` raises, and nothing is at `out` nor beside it."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(error, match=match) as caught:
        train(config, out)
    assert sorted(out.parent.iterdir()) == before
    return caught.value


def test_an_image_run(image_run, vit_dir, digits_npz):
    assert sorted(path.name for path in image_run.root.iterdir()) == ["adapter.safetensors", "run.json"]
    run = open_run(image_run.root)
    assert (run.labels, run.config, run.base_digest) == (
        ("0", "1", "2"),
        image_run.config,
        image_run.base_digest,
    )
    metrics = run.metrics
    assert metrics["samples"] + metrics["held_out_samples"] == 60
    assert len(metrics["losses"]) == 6 * 3
    assert metrics["losses"][-1] < metrics["losses"][0]
    assert metrics["trained_numbers"] == 6 * 2 * 2 * 2  # six projections, two layers, rank 2
    assert metrics["head_numbers"] == 0
    assert metrics["adapter_bytes"] == run.adapter_path.stat().st_size
    result = evaluate_run(run, digits_npz)
    assert result.samples == 60
    assert 0 <= result.base_accuracy <= 1
    adapter = run.adapter()
    assert adapter.header.base_digest == load_base(str(vit_dir), find_task(IMAGE), run.labels, {}).digest
    assert all(np.abs(factors.core).max() > 0 for factors in adapter.factors.values())


def test_a_text_run_trains_its_head(text_run, texts_csv):
    names = sorted(path.name for path in text_run.root.iterdir())
    assert names == ["adapter.safetensors", "run.json", "tokenizer.json"]
    adapter = text_run.adapter()
    assert set(adapter.extras) == {"head.weight", "head.bias"}
    assert adapter.extra_numbers == 2 * 16 + 2
    assert text_run.preprocessing["max_length"] == 24  # the model's positions, not the usual 128
    result = evaluate_run(text_run, texts_csv)
    assert result.base_accuracy == 0.5  # a head of zeros answers every text alike
    assert result.adapter_accuracy > 0.9


KINDS = {
    "paper": {"grouping": "shape", "coupling": "all", "transform": "dft", "selection": "norm", "frame": "raw",
              "learning_rate": 0.5},
    "curlora": {"selection": "inverse-norm", "frame": "raw", "learning_rate": 0.5},
    "gradient": {},
    "sketch": {"frame": "sketch"},
    "update": {"selection": "update"},
    "update-sketch": {"selection": "update", "frame": "sketch"},
    "layer": {"grouping": "shape", "coupling": "layer", "transform": "dct", "selection": "leverage"},
    "random": {"grouping": "layer", "coupling": "all", "transform": "identity", "selection": "random"},
    "saved": {"modules_to_save": "module.classifier,module.vit.layernorm", "alpha": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_run_along_every_axis(vit_dir, digits_npz, tmp_path, kind):
    """Trained, read back and scored: the adapter's accuracy is the one of the end of training, twice."""
    config = image_config(vit_dir, digits_npz, epochs=4, eval_data=str(digits_npz), **KINDS[kind])
    run = train(config, tmp_path / "run").run
    assert run.metrics["losses"][-1] < run.metrics["losses"][0]
    again = open_run(run.root)
    assert again.config == run.config
    assert replace(again.config, rehearsal_rate=0.0) == config  # found for the base where none was given
    adapter = again.adapter()
    header, method = adapter.header, config.method()
    axes = (method.coupling, method.domain, method.frame, method.alpha)
    assert (header.coupling, header.transform, header.frame, header.alpha) == axes
    assert header.provenance["selection"] == config.selection
    assert all(np.abs(factors.core).max() > 0 for factors in adapter.factors.values())
    result = evaluate_run(again, digits_npz)
    assert result.adapter_accuracy == pytest.approx(run.metrics["accuracy"])
    base = load_base(config.base, find_task(IMAGE), run.labels, {})
    pixels = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = base.model(pixel_values=pixels)
        injection = apply_adapter(base, again, adapter)
        adapted = base.model(pixel_values=pixels)
        assert not torch.allclose(adapted, plain, atol=1e-4)
        injection.remove()
        assert torch.equal(base.model(pixel_values=pixels), plain)
    assert base_digest(base.model, base.head) == run.base_digest
    repeated = train(config, tmp_path / "again").run
    assert digest_file(repeated.adapter_path) == digest_file(run.adapter_path)
    assert set(adapter.extras) == (
        {f"module.{name}.{part}" for name in ("classifier", "vit.layernorm") for part in ("weight", "bias")}
        if kind == "saved"
        else set()
    )


def test_modules_to_save_may_name_the_new_head(bert_dir, texts_csv, text_run, tmp_path):
    """It is trained in full anyway: nothing is trained twice, and the run is the same."""
    config = replace(text_run.config, modules_to_save="head")
    run = train(config, tmp_path / "run").run
    assert run.metrics["losses"] == text_run.metrics["losses"]
    adapter, other = run.adapter(), text_run.adapter()
    assert set(adapter.extras) == set(other.extras)
    for name, value in adapter.extras.items():
        np.testing.assert_array_equal(value, other.extras[name])
    assert evaluate_run(run, texts_csv).adapter_accuracy == evaluate_run(text_run, texts_csv).adapter_accuracy


def test_a_rehearsal_comes_first(bert_dir, texts_csv, tmp_path):
    """The adapter of a run of next to no steps is the nearest to what the rehearsal learnt."""
    seen = []
    config = text_config(bert_dir, texts_csv, selection="update", frame="sketch", learning_rate=1e-9)
    result = train(
        config,
        tmp_path / "run",
        on_epoch=lambda epoch, _: seen.append(("train", epoch)),
        on_rehearsal=lambda epoch, _: seen.append(("rehearsal", epoch)),
    )
    epochs = range(1, config.epochs + 1)
    assert seen == [("rehearsal", n) for n in epochs] + [("train", n) for n in epochs]
    adapter = result.run.adapter()
    assert all(np.abs(factors.core).max() > 1e-4 for factors in adapter.factors.values())
    assert adapter.header.provenance["selection"] == "update"


def test_the_rate_of_a_rehearsal_goes_by_the_width_and_is_saved(bert_dir, texts_csv, tmp_path):
    def of(*widths):
        groups = tuple(Group(str(n), ("a", "b"), 8, width) for n, width in enumerate(widths))
        return rehearsal_rate(Targets(groups, {}))

    assert of(384, 384, 1536) == pytest.approx(1e-3)  # MiniLM
    assert of(64) == pytest.approx(3.83e-3, rel=1e-2)
    assert of(4096) == pytest.approx(1.7e-4, rel=2e-2)
    chosen, given = (
        train(text_config(bert_dir, texts_csv, selection="update", epochs=1, **options), tmp_path / name)
        for name, options in (("auto", {}), ("given", {"rehearsal_rate": 0.25}))
    )
    base = load_base(str(bert_dir), find_task(TEXT), chosen.run.labels, {"max_length": 0})
    targets = find_targets(base.model, chosen.run.config.method(), keep=base.head)
    assert open_run(tmp_path / "auto").config.rehearsal_rate == rehearsal_rate(targets)
    assert given.run.config.rehearsal_rate == 0.25


def test_a_rehearsal_that_diverges_is_named(bert_dir, texts_csv, tmp_path, monkeypatch):
    task = find_task(TEXT)
    original = type(task).loss
    monkeypatch.setattr(type(task), "loss", lambda *arguments: original(*arguments) * float("inf"))
    config = text_config(bert_dir, texts_csv, selection="update", rehearsal_rate=0.5, head_epochs=0)
    error = refused(config, tmp_path / "run", ConfigError, "diverged at the learning rate 0.5")
    assert error.where == "rehearsal_rate"


def test_adapters_of_other_axes_are_refused(image_run, vit_dir, digits_npz, tmp_path):
    for number, options in enumerate(({"coupling": "all"}, {"frame": "sketch"})):
        other = train(image_config(vit_dir, digits_npz, epochs=1, **options), tmp_path / str(number)).run
        for run, adapter in ((image_run, other), (other, image_run)):
            with pytest.raises(IncompatibleError, match="coupling, transform and factors are"):
                evaluate_run(run, digits_npz, adapter=adapter.adapter())
    own = image_run.adapter()
    # The coordinates of training are no part of what an adapter does.
    raw = Adapter(replace(own.header, frame="raw"), own.factors, own.extras)
    expected = evaluate_run(image_run, digits_npz).adapter_accuracy
    assert evaluate_run(image_run, digits_npz, adapter=raw).adapter_accuracy == expected


@pytest.fixture
def text_material(bert_dir, texts_csv, text_run):
    """A base with a new head, and its data."""
    task = find_task(TEXT)
    base = load_base(str(bert_dir), task, ("card", "money"), {})
    dataset = read_data(str(texts_csv), task, TrainConfig())
    return base, prepare(dataset, base.labels, base.preprocessing, text_run.root, task), task


def test_data_in_batches(text_material):
    _, data, _ = text_material
    parts = list(in_batches(data, 10))
    assert [len(targets) for _, targets in parts] == [10, 10, 4]
    assert torch.cat([targets for _, targets in parts]).tolist() == data.targets.tolist()
    inputs, targets = data.take(np.array([5, 0, 5]))
    assert targets.tolist() == data.targets[[5, 0, 5]].tolist()
    assert torch.equal(inputs["input_ids"][0], inputs["input_ids"][2])


def test_warming_up_a_new_head(text_material):
    """The head alone learns, on the very features that the whole model would give it."""
    base, data, task = text_material
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    losses = warm_head(base, data, task, LoopSettings(epochs=20, batch_size=8), 0.05)
    assert len(losses) == 20 * 3
    assert losses[0] == pytest.approx(np.log(2))
    assert losses[-1] < 0.3
    changed = {
        name for name, value in base.model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {"head.weight", "head.bias"}
    assert not any(value.requires_grad for value in base.model.parameters())
    assert not base.model.get_submodule("head")._forward_pre_hooks
    ((inputs, targets),) = in_batches(data, 64)
    with torch.no_grad():
        assert task.loss(base.model(**inputs), targets).item() < 0.3
    assert base_digest(base.model, base.head) == base.digest


def test_a_base_with_its_own_head_is_not_warmed_up(vit_dir, digits_npz, text_material):
    task = find_task(IMAGE)
    base = load_base(str(vit_dir), task, ("0", "1", "2"), {})
    dataset = read_data(str(digits_npz), task, TrainConfig(task=IMAGE), base=base)
    data = prepare(dataset, base.labels, base.preprocessing, vit_dir, task)
    assert warm_head(base, data, task, LoopSettings(3, 8), 0.1) == []
    base, data, task = text_material
    assert warm_head(base, data, task, LoopSettings(0, 8), 0.1) == []
    assert not base.head_parameters()["head.weight"].any()


def test_the_gradients_of_a_task(text_material):
    """At most that many batches, drawn with the seed; a zero head passes none back, a warm one does."""
    base, data, task = text_material
    targets = find_targets(base.model, TrainConfig(rank=2).method(), keep=base.head)
    calls = []
    options = {"batch_size": 10, "seed": 0}

    class Counted:
        def __len__(self):
            return len(data)

        def take(self, indices):
            calls.append(indices.tolist())
            return data.take(indices)

    found = task_gradients(base.model, targets, Counted(), task, batches=24, **options)
    assert [len(call) for call in calls] == [10, 10, 4]
    assert sorted(index for call in calls for index in call) == list(range(24))
    assert not any(value.any() for value in found.values())
    warm_head(base, data, task, LoopSettings(5, 8), 0.05)
    calls.clear()
    found = task_gradients(base.model, targets, Counted(), task, batches=1, **options)
    assert [len(call) for call in calls] == [10]
    assert all(value.abs().max() > 0 for value in found.values())
    parameter = base.model.get_parameter("encoder.encoder.layer.0.output.dense.weight").requires_grad_(True)
    inputs, labels = data.take(np.array(calls[0]))
    task.loss(base.model(**inputs), labels).backward()
    torch.testing.assert_close(
        found["encoder.encoder.layer.0.output.dense"], parameter.grad, rtol=1e-4, atol=1e-7
    )


def test_the_same_seed_gives_the_same_bytes(vit_dir, digits_npz, tmp_path):
    digests = []
    for number in range(2):
        torch.manual_seed(number)  # whatever the process did before
        run = train(image_config(vit_dir, digits_npz), tmp_path / str(number)).run
        digests.append(digest_file(run.adapter_path))
    other = train(image_config(vit_dir, digits_npz, seed=1), tmp_path / "other").run
    assert digests[0] == digests[1]
    assert digest_file(other.adapter_path) != digests[0]


def test_a_base_without_a_head_for_the_labels_has_one_digest(vit_dir, tmp_path, digits_npz):
    """A checkpoint with a head has no pooler; made up weights of one must not get into the base."""
    path = tmp_path / "two.npz"
    arrays = np.load(digits_npz)
    keep = arrays["labels"] < 2
    np.savez(path, images=arrays["images"][keep], labels=arrays["labels"][keep])
    run = train(image_config(vit_dir, path, epochs=1), tmp_path / "run").run
    assert run.metrics["head_numbers"] == 2 * 16 + 2
    assert evaluate_run(run, path).samples == 40  # the same base is found again


def test_a_head_that_names_its_classes_decides_their_order(vit_dir, digits_npz, tmp_path):
    base = tmp_path / "vit"
    shutil.copytree(vit_dir, base)
    config = json.loads((base / "config.json").read_text())
    config["id2label"] = {"0": "two", "1": "zero", "2": "one"}
    config["label2id"] = {"two": 0, "zero": 1, "one": 2}
    (base / "config.json").write_text(json.dumps(config))
    named, foreign = tmp_path / "named.npz", tmp_path / "foreign.npz"
    arrays = np.load(digits_npz)
    np.savez(named, images=arrays["images"], labels=np.array(["zero", "one", "two"])[arrays["labels"]])
    np.savez(foreign, images=arrays["images"], labels=np.array(["cat", "cow", "dog"])[arrays["labels"]])
    run = train(image_config(base, named, epochs=1), tmp_path / "run").run
    assert (run.labels, run.metrics["head_numbers"]) == (("two", "zero", "one"), 0)
    run = train(image_config(base, foreign, epochs=1), tmp_path / "run2").run
    assert (run.labels, run.metrics["head_numbers"]) == (("cat", "cow", "dog"), 3 * 16 + 3)


FUNCTIONS = """
import torch
from torch import nn

PREPROCESSING = {"kind": "image", "input": "pixels", "height": 8, "width": 8, "channels": 1,
                 "scale": 1 / 255, "mean": [0.5], "std": [0.5]}

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(1, 8, 4, 4)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.ModuleList([layer, nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)])
        self.out = nn.Linear(8, 3)
        self.preprocessing = PREPROCESSING
    def forward(self, pixels):
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        for layer in self.encoder:
            x = layer(x)
        return self.out(x.mean(dim=1))

def net():
    return Net()

def unstable():
    model = Net()
    nn.init.normal_(model.out.weight, generator=torch.Generator().manual_seed(torch.seed() % 2**31))
    return model

def nothing():
    return "a string"

def silent():
    return nn.Linear(3, 3)

def partial():
    model = Net()
    model.preprocessing = {"kind": "image", "input": "pixels"}
    return model

def other_name():
    model = Net()
    model.preprocessing = {**PREPROCESSING, "input": "image"}
    return model

def broken():
    raise RuntimeError("no weights here")
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """A module `own_bases` in the current directory."""
    place = tmp_path / "here"
    place.mkdir()
    (place / "own_bases.py").write_text(FUNCTIONS)
    (place / "bad_syntax.py").write_text("def f(:\n")
    monkeypatch.chdir(place)
    yield place
    sys.modules.pop("own_bases", None)


def test_a_function_base(functions, digits_npz, tmp_path):
    run = train(image_config("own_bases:net", digits_npz, epochs=3), tmp_path / "run").run
    assert {spec.parameters for spec in run.adapter().header.groups.values()} == {
        tuple(f"module.encoder.{i}.linear{n}.weight" for i in range(2)) for n in (1, 2)
    }
    assert all(np.abs(factors.core).max() > 0 for factors in run.adapter().factors.values())
    assert str(functions) not in sys.path
    # torch's fused layer would read the base's weights and ignore the update in inference.
    base = load_base("own_bases:net", find_task(IMAGE), run.labels, {})
    pixels = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        injection = apply_adapter(base, run, run.adapter())
        adapted = base.model(pixels=pixels)
        injection.activate(None)
        assert not torch.equal(base.model(pixels=pixels), adapted)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("own_bases:missing", "cannot import the function"),
        ("no_such_module:f", "cannot import the function"),
        ("bad_syntax:f", "cannot import the function"),
        ("own_bases:nothing", "returned str; expected a torch.nn.Module"),
        ("own_bases:silent", "says nothing of its inputs"),
        ("own_bases:partial", "preprocessing is not valid: the field 'channels' is missing"),
        ("own_bases:other_name", "the model fails on inputs"),
        ("own_bases:broken", "the function failed: RuntimeError: no weights here"),
    ],
)
def test_bad_functions(functions, name, match, digits_npz, tmp_path):
    error = refused(image_config(name, digits_npz), tmp_path / "run", BaseModelError, match)
    assert error.where == name


def test_a_function_whose_weights_change(functions, digits_npz, tmp_path):
    run = train(image_config("own_bases:unstable", digits_npz), tmp_path / "run").run
    with pytest.raises(BaseMismatchError) as caught:
        evaluate_run(run, digits_npz)
    assert "the same weights at every call" in caught.value.hint


def test_a_function_takes_no_text(functions, texts_csv, tmp_path):
    refused(
        text_config("own_bases:net", texts_csv), tmp_path / "run", BaseModelError, "gives a picture model"
    )


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
    images = np.load(digits_npz)["images"]
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
    arrays = np.load(digits_npz)
    path = tmp_path / "more.npz"
    np.savez(path, images=arrays["images"][:4], labels=np.array([0, 1, 7, 2]))
    with pytest.raises(DataError, match="unknown label '7'") as caught:
        evaluate_run(image_run, path)
    assert caught.value.where == f"{path}[2]"
    config = image_config(vit_dir, digits_npz, eval_data=str(path))
    refused(config, tmp_path / "run", DataError, "unknown label '7'")


def test_pictures_of_another_size_and_in_folders(vit_dir, digits_npz, tmp_path):
    from PIL import Image

    arrays = np.load(digits_npz)
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
