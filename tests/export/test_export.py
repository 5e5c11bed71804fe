"""A bundle of a Vision Transformer and one of a BERT with a trained head: what is in them, and that they
answer as torch does."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.external_data_helper import ExternalDataInfo

from edge_tcur.method.adapted import inject
from edge_tcur.method.config import TCurConfig
from edge_tcur.models import load_base
from edge_tcur.tasks import find_task
from edge_tcur.training import TrainConfig
from edge_tcur_export.base_file import read_tensor
from edge_tcur_export.parity import TOLERANCES
from edge_tcur_runtime.feeds import build_feeds
from edge_tcur_runtime.formats.bundle import BASE_FILE, MANIFEST
from edge_tcur_runtime.formats.digest import digest_file

HEAD = {"head.weight", "head.bias"}
GRAPHS = ("infer", "step", "train", "eval", "optimizer")


@pytest.fixture(params=["vit", "bert"])
def exported(request):
    return request.getfixturevalue(request.param)


def test_every_graph_agrees_with_torch(exported):
    report = exported.report
    assert set(report.parity) == {"infer", "step", "train"}
    assert set(report.parity["infer"]) == {"outputs"}
    for target in ("step", "train"):
        assert set(report.parity[target]) == set(TOLERANCES)
    for quantities in report.parity.values():
        assert all(0 <= error <= TOLERANCES[quantity] for quantity, error in quantities.items())
    assert report.seconds >= sum(report.stages.values()) * 0.99
    assert json.loads(json.dumps(report.to_dict()))["base_bytes"] == report.base_bytes


def external(graph):
    """Initializer name -> offset and length in the base file."""
    result = {}
    for tensor in graph.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            info = ExternalDataInfo(tensor)
            assert info.location == BASE_FILE
            result[tensor.name] = (info.offset, info.length)
    return result


def test_there_is_one_base_file(exported):
    raw = exported.bundle.path(BASE_FILE).read_bytes()
    blocks = set()
    for role in GRAPHS:
        graph = exported.graph(role)
        places = external(graph)
        blocks |= set(places.values())
        defaults = {value.name for value in graph.graph.input}
        for tensor in graph.graph.initializer:
            if tensor.name not in places:
                assert tensor.ByteSize() < 256 + 100 or tensor.name in defaults, (role, tensor.name)
        assert exported.bundle.graph(role).stat().st_size < 2 * 2**20
    ordered = sorted(blocks)
    for (offset, length), (following, _) in itertools.pairwise(ordered):
        assert offset + length <= following  # no overlap: a tensor is referred to as a whole
    contents = [hashlib.sha256(raw[offset : offset + length]).digest() for offset, length in ordered]
    assert len(set(contents)) == len(contents)
    head = exported.base().head
    state = exported.base().model.state_dict()
    frozen = sum(v.nbytes for name, v in state.items() if not name.startswith(tuple(head) or "\0"))
    # Tensors of at most 256 bytes stay in the graphs; a second copy of any matrix would be seen.
    assert frozen * 0.7 < sum(length for _, length in ordered) <= frozen
    assert not any(raw[end : end + 1].strip(b"\0") for end in (o + n for o, n in ordered) if end % 64)


def test_no_matrix_is_stored_transposed_as_well(exported):
    raw = exported.bundle.path(BASE_FILE).read_bytes()
    contents = {}
    for role in GRAPHS:
        for tensor in exported.graph(role).graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL and len(tensor.dims) == 2:
                info = ExternalDataInfo(tensor)
                matrix = (
                    np.frombuffer(raw, np.uint8, info.length, info.offset).view("<f4").reshape(tensor.dims)
                )
                contents[matrix.tobytes()] = np.ascontiguousarray(matrix.T).tobytes()
    assert len(contents) >= 12
    assert not [turned for plain, turned in contents.items() if turned in contents and turned != plain]


def test_the_bases_weights_are_torchs(exported):
    manifest = exported.bundle.manifest
    parameters = dict(exported.base().model.named_parameters())
    names = [name for group in manifest.groups.values() for name in group.parameters]
    assert sorted(manifest.tensors) == sorted(names)
    assert len(names) == 12  # six projections in two layers
    for name, place in manifest.tensors.items():
        assert (place.dtype, place.transposed) == ("float32", True)
        stored = read_tensor(exported.bundle.path(BASE_FILE), place.offset, place.shape)
        np.testing.assert_array_equal(stored.T, parameters[name].detach().numpy())


def test_the_manifest_lists_every_file(exported):
    root, manifest = exported.bundle.root, exported.bundle.manifest
    on_disk = {path.name for path in root.iterdir()}
    assert on_disk == {*manifest.files, MANIFEST}
    assert all(path.is_file() and not path.is_symlink() for path in root.iterdir())
    for name, entry in manifest.files.items():
        assert (entry.size, entry.sha256) == ((root / name).stat().st_size, digest_file(root / name))
    assert manifest.graphs == {
        **{role: f"{role}.onnx" for role in ("infer", "step", "train", "eval", "optimizer", "checks")},
        "checkpoint": "checkpoint",
    }
    assert (root / manifest.adapter).read_bytes() == exported.run.adapter_path.read_bytes()
    assert (manifest.labels, manifest.task) == (exported.run.labels, exported.run.config.task)
    assert set(manifest.versions) >= {"edge-tcur", "torch", "onnx", "python"}
    assert ("tokenizer.json" in on_disk) == (manifest.preprocessing["kind"] == "text")


def test_versions_of_the_graphs(exported):
    manifest = exported.bundle.manifest
    assert (manifest.opset, manifest.ir_version) == (20, 10)
    for role in GRAPHS:
        graph = exported.graph(role)
        assert graph.ir_version <= 10
        opsets = {entry.domain: entry.version for entry in graph.opset_import}
        if role != "optimizer":  # it has operators of ONNX Runtime only
            assert opsets[""] == 20
        if role in {"infer", "step"}:
            assert set(opsets) == {""}
            assert {node.domain for node in graph.graph.node} == {""}
            assert not graph.functions
            onnx.checker.check_model(str(exported.bundle.graph(role)))


def test_no_path_of_this_machine_is_in_a_bundle(exported):
    secrets = [str(exported.bundle.root.parent), str(Path(__file__).parents[2]), str(Path.home()), sys.prefix]
    secrets += ["/tmp/", "/home/", ".py\0", 'File "', "pkg.torch", "site-packages"]
    for path in exported.bundle.root.iterdir():
        if path.name not in {"tokenizer.json", BASE_FILE}:
            content = path.read_bytes()
            found = [text for text in secrets if text.encode() in content]
            assert not found, path.name


def test_the_base_digest_says_nothing_of_files(exported, tmp_path):
    from transformers import AutoModel, AutoModelForImageClassification

    digest = exported.bundle.manifest.base_digest
    assert digest == exported.run.base_digest == exported.run.adapter().header.base_digest
    config = exported.run.config
    kind = AutoModel if config.task == "text-classification" else AutoModelForImageClassification
    source = Path(config.base)
    kind.from_pretrained(source).save_pretrained(tmp_path, max_shard_size="6KB")
    for path in source.iterdir():
        if "model" not in path.name and path.name != "config.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert load_base(str(tmp_path), find_task(config.task), exported.run.labels, {}).digest == digest


CASES = [(1, 1, 2), (3, 1, 24), (3, 4, 7), (5, 6, 2), (16, 2, 16)]


@pytest.mark.parametrize(("rank", "samples", "length"), CASES)
def test_infer_takes_any_rank_rows_columns_batch_and_length(exported, kit, rank, samples, length):
    base = exported.base()
    factors = kit.random_factors(exported, rank, seed=rank)
    extras = kit.random_extras(exported, seed=rank)
    inputs = kit.inputs_of(exported, samples, length)
    feeds = {
        f"{name}.{part}": array for name, value in factors.items() for part, array in value.feeds().items()
    }
    assert {part for name in feeds for part in (name.rpartition(".")[2],)} == {"core", "rows", "cols"}
    found = exported.session().run(["logits"], {**inputs, **feeds, **extras})[0]
    assert set(extras) == set(base.head_parameters())
    for name, parameter in base.head_parameters().items():
        parameter.data.copy_(torch.from_numpy(extras[name]))
    plain = kit.torch_outputs(base, inputs)
    inject(base.model, TCurConfig(rank=rank, frame="raw"), keep=base.head, factors=factors)
    expected = kit.torch_outputs(base, inputs)
    assert np.abs(expected - plain).max() > 1e-3  # the factors matter
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * max(1, np.abs(expected).max()))


def test_nothing_fed_is_the_base_and_the_adapter_fed_is_the_adapter(exported, kit):
    inputs = kit.inputs_of(exported, 3, 5)
    session, base = exported.session(), exported.base()
    found = session.run(["logits"], inputs)[0]
    np.testing.assert_allclose(found, kit.torch_outputs(base, inputs), atol=1e-5)
    adapter = exported.run.adapter()
    found = session.run(["logits"], {**inputs, **build_feeds(exported.bundle.manifest, adapter)})[0]
    for name, parameter in base.head_parameters().items():
        parameter.data.copy_(torch.from_numpy(adapter.extras[name].copy()))
    inject(base.model, exported.run.config.method(), keep=base.head, factors=adapter.factors)
    np.testing.assert_allclose(found, kit.torch_outputs(base, inputs), atol=1e-5)
    assert {value.name for value in session.get_inputs()} == set(inputs)  # the rest has defaults


def test_a_base_of_few_tokens(bert_dir, texts_csv, tmp_path, kit):
    settings = {"epochs": 1, "batch_size": 4, "layers_to_transform": "1", "max_length": 8}
    config = TrainConfig(str(bert_dir), str(texts_csv), rank=2, threads=1, **settings)
    exported = kit.export(config, tmp_path, ("onnx", "step"))
    inputs = kit.inputs_of(exported, 3, 8)
    found = exported.session().run(["logits"], inputs)[0]
    kit.close(found, kit.torch_outputs(exported.base(), inputs))


@pytest.mark.parametrize("start", ["base", "adapter"])
def test_a_device_personalises_with_the_step_graph(vit, start, kit, digits_npz, tmp_path):
    kit.check_personalisation(vit, digits_npz, tmp_path / "personal.safetensors", 0.05, start)


CHECKPOINT = """
import json
from edge_tcur_runtime.engines.ort_training import import_training_api
state = import_training_api().CheckpointState.load_checkpoint(sys.argv[1])
values = {name: parameter.data.tolist() for name, parameter in state.parameters}
print(json.dumps(values))
"""


def test_the_checkpoint_holds_the_factors_alone(exported, kit):
    path = exported.bundle.graph("checkpoint")
    assert path.stat().st_size < 8 * 2**10
    values = kit.without_torch(CHECKPOINT, path)
    adapter = exported.run.adapter()
    assert set(adapter.extras) == (HEAD if "head.weight" in values else set())
    expected = {f"{name}.core": factors.core for name, factors in adapter.factors.items()} | dict(
        adapter.extras
    )
    assert set(values) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(np.float32(values[name]).reshape(value.shape), value)


STEP = """
import json, os
import numpy as np
from pathlib import Path
from safetensors.numpy import load_file
from edge_tcur_runtime.engines import open_engine
from edge_tcur_runtime.engines.ort_training import import_training_api
from edge_tcur_runtime.formats.adapter import read_adapter
from edge_tcur_runtime.formats.bundle import open_bundle
bundle = open_bundle(Path(sys.argv[1]))
canary = load_file(bundle.path("canary.safetensors"))
inputs = {name[6:]: value for name, value in canary.items() if name.startswith("input.")}
labels = np.arange(2)
adapter = read_adapter(bundle.path(bundle.manifest.adapter))
feeds = adapter.tensors()
engines = {name: open_engine(name, bundle, threads=1) for name in ("ort-step", "ort-training")}
steps = {name: engine.step(inputs, labels, feeds) for name, engine in engines.items()}
api = import_training_api()
state = api.CheckpointState.load_checkpoint(str(bundle.graph("checkpoint")))
module = api.Module(str(bundle.graph("train")), state)
optimizer = api.Optimizer(str(bundle.graph("optimizer")), module)
factors = {f"{name}.{part}": feeds[f"{name}.{part}"] for name in adapter.factors for part in ("rows", "cols")}
fed = {**inputs, "labels": labels, **factors}
arguments = [fed[name] for name in module.input_names()]
before = {name: parameter.data.copy() for name, parameter in state.parameters}
loss, outputs, metric = module(*arguments)
optimizer.step()
after = {name: parameter.data.copy() for name, parameter in state.parameters}
module.lazy_reset_grad()
later, *_ = module(*arguments)
print(json.dumps({
    "losses": [float(loss), float(later), *(result.loss for result in steps.values())],
    "canary": float(np.abs(outputs - canary["output.adapter"]).max()),
    "gradient": max(float(np.abs(value - steps["ort-training"].gradients[name]).max())
                    for name, value in steps["ort-step"].gradients.items()),
    "largest": {name: float(np.abs(value).max()) for name, value in before.items()},
    "changes": {name: (after[name] - before[name]).ravel().tolist() for name in before},
    "gradients": {name: value.ravel().tolist() for name, value in steps["ort-step"].gradients.items()},
    "inputs": sorted(module.input_names()),
}))
"""


def test_onnx_runtimes_own_optimizer_moves_the_factors_alone(exported, kit):
    files = {path.name: digest_file(path) for path in exported.bundle.root.iterdir()}
    result = kit.without_torch(STEP, exported.bundle.root)
    manifest = exported.bundle.manifest
    trained = {f"{name}.core" for name in manifest.groups} | set(manifest.extras)
    assert set(result["changes"]) == set(result["gradients"]) == trained
    indices = {f"{name}.{part}" for name in manifest.groups for part in ("rows", "cols")}
    assert set(result["inputs"]) == {*manifest.inputs, "labels", *indices}
    for name, change in result["changes"].items():
        gradient = np.array(result["gradients"][name])
        # The first step of AdamW with rate 1e-3, beta2 0.999 and epsilon 1e-6, without decay.
        expected = -1e-3 * gradient / (np.abs(gradient) + 1e-6 / np.sqrt(1e-3))
        rounding = np.spacing(np.float32(result["largest"][name]))
        np.testing.assert_allclose(change, expected, rtol=0.01, atol=2e-7 + rounding)
        assert np.abs(expected).max() > 1e-6
    loss, later, step, training = result["losses"]
    assert loss == pytest.approx(step, rel=1e-5) == training
    assert later <= loss
    assert result["canary"] < 1e-5
    assert result["gradient"] < 1e-5
    assert files == {path.name: digest_file(path) for path in exported.bundle.root.iterdir()}
