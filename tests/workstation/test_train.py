"""`train` and `eval` on tiny bases: what is written, along every axis, and that nothing depends on chance."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from edge_tcur.data import in_batches, prepare
from edge_tcur.method.targets import Group, Targets, find_targets
from edge_tcur.models import base_digest, load_base
from edge_tcur.tasks import find_task
from edge_tcur.training import TrainConfig, evaluate_run, open_run, train
from edge_tcur.training.evaluate import apply_adapter
from edge_tcur.training.gradients import task_gradients
from edge_tcur.training.head import warm_head
from edge_tcur.training.loop import LoopSettings
from edge_tcur.training.rehearsal import rehearsal_rate
from edge_tcur.training.train import read_data
from edge_tcur_runtime.errors import (
    ConfigError,
    IncompatibleError,
)
from edge_tcur_runtime.formats.adapter import Adapter
from edge_tcur_runtime.formats.digest import digest_file
from training_runs import IMAGE, TEXT, image_config, refused, text_config


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
    with np.load(digits_npz) as data:
        arrays = dict(data)
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
    with np.load(digits_npz) as data:
        arrays = dict(data)
    np.savez(named, images=arrays["images"], labels=np.array(["zero", "one", "two"])[arrays["labels"]])
    np.savez(foreign, images=arrays["images"], labels=np.array(["cat", "cow", "dog"])[arrays["labels"]])
    run = train(image_config(base, named, epochs=1), tmp_path / "run").run
    assert (run.labels, run.metrics["head_numbers"]) == (("two", "zero", "one"), 0)
    run = train(image_config(base, foreign, epochs=1), tmp_path / "run2").run
    assert (run.labels, run.metrics["head_numbers"]) == (("cat", "cow", "dog"), 3 * 16 + 3)
