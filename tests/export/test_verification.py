"""Parity that fails: the operator that is named, what is removed, and what the manifest records."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edge_tcur.cli.inspect import describe_bundle
from edge_tcur.errors import ExportError
from edge_tcur.models import load_base
from edge_tcur.tasks import find_task
from edge_tcur.training import TrainConfig, train
from edge_tcur_export import bundle as bundles
from edge_tcur_export import verification
from edge_tcur_export.bundle import export_run
from edge_tcur_export.exposed import distance
from edge_tcur_export.parity import TOLERANCES
from edge_tcur_export.settings import TARGETS, ExportSettings, ProgramSettings
from edge_tcur_runtime.doctor import EngineReport, _render_bundle, examine_bundle
from edge_tcur_runtime.errors import FileFormatError
from edge_tcur_runtime.formats.bundle import (
    FileEntry,
    Verified,
    open_bundle,
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
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.acts = nn.ModuleList([nn.Tanh(), nn.Sigmoid()])
        self.out = nn.Linear(16, 3)

    def forward(self, pixel_values):
        x = pixel_values.flatten(1)
        for block, act in zip(self.blocks, self.acts):
            x = act(block(x))
        return self.out(x)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("verify")
    (root / "verify_models.py").write_text(MODEL)
    images = np.random.default_rng(0).integers(0, 255, (30, 4, 4)).astype(np.uint8)
    np.savez(root / "pictures.npz", images=images, labels=np.arange(30) % 3)
    settings = {"task": "image-classification", "rank": 2, "epochs": 1, "threads": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        yield train(TrainConfig("verify_models:Net", "pictures.npz", **settings), root / "run").run


@pytest.fixture(scope="module")
def written(run, tmp_path_factory):
    """A bundle with every graph as it was before it was compared, and what `settle` is given for it."""
    kept = tmp_path_factory.mktemp("written")

    def keep(root, manifest, cases, sources, last, **_):
        assert last == []
        shutil.copytree(root, kept / "bundle")
        stash.append((manifest, cases, sources))
        return verification.Outcome(manifest)

    stash = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundles, "settle", keep)
        export_run(run, kept / "out", ExportSettings(TARGETS))
    return kept / "bundle", *stash[0]


def with_digests(root, manifest):
    """The manifest of a bundle whose files were changed, written."""
    files = {
        name: FileEntry((root / name).stat().st_size, digest_file(root / name)) for name in manifest.files
    }
    changed = replace(manifest, files=files)
    (root / "manifest.json").write_bytes(serialize_manifest(changed))
    return changed


@pytest.fixture
def settled(written, tmp_path):
    """Does damage to a copy of the bundle and settles it."""
    bundle, manifest, cases, sources = written
    root = tmp_path / "bundle"

    def call(damage):
        shutil.copytree(bundle, root)
        damage(root)
        return root, verification.settle(root, with_digests(root, manifest), cases, sources)

    return call


def replace_operator(path, operator, by):
    """Makes the first node of a type another one; its name."""
    model = onnx.load(str(path), load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == operator)
    node.op_type = by
    path.write_bytes(model.SerializeToString())
    return node.name


def test_targets_that_fail_are_removed_with_the_first_operator_named(settled):
    nodes = {}

    def damage(root):
        nodes["step"] = replace_operator(root / "step.onnx", "Sigmoid", "Tanh")
        nodes["train"] = replace_operator(root / "train.onnx", "Tanh", "Sigmoid")

    root, outcome = settled(damage)
    assert set(outcome.failures) == {"step", "train"}
    assert outcome.failures["step"].startswith("the outputs differ from torch by ")
    assert f"first operator that differs is Tanh (node {nodes['step']})" in outcome.failures["step"]
    origin = f"is Sigmoid (node {nodes['train']}, from the module module.acts.0)"
    assert origin in outcome.failures["train"]
    manifest = open_bundle(root).manifest
    assert manifest == outcome.manifest
    assert manifest.graphs == {"checks": "checks.onnx", "infer": "infer.onnx"}
    assert manifest.verified == Verified(("infer",), TOLERANCES)
    assert {path.name for path in root.iterdir()} == {*manifest.files, "manifest.json"}


def test_a_wrong_weight_is_named_by_the_operator_that_reads_it(settled):
    """In the inference graph, without which there is no bundle."""
    found = {}

    def damage(root):
        model = onnx.load(str(root / "infer.onnx"))
        weight = next(t for t in model.graph.initializer if t.name == "model.module.blocks.1.weight_t")
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) + 0.1, weight.name))
        readers = (node for node in model.graph.node if weight.name in node.input)
        found["node"] = next(node.name for node in readers if node.op_type == "MatMul")
        onnx.save(model, str(root / "infer.onnx"))

    with pytest.raises(ExportError, match="infer: the outputs differ") as caught:
        settled(damage)
    assert f"is MatMul (node {found['node']}, from the module module.blocks.1)" in caught.value.message
    assert "nothing was written" in caught.value.hint


def test_a_wrong_backward_operator_and_a_graph_that_does_not_open(settled):
    """The forward pass of the step is right and only gradients depart; the other is no graph at all."""
    nodes = {}

    def damage(root):
        model = onnx.load(str(root / "step.onnx"), load_external_data=False)
        products = [n for n in model.graph.node if n.op_type == "Mul" and n.name.startswith("node_mul")]
        products[-1].op_type, nodes["step"] = "Add", products[-1].name
        (root / "step.onnx").write_bytes(model.SerializeToString())
        (root / "train.onnx").write_bytes(b"no graph")

    _, outcome = settled(damage)
    assert outcome.failures["step"].startswith("the gradients differ")
    assert f"is Add (node {nodes['step']}" in outcome.failures["step"]
    assert outcome.failures["train"].startswith("it does not run: ")
    assert set(outcome.errors) == {"infer"}


def test_the_command_ends_with_an_error_and_the_bundle_holds_the_rest(run, tmp_path, monkeypatch):
    def damaged(root, manifest, cases, sources, last, **more):
        replace_operator(root / "step.onnx", "Sigmoid", "Tanh")
        return verification.settle(root, with_digests(root, manifest), cases, sources, last, **more)

    monkeypatch.setattr(bundles, "settle", damaged)
    out = tmp_path / "bundle"
    with pytest.raises(ExportError, match="step: the outputs differ") as caught:
        export_run(run, out, ExportSettings(("onnx", "step")))
    assert caught.value.exit_code == 4
    assert f"{out} was written without it and holds what agrees with torch: infer" in caught.value.hint
    assert open_bundle(out).manifest.graphs == {"checks": "checks.onnx", "infer": "infer.onnx"}
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_what_was_compared_is_recorded_and_shown(run, tmp_path):
    out, engines = tmp_path / "bundle", (EngineReport("ort-step", True, None, ""),)
    report = export_run(run, out, ExportSettings(("onnx",), verify=False))
    assert (report.manifest.verified, report.parity) == (Verified((), {}), {})
    assert open_bundle(out).manifest == report.manifest
    for verified, text in (
        (None, "does not say"),
        (Verified((), {}), "--no-verify"),
        (Verified(("infer",), TOLERANCES), "at export: infer"),
    ):
        manifest = replace(report.manifest, verified=verified)
        (out / "manifest.json").write_bytes(serialize_manifest(manifest))
        payload, human = describe_bundle(out)
        assert payload["verified"] == (None if verified is None else asdict(verified))
        assert text in human
        assert text in _render_bundle(examine_bundle(out, engines))


def test_what_cannot_be_run_here_is_not_called_compared(run, tmp_path):
    """Vulkan's program is written with what lies outside its delegates and what it copies."""
    settings = ExportSettings(("onnx", "executorch"), programs=ProgramSettings(("vulkan",)))
    report = export_run(run, tmp_path / "bundle", settings)
    assert report.not_run == {"infer-vulkan": "no VulkanBackend in this ExecuTorch"}
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert manifest.verified.targets == ("infer",)
    assert set(manifest.programs) == {"infer-vulkan"}
    assert manifest.programs["infer-vulkan"].file == "infer-vulkan.pte"
    assert not {"mm", "linear", "sigmoid", "tanh"} & set(report.executorch.left_over["infer-vulkan"])
    # The two adapted weights and more; `base.ptd` has them too.
    assert 2 * 16 * 16 * 4 <= report.executorch.packed["infer-vulkan"] <= manifest.files["base.ptd"].size
    program = (tmp_path / "bundle" / "infer-vulkan.pte").read_bytes()
    assert b"VulkanBackend" in program
    weight = load_base("verify_models:Net", find_task("image-classification"), ("0", "1", "2"), {})
    content = weight.model.module.blocks[0].weight.detach().numpy()
    assert any(turned.tobytes() in program for turned in (content, np.ascontiguousarray(content.T)))


def test_bundles_that_do_not_say_are_written_as_before(written):
    manifest = replace(written[1], verified=None)
    raw = serialize_manifest(manifest)
    assert b"verified" not in raw
    assert parse_manifest(raw, "m") == manifest
    document, empty = json.loads(raw), {"targets": [], "tolerances": {}}
    for wrong in ({"targets": ["infer"]}, {**empty, "targets": [1]}, {**empty, "x": 1}):
        document["verified"] = wrong
        with pytest.raises(FileFormatError):
            parse_manifest(json.dumps(document).encode(), "m")


def test_distances_of_special_values():
    infinite = np.array([1.0, -np.inf, np.nan])
    assert distance(infinite, infinite.copy()) == 0
    assert distance(np.array([1.0, 2.0, np.nan]), infinite) == np.inf
    assert distance(np.array([True, False]), np.array([True, True])) == 1
    assert distance(np.zeros(3), np.zeros(2)) == np.inf
    assert distance(np.array([1.0, 2.5]), np.array([1.0, 2.0])) == pytest.approx(0.25)
    assert distance(np.array([np.nan]), np.array([1.0])) == np.inf
