"""ExecuTorch's programs: what is in them, and that ExecuTorch's own runtime computes what torch does."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from edge_tcur.errors import ExportError
from edge_tcur.training import TrainConfig
from edge_tcur_export import executorch
from edge_tcur_export.bundle import export_run
from edge_tcur_export.parity import TOLERANCES, Case, compare_steps, distance
from edge_tcur_export.program_parity import ProgramStepper, load_program
from edge_tcur_export.settings import ExportSettings, ProgramSettings
from edge_tcur_runtime.engines import open_engine
from edge_tcur_runtime.errors import FileFormatError, UsageError
from edge_tcur_runtime.feeds import build_feeds
from edge_tcur_runtime.formats.bundle import BASE_PTD, parse_manifest, serialize_manifest

ROLES = ("infer-portable", "infer-xnnpack", "train-portable", "train-xnnpack")


@pytest.fixture(scope="session")
def bert(bert_dir, texts_csv, tmp_path_factory, kit):
    config = TrainConfig(str(bert_dir), str(texts_csv), rank=2, epochs=4, batch_size=4, threads=1)
    return kit.export(config, tmp_path_factory.mktemp("bert-executorch"), ("onnx", "step", "executorch"))


@pytest.fixture(scope="session")
def vit(vit_dir, digits_npz, tmp_path_factory, kit):
    """Sketches, and its own head."""
    settings = {"task": "image-classification", "rank": 2, "epochs": 1, "threads": 1, "batch_size": 8}
    config = TrainConfig(str(vit_dir), str(digits_npz), selection="gradient", frame="sketch", **settings)
    programs = ProgramSettings(("portable",))
    return kit.export(config, tmp_path_factory.mktemp("vit-executorch"), ("onnx", "executorch"), programs)


def test_every_program_agrees_with_torch(bert, vit):
    assert set(bert.report.parity) == {"infer", "step", *ROLES}
    assert set(vit.report.parity) == {"infer", "infer-portable", "train-portable"}
    for exported in (bert, vit):
        for name, quantities in exported.report.parity.items():
            assert set(quantities) == ({"outputs"} if "infer" in name else set(TOLERANCES))
            assert all(0 <= error <= TOLERANCES[quantity] for quantity, error in quantities.items())
    assert (
        json.loads(json.dumps(bert.report.to_dict()))["executorch"]["bytes"] == bert.report.executorch.bytes
    )


def test_the_frozen_weights_lie_in_one_file(bert, kit):
    root, state = bert.bundle.root, bert.base().model.state_dict()
    frozen = {name: value for name, value in state.items() if not name.startswith(tuple(bert.base().head))}
    tensors = kit.read_ptd((root / BASE_PTD).read_bytes())
    total = sum(value.nbytes for value in frozen.values())
    assert total * 0.9 < sum(value.nbytes for value in tensors.values()) <= total * 1.05
    programs = {path.name: path.read_bytes() for path in root.glob("*.pte")}
    assert set(programs) == {"infer.pte", "infer-xnnpack.pte", "train.pte", "train-xnnpack.pte"}
    for group in bert.bundle.manifest.groups.values():
        for name in group.parameters:
            weight = frozen[name].numpy()
            assert np.array_equal(tensors[f"base.model.{name}_t"], weight.T)
            for turned in (weight, np.ascontiguousarray(weight.T)):
                assert not [file for file, content in programs.items() if turned.tobytes() in content]


def test_no_path_of_this_machine_is_in_a_program(bert):
    secrets = (str(bert.bundle.root.parent), sys.prefix, "/tmp/", "/home/", "site-packages", 'File "')
    for path in (*bert.bundle.root.glob("*.pte"), *bert.bundle.root.glob("*.ptd")):
        content = path.read_bytes()
        assert not [text for text in secrets if text.encode() in content], path.name


def test_the_adapter_file_holds_what_the_programs_are_fed(bert, vit, kit):
    for exported in (bert, vit):
        found = kit.read_ptd(exported.bundle.path("adapter.ptd").read_bytes())
        expected = build_feeds(exported.bundle.manifest, exported.run.adapter())
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            np.testing.assert_array_equal(found[name], value)


def test_the_manifest_says_what_the_programs_need(bert):
    manifest = bert.bundle.manifest
    assert tuple(sorted(manifest.programs)) == ROLES
    extras = set(manifest.extras)
    for name, program in manifest.programs.items():
        assert program.limits == {"batch": 4, "sequence": 24}
        assert program.memory > 10_000
        assert program.file in manifest.files
        frozen = {n for n in manifest.factor_names() if not n.endswith(".core")} - extras
        fed = set(manifest.factor_names()) if name.startswith("infer") else frozen | {"labels"}
        assert set(program.inputs) == set(manifest.inputs) | fed
        assert program.outputs == (("logits",) if name.startswith("infer") else ("loss", "logits", "metric"))
    assert {"base.ptd", "adapter.ptd"} <= set(manifest.files)
    raw = serialize_manifest(manifest)
    assert parse_manifest(raw, "manifest.json") == manifest
    document = json.loads(raw)
    document["programs"]["train-portable"]["file"] = "other.pte"
    with pytest.raises(FileFormatError, match=r"other\.pte"):
        parse_manifest(json.dumps(document).encode(), "manifest.json")


@pytest.mark.parametrize("backend", ["portable", "xnnpack"])
@pytest.mark.parametrize(("samples", "length"), [(1, 2), (2, 24), (4, 7), (4, 24)])
def test_infer_takes_any_batch_and_length_below_the_limits(bert, kit, backend, samples, length):
    program = bert.bundle.manifest.programs[f"infer-{backend}"]
    module = load_program(bert.bundle, program)
    inputs, adapter = kit.inputs_of(bert, samples, length), bert.run.adapter()
    fed = {**inputs, **build_feeds(bert.bundle.manifest, adapter)}
    arguments = [torch.from_numpy(np.ascontiguousarray(fed[name])) for name in program.inputs]
    (found,) = module.run_method("forward", arguments)
    kit.close(found.numpy(), kit.outputs_under(bert, adapter, inputs))
    for name, value in fed.items():
        if name.endswith(".core"):
            fed[name] = np.zeros_like(value)
    arguments = [torch.from_numpy(np.ascontiguousarray(fed[name])) for name in program.inputs]
    base = bert.base()
    for name, parameter in base.head_parameters().items():
        parameter.data.copy_(torch.from_numpy(adapter.extras[name].copy()))
    kit.close(module.run_method("forward", arguments)[0].numpy(), kit.torch_outputs(base, inputs))


def test_more_samples_than_the_limit_are_refused(bert, kit):
    program = bert.bundle.manifest.programs["infer-portable"]
    fed = {**kit.inputs_of(bert, 5, 7), **build_feeds(bert.bundle.manifest, bert.run.adapter())}
    arguments = [torch.from_numpy(np.ascontiguousarray(fed[name])) for name in program.inputs]
    with pytest.raises(RuntimeError):
        load_program(bert.bundle, program).run_method("forward", arguments)


TRAIN = """
import json, sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import numpy as np
import torch
from safetensors.numpy import load_file
from edge_tcur_export.program_parity import load_program
from edge_tcur_runtime.formats.bundle import open_bundle
from executorch.extension.training import TrainingModule, get_sgd_optimizer
bundle = open_bundle(Path(sys.argv[1]))
program = bundle.manifest.programs[sys.argv[2]]
canary = load_file(bundle.path("canary.safetensors"))
adapter = load_file(bundle.path("adapter.safetensors"))
fed = {name[6:]: value for name, value in canary.items() if name.startswith("input.")}
fed |= adapter | {"labels": np.arange(2)}
arguments = [torch.from_numpy(np.ascontiguousarray(fed[name])) for name in program.inputs]
module = TrainingModule(load_program(bundle, program))
losses, optimizer = [], None
for step in range(6):
    losses.append(float(module.forward_backward("forward", arguments)[0]))
    if optimizer is None:
        start = {name: value.clone() for name, value in module.named_parameters().items()}
        optimizer = get_sgd_optimizer(module.named_parameters(), 0.05)
        first = {name: value.clone() for name, value in module.named_gradients().items()}
    optimizer.step(module.named_gradients())
    if step == 0:
        wrong = max(float((start[name] - 0.05 * first[name] - value).abs().max())
                    for name, value in module.named_parameters().items())
print(json.dumps({
    "losses": losses, "wrong": wrong,
    "start": all(np.array_equal(adapter[name[8:]], value) for name, value in start.items()),
    "trained": sorted(start),
    "moved": sorted(n for n, value in module.named_parameters().items() if not torch.equal(value, start[n])),
}))
"""


@pytest.mark.parametrize("backend", ["portable", "xnnpack"])
def test_executorchs_own_optimizer_moves_the_factors_alone(bert, backend):
    root = bert.bundle.root
    files = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in root.iterdir()}
    command = [sys.executable, "-c", TRAIN, str(root), f"train-{backend}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    manifest = bert.bundle.manifest
    assert result["start"]
    names = {f"{name}.core" for name in manifest.groups} | set(manifest.extras)
    assert result["trained"] == sorted(f"trained.{name}" for name in names)
    assert len(result["moved"]) > len(names) / 2  # the least of the gradients are lost in rounding
    assert result["wrong"] < 1e-7
    assert result["losses"][-1] < result["losses"][0] - 1e-3
    assert files == {path.name: hashlib.sha256(path.read_bytes()).digest() for path in root.iterdir()}


def test_the_programs_and_the_step_graph_take_the_same_steps(bert, kit):
    bundle, inputs = bert.bundle, kit.inputs_of(bert, 4, 9)
    feeds = build_feeds(bundle.manifest, bert.run.adapter())
    targets = np.array([0, 1, 1, 0])
    expected = open_engine("ort-step", bundle, threads=1).step(inputs, targets, feeds)
    for backend in ("portable", "xnnpack"):
        stepper = ProgramStepper(bundle, bundle.manifest.programs[f"train-{backend}"])
        for _ in range(2):  # the same, whatever it was fed before
            found = stepper.step(inputs, targets, feeds)
            assert found.loss == pytest.approx(expected.loss, rel=1e-5)
            assert set(found.gradients) == set(expected.gradients)
            for name, gradient in expected.gradients.items():
                assert distance(found.gradients[name], gradient) < 1e-4
            stepper.step(inputs, 1 - targets, {name: value * 0 for name, value in feeds.items()})


def test_parity_sees_a_wrong_step(bert, kit):
    """Gradients that go wrong after the first step are found by the steps alone."""
    bundle, inputs = bert.bundle, kit.inputs_of(bert, 3, 9)
    engine = open_engine("ort-step", bundle, threads=1)
    feeds, targets = build_feeds(bundle.manifest, bert.run.adapter()), np.array([0, 1, 1])
    first = engine.step(inputs, targets, feeds)

    class Forgetful:
        def __init__(self, sign):
            self._calls, self._sign = 0, sign

        def step(self, inputs, targets, feeds):
            self._calls += 1
            result = engine.step(inputs, targets, feeds)
            sign = 1 if self._calls == 1 else self._sign
            gradients = {name: sign * value for name, value in result.gradients.items()}
            return type(result)(result.loss, result.outputs, gradients)

    case = Case({**inputs, "labels": targets, **feeds}, first.outputs, first.loss, first.gradients, 0.0)
    later = compare_steps(Forgetful(1), bundle, [case])["steps"] * 1e-6  # relative to zero
    case = Case(case.feeds, case.outputs, case.loss, case.gradients, later)
    right, wrong = (compare_steps(Forgetful(sign), bundle, [case]) for sign in (1, -1))
    assert right["steps"] < 1e-6
    assert wrong["steps"] > TOLERANCES["steps"]
    assert all(wrong[name] == right[name] for name in ("outputs", "loss", "gradients"))


def test_the_delegates_take_the_products(bert):
    left = bert.report.executorch.left_over
    assert set(left) == {"infer-xnnpack", "train-xnnpack"}
    for counts in left.values():
        assert not {"softmax", "_softmax", "gelu", "permute_copy", "bmm", "sub"} & set(counts)
        assert counts["index_select"] > 0  # XNNPACK has none


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ProgramSettings(("cuda",)), "cuda"),
        (ProgramSettings(()), "expected portable, xnnpack, vulkan"),
        (ProgramSettings(max_batch=2), "--max-batch 2"),
        (ProgramSettings(max_length=25), "--max-length 25"),
        (ProgramSettings(max_length=3), "--max-length 3"),
    ],
)
def test_settings_that_cannot_be_met_are_refused_early(bert, tmp_path, settings, message):
    with pytest.raises(UsageError, match=message):
        export_run(bert.run, tmp_path / "out", ExportSettings(("onnx", "executorch"), programs=settings))
    assert not list(tmp_path.iterdir())


def test_without_executorch_the_target_is_refused(bert, tmp_path, monkeypatch):
    monkeypatch.setattr(executorch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match="not installed") as caught:
        export_run(bert.run, tmp_path / "out", ExportSettings(("onnx", "executorch")))
    assert "edge-tcur[executorch]" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_a_failure_of_executorch_leaves_nothing(bert, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no such kernel\n")

    monkeypatch.setattr(executorch.Lowering, "lower", fail)
    with pytest.raises(ExportError, match="infer-portable program: no such kernel"):
        export_run(bert.run, tmp_path / "out", ExportSettings(("onnx", "executorch")))
    assert not list(tmp_path.iterdir())
