"""Every task from data to a personal adapter: trained, exported, fine-tuned and answered on a device."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_tcur.tasks import find_task
from edge_tcur.training import TrainConfig, evaluate_run, train
from edge_tcur_export.bundle import export_run
from edge_tcur_export.parity import TOLERANCES
from edge_tcur_export.settings import TARGETS, ExportSettings
from edge_tcur_runtime.canary import read_canary
from edge_tcur_runtime.engines import open_engine
from edge_tcur_runtime.errors import HealthCheckError, IncompatibleError, UsageError
from edge_tcur_runtime.feeds import build_feeds
from edge_tcur_runtime.formats.bundle import open_bundle
from edge_tcur_runtime.predict import Model
from edge_tcur_runtime.tasks import IGNORED
from edge_tcur_runtime.update.health import SAMPLES, canary_answers, canary_digest, check_health

NAMES = ("text-regression", "image-multilabel", "image-segmentation", "causal-lm")
WORDS = ("where", "is", "my", "card", "please", "money", "send", "again")
COMMAND = "import sys; sys.modules['torch'] = None; from edge_tcur_runtime.cli import main; main()"


def write_regression(path):
    """Texts whose two numbers follow from their words."""
    rows = ["text,urgency,length"]
    for number in range(16):
        words = [WORDS[(number + place) % 8] for place in range(2 + number % 4)]
        rows.append(f"{' '.join(words)},{float('please' in words)},{len(words) / 4}")
    path.write_text("\n".join(rows) + "\n")


def write_multilabel(path):
    """Pictures of 8 x 8 with none, one or both of two bright parts."""
    generator = np.random.default_rng(2)
    images = generator.integers(0, 60, (32, 8, 8), dtype=np.uint8)
    images[np.arange(32) % 2 == 1, :4] += 150
    images[np.arange(32) % 4 >= 2, :, 4:] += 40
    names = ("", "top", "right", "top|right")
    np.savez(path, images=images, labels=np.array([names[number % 4] for number in range(32)]))


def write_masks(path, size):
    """Pictures whose classes are ranges of grey."""
    generator = np.random.default_rng(3)
    images = generator.integers(0, 256, (12, *size), dtype=np.uint8)
    masks = (images > 90).astype(np.uint8) + (images > 190)
    np.savez(path, images=images, masks=masks, names=np.array(["dark", "grey", "bright"]))


def write_texts(path):
    rows = [" ".join(WORDS[(number + place) % 8] for place in range(2 + number % 5)) for number in range(16)]
    path.write_text("text\n" + "\n".join(rows) + "\n")


def write_gpt2(root):
    """A GPT-2 of one layer and 16 dimensions, and its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(3)
    vocabulary = {word: number for number, word in enumerate(("[PAD]", "[UNK]", *WORDS))}
    size = {"n_positions": 12, "n_embd": 16, "n_layer": 1, "n_head": 2}
    config = GPT2Config(vocab_size=len(vocabulary), bos_token_id=None, eos_token_id=None, **size)
    GPT2LMHeadModel(config).save_pretrained(root)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(root)


class Case:
    """A task's data, run and bundle."""

    def __init__(self, task, root, base, data, targets=TARGETS, optimizer="adamw", **settings):
        common = {
            "rank": 2,
            "epochs": 3,
            "batch_size": 8,
            "head_epochs": 2,
            "gradient_batches": 2,
            "threads": 1,
        }
        self.data, self.root = data, root
        self.run = train(TrainConfig(str(base), str(data), task=task, **common, **settings), root / "run").run
        self.report = export_run(self.run, root / "bundle", ExportSettings(targets, optimizer=optimizer))
        self.bundle = open_bundle(root / "bundle")
        self.task = find_task(task)

    def device(self, *arguments, code=0):
        """Runs `edge-tcur-device` where torch cannot be imported; its JSON, or its message."""
        command = [
            sys.executable,
            "-c",
            COMMAND,
            *map(str, arguments),
            "--store",
            str(self.root / "store"),
            "--json",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="session")
def segmenters():
    """Makes `segmenter` importable, as a user's own module is."""
    sys.path.insert(0, str(Path(__file__).parent))
    yield "segmenter"
    sys.path.remove(str(Path(__file__).parent))


@pytest.fixture(scope="session")
def cases(bert_dir, vit_dir, segmenters, tmp_path_factory):
    """Task name -> `Case`, made when it is first asked for."""

    @functools.cache
    def make(task):
        root = tmp_path_factory.mktemp(task)
        if task == "text-regression":
            write_regression(data := root / "data.csv")
            return Case(task, root, bert_dir, data, label_column="urgency,length", layers_to_transform="1")
        if task == "image-multilabel":
            write_multilabel(data := root / "data.npz")
            return Case(task, root, vit_dir, data, optimizer="sgd", layers_to_transform="1")
        if task == "image-segmentation":
            write_masks(data := root / "data.npz", (4, 6))
            return Case(task, root, f"{segmenters}:plane", data)
        write_gpt2(root / "gpt2")
        write_texts(data := root / "data.csv")
        return Case(task, root, root / "gpt2", data)

    return make


@pytest.mark.parametrize("name", NAMES)
def test_every_graph_agrees_with_torch(cases, name):
    """Inference, step graph and ONNX Runtime Training's: outputs, loss, gradients, metric and later steps."""
    case = cases(name)
    parity, manifest = case.report.parity, case.bundle.manifest
    assert set(parity) == {"infer", "step", "train"}
    assert set(parity["step"]) == set(parity["train"]) == set(TOLERANCES)
    assert manifest.task == name
    assert manifest.metric == case.task.metric.name
    assert manifest.optimizer == ("sgd" if name == "image-multilabel" else "adamw")
    expected = {
        "text-regression": ("urgency", "length"),
        "image-multilabel": ("right", "top"),
        "image-segmentation": ("dark", "grey", "bright"),
        "causal-lm": (),
    }
    assert manifest.labels == case.run.labels == expected[name]


def some_batch(case, samples, length):
    """Inputs and targets of a size that was never traced."""
    generator = np.random.default_rng(samples)
    sizes = {"batch": samples, "sequence": length}
    inputs = {}
    for name, spec in case.bundle.manifest.inputs.items():
        shape = [sizes.get(axis, axis) for axis in spec.shape]
        fill = generator.normal(size=shape).astype(np.float32)
        inputs[name] = fill if spec.dtype == "float32" else generator.integers(2, 9, shape)
    if "attention_mask" in inputs:
        inputs["attention_mask"] = np.ones((samples, length), np.int64)
        inputs["attention_mask"][1:, length - 1 :] = 0
    axes = case.task.output_axes(case.bundle.manifest.inputs, case.run.labels)
    shape = [{**sizes, "vocabulary": 10}.get(axis, axis) for axis in axes]
    targets = case.task.example_targets(torch.zeros(shape), torch.Generator().manual_seed(samples)).numpy()
    return inputs, case.task.batch_targets(targets, inputs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("samples", "length"), [(1, 3), (7, 11)])
def test_batch_and_sequence_are_free_and_loss_and_metric_are_those_of_the_outputs(
    cases, name, samples, length
):
    case = cases(name)
    inputs, targets = some_batch(case, samples, length)
    feeds = build_feeds(case.bundle.manifest, case.run.adapter())
    for engine in ("ort-step", "ort-training"):
        result = open_engine(engine, case.bundle, threads=1).step(inputs, targets, feeds)
        outputs = torch.from_numpy(result.outputs)
        assert result.loss == pytest.approx(
            case.task.loss(outputs, torch.from_numpy(targets)).item(), rel=1e-5
        )
        assert result.metric == pytest.approx(case.task.score(result.outputs, targets), abs=1e-6)
        assert len(outputs) == samples
        assert {name: value.shape for name, value in result.gradients.items()} == {
            name: feeds[name].shape for name in result.gradients
        }
        assert any(np.abs(value).max() > 0 for value in result.gradients.values())


def test_a_batch_without_a_counted_token_has_no_loss_and_no_gradient(cases):
    case = cases("causal-lm")
    inputs, targets = some_batch(case, 2, 4)
    feeds = build_feeds(case.bundle.manifest, case.run.adapter())
    for engine in ("ort-step", "ort-training"):
        result = open_engine(engine, case.bundle, threads=1).step(
            inputs, np.full_like(targets, IGNORED), feeds
        )
        assert result.loss == result.metric == 0
        assert not any(value.any() for value in result.gradients.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_device_fine_tunes_and_answers(cases, name):
    case = cases(name)
    options = ("--epochs", 20, "--learning-rate", 0.02, "--start", "base", "--holdout", 0.25, "--threads", 1)
    done = case.device("personalize", case.bundle.root, "--data", case.data, *options)
    assert done["metric"] == case.task.metric.name
    assert np.mean(done["losses"][-2:]) < np.mean(done["losses"][:2])
    assert done["loss_after"] < done["loss_before"]
    assert done["accuracy_after"] is None
    assert done["better"] == (done["installed"] is not None)
    answered = case.device("predict", case.bundle.root, "--data", case.data, "--adapter", "bundle")
    scored = evaluate_run(case.run, case.data)
    assert answered["score"] == pytest.approx(scored.adapter_score, abs=1e-5)
    assert answered["metric"] == scored.metric == case.task.metric.name
    keys = {
        "text-regression": {"values"},
        "image-multilabel": {"labels", "scores"},
        "image-segmentation": {"shares"},
        "causal-lm": {"log_likelihood", "tokens", "perplexity"},
    }
    assert all(set(answer) == keys[name] for answer in answered["predictions"])


def test_masks_are_written_for_a_segmentation_alone(cases, tmp_path):
    case, out = cases("image-segmentation"), tmp_path / "answers.npz"
    answered = case.device(
        "predict", case.bundle.root, "--data", case.data, "--masks", out, "--adapter", "bundle"
    )
    with np.load(out) as data:
        masks = data["masks"]
    assert masks.shape == (12, 4, 6)
    assert masks.dtype == np.uint8
    for mask, answer in zip(masks, answered["predictions"], strict=True):
        shares = {name: float((mask == number).mean()) for number, name in enumerate(case.run.labels)}
        assert answer["shares"] == pytest.approx({name: part for name, part in shares.items() if part})
    other = cases("causal-lm")
    refused = other.device("predict", other.bundle.root, "--text", "my card", "--masks", out, code=2)
    assert "--masks is for a segmentation" in refused["error"]["message"]


def test_a_bundle_whose_graph_gives_no_metric_is_refused_where_the_manifest_names_one(cases, tmp_path):
    from dataclasses import replace

    from edge_tcur_runtime.formats.bundle import Bundle

    old = open_bundle(Path(__file__).parents[1] / "data" / "bundle-v1")
    assert old.manifest.metric is None
    named = Bundle(old.root, replace(old.manifest, metric="accuracy"))
    for engine in ("ort-step", "ort-training"):
        with pytest.raises(IncompatibleError, match="has no output 'metric'"):
            open_engine(engine, named, threads=1)


OPTIMIZER = """
import json
import numpy as np
from pathlib import Path
from edge_tcur_runtime.engines import open_engine
from edge_tcur_runtime.engines.ort_training import import_training_api
from edge_tcur_runtime.formats.bundle import open_bundle
bundle = open_bundle(Path(sys.argv[1]))
api = import_training_api()
state = api.CheckpointState.load_checkpoint(str(bundle.graph("checkpoint")))
module = api.Module(str(bundle.graph("train")), state)
optimizer = api.Optimizer(str(bundle.graph("optimizer")), module)
fed = dict(np.load(sys.argv[2]))
module(*(fed[name] for name in module.input_names()))
before = {name: parameter.data.copy() for name, parameter in state.parameters}
gradients = {name: parameter.grad for name, parameter in state.parameters}
optimizer.set_learning_rate(0.1)
optimizer.step()
print(json.dumps({name: [(parameter.data - before[name]).ravel().tolist(), gradients[name].ravel().tolist(),
                         float(np.spacing(np.abs(before[name]).max()))]
                  for name, parameter in state.parameters}))
"""


def test_the_sgd_artifact_takes_steps_of_the_gradient(cases, kit, tmp_path):
    """ONNX Runtime's own SGD on the exported training graph: the AdamW artifact's is in test_export.py."""
    case = cases("image-multilabel")
    bundle = case.bundle
    inputs, targets = some_batch(case, 4, 0)
    feeds = build_feeds(bundle.manifest, case.run.adapter())
    np.savez(tmp_path / "fed.npz", **inputs, labels=targets, **feeds)
    found = kit.without_torch(OPTIMIZER, bundle.root, tmp_path / "fed.npz")
    for name, (change, gradient, rounding) in found.items():
        np.testing.assert_allclose(change, -0.1 * np.array(gradient), rtol=1e-4, atol=rounding, err_msg=name)
    assert set(found) == {f"{name}.core" for name in bundle.manifest.groups} | set(bundle.manifest.extras)
    assert np.abs(found["head.weight"][0]).max() > 1e-3


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(UsageError, match="unknown optimizer 'lion'; expected adamw, sgd"):
        ExportSettings(optimizer="lion")


def test_volumes_are_segmented_too(segmenters, tmp_path):
    write_masks(tmp_path / "data.npz", (2, 4, 4))
    case = Case(
        "image-segmentation", tmp_path, f"{segmenters}:volume", tmp_path / "data.npz", ("onnx", "step")
    )
    assert set(case.report.parity["step"]) == set(TOLERANCES)
    answered = case.device("predict", case.bundle.root, "--data", case.data, "--adapter", "bundle")
    assert answered["score"] == pytest.approx(evaluate_run(case.run, case.data).adapter_score, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_answers_that_a_publisher_signs_are_checked_on_a_device(cases, name):
    """Outputs of any shape: for each sample the place of its largest output, and that output."""
    case = cases(name)
    bundle, adapter = case.bundle, case.run.adapter()
    signed, inputs = canary_answers(bundle, adapter), canary_digest(bundle.root, bundle.manifest)
    model = Model(bundle, threads=1)
    model.attach(adapter)
    outputs = model.outputs(read_canary(bundle.root, bundle.manifest).inputs)[:SAMPLES]
    flat = outputs.reshape(len(outputs), -1)
    assert signed.answers == tuple(flat.argmax(axis=1))
    assert signed.outputs == tuple(np.rint(1000 * flat.max(axis=1)))
    assert "the signed answers" in check_health(bundle, adapter, signed, inputs)
    moved = replace(signed, outputs=tuple(value + 1000 for value in signed.outputs))
    lowest = replace(signed, answers=tuple(int(place) for place in flat.argmin(axis=1)))
    outside = replace(signed, answers=(flat.shape[1], *signed.answers[1:]))
    before = replace(signed, answers=(-1, *signed.answers[1:]))
    for wrong in (moved, lowest, outside, before):
        with pytest.raises(HealthCheckError):
            check_health(bundle, adapter, wrong, inputs)
