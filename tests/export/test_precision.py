"""Bundles with an int8 and an int4 base: indices and sketches, coupled and not, every graph. They answer as
torch does over the dequantised weights, hold each weight once, and share adapters with the float32 bundle."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.external_data_helper import ExternalDataInfo
from torch import nn

from edge_tcur.errors import ExportError
from edge_tcur.method.config import PRESETS
from edge_tcur.models import Base
from edge_tcur.training import TrainConfig, train
from edge_tcur.training.evaluate import apply_adapter
from edge_tcur_export.bundle import export_run
from edge_tcur_export.operator_checks import CONSTANT
from edge_tcur_export.parity import TOLERANCES
from edge_tcur_export.precision import quantize_base
from edge_tcur_export.quantization import Quantization
from edge_tcur_export.settings import TARGETS, ExportSettings
from edge_tcur_runtime.errors import IntegrityError, UsageError
from edge_tcur_runtime.feeds import build_feeds
from edge_tcur_runtime.formats.adapter import read_adapter
from edge_tcur_runtime.formats.bundle import BASE_FILE, open_bundle, parse_manifest, serialize_manifest
from edge_tcur_runtime.formats.weights import read_columns_and_rows

WEIGHTS = (onnx.TensorProto.FLOAT, onnx.TensorProto.INT8, onnx.TensorProto.INT4)
STEP, STEP_ROLES = ("onnx", "step"), ("infer", "step")
IMAGE = {"task": "image-classification", "rank": 2, "epochs": 2, "threads": 1}
SETTINGS = {
    "paper": {**PRESETS["paper"], "targets": "*.k_proj,*.v_proj,*.fc2"},
    "sketch": {"frame": "sketch", "targets": "*.q_proj,*.fc1"},
}
CASES = {  # name -> run, precision, targets
    "vit-int8": ("vit", "int8", TARGETS),
    "bert-int4": ("bert", "int4", TARGETS),
    "paper-int4": ("paper", "int4", STEP),
    "sketch-int8": ("sketch", "int8", STEP),
}


class Quantised:
    """A run, the report of its export and the opened bundle, and the base as the bundle has it."""

    def __init__(self, run, precision, targets, root, base):
        self.run, self.precision = run, precision
        self.report = export_run(run, root / "bundle", ExportSettings(targets, precision=precision))
        self.bundle = open_bundle(root / "bundle")
        self._load = base

    def base(self):
        base = self._load()
        trained = base.extra_parameters(self.run.config.method().modules_to_save)
        self.weights = quantize_base(base, self.precision, trained).weights
        return base

    def graphs(self):
        """Role -> graph without the base."""
        names = {role: name for role, name in self.bundle.manifest.graphs.items() if role != "checkpoint"}
        return {
            role: onnx.load(self.bundle.path(name), load_external_data=False) for role, name in names.items()
        }

    def session(self):
        """The inference graph, as any ONNX Runtime opens it: with its default optimisations."""
        return onnxruntime.InferenceSession(self.bundle.graph("infer"), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def make(request, vit_dir, digits_npz, tmp_path_factory):
    """Exports the run of a case."""
    made = {}

    def call(name):
        if name not in made:
            kind, precision, targets = CASES[name]
            root = tmp_path_factory.mktemp(name)
            if kind in SETTINGS:
                config = TrainConfig(str(vit_dir), str(digits_npz), **{**IMAGE, **SETTINGS[kind]})
                run, base = train(config, root / "run").run, request.getfixturevalue("vit").base
            else:
                exported = request.getfixturevalue(kind)
                run, base = exported.run, exported.base
            made[name] = Quantised(run, precision, targets, root, base)
        return made[name]

    return call


@pytest.fixture(params=CASES)
def case(request, make):
    return make(request.param)


def external(graph):
    """Initializer name -> element type, offset and length in the base file."""
    result = {}
    for tensor in graph.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            info = ExternalDataInfo(tensor)
            result[tensor.name] = (tensor.data_type, info.offset, info.length)
    return result


def test_every_graph_agrees_with_torch_over_the_dequantised_weights(case):
    parity = case.report.parity
    assert set(parity) == {"infer", *(role for role in ("step", "train") if case.bundle.graph(role))}
    for quantities in parity.values():
        assert all(0 <= error <= TOLERANCES[quantity] for quantity, error in quantities.items())


def test_nothing_fed_is_the_quantised_base_and_the_adapter_of_float32_fits(case, kit):
    base, manifest = case.base(), case.bundle.manifest
    inputs = kit.inputs_of(case, 3, 8)
    plain = kit.torch_outputs(base, inputs)
    session = case.session()
    kit.close(session.run(["logits"], inputs)[0], plain)
    adapter = case.run.adapter()
    assert adapter.header.base_digest == manifest.base_digest == base.digest
    apply_adapter(base, case.run, adapter)
    expected = kit.torch_outputs(base, inputs)
    assert np.abs(expected - plain).max() > 1e-4
    kit.close(session.run(["logits"], {**inputs, **build_feeds(manifest, adapter)})[0], expected)


def test_the_graphs_hold_each_weight_once_and_none_of_them_unfolded(case):
    raw = case.bundle.path(BASE_FILE).read_bytes()
    case.base()
    dequantised = {w.dequantize().tobytes() for w in case.weights.values()}
    dequantised |= {np.ascontiguousarray(w.dequantize().T).tobytes() for w in case.weights.values()}
    blocks = {}
    for role, graph in case.graphs().items():
        defaults = {value.name for value in graph.graph.input}
        places = external(graph)
        for tensor in graph.graph.initializer:
            if tensor.name in places:
                kind, offset, length = places[tensor.name]
                block = raw[offset : offset + length]
                assert block not in dequantised, (role, tensor.name)
                if kind in WEIGHTS:  # and not the constants of the coupling
                    blocks[offset] = block
            else:
                most = 8 * CONSTANT if role == "checks" else 256  # small constants of its operators
                assert tensor.ByteSize() < most + 100 or tensor.name in defaults, (role, tensor.name)
        assert case.bundle.graph(role).stat().st_size < 2**20
    digests = [hashlib.sha256(block).digest() for block in blocks.values() if len(block) > 512]
    assert len(set(digests)) == len(digests)
    used = {name: case.weights[name] for name in case.report.quantization.relative_errors}
    head = tuple(f"{name}." for name in case.base().head)
    others = sum(
        value.nbytes
        for name, value in case.base().model.state_dict().items()
        if name not in used and not name.startswith(head or ("\0",))
    )
    assert sum(map(len, blocks.values())) <= sum(w.nbytes for w in used.values()) + others
    if "checkpoint" in case.bundle.manifest.graphs:
        assert case.bundle.graph("checkpoint").stat().st_size < 8 * 1024


def test_the_manifest_says_where_values_and_scales_lie(case):
    manifest, path = case.bundle.manifest, case.bundle.path(BASE_FILE)
    assert manifest.precision == case.precision
    assert manifest.opset == (21 if case.precision == "int4" else 20)
    assert all(
        part.version == manifest.opset
        for graph in (
            case.graphs()[role] for role in case.bundle.manifest.graphs if role in {"infer", "step"}
        )
        for part in graph.opset_import
        if part.domain == ""
    )
    assert parse_manifest(serialize_manifest(manifest), "m.json") == manifest
    parameters = dict(case.base().model.named_parameters())
    for name, place in manifest.tensors.items():
        assert (place.dtype, place.transposed) == (case.precision, True)
        weight = parameters[name].detach().numpy()
        rows, cols = np.array([1, 5, 2]), np.array([0, 15, 7, 8])
        columns, lines = read_columns_and_rows(path, place, rows, cols)
        np.testing.assert_array_equal(columns, weight[:, cols])
        np.testing.assert_array_equal(lines, weight[rows])


def test_a_float32_manifest_says_nothing_of_precision(vit):
    document = json.loads(serialize_manifest(vit.bundle.manifest))
    assert "precision" not in document
    assert all(
        set(place) == {"offset", "dtype", "shape", "transposed"} for place in document["tensors"].values()
    )


def test_a_place_of_another_precision_than_the_bundles_is_refused(make):
    manifest = make("vit-int8").bundle.manifest
    raw = serialize_manifest(replace(manifest, precision="fp32"))
    with pytest.raises(Exception, match="is int8 in a bundle of fp32"):
        parse_manifest(raw, "m.json")


def test_what_changed_is_reported(case):
    report = case.report.quantization
    assert report.precision == case.precision
    assert report.base_bytes == case.report.base_bytes
    assert report.base_bytes_fp32 > report.base_bytes * 1.3
    assert set(report.relative_errors) >= set(case.bundle.manifest.tensors)
    low, high = (1e-3, 2e-2) if case.precision == "int8" else (1e-2, 0.2)
    assert low < report.worst()[1] < high
    assert 0 < report.output_change["adapter"] < 1
    samples = case.run.metrics["held_out_samples"]
    assert set(report.accuracy) == {"fp32", case.precision, "samples"}
    assert report.accuracy["samples"] == samples > 0
    assert report.accuracy["fp32"] == case.run.metrics["accuracy"]
    assert json.loads(json.dumps(case.report.to_dict()))["quantization"]["precision"] == case.precision


def test_the_canary_is_the_quantised_bases(make, vit):
    canaries = [
        bundle.path("canary.safetensors").read_bytes() for bundle in (make("vit-int8").bundle, vit.bundle)
    ]
    assert canaries[0] != canaries[1]


PERSONALIZE = """
import json
from pathlib import Path
from edge_tcur_runtime.data import load_dataset
from edge_tcur_runtime.formats.adapter import write_adapter
from edge_tcur_runtime.formats.bundle import open_bundle
from edge_tcur_runtime.personalize import blank_adapter, personalize
from edge_tcur_runtime.settings import AdamWSettings, PersonalizeSettings
bundle = open_bundle(Path(sys.argv[1]))
kind = bundle.manifest.preprocessing["kind"]
options = {"image_size": (8, 8), "channels": 1} if kind == "image" else {}
data = load_dataset(Path(sys.argv[2]), kind, **options)
settings = PersonalizeSettings(epochs=6, engine=sys.argv[4], threads=1, holdout=0.2, batch_size=8,
                               optimizer=AdamWSettings(learning_rate=0.05))
result = personalize(bundle, data, settings, start=blank_adapter(bundle))
write_adapter(Path(sys.argv[3]), result.adapter)
print(json.dumps({"losses": result.losses, "engine": result.engine}))
"""


@pytest.mark.parametrize("engine", ["ort-training", "ort-step"])
@pytest.mark.parametrize("name", ["vit-int8", "bert-int4"])
def test_a_device_personalises_over_a_quantised_base(
    make, name, engine, kit, digits_npz, texts_csv, tmp_path, request
):
    case, path = make(name), tmp_path / "personal.safetensors"
    data = digits_npz if name.startswith("vit") else texts_csv
    result = kit.without_torch(PERSONALIZE, case.bundle.root, data, path, engine)
    assert result["engine"] == engine
    assert np.mean(result["losses"][-3:]) < np.mean(result["losses"][:3])
    personal = read_adapter(path)
    assert personal.header.provenance["base precision"] == case.precision
    # It fits the float32 bundle of the same run, which answers as torch does over the float32 base.
    full = request.getfixturevalue(name.partition("-")[0])
    inputs = kit.inputs_of(full, 3, 8)
    found = full.session().run(["logits"], {**inputs, **build_feeds(full.bundle.manifest, personal)})[0]
    kit.close(found, kit.outputs_under(full, personal, inputs))


def test_a_float32_bundle_leaves_no_precision_in_provenance(make, vit, kit, digits_npz, tmp_path):
    path = tmp_path / "personal.safetensors"
    kit.without_torch(PERSONALIZE, vit.bundle.root, digits_npz, path, "ort-step")
    assert "base precision" not in read_adapter(path).header.provenance


def test_damaged_scales_are_refused(make, tmp_path):
    bundle = make("vit-int8").bundle
    copy = Path(shutil.copytree(bundle.root, tmp_path / "bundle"))
    place = next(iter(bundle.manifest.tensors.values()))
    with (copy / BASE_FILE).open("r+b") as file:
        file.seek(place.scales)
        byte = file.read(1)[0]
        file.seek(place.scales)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(IntegrityError, match="altered"):
        open_bundle(copy)


def quantised_with_data(exported, path, work):
    """The report of a run whose data file is another one."""
    run = replace(exported.run, config=replace(exported.run.config, data=str(path)))
    found = Quantization(exported.base(), run, run.adapter(), work, "int8")
    return found.report({}, 0)


def test_without_the_runs_data_the_accuracy_is_not_guessed(vit, tmp_path, digits_npz):
    report = quantised_with_data(vit, tmp_path / "gone.npz", tmp_path)
    assert (report.accuracy, report.note) == (None, "the run's data file is not there")
    assert report.output_change["adapter"] > 0
    fewer = tmp_path / "fewer.npz"
    with np.load(digits_npz) as data:
        np.savez(fewer, images=data["images"][:30], labels=data["labels"][:30])
    report = quantised_with_data(vit, fewer, tmp_path)
    assert (report.accuracy, report.note) == (None, "the run's data file is not what it was trained on")
    fewer.write_bytes(b"not a data file")
    assert (
        quantised_with_data(vit, fewer, tmp_path).note == "the run's data file is not what it was trained on"
    )


def test_executorch_is_refused_before_any_work():
    with pytest.raises(UsageError, match="float32 base") as caught:
        ExportSettings(("onnx", "executorch"), precision="int8")
    assert "two bundles" in caught.value.hint
    with pytest.raises(UsageError, match="expected fp32, int8, int4"):
        ExportSettings(precision="int2")


class Tied(nn.Module):
    """A table that is tied to a linear layer, one of two rows, one that its module changes, a trained
    layer, a small one, one in half precision."""

    def __init__(self):
        super().__init__()
        self.table, self.output = nn.Embedding(40, 16), nn.Linear(16, 40, bias=False)
        self.output.weight = self.table.weight
        self.trained, self.small, self.half = nn.Linear(16, 16), nn.Linear(4, 4), nn.Linear(32, 32).bfloat16()
        self.clipped, self.types = nn.Embedding(40, 16, max_norm=1.0), nn.Embedding(2, 256)


def test_which_weights_are_quantised():
    base = Base(Tied(), "tied", {}, {})
    digest, before = base.digest, {name: value.clone() for name, value in base.model.state_dict().items()}
    found = quantize_base(base, "int4", {"trained.weight"})
    assert set(found.weights) == {"output.weight"}
    assert base.digest == digest
    after = base.model.state_dict()
    assert torch.equal(after["output.weight"], after["table.weight"])
    # 16 features are no block of 32: int8, and its rows have the scales.
    table = found.weights["output.weight"]
    assert (table.precision, table.axis, table.values.shape) == ("int8", 0, (40, 16))
    np.testing.assert_array_equal(table.dequantize(), after["output.weight"])
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"output.weight", "table.weight"}


def test_a_base_without_large_weights_is_refused():
    base = Base(nn.Linear(4, 4), "small", {}, {})
    with pytest.raises(ExportError, match="no float32 weight"):
        quantize_base(base, "int8", ())
    assert quantize_base(base, "fp32", ()).weights == {}
