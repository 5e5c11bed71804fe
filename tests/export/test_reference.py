"""A bundle's reference set: its samples, its scores, and that a device agrees with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from edge_tcur.errors import ExportError
from edge_tcur.training.evaluate import load_run_base
from edge_tcur_export import reference as module
from edge_tcur_export.reference import FILE, write_reference
from edge_tcur_export.settings import ReferenceSettings
from edge_tcur_runtime.data import load_dataset
from edge_tcur_runtime.errors import DataError, UsageError
from edge_tcur_runtime.formats.bundle import open_bundle
from edge_tcur_runtime.personalize import personalize
from edge_tcur_runtime.reference import read_reference
from edge_tcur_runtime.settings import PersonalizeSettings


@pytest.fixture(scope="module")
def referring(export_vit, digits_npz):
    return export_vit("reference", {}, reference=ReferenceSettings(digits_npz, 24))


def test_a_device_scores_the_base_on_it_as_torch_did(referring, digits_npz):
    bundle, spec = open_bundle(referring.bundle.root), referring.bundle.manifest.reference
    found = read_reference(bundle)
    assert (spec.file, spec.samples, len(found.targets)) == (FILE, 24, 24)
    assert spec.measure == "base"
    counts = np.bincount(found.targets, minlength=len(bundle.manifest.labels))
    assert counts.max() - counts[counts > 0].min() <= 1  # shared out among the classes
    data = load_dataset(digits_npz, "image", image_size=(8, 8), channels=1)
    settings = PersonalizeSettings(epochs=1, threads=1, engine="ort-step")
    result = personalize(bundle, data, settings)
    assert result.reference["score_before"] == pytest.approx(spec.score, abs=1e-6)
    assert result.reference["loss_before"] == pytest.approx(spec.loss, rel=1e-4)


def test_text_is_stored_as_tokens_and_a_new_head_is_measured_by_the_adapter(bert, kit, tmp_path):
    base, adapter = load_run_base(bert.run), bert.run.adapter()
    (tmp_path / "tokenizer.json").write_text(base.tokenizer, encoding="utf-8")
    settings = ReferenceSettings(Path(bert.run.config.data), 4)
    spec = write_reference(base, bert.run, adapter, tmp_path, settings)
    tensors = load_file(tmp_path / FILE)
    assert set(tensors) == {"targets", *(f"input.{name}" for name in bert.bundle.manifest.inputs)}
    assert spec.measure == "adapter"
    inputs = {name.removeprefix("input."): value for name, value in tensors.items() if name != "targets"}
    answers = kit.outputs_under(bert, adapter, inputs)
    assert spec.score == pytest.approx(np.mean(answers.argmax(axis=1) == tensors["targets"]))
    assert spec.samples == len(answers) <= 4


def test_without_data_the_runs_own_held_out_samples_are_taken(vit, tmp_path):
    base = load_run_base(vit.run)
    spec = write_reference(base, vit.run, vit.run.adapter(), tmp_path, ReferenceSettings(samples=10**6))
    assert spec.samples == vit.run.metrics["held_out_samples"]
    assert len(load_file(tmp_path / FILE)["targets"]) == spec.samples


def test_what_cannot_be_a_reference_is_refused(vit, tmp_path, monkeypatch):
    base, adapter = load_run_base(vit.run), vit.run.adapter()

    def write(settings):
        write_reference(base, vit.run, adapter, tmp_path, settings)

    with pytest.raises(UsageError, match="expected at least 1"):
        ReferenceSettings(samples=0)
    with pytest.raises(DataError, match=r"missing\.npz"):
        write(ReferenceSettings(tmp_path / "missing.npz"))
    with monkeypatch.context() as patch:
        patch.setattr(module, "held_out_samples", lambda *_: (None, "the run held no samples out"))
        with pytest.raises(DataError, match="the run held no samples out") as caught:
            write(ReferenceSettings())
        assert "--reference DATA" in caught.value.hint
    monkeypatch.setattr(module, "MAX_REFERENCE_BYTES", 1000)
    with pytest.raises(ExportError, match="a device reads at most"):
        write(ReferenceSettings())
