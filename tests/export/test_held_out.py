"""Parity on samples that the run held out: what random inputs do not see, and where there are none."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from edge_tcur.cli.export import _compared_on
from edge_tcur.method.targets import find_targets
from edge_tcur.tasks import find_task
from edge_tcur.training.evaluate import load_run_base
from edge_tcur_export import held_out
from edge_tcur_export.bundle import export_run
from edge_tcur_export.cases import make_case
from edge_tcur_export.held_out import _is_sound, held_out_example
from edge_tcur_export.parity import verify_bundle
from edge_tcur_export.quantization import held_out_samples
from edge_tcur_export.settings import ExportSettings
from edge_tcur_export.trace import FactorModel, make_example
from edge_tcur_runtime.errors import FileFormatError
from edge_tcur_runtime.formats.bundle import (
    HELD_OUT,
    RANDOM,
    FileEntry,
    parse_manifest,
    serialize_manifest,
)
from edge_tcur_runtime.formats.digest import digest_file

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    preprocessing = {
        "kind": "image", "input": "pixel_values", "height": 4, "width": 4, "channels": 1, "scale": 1 / 255,
        "mean": [0.5], "std": [0.25],
    }

    def __init__(self):
        super().__init__()
        self.block, self.out = nn.Linear(16, 16), nn.Linear(16, 3)
        for number, value in enumerate(self.parameters()):
            nn.init.normal_(value, generator=torch.Generator().manual_seed(number))

    def forward(self, pixel_values):
        return self.out(self.block(pixel_values.flatten(1)).tanh())
"""


@pytest.fixture(scope="module")
def cases(bert):
    """What an export of the text bundle compares: a random case, and the one of held-out samples."""
    base, adapter = load_run_base(bert.run), bert.run.adapter()
    config, task = bert.run.config.method(), find_task(bert.run.config.task)
    groups = find_targets(base.model, config, keep=base.head).groups
    random = make_example(base, groups, lambda _: 2, batch=3, seed=0, config=config, task=task)
    model = FactorModel(base, groups, task, config)  # it uses up the base's model
    found = held_out_example(model, base, bert.run, adapter, random, {"sequence": 16})
    assert (found.inputs, found.note) == (HELD_OUT, "")
    return [make_case(model, example) for example in (random, found.example)]


def test_the_case_holds_samples_of_the_held_out_part_under_the_trained_adapter(bert, cases):
    held_out, _ = held_out_samples(load_run_base(bert.run), bert.run)
    case = cases[1]
    ids = case.feeds["input_ids"]
    assert ids.shape[1] <= 16
    inputs, targets = held_out.take(np.arange(len(held_out)))
    rows = [list(row)[: ids.shape[1]] for row in inputs["input_ids"].numpy()]
    places = [rows.index(list(row)) for row in ids]
    assert len(set(places)) == 3
    assert np.array_equal(case.feeds["labels"], targets.numpy()[places])
    for name, value in bert.run.adapter().feeds().items():
        assert np.array_equal(case.feeds[name], value)


def test_random_inputs_do_not_read_most_of_a_word_table_and_held_out_ones_do(bert, cases, tmp_path):
    """Every row but those of the padding and of the one token of the random cases is wrong in the step graph.

    (In the inference graph the canary would see it too.)
    """
    root = shutil.copytree(bert.bundle.root, tmp_path / "bundle")
    model = onnx.load(str(root / "step.onnx"))
    table = next(t for t in model.graph.initializer if t.name.endswith("word_embeddings.weight"))
    rows = numpy_helper.to_array(table).copy()
    rows[2:] = rows[2:, ::-1]
    table.CopyFrom(numpy_helper.from_array(rows, table.name))
    onnx.save(model, str(root / "step.onnx"))
    entry = FileEntry((root / "step.onnx").stat().st_size, digest_file(root / "step.onnx"))
    manifest = bert.bundle.manifest
    changed = replace(
        manifest, files={**manifest.files, "step.onnx": entry}, graphs={"step": "step.onnx"}, memory=None
    )
    (root / "manifest.json").write_bytes(serialize_manifest(changed))
    assert verify_bundle(root, cases[:1], changed).failures == {}
    assert verify_bundle(root, cases, changed).failures["step"].quantity == "outputs"


def test_the_manifest_and_the_report_say_what_was_compared(bert):
    verified, report = bert.bundle.manifest.verified, bert.report
    assert verified.inputs == report.to_dict()["parity_inputs"] == HELD_OUT
    assert _compared_on(report) == ["compared on samples that the run held out, and on random inputs"]
    raw = serialize_manifest(bert.bundle.manifest)
    assert parse_manifest(raw, "m").verified == verified
    document = json.loads(raw)
    document["verified"]["inputs"] = "other"
    with pytest.raises(FileFormatError, match="inputs"):
        parse_manifest(json.dumps(document).encode(), "m")
    older = replace(bert.bundle.manifest, verified=replace(verified, inputs=None))
    assert "inputs" not in json.loads(serialize_manifest(older))["verified"]
    assert parse_manifest(serialize_manifest(older), "m") == older


def test_where_the_data_are_gone_random_inputs_remain_and_it_is_said(train_module, tmp_path):
    run = train_module(MODEL, "held_out_models", "Net")
    Path("pictures.npz").rename("moved.npz")
    report = export_run(run, tmp_path / "bundle", ExportSettings(("onnx",)))
    assert report.manifest.verified.inputs == RANDOM
    assert set(report.parity) == {"infer"}
    assert _compared_on(report) == ["compared on random inputs alone: the run's data file is not there"]
    Path("moved.npz").rename("pictures.npz")
    report = export_run(run, tmp_path / "again", ExportSettings(("onnx",), verify=False))
    assert report.manifest.verified.inputs is None
    assert (report.to_dict()["parity_inputs"], _compared_on(report)) == (None, [])


def test_targets_whose_loss_is_rounding_are_replaced(train_module, tmp_path, monkeypatch):
    run = train_module(MODEL, "held_out_models", "Net")
    monkeypatch.setattr(held_out, "_is_sound", lambda *_: False)
    report = export_run(run, tmp_path / "bundle", ExportSettings(("onnx", "step")))
    assert report.manifest.verified.inputs == HELD_OUT
    assert set(report.parity) == {"infer", "step"}
    assert "with random targets" in _compared_on(report)[0]


@pytest.mark.parametrize(
    ("task", "outputs", "targets", "sound"),
    [
        ("image-classification", [[2.0, -1.0, 0.5]], [2], True),
        ("image-classification", [[30.0, -30.0, 0.5]], [2], True),  # sure and wrong
        ("image-classification", [[30.0, -30.0, 0.5]], [0], False),  # sure and right
        ("image-regression", [[0.3, -0.2]], [[0.5, 0.1]], True),
        ("image-regression", [[2000.01, 3000.0]], [[2000.0, 3000.01]], False),
    ],
)
def test_a_loss_is_sound_where_the_last_bits_of_the_outputs_do_not_decide_it(task, outputs, targets, sound):
    assert _is_sound(find_task(task), torch.tensor(outputs), torch.tensor(targets)) is sound
