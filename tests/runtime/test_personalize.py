"""Personalisation on the bundles of version 1: it learns, moves the factors alone, and what does not fit."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from edge_tcur_runtime import personalize as module
from edge_tcur_runtime.coordinates import read_coordinates
from edge_tcur_runtime.errors import (
    BaseMismatchError,
    DataError,
    IncompatibleError,
    IntegrityError,
)
from edge_tcur_runtime.formats.adapter import Adapter, parse_adapter, serialize_adapter
from edge_tcur_runtime.formats.bundle import BASE_FILE, open_bundle
from edge_tcur_runtime.formats.digest import digest_file
from edge_tcur_runtime.formats.factors import FACTOR_PARTS, Factors, SketchFactors
from edge_tcur_runtime.frame import build_frame
from edge_tcur_runtime.personalize import blank_adapter, bundle_adapter, personalize
from edge_tcur_runtime.predict import Model
from edge_tcur_runtime.preprocess import build_preprocessor
from short_runs import ENGINE, INSTALLED, needs_training, quick

DATA = Path(__file__).parents[1] / "data"
V1, SKETCH_V1, USER = DATA / "bundle-v1", DATA / "sketch-v1", DATA / "user.npz"


pytestmark = pytest.mark.skipif(INSTALLED is None, reason="ONNX Runtime is not installed")


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
