"""No catastrophic forgetting: an adapter that falls behind on the bundle's reference set is not kept."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_tcur_runtime import budget as budget_module
from edge_tcur_runtime import fitting as fitting_module
from edge_tcur_runtime import keeper as keeper_module
from edge_tcur_runtime import personalize as personalize_module
from edge_tcur_runtime import trainer as trainer_module
from edge_tcur_runtime.budget import Budget, Memory
from edge_tcur_runtime.cli import device
from edge_tcur_runtime.cli.framework import run
from edge_tcur_runtime.coordinates import read_coordinates
from edge_tcur_runtime.engines import open_engine
from edge_tcur_runtime.errors import BudgetError, ConfigError, FileFormatError, IntegrityError, PausedError
from edge_tcur_runtime.formats.adapter import serialize_adapter
from edge_tcur_runtime.formats.bundle import (
    MANIFEST,
    ReferenceSpec,
    open_bundle,
    parse_manifest,
    serialize_manifest,
)
from edge_tcur_runtime.installed import find_onnxruntime
from edge_tcur_runtime.personalize import bundle_adapter, personalize
from edge_tcur_runtime.predict import Model
from edge_tcur_runtime.preprocess import build_preprocessor
from edge_tcur_runtime.reference import ReferenceSet, read_reference
from edge_tcur_runtime.settings import KeepSettings, PersonalizeSettings
from edge_tcur_runtime.tasks import find_device_task
from referring import FILE, tensors_of, with_reference

DATA = Path(__file__).parents[1] / "data"
V1, USER = DATA / "bundle-v1", DATA / "user.npz"
TASK = find_device_task("image-classification")
QUICK = PersonalizeSettings(epochs=4, threads=1, engine="ort-step")
pytestmark = pytest.mark.skipif(find_onnxruntime() is None, reason="ONNX Runtime is not installed")


@pytest.fixture(scope="module")
def contrary(tmp_path_factory, user):
    """A bundle whose reference set is right where the user's data are wrong."""
    tensors = tensors_of(open_bundle(V1), user, own_answers=True)
    return with_reference(tmp_path_factory.mktemp("contrary") / "b", tensors, score=1.0, loss=0.1)


@pytest.fixture(scope="module")
def agreeing(tmp_path_factory, user):
    tensors = tensors_of(open_bundle(V1), user, own_answers=False)
    return with_reference(tmp_path_factory.mktemp("agreeing") / "b", tensors, score=0.0, loss=3.0)


def test_an_adapter_that_forgets_is_not_better_whatever_the_user_says(contrary, user):
    result = personalize(contrary, user, QUICK, start=bundle_adapter(contrary))
    assert result.score_after > result.score_before
    assert not result.better
    assert "it forgot" in result.verdict
    found = result.reference
    assert (found["samples"], found["measure"], found["score"], found["loss"]) == (32, "base", 1.0, 0.1)
    assert found["score_before"] == 1.0
    assert found["score_after"] < 0.9
    assert found["forgot"] is True
    lenient = personalize(contrary, user, replace(QUICK, forget=1.0), start=bundle_adapter(contrary))
    assert lenient.better
    assert lenient.reference["forgot"] is False
    assert serialize_adapter(lenient.adapter) == serialize_adapter(result.adapter)


def test_an_adapter_that_holds_its_ground_is_kept_and_scored_as_predict_scores_it(agreeing, user):
    result = personalize(agreeing, user, QUICK, start=bundle_adapter(agreeing))
    assert result.better
    assert "holds its ground" in result.verdict
    model = Model(agreeing, threads=1)
    model.attach(result.adapter)
    assert result.reference["score_after"] == pytest.approx(model.score(user.select(np.arange(32))))


def test_the_scores_survive_a_break(contrary, user, tmp_path, monkeypatch):
    monkeypatch.setattr(keeper_module, "GATE_SECONDS", 0.0)
    whole = personalize(contrary, user, QUICK)
    left = [5]
    keep = KeepSettings(tmp_path, 1e9, gates=[lambda: "enough" if left[0] <= 0 else None])

    def count(*_):
        left[0] -= 1

    with pytest.raises(PausedError):
        personalize(contrary, user, QUICK, keep=keep, on_step=count)
    rest = personalize(contrary, user, QUICK, keep=replace(keep, gates=()))
    assert rest.resumed_from == 5
    assert rest.reference == whole.reference


def test_the_command_changes_nothing_and_says_why(contrary, tmp_path, capsys):
    store = tmp_path / "store"
    arguments = ["personalize", str(contrary.root), "--data", str(USER), "--store", str(store), "--threads",
                 "1", "--engine", "ort-step", "--epochs", "4", "--start", "bundle"]  # fmt: skip

    def call(*more):
        with pytest.raises(SystemExit) as caught:
            run(device, [*arguments, *more])
        return caught.value.code, capsys.readouterr().out

    code, out = call()
    assert code == 0
    assert "on the reference set" in out
    assert "it forgot: it falls behind on the bundle's reference set: nothing was installed" in out
    assert not [path for path in store.rglob("*") if path.is_file()]
    code, out = call("--forget", "1", "--json")
    assert code == 0
    result = json.loads(out)
    assert result["installed"]
    assert result["reference"]["allowed"] == 1.0
    assert call("--forget", "-1", "--json")[0] == 3


# --- under a budget --------------------------------------------------------------------------------


def test_a_set_that_the_budget_has_no_room_for_ends_the_run_before_training(contrary, user, monkeypatch):
    limit, passes = 400 * 2**20, []
    real = trainer_module.Trainer._run

    def counted(self, indices, data, what):
        passes.append(isinstance(data, ReferenceSet))
        return real(self, indices, data, what)

    def memory():
        crossed = any(passes)
        return Memory(limit + 1 if crossed else limit // 2, limit // 4, 0, 0)

    monkeypatch.setattr(trainer_module.Trainer, "_run", counted)
    for part in (trainer_module, budget_module, fitting_module, personalize_module):
        monkeypatch.setattr(part, "read_memory", memory)
    steps = []
    with pytest.raises(BudgetError, match="was exceeded by scoring the bundle's reference set"):
        personalize(contrary, user, replace(QUICK, budget=limit), on_step=lambda *_: steps.append(1))
    assert not steps


@pytest.mark.parametrize(("factor", "limit", "expected"), [(1, 1, 16), (4, 1, 4), (64, 1, 1), (64, None, 16)])
def test_larger_samples_than_were_measured_are_scored_fewer_at_once(user, factor, limit, expected):
    bundle = open_bundle(V1)
    preprocess = build_preprocessor(bundle.manifest.preprocessing, bundle.root)
    data = trainer_module.Batch(user, np.zeros(len(user), np.int64), preprocess, TASK)
    coordinates = read_coordinates(bundle, bundle_adapter(bundle))
    engine = open_engine("ort-step", bundle, threads=1)
    trainer = trainer_module.Trainer(engine, coordinates, data, QUICK, Budget(limit))
    spec = ReferenceSpec(FILE, 32, "base", 1.0, 0.1)
    inputs = {"pixel_values": np.zeros((32, 1, 8, 8 * factor), np.float32)}
    reference = ReferenceSet(inputs, np.zeros(32, np.int64), TASK, spec)
    assert trainer._together(reference) == expected


def test_a_plan_knows_how_long_the_samples_are_and_which_rows_they_read():
    spec = ReferenceSpec(FILE, 2, "base", 1.0, 0.1)
    text = {"input_ids": np.array([[5, 3, 0], [3, 9, 9]]), "attention_mask": np.ones((2, 3), np.int64)}
    found = ReferenceSet(text, np.zeros(2, np.int64), TASK, spec)
    assert found.lengths.tolist() == [3, 3]
    assert {name: rows.tolist() for name, rows in found.picked.items()} == {
        "input_ids": [0, 3, 5, 9], "attention_mask": [1],
    }  # fmt: skip
    pictures = {"pixel_values": np.zeros((2, 1, 8, 8), np.float32)}
    found = ReferenceSet(pictures, np.zeros(2, np.int64), TASK, spec)
    assert (found.lengths.tolist(), found.picked) == ([0, 0], {})


def test_held_out_texts_longer_than_what_was_measured_are_scored_fewer_at_once(user):
    """Of a bundle without tables; pictures four times as wide stand for the longer texts."""
    bundle = open_bundle(V1)
    preprocess = build_preprocessor(bundle.manifest.preprocessing, bundle.root)
    data = trainer_module.Batch(user, np.zeros(len(user), np.int64), preprocess, TASK)
    coordinates = read_coordinates(bundle, bundle_adapter(bundle))
    engine = open_engine("ort-step", bundle, threads=1)
    trainer = trainer_module.Trainer(engine, coordinates, data, QUICK, Budget(1))
    wide = replace(data, preprocess=lambda samples: {"pixel_values": np.zeros((len(samples), 1, 8, 32))})
    assert trainer._together(wide) == 4
    assert trainer._together(data) == 16


# --- the rule --------------------------------------------------------------------------------------


def forgot(task, score, loss, found, allowed):
    spec = ReferenceSpec(FILE, 1, "base", score, loss)
    return ReferenceSet({}, np.zeros(1), find_device_task(task), spec).forgot(found, allowed)


@pytest.mark.parametrize(
    ("task", "base", "found", "allowed", "expected"),
    [
        ("image-classification", (1.0, 0.1), (0.98, 9.0), 0.02, False),  # exactly what is allowed
        ("image-classification", (1.0, 0.1), (0.97, 0.1), 0.02, True),
        ("image-classification", (0.5, 0.1), (0.5, 0.2), 0.0, False),
        ("image-regression", (2.0, 9.0), (2.1, 9.0), 0.1, False),  # an error may grow by a tenth
        ("image-regression", (2.0, 9.0), (2.3, 0.0), 0.1, True),
        ("causal-lm", (0.1, 3.0), (0.9, 3.5), 0.1, True),  # judged by its loss
        ("causal-lm", (0.9, 3.0), (0.1, 3.2), 0.1, False),
        ("image-classification", (0.0, 0.1), (1.0, float("nan")), 1.0, True),
        ("image-classification", (0.0, 0.1), (1.0, float("inf")), 1.0, True),
    ],
)
def test_what_counts_as_forgetting(task, base, found, allowed, expected):
    assert forgot(task, *base, found, allowed) is expected


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_whoever_allows_more_refuses_less(score, found, one, other):
    low, high = sorted((one, other))
    for task in ("image-classification", "image-regression", "causal-lm"):
        assert forgot(task, score, score, (found, found), low) or not forgot(
            task, score, score, (found, found), high
        )


def test_a_tolerance_that_makes_no_sense_is_refused():
    for bad in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="expected 0 or more") as caught:
            PersonalizeSettings(forget=bad)
        assert caught.value.where == "forget"


# --- the file and the manifest ---------------------------------------------------------------------


def test_bundles_without_one_are_as_before():
    bundle = open_bundle(V1)
    assert read_reference(bundle) is None
    assert serialize_manifest(bundle.manifest) == (V1 / MANIFEST).read_bytes()


def test_the_manifest_reads_back(contrary):
    again = parse_manifest((contrary.root / MANIFEST).read_bytes(), "here")
    assert again.reference == contrary.manifest.reference
    assert asdict(again.reference) == {
        "file": FILE, "samples": 32, "measure": "base", "score": 1.0, "loss": 0.1
    }  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("file", "other", "'other' is used but not listed"),
        ("samples", 0, "expected 1 to"),
        ("measure", "me", "expected one of base, adapter"),
        ("score", "1", "must be a number"),
        ("more", 1, "unknown field 'more'"),
    ],
)
def test_a_manifest_that_says_something_else_is_refused(contrary, field, value, message):
    document = json.loads((contrary.root / MANIFEST).read_bytes())
    document["reference"][field] = value
    with pytest.raises(FileFormatError, match=message):
        parse_manifest(json.dumps(document).encode(), "here")


def test_an_altered_file_is_not_opened(contrary, tmp_path):
    root = shutil.copytree(contrary.root, tmp_path / "b")
    raw = bytearray((root / FILE).read_bytes())
    raw[-1] ^= 1
    (root / FILE).write_bytes(raw)
    with pytest.raises(IntegrityError, match="altered"):
        open_bundle(root)


@pytest.mark.parametrize("what", ["name", "dtype", "count", "targets", "garbage"])
def test_a_file_that_is_not_what_the_manifest_says_is_refused(contrary, tmp_path, user, what, resealed):
    tensors = tensors_of(open_bundle(V1), user, own_answers=True)
    pictures = tensors["input.pixel_values"]
    change = {
        "name": {"input.other": pictures},
        "dtype": {"input.pixel_values": pictures.astype(np.float64)},
        "count": {"input.pixel_values": pictures[:-1]},
        "targets": {"targets": tensors["targets"].astype(np.float32)},
        "garbage": {},
    }[what]
    bundle = with_reference(tmp_path / "b", {**tensors, **change}, score=1.0, loss=0.1)
    if what == "garbage":
        (bundle.root / FILE).write_bytes(b"\0" * 20)
        bundle = resealed(bundle.root)
    with pytest.raises(FileFormatError, match=r"not a safetensors file|not what the manifest says"):
        read_reference(bundle)
