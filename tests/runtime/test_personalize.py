"""Personalisation on the committed bundle: it learns, moves only the factors, and keeps its budget."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from edge_tcur_runtime import budget as budget_module
from edge_tcur_runtime import fitting as fitting_module
from edge_tcur_runtime import personalize as module
from edge_tcur_runtime import trainer as trainer_module
from edge_tcur_runtime.budget import Budget, Memory
from edge_tcur_runtime.cli import device
from edge_tcur_runtime.cli.framework import run
from edge_tcur_runtime.coordinates import Coordinates, read_coordinates
from edge_tcur_runtime.data import Dataset, encode_labels
from edge_tcur_runtime.engines import StepResult, open_engine
from edge_tcur_runtime.errors import (
    BaseMismatchError,
    BudgetError,
    ConfigError,
    DataError,
    IncompatibleError,
    IntegrityError,
    UsageError,
)
from edge_tcur_runtime.formats.adapter import Adapter, AdapterHeader, parse_adapter, serialize_adapter
from edge_tcur_runtime.formats.bundle import BASE_FILE, open_bundle
from edge_tcur_runtime.formats.digest import digest_file
from edge_tcur_runtime.formats.factors import FACTOR_PARTS, Factors, GroupSpec, SketchFactors
from edge_tcur_runtime.frame import Frame, build_frame
from edge_tcur_runtime.installed import find_onnxruntime
from edge_tcur_runtime.personalize import blank_adapter, bundle_adapter, personalize
from edge_tcur_runtime.predict import Model
from edge_tcur_runtime.preprocess import build_preprocessor
from edge_tcur_runtime.settings import AdamWSettings, PersonalizeSettings
from edge_tcur_runtime.tasks import find_device_task, mean_by_weight

DATA = Path(__file__).parents[1] / "data"
V1, SKETCH_V1, USER = DATA / "bundle-v1", DATA / "sketch-v1", DATA / "user.npz"
MIB = 2**20
INSTALLED = find_onnxruntime()
ONE_LABEL = find_device_task("image-classification")

pytestmark = pytest.mark.skipif(INSTALLED is None, reason="ONNX Runtime is not installed")
needs_training = pytest.mark.skipif(
    INSTALLED is None or not INSTALLED.training,
    reason="the installed ONNX Runtime has no training interface (onnxruntime-training-cpu has)",
)
ENGINE = ["ort-step", pytest.param("ort-training", marks=needs_training)]


def quick(**changes):
    """Settings of a short run on one thread."""
    optimizer = AdamWSettings(**changes.pop("optimizer", {}))
    return PersonalizeSettings(
        **{"epochs": 4, "threads": 1, "engine": "ort-step", "optimizer": optimizer, **changes}
    )


# --- it learns, and moves only the factors ---------------------------------------------------------


@pytest.mark.parametrize("name", ENGINE)
@pytest.mark.parametrize("start", ["bundle", "base"])
def test_the_users_pictures_are_answered_far_better_afterwards(bundle, user, name, start):
    check_learning(bundle, user, name, start)


@pytest.mark.parametrize("start", ["bundle", "base"])
def test_sketches_and_a_module_in_full_learn_the_users_pictures(sketched, user, start):
    check_learning(sketched, user, "ort-step", start)


def check_learning(bundle, user, name, start):
    model = Model(bundle, threads=1)
    begin = bundle_adapter(bundle) if start == "bundle" else None
    model.attach(begin)
    before = model.score(user)
    seen = []
    result = personalize(
        bundle, user, quick(epochs=20, engine=name), start=begin, on_step=lambda *step: seen.append(step)
    )
    model.attach(result.adapter)
    assert before < 0.3
    assert model.score(user) > 0.8
    assert result.better
    assert result.accuracy_before < 0.3
    assert result.accuracy_after > 0.8
    assert result.accuracy_after == result.accuracies[-1]
    assert result.engine == name
    assert result.engine_reason == "asked for"
    assert (result.samples, result.holdout_samples) == (64, 16)
    assert len(result.accuracies) == 20
    assert [step[:2] for step in seen] == [(done, 80) for done in range(1, 81)]
    assert [step[2] for step in seen] == result.losses
    assert result.losses[-1] < 0.2 * result.losses[0]
    assert result.peak_rss_bytes > 0


@pytest.mark.parametrize("stored", [V1, SKETCH_V1], ids=["indices", "sketch"])
def test_only_the_cores_and_the_head_move_and_the_base_is_only_read(tmp_path, user, stored):
    root = shutil.copytree(stored, tmp_path / "bundle")
    before = {path.name: (digest_file(path), path.stat().st_mtime_ns) for path in root.iterdir()}
    bundle = open_bundle(root)
    own = bundle_adapter(bundle)
    result = personalize(bundle, user, quick(), start=own)
    assert {path.name: (digest_file(path), path.stat().st_mtime_ns) for path in root.iterdir()} == before
    assert result.base_digest_before == result.base_digest_after == before[BASE_FILE][0]
    assert replace(result.adapter.header, provenance={}) == replace(own.header, provenance={})
    assert result.adapter.header.provenance["personal"] == "true"
    assert set(result.adapter.tensors()) == set(own.tensors())
    for name, value in own.tensors().items():
        moved = result.adapter.tensors()[name]
        if name.rpartition(".")[2] in FACTOR_PARTS[1:]:
            np.testing.assert_array_equal(moved, value, err_msg=name)
        else:
            assert (moved != value).all(), name
    assert parse_adapter(serialize_adapter(result.adapter)).header == result.adapter.header


@pytest.mark.parametrize("stored", [V1, SKETCH_V1], ids=["indices", "sketch"])
def test_the_blank_adapter_is_the_base(stored, user):
    bundle = open_bundle(stored)
    model = Model(bundle, threads=1)
    inputs = build_preprocessor(bundle.manifest.preprocessing, stored)(user.samples[:8])
    base = model.outputs(inputs)
    model.attach(blank_adapter(bundle))
    np.testing.assert_array_equal(model.outputs(inputs), base)
    for part in blank_adapter(bundle).factors.values():
        assert not part.core.any()


def test_the_blank_adapter_has_the_bases_own_values_of_a_module_trained_in_full(sketched):
    blank, own = blank_adapter(sketched), bundle_adapter(sketched)
    stored = load_file(SKETCH_V1 / "extras.safetensors")
    assert set(blank.extras) == set(own.extras) == set(stored)
    for name, value in stored.items():
        np.testing.assert_array_equal(blank.extras[name], value)
        assert value.any()
        assert (own.extras[name] != value).any()
    new_head = replace(sketched, manifest=replace(sketched.manifest, base_extras=None))
    assert not any(value.any() for value in blank_adapter(new_head).extras.values())


def test_a_bundle_without_an_adapter_says_so(bundle, user):
    bare = replace(bundle, manifest=replace(bundle.manifest, adapter=None))
    with pytest.raises(IncompatibleError, match="the bundle carries no adapter"):
        personalize(bare, user, quick())


@pytest.mark.parametrize("name", ENGINE)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(bundle, user, name):
    first, again, other = (
        serialize_adapter(personalize(bundle, user, quick(seed=seed, engine=name)).adapter)
        for seed in (3, 3, 4)
    )
    assert first == again != other


@needs_training
def test_both_engines_take_the_same_twenty_steps(bundle, user):
    curves = [
        personalize(bundle, user, quick(epochs=5, engine=name), start=bundle_adapter(bundle)).losses
        for name in ("ort-step", "ort-training")
    ]
    assert len(curves[0]) == 20
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-3)


def test_an_adapter_of_another_rank_is_trained_by_the_engine_that_can(bundle, user):
    own = bundle_adapter(bundle)
    factors = {
        group: Factors(np.ascontiguousarray(part.core[:, :2, :2]), part.rows[:, :2], part.cols[:, :2])
        for group, part in own.factors.items()
    }
    result = personalize(bundle, user, quick(engine="auto"), start=Adapter(own.header, factors))
    assert result.engine == "ort-step"
    assert {part.rank for part in result.adapter.factors.values()} == {2}
    assert result.losses[-1] < result.losses[0]


def test_a_sketch_of_another_rank_is_trained_too(sketched, user):
    own = bundle_adapter(sketched)
    factors = {
        group: SketchFactors.pack(part.core[:, :1, :1], part.left[:, :, :1], part.right[:, :1])
        for group, part in own.factors.items()
    }
    start = replace(own, factors=factors)
    result = personalize(sketched, user, quick(engine="auto"), start=start)
    assert result.engine == "ort-step"
    assert {part.rank for part in result.adapter.factors.values()} == {1}
    assert result.losses[-1] < result.losses[0]


def test_without_a_held_out_part_the_new_adapter_always_counts_as_better(bundle, user):
    result = personalize(bundle, user, quick(epochs=1, holdout=0.0))
    assert (result.samples, result.holdout_samples) == (80, 0)
    assert result.accuracy_before is result.accuracy_after is None
    assert result.accuracies == []
    assert result.better


# --- coordinates -----------------------------------------------------------------------------------


def base_weights(bundle, group):
    """The weights [n3, n1, n2] of a group, read from the base file as a whole."""
    raw, spec = np.fromfile(bundle.path(BASE_FILE), "<f4"), bundle.manifest.groups[group]
    places = [bundle.manifest.tensors[name] for name in spec.parameters]
    flat = [raw[place.offset // 4 :][: np.prod(place.shape)].reshape(place.shape) for place in places]
    return np.stack([part.T if place.transposed else part for part, place in zip(flat, places, strict=True)])


def test_the_frame_of_every_group_is_made_of_the_rows_and_columns_of_each_block(bundle):
    own = bundle_adapter(bundle)
    start = replace(own, header=replace(own.header, alpha=3.0))
    coordinates = read_coordinates(bundle, start)
    for group, part in own.factors.items():
        weights = base_weights(bundle, group)
        size = len(weights) // part.blocks
        columns = [weight[:, part.cols[at // size]] for at, weight in enumerate(weights)]
        rows = [weight[part.rows[at // size]] for at, weight in enumerate(weights)]
        expected = build_frame(
            "orthonormal", np.stack(columns), np.stack(rows), transform="dft", blocks=part.blocks, alpha=3.0
        )
        np.testing.assert_array_equal(coordinates.frames[group].to_raw(part.core), expected.to_raw(part.core))
    again = coordinates.adapter(coordinates.initial(), {})
    for group, part in own.factors.items():
        np.testing.assert_allclose(again.factors[group].core, part.core, rtol=1e-5, atol=1e-6)


def test_sketches_are_trained_as_they_are_but_for_alpha(sketched):
    own = bundle_adapter(sketched)
    coordinates = read_coordinates(sketched, own)
    values = coordinates.initial()
    assert set(values) == {f"{group}.core" for group in own.factors} | set(own.extras)
    for group, part in own.factors.items():
        np.testing.assert_array_equal(values[f"{group}.core"], part.core.astype(np.float64) / 2)
    for name, value in coordinates.raw(values).items():
        np.testing.assert_array_equal(value, own.feeds()[name])
    ones = {name: np.ones_like(value) for name, value in values.items()}
    for name, value in coordinates.pull_back(ones).items():
        np.testing.assert_array_equal(value, 2 if coordinates.is_core(name) else 1)


# --- one update, whatever the micro-batch -----------------------------------------------------------


def make_trainer(bundle, user, settings, budget=None, start=None):
    preprocess = build_preprocessor(bundle.manifest.preprocessing, bundle.root)
    data = trainer_module.Batch(user, encode_labels(user, bundle.manifest.labels), preprocess, ONE_LABEL)
    coordinates = read_coordinates(bundle, start or bundle_adapter(bundle))
    engine = open_engine(settings.engine, bundle, threads=1)
    return trainer_module.Trainer(engine, coordinates, data, settings, Budget(budget))


@pytest.mark.parametrize("name", ENGINE)
def test_accumulated_micro_batches_take_the_same_steps_as_the_whole_batch(bundle, user, name):
    values = {}
    for micro in (16, 3, 1):
        trainer = make_trainer(bundle, user, quick(engine=name))
        trainer.micro_batch = micro
        losses = [trainer.step(np.arange(16) + 16 * number, 1.0) for number in range(3)]
        values[micro] = trainer.values, losses
    for micro in (3, 1):
        np.testing.assert_allclose(values[micro][1], values[16][1], rtol=1e-6)
        for key, value in values[micro][0].items():
            np.testing.assert_allclose(value, values[16][0][key], rtol=0, atol=1e-6, err_msg=key)


class Quadratic:
    """An engine whose loss is half the squared distance of a core and a head from each sample's target."""

    name = "quadratic"

    def __init__(self, spoil=lambda count, result: result):
        self.sizes = []
        self._spoil = spoil

    def step(self, inputs, targets, feeds):
        self.sizes.append(len(targets))
        wanted = targets.astype(np.float64)[:, None]
        gradients, loss = {}, 0.0
        for name in ("q.core", "head"):
            apart = feeds[name].astype(np.float64).ravel()[None] - wanted
            loss += float(np.square(apart).sum(axis=1).mean()) / 2
            gradients[name] = apart.mean(axis=0).reshape(feeds[name].shape).astype(np.float32)
        result = StepResult(loss, np.eye(2, dtype=np.float32)[targets], gradients)
        return self._spoil(len(self.sizes), result)


def quadratic_trainer(engine, settings, count=7):
    """A trainer of one core and a head in the raw frame, on samples whose targets are 0 or 1."""
    header = AdapterHeader("sha256:b", {"q": GroupSpec(("q.0",), 4, 4)}, "t", ("0", "1"), frame="raw")
    indices = np.array([[0, 1]], np.int32)
    core = Factors(np.full((1, 2, 2), 3, np.float32), indices, indices)
    start = Adapter(header, {"q": core}, {"head": np.full(3, 3, np.float32)})
    samples = np.arange(count, dtype=np.float32)[:, None, None]
    labels = tuple(str(index % 2) for index in range(count))
    dataset = Dataset("image", samples, labels, "made", labels)
    data = trainer_module.Batch(
        dataset, encode_labels(dataset, ("0", "1")), lambda samples: {"x": samples}, ONE_LABEL
    )
    return trainer_module.Trainer(engine, Coordinates(start, {"q": Frame()}), data, settings, Budget())


def test_a_step_weighs_micro_batches_by_their_samples():
    """Seven samples by three: the last pass has one sample and a third of the others' weight."""
    optimizer = {"max_gradient_norm": 0.0}
    trainer = quadratic_trainer(engine := Quadratic(), quick(optimizer=optimizer))
    trainer.micro_batch = 3
    loss = trainer.step(np.arange(7), 1.0)
    assert engine.sizes == [3, 3, 1]
    mean = 3 / 7
    assert loss == pytest.approx((4 + 3) * (9 - 6 * mean + mean) / 2)
    np.testing.assert_allclose(trainer._optimizer.first["head"] / 0.1, 3 - mean, rtol=1e-6)


def test_micro_batches_of_a_language_model_weigh_by_their_tokens():
    """Texts of three and one counted tokens: the second pass counts a third of the first, one without any
    counts nothing."""

    class Tokens(Quadratic):
        def step(self, inputs, targets, feeds):
            self.sizes.append(len(targets))
            counted = targets[:, 1:] != -100
            value = float(inputs["input_ids"][:, 1:][counted].mean()) if counted.any() else 0.0
            gradients = {name: np.full(feeds[name].shape, value, np.float32) for name in ("q.core", "head")}
            return StepResult(value, np.zeros((*targets.shape, 2), np.float32), gradients, value)

    optimizer = {"max_gradient_norm": 0.0}
    trainer = quadratic_trainer(engine := Tokens(), quick(optimizer=optimizer), count=3)
    ids = np.array([[9, 1, 1, 1], [9, 5, 0, 0], [9, 0, 0, 0]])
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])

    def preprocess(samples):
        rows = samples.ravel().astype(int)
        return {"input_ids": ids[rows], "attention_mask": mask[rows]}

    dataset = Dataset("text", trainer._data.dataset.samples, None, "made", ("a", "b", "c"), reads="nothing")
    task = find_device_task("causal-lm")
    trainer._data = trainer_module.Batch(dataset, np.empty((3, 0), np.int64), preprocess, task)
    trainer.micro_batch = 1
    assert trainer.score(trainer._data) == (2.0, 2.0)
    assert trainer.step(np.arange(3), 1.0) == pytest.approx(2.0)
    assert engine.sizes == [1] * 6
    np.testing.assert_allclose(trainer._optimizer.first["head"] / 0.1, 2.0, rtol=1e-6)


def test_the_better_of_two_adapters_is_the_tasks_business():
    def better(task, before, after):
        return trainer_module.Outcome(find_device_task(task), {}, before=before, after=after).better

    assert better("text-regression", (2.0, 4.0), (1.0, 5.0))  # an error: less is better
    assert not better("text-regression", (1.0, 4.0), (2.0, 1.0))
    assert better("image-segmentation", (0.4, 1.0), (0.5, 1.2))
    assert better("causal-lm", (0.5, 3.0), (0.4, 2.0))  # the likelihood of the text, not the best guesses
    assert not better("causal-lm", (0.4, 2.0), (0.5, 2.0))


@pytest.mark.parametrize(("right", "count", "micro"), [(15, 23, 22), (7, 26, 25)])
def test_a_share_that_differs_by_rounding_alone_is_the_same_share(right, count, micro):
    """Before and after may be scored in passes of other sizes: the guard makes them smaller on the way."""
    hits = np.arange(count) < right
    sizes = [len(part) for part in np.split(hits, range(micro, count, micro))]
    found = [np.mean(part) for part in np.split(hits, range(micro, count, micro))]
    whole = mean_by_weight([np.mean(hits)], [count])
    parts = mean_by_weight(found, sizes)
    task = find_device_task("image-classification")
    for before, after in ((whole, parts), (parts, whole)):
        assert not trainer_module.Outcome(task, {}, before=(before, 1.0), after=(after, 2.0)).better
        assert trainer_module.Outcome(task, {}, before=(before, 2.0), after=(after, 1.0)).better


def test_data_read_for_another_task_are_refused(bundle, user):
    with pytest.raises(UsageError, match="read as 'values'; the task image-classification takes 'label'"):
        personalize(bundle, replace(user, reads="values"), quick())


@pytest.mark.parametrize("micro", [1, 3])
def test_accumulation_is_exact_but_for_the_engines_rounding(micro):
    whole, parts = (quadratic_trainer(Quadratic(), quick()) for _ in range(2))
    whole.micro_batch, parts.micro_batch = 7, micro
    for number in range(5):
        assert whole.step(np.arange(7), 1.0) == pytest.approx(parts.step(np.arange(7), 1.0), rel=1e-6), number
    for key, value in whole.values.items():
        np.testing.assert_allclose(parts.values[key], value, atol=1e-6)


def test_cores_and_a_head_have_learning_rates_of_their_own():
    optimizer = {"learning_rate": 0.5, "head_learning_rate": 0.125}
    trainer = quadratic_trainer(Quadratic(), quick(optimizer=optimizer))
    trainer.step(np.arange(7), 0.5)  # Adam's first step is as long as the rate
    np.testing.assert_allclose(3 - trainer.values["q.core"], 0.25, rtol=1e-5)
    np.testing.assert_allclose(3 - trainer.values["head"], 0.0625, rtol=1e-5)
    adapter = trainer._coordinates.adapter(trainer.values, {})
    np.testing.assert_allclose(adapter.extras["head"], 3 - 0.0625, rtol=1e-6)


def test_scoring_moves_nothing_and_counts_every_sample():
    trainer = quadratic_trainer(engine := Quadratic(), quick())
    trainer.micro_batch = 3
    before = {key: value.copy() for key, value in trainer.values.items()}
    accuracy, loss = trainer.score(trainer._data)
    assert accuracy == 1
    assert loss == pytest.approx((4 + 3) * (9 - 6 * 3 / 7 + 3 / 7) / 2)
    assert engine.sizes == [3, 3, 1]
    for key, value in before.items():
        np.testing.assert_array_equal(value, trainer.values[key])


# --- divergence ------------------------------------------------------------------------------------


def not_a_number(count, result):
    return replace(result, loss=float("nan")) if count == 3 else result


def bad_gradient(bad):
    def spoil(count, result):
        gradients = {**result.gradients, "q.core": np.full((1, 2, 2), bad, np.float32)}
        return replace(result, gradients=gradients) if count == 3 else result

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (not_a_number, "the loss is nan"),
        (bad_gradient(np.nan), "a gradient is not finite"),
        (bad_gradient(np.inf), "a gradient is not finite"),
    ],
)
def test_divergence_is_a_clear_error_and_leaves_the_last_good_values(spoil, message):
    trainer = quadratic_trainer(Quadratic(spoil), quick())
    trainer.step(np.arange(7), 1.0)
    trainer.step(np.arange(7), 1.0)
    before = {key: value.copy() for key, value in trainer.values.items()}
    with pytest.raises(ConfigError, match=f"training diverged: {message}") as caught:
        trainer.step(np.arange(7), 1.0)
    assert caught.value.where == "learning_rate"
    assert "lower --learning-rate" in caught.value.hint
    for key, value in before.items():
        np.testing.assert_array_equal(value, trainer.values[key])


def test_a_factor_that_float32_cannot_hold_is_divergence_too():
    trainer = quadratic_trainer(Quadratic(), quick(optimizer={"learning_rate": 99.0}))
    trainer._optimizer.step = lambda values, gradients, rates: {
        key: value + 1e39 for key, value in values.items()
    }
    with pytest.raises(ConfigError, match="training diverged: a factor is too large for float32"):
        trainer.step(np.arange(7), 1.0)


def test_a_held_out_loss_that_is_no_number_is_never_better():
    outcome = trainer_module.Outcome(ONE_LABEL, {}, before=(0.0, 1.0), after=(1.0, float("nan")))
    assert not outcome.better
    assert trainer_module.Outcome(ONE_LABEL, {}, before=(0.5, 1.0), after=(0.5, 0.9)).better
    assert not trainer_module.Outcome(ONE_LABEL, {}, before=(0.5, 1.0), after=(0.5, 1.0)).better
    assert not trainer_module.Outcome(ONE_LABEL, {}, before=(0.5, 1.0), after=(0.4, 0.1)).better


# --- data and adapters that do not fit --------------------------------------------------------------


def with_labels(user, change):
    return replace(user, labels=None if change is None else tuple(change(label) for label in user.labels))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda user: user.select([]), "the data set is empty"),
        (lambda user: with_labels(user, lambda _: "1"), "every sample has the label '1'"),
        (
            lambda user: with_labels(user, lambda label: "cat" if label == "2" else label),
            "unknown label 'cat'",
        ),
        (lambda user: with_labels(user, None), "no labels"),
    ],
)
def test_data_that_nothing_can_be_learnt_from_is_refused_before_anything_is_loaded(
    bundle, user, edit, message, monkeypatch
):
    monkeypatch.setattr(module, "open_engine", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(DataError, match=message):
        personalize(bundle, edit(user), quick())


def one_of_each(user, count=1):
    """`count` samples of each class."""
    places = [
        [i for i, label in enumerate(user.labels) if label == name] for name in sorted(set(user.labels))
    ]
    return user.select(sorted(index for place in places for index in place[:count]))


def test_one_sample_of_each_class_trains_whole_and_is_judged_by_what_it_was_trained_on(bundle, user):
    few = one_of_each(user)
    result = personalize(bundle, few, quick(), start=bundle_adapter(bundle))
    assert (result.samples, result.holdout_samples) == (len(few), 0)
    assert result.losses[-1] < result.losses[0]
    assert result.better
    assert result.kept_epoch is None
    assert result.verdict == "nothing was held out to judge it by; no worse on what it was trained on"
    assert result.judged_by == ["training"]
    assert result.training["loss_after"] < result.training["loss_before"]
    assert "of a class with one sample none is kept apart" in result.notes[0]
    assert "the samples that it was trained on judge it" in result.notes[0]


def test_too_few_held_out_samples_judge_the_adapter_but_choose_no_epoch(bundle, user):
    few = one_of_each(user, 3)
    wild = {"learning_rate": 0.5, "head_learning_rate": 0.5}
    result = personalize(bundle, few, quick(epochs=10, patience=1, optimizer=wild))
    assert 0 < result.holdout_samples < 8
    assert len(result.scores) == result.kept_epoch == 10
    assert not result.stopped_early
    assert result.loss_after == result.held_out_losses[-1]


def test_two_samples_of_two_classes_are_enough(bundle, user):
    result = personalize(bundle, user.select([0, 1]), quick(epochs=1))
    assert (result.samples, result.holdout_samples) == (2, 0)


def test_an_adapter_of_another_base_is_refused_before_anything_is_loaded(bundle, user, monkeypatch):
    monkeypatch.setattr(module, "open_engine", lambda *_, **__: pytest.fail("loaded"))
    own = bundle_adapter(bundle)
    foreign = replace(own, header=replace(own.header, base_digest="sha256:" + "0" * 64))
    with pytest.raises(BaseMismatchError, match=r"sha256:0000.*; this bundle holds sha256:602d2cf7"):
        personalize(bundle, user, quick(), start=foreign)


def test_a_base_that_changes_under_the_run_is_an_integrity_error(tmp_path, user):
    bundle = open_bundle(shutil.copytree(V1, tmp_path / "bundle"))

    def damage(done, total, _loss):
        if done == total:
            path = bundle.path(BASE_FILE)
            other = path.with_name("other")
            other.write_bytes(path.read_bytes()[:-1] + b"\1")
            other.replace(path)

    with pytest.raises(IntegrityError, match="the base changed during the run"):
        personalize(bundle, user, quick(epochs=1), on_step=damage)


# --- the budget ------------------------------------------------------------------------------------


def crossing(monkeypatch, passes, limit):
    """Lets the memory that is read cross `limit` after `passes` engine passes."""
    state = {"passes": 0}
    real = open_engine

    def opened(*arguments, **options):
        engine = real(*arguments, **options)
        step = engine.step

        def counted(*batch):
            state["passes"] += 1
            return step(*batch)

        engine.step = counted
        return engine

    def memory():
        peak = limit + 1 if state["passes"] >= passes else limit - 20 * MIB
        return Memory(peak, limit // 2, 0, 0)

    monkeypatch.setattr(module, "open_engine", opened)
    for part in (module, trainer_module, fitting_module):
        monkeypatch.setattr(part, "read_memory", memory)
    monkeypatch.setattr(budget_module, "read_memory", memory)
    return state


@pytest.mark.parametrize(
    ("passes", "what"),
    [
        (1, "by a step of one or two samples"),
        (3, "by scoring held-out samples"),
        (6, "by a training step"),
        (20, "by a training step"),
    ],
)
def test_a_budget_that_is_crossed_on_the_way_stops_the_run(bundle, user, monkeypatch, passes, what):
    limit = 400 * MIB
    state = crossing(monkeypatch, passes, limit)
    with pytest.raises(BudgetError, match=f"was exceeded {what}"):
        personalize(bundle, user, quick(budget=limit))
    assert state["passes"] == passes  # it stopped there and then


def test_a_budget_below_what_the_process_holds_is_refused_before_anything_is_loaded(
    bundle, user, monkeypatch
):
    monkeypatch.setattr(module, "open_engine", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr(module, "digest_file", lambda *_: pytest.fail("read"))
    monkeypatch.setattr(module, "read_memory", lambda: Memory(90 * MIB, 50 * MIB, 0, 0))
    size = bundle.manifest.files[BASE_FILE].size
    with pytest.raises(BudgetError, match="the base and the libraries needs about 90") as caught:
        personalize(bundle, user, quick(budget=64 * MIB))
    # The peak so far is the highest; 1/64 more for what differs from one process to the next.
    assert caught.value.hint == "give at least --budget 92MiB"
    monkeypatch.setattr(module, "read_memory", lambda: Memory(51 * MIB, 50 * MIB, 0, 0))
    needed = 50 * MIB + size + module._LIBRARIES_BYTES
    with pytest.raises(BudgetError) as caught:
        personalize(bundle, user, quick(budget=64 * MIB))
    assert caught.value.hint == f"give at least --budget {-(-needed * 65 // 64 // MIB)}MiB"


def test_the_budget_that_is_named_before_loading_is_not_refused_by_a_process_that_holds_a_little_more(
    bundle, user, monkeypatch
):
    """The need of one process is just below a whole MiB, that of the next one just above it."""
    size = bundle.manifest.files[BASE_FILE].size
    held = 70 * MIB - size - module._LIBRARIES_BYTES
    monkeypatch.setattr(module, "read_memory", lambda: Memory(held, held, 0, 0))
    with pytest.raises(BudgetError) as caught:
        personalize(bundle, user, quick(budget=MIB))
    named = int(re.fullmatch(r"give at least --budget (\d+)MiB", caught.value.hint).group(1)) * MIB
    monkeypatch.setattr(module, "read_memory", lambda: Memory(held, held + MIB // 2, 0, 0))
    module._refuse_early(bundle, user, Budget(named))


def readings(monkeypatch, *pairs):
    """Makes memory read as these (peak, resident) pairs, in MiB, one a pass."""
    rest = [Memory(peak * MIB, resident * MIB, 0, 0) for peak, resident in pairs]
    monkeypatch.setattr(trainer_module, "read_memory", lambda: rest.pop(0))
    monkeypatch.setattr(budget_module, "read_memory", lambda: rest[0])


@pytest.mark.parametrize(
    ("one", "two", "limit", "expected"),
    [
        ((100, 90), (105, 95), 400, 16),
        ((100, 90), (105, 95), 150, 8),
        ((100, 90), (105, 95), 109, 2),  # a 32nd is left free
        ((100, 90), (105, 95), 106, 1),
        ((100, 40), (100, 45), 150, 8),  # a peak of loading hides what a step adds
        ((100, 40), (100, 45), 104, 2),
        ((100, 90), (100, 90), 104, 16),
    ],
)
def test_the_micro_batch_fits_the_budget(bundle, user, monkeypatch, one, two, limit, expected):
    trainer = make_trainer(bundle, user, quick(), budget=limit * MIB)
    readings(monkeypatch, one, two)
    trainer.calibrate()
    assert trainer.micro_batch == expected


def test_a_budget_that_the_first_steps_nearly_fill_is_refused_before_training(bundle, user, monkeypatch):
    """A run takes a little more than they do: what is accepted ends under its budget."""
    limit = 400 * MIB
    state = crossing(monkeypatch, 100, limit)
    for part in (module, fitting_module, trainer_module, budget_module):
        monkeypatch.setattr(part, "read_memory", lambda: Memory(limit - 4 * MIB, limit // 2, 0, 0))
    with pytest.raises(
        BudgetError, match="cannot be met: by its first steps training takes about 396"
    ) as caught:
        personalize(bundle, user, quick(budget=limit))
    assert caught.value.hint == "give at least --budget 412MiB"
    assert state["passes"] == 2
    assert personalize(bundle, user, quick(budget=412 * MIB, epochs=1)).predicted_peak_bytes == 396 * MIB


def test_without_a_budget_nothing_is_measured_and_the_whole_batch_is_taken(bundle, user, monkeypatch):
    trainer = make_trainer(bundle, user, quick())
    monkeypatch.setattr(trainer, "_engine", None)
    trainer.calibrate()
    assert trainer.micro_batch == 16


def test_a_budget_that_is_kept_changes_the_micro_batch_and_not_the_adapter(bundle, user, monkeypatch):
    free = personalize(bundle, user, quick())
    monkeypatch.setattr(trainer_module, "choose_micro_batch", lambda *_: 4)
    tight = personalize(bundle, user, quick(budget=2**40))
    assert (free.micro_batch, tight.micro_batch) == (16, 4)
    assert (free.budget_bytes, tight.budget_bytes) == (None, 2**40)
    for group, part in tight.adapter.factors.items():
        np.testing.assert_allclose(part.core, free.adapter.factors[group].core, rtol=1e-3, atol=1e-3)


# --- the command and the store ----------------------------------------------------------------------


@pytest.fixture
def cli(tmp_path, capsys):
    """Runs `edge-tcur-device personalize` in this process; returns exit code, JSON, and the store's files."""
    store = tmp_path / "store"

    def call(*arguments, data=USER):
        with pytest.raises(SystemExit) as caught:
            run(device, ["personalize", str(V1), "--data", str(data), "--store", str(store), "--threads", "1",
                         "--engine", "ort-step", "--json", *map(str, arguments)])  # fmt: skip
        found = {path.name: path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}
        return caught.value.code, json.loads(capsys.readouterr().out), found

    return call


def test_a_better_adapter_is_installed_and_becomes_the_start_of_the_next_run(cli):
    code, first, store = cli("--epochs", "8")
    assert code == 0
    assert f"{first['installed'].removeprefix('sha256:')}.safetensors" in store
    code, second, _ = cli("--epochs", "8")
    assert second["accuracy_before"] == first["accuracy_after"]
    assert second["losses"][0] < first["losses"][0]


@pytest.mark.parametrize("earlier", [False, True])
def test_an_adapter_that_is_not_better_leaves_the_store_as_it_was(cli, earlier):
    if earlier:
        cli("--epochs", "4")
    _, _, before = cli("--learning-rate", "1e-30", "--epochs", "1")
    code, result, after = cli("--learning-rate", "1e-30", "--epochs", "1")
    assert code == 0
    assert result["better"] is False
    assert result["installed"] is None
    assert after == before
    assert bool(after) is earlier


@pytest.mark.parametrize("passes", [1, 3, 20])
def test_a_budget_crossed_in_the_middle_leaves_the_store_as_it_was(cli, monkeypatch, passes):
    _, _, before = cli("--epochs", "2")
    crossing(monkeypatch, passes, 400 * MIB)
    code, result, after = cli("--budget", "400MiB")
    assert code == 5
    assert result["error"]["code"] == "budget"
    assert {name: content for name, content in after.items() if not name.startswith("checkpoint-")} == before


def test_divergence_leaves_the_store_as_it_was(cli, monkeypatch):
    real = open_engine

    def opened(*arguments, **options):
        engine = real(*arguments, **options)
        step = engine.step
        engine.step = lambda *batch: replace(step(*batch), loss=float("inf"))
        return engine

    monkeypatch.setattr(module, "open_engine", opened)
    code, result, store = cli()
    assert code == 3
    assert result["error"]["where"] == "learning_rate"
    assert "training diverged: the loss is inf" in result["error"]["message"]
    assert store == {}


COMMAND = """
import sys
sys.modules["torch"] = None
from edge_tcur_runtime.cli import main
main()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
@pytest.mark.parametrize("name", ENGINE)
def test_a_budget_too_small_is_refused_and_the_one_that_is_named_will_do(tmp_path, name):
    """In a process of its own; the estimate before loading and the measured need may each speak once."""
    store, budget, named = tmp_path / "store", "1MiB", []
    while True:
        arguments = [str(V1), "--data", str(USER), "--store", str(store), "--engine", name, "--epochs", "1",
                     "--threads", "1", "--holdout", "0", "--budget", budget, "--json"]  # fmt: skip
        command = [sys.executable, "-c", COMMAND, "personalize", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        result = json.loads(done.stdout)
        if done.returncode == 0:
            break
        assert done.returncode == 5, done.stderr
        assert not store.exists()
        budget = re.fullmatch(r"give at least --budget (\d+MiB)", result["error"]["hint"]).group(1)
        named.append(int(budget.removesuffix("MiB")))
    assert 1 <= len(named) <= 2
    assert named == sorted(named)
    assert 0 < result["peak_rss_bytes"] <= named[-1] * MIB == result["budget_bytes"]
