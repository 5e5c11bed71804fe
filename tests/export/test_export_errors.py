"""Exports that must fail: what the user is told, and that nothing is left behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edge_tcur.errors import ExportError
from edge_tcur.method.config import TCurConfig
from edge_tcur.method.targets import find_targets
from edge_tcur.models import load_base
from edge_tcur.tasks import find_task
from edge_tcur.training import TrainConfig, train
from edge_tcur_export import bundle as bundles
from edge_tcur_export import ort_training, verification
from edge_tcur_export.bundle import export_run
from edge_tcur_export.graph import to_graph
from edge_tcur_export.ort_training import _failure
from edge_tcur_export.parity import verify_bundle
from edge_tcur_export.settings import TARGETS, ExportSettings
from edge_tcur_export.trace import FactorModel, make_example, trace_forward, trace_step
from edge_tcur_runtime.errors import BaseMismatchError, DiskError, ExitCode, OutputExistsError, UsageError
from edge_tcur_runtime.formats.bundle import open_bundle
from edge_tcur_runtime.installed import OnnxRuntimeInstall

IMAGE = "image-classification"
MODEL = """
import torch
from torch import nn

class Branch(nn.Module):
    def forward(self, x):
        if x.sum() > 0:  # the line that cannot be traced
            return x
        return 2 * x

class RunningSum(nn.Module):
    def forward(self, x):
        return torch.cumsum(x, 1)

class FixedBatch(nn.Module):
    def forward(self, x):
        return x * torch.ones(int(x.shape[0]), 1)  # the line that fixes the batch

class Values(nn.Module):
    def forward(self, x):
        return x + torch.from_numpy(x.detach().numpy())

class Attention(nn.Module):
    def forward(self, x):
        y = x.reshape(-1, 1, 4, 4)
        return torch.nn.functional.scaled_dot_product_attention(y, y, y).reshape(-1, 16)

class Flash(nn.Module):
    def forward(self, x):
        y = x.reshape(-1, 1, 4, 4)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(y, y, y)[0].reshape(-1, 16)

class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        return torch.tanh(x)

class Bessel(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)

class Detached(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x.detach()) + x

class Net(nn.Module):
    preprocessing = {
        "kind": "image", "input": "pixel_values", "height": 4, "width": 4, "channels": 1, "scale": 1 / 255,
        "mean": [0.5], "std": [0.25],
    }

    def __init__(self, between):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.between = between
        self.stem = None
        self.out = nn.Linear(16, 3)

    def forward(self, pixel_values):
        x = self.stem(pixel_values).flatten(1) if self.stem else pixel_values.flatten(1)
        for block in self.blocks:
            x = self.between(block(x))
        return self.out(x)

class Convolutional(Net):
    def __init__(self):
        super().__init__(nn.Tanh())
        self.stem = nn.Conv2d(1, 1, 3, padding=1)

def plain(): return Net(nn.Tanh())
def convolutional(): return Convolutional()
def branch(): return Net(Branch())
def fixed_batch(): return Net(FixedBatch())
def values(): return Net(Values())
def attention(): return Net(Attention())
def flash(): return Net(Flash())
def idle(): return Net(Idle())
def softplus(): return Net(nn.Softplus())
def running_sum(): return Net(RunningSum())
def bessel(): return Net(Bessel())
def detached(): return Net(Detached())
"""


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """A directory with `MODEL` as a module and 4x4 pictures."""
    root = tmp_path_factory.mktemp("workshop")
    (root / "export_models.py").write_text(MODEL)
    images = np.random.default_rng(0).integers(0, 255, (30, 4, 4)).astype(np.uint8)
    np.savez(root / "pictures.npz", images=images, labels=np.arange(30) % 3)
    return root


@pytest.fixture
def run_of(workshop, tmp_path, monkeypatch):
    """Trains a run on one of the functions of `MODEL`."""
    monkeypatch.chdir(workshop)

    def call(function, **settings):
        data = str(workshop / "pictures.npz")
        usual = {"task": IMAGE, "rank": 2, "epochs": 1, "threads": 1}
        config = TrainConfig(f"export_models:{function}", data, **{**usual, **settings})
        return train(config, tmp_path / "-".join(["run", function, *settings])).run

    return call


def refused(run, out, error, match, targets=TARGETS, **options):
    """`export_run` raises, and nothing is at `out` nor beside it."""
    before = {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()}
    with pytest.raises(error, match=match) as caught:
        export_run(run, out, ExportSettings(targets), **options)
    assert {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()} == before
    return caught.value


def test_a_base_that_changed_since_training(vit_dir, digits_npz, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(vit_dir, base)
    config = TrainConfig(str(base), str(digits_npz), task=IMAGE, rank=2, epochs=1, threads=1)
    run = train(config, tmp_path / "run").run
    weights = load_file(base / "model.safetensors")
    next(value for value in weights.values() if value.ndim == 2)[0, 0] += 1e-3
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    error = refused(run, tmp_path / "bundle", BaseMismatchError, run.base_digest)
    assert error.exit_code is ExitCode.INCOMPATIBLE == 4
    assert error.where == str(base)


def test_an_unknown_target(run_of, tmp_path):
    error = refused(run_of("plain"), tmp_path / "bundle", UsageError, "'tflite'", targets=("step", "tflite"))
    assert "onnx, step, ort-training" in error.message


def test_an_output_that_is_there(run_of, tmp_path):
    run, out = run_of("plain"), tmp_path / "bundle"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    error = refused(run, out, OutputExistsError, "not empty", targets=("onnx",))
    assert "--force" in error.hint
    refused(run, out, OutputExistsError, "this is neither", targets=("onnx",), force=True)
    (out / "manifest.json").write_text("an earlier bundle")
    report = export_run(run, out, ExportSettings(("onnx",), verify=False), force=True)
    assert report.parity == {}
    assert open_bundle(out).manifest.graphs == {"checks": "checks.onnx", "infer": "infer.onnx"}
    assert not (out / "precious.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "run-plain"]


def test_force_keeps_the_old_bundle_when_the_export_fails(run_of, tmp_path):
    out = tmp_path / "bundle"
    out.mkdir()
    (out / "manifest.json").write_text("an earlier bundle")
    (out / "precious.txt").write_text("mine")
    refused(run_of("branch"), out, ExportError, "cannot trace", force=True)
    assert (out / "precious.txt").read_text() == "mine"


def test_a_model_that_cannot_be_traced(run_of, workshop, tmp_path, capfd):
    run = run_of("branch")
    capfd.readouterr()
    error = refused(run, tmp_path / "bundle", ExportError, "torch.export cannot trace the model: ")
    assert error.where == line_of(workshop, "        if x.sum() > 0:  # the line that cannot be traced")
    assert error.message.endswith("in the module module.between (Branch)")
    assert "control flow" in error.hint
    assert error.exit_code == 4
    assert capfd.readouterr() == ("", "")  # torch prints its graph and a warning


@pytest.mark.parametrize(("function", "operator"), [("softplus", "Softplus"), ("running_sum", "CumSum")])
def test_an_operator_without_gradient_in_onnx_runtime_training(run_of, tmp_path, function, operator):
    run, out = run_of(function), tmp_path / "bundle"
    stages = []
    error = refused(run, out, ExportError, f"no gradient for {operator} ", on_stage=stages.append)
    assert f"{operator} (node " in error.message
    assert "from the module module.between)" in error.message
    assert "--target onnx --target step" in error.hint
    assert not [stage for stage in stages if "step graph" in stage]  # found before the long work
    report = export_run(run, out, ExportSettings(("onnx", "step")))
    assert set(report.parity) == {"infer", "step"}
    assert report.parity["step"]["gradients"] <= 1e-3


def test_an_operator_without_onnx_form(run_of, tmp_path):
    error = refused(run_of("detached"), tmp_path / "bundle", ExportError, "bessel_j0 has no ONNX form")
    assert error.hint


@pytest.fixture
def traced(workshop, monkeypatch):
    """Base, model and traced forward pass of a function of `MODEL`."""
    monkeypatch.chdir(workshop)

    def call(function, targets="*.blocks.*", rank=2):
        task, config = find_task(IMAGE), TCurConfig(rank=rank, targets=targets)
        base = load_base(f"export_models:{function}", task, ("0", "1", "2"), {})
        groups = find_targets(base.model, config).groups
        example = make_example(base, groups, lambda group: rank, task=task, batch=3, seed=0, config=config)
        model = FactorModel(base, groups, task, config)
        return trace_forward(model, base, groups, task, example), example

    return call


def line_of(workshop, text):
    return f"{workshop / 'export_models.py'}:{MODEL.splitlines().index(text) + 1}"


def test_an_operator_without_backward(traced, workshop):
    forward, example = traced("bessel")
    with pytest.raises(ExportError, match=r"backward pass of the model: aten\.special_bessel_j0") as caught:
        trace_step(forward, example)
    assert "in the module module.between (Bessel)" in caught.value.message
    assert caught.value.where.startswith(str(workshop / "export_models.py"))
    assert "--target onnx" in caught.value.hint


def test_a_weight_of_one_row_has_one_rank(traced):
    _, example = traced("convolutional", "*.stem", 1)
    assert example.named()["module.stem.core"].shape == (1, 1, 1)


def test_a_model_that_fixes_the_batch_size(traced, workshop):
    with pytest.raises(ExportError, match="the size of batch became fixed, in the module") as caught:
        traced("fixed_batch")
    assert "module.between (FixedBatch)" in caught.value.message
    assert caught.value.where == line_of(
        workshop, "        return x * torch.ones(int(x.shape[0]), 1)  # the line that fixes the batch"
    )
    assert "without int()" in caught.value.hint


def test_a_model_that_leaves_torch(traced):
    with pytest.raises(ExportError, match=r"in the module module\.between \(Values\)") as caught:
        traced("values")
    assert "stay in torch" in caught.value.hint


def test_fused_attention_that_slips_through(traced):
    step = trace_step(*traced("attention"))
    names = {str(node.target) for node in step.program.graph.nodes}
    assert not [name for name in names if "scaled_dot_product" in name]
    to_graph(step)


def test_a_fused_kernel_that_is_called_by_its_name(traced):
    step = trace_step(*traced("flash"))
    with pytest.raises(ExportError, match=r"flash_attention.* has no ONNX form") as caught:
        to_graph(step)
    assert "attn_implementation='eager'" in caught.value.hint


def test_a_module_that_the_loss_does_not_depend_on(run_of, tmp_path):
    run = run_of("idle", targets="*.blocks.*", modules_to_save="*.between")
    error = refused(run, tmp_path / "bundle", ExportError, "no gradient, because the loss does not depend")
    assert "module.between.unused.weight" in error.message
    assert "(a buffer)" in error.hint


def test_a_graph_that_does_not_agree_with_torch(run_of, tmp_path, monkeypatch):
    trace = bundles.trace_forward

    def change_a_weight_after_tracing(model, *arguments):
        traced = trace(model, *arguments)
        layer = model.model.module.blocks[0]
        layer.weight_t = layer.weight_t + 0.01
        return traced

    monkeypatch.setattr(bundles, "trace_forward", change_a_weight_after_tracing)
    run, out = run_of("plain"), tmp_path / "bundle"
    error = refused(run, out, ExportError, "infer: the outputs differ", targets=("onnx",))
    assert "the traced program departs from the model already" in error.message


def test_a_bundle_that_does_not_open(run_of, tmp_path, monkeypatch):
    def damage(root, cases, manifest, **options):
        (root / "infer.onnx").write_bytes(b"no graph")
        return verify_bundle(root, cases, manifest, **options)

    monkeypatch.setattr(verification, "verify_bundle", damage)
    error = refused(run_of("plain"), tmp_path / "bundle", ExportError, "does not run", targets=("onnx",))
    assert "infer.onnx" in error.message


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
from edge_tcur.cli import main
sys.argv[1:] = sys.argv[2:]
main()
"""


@pytest.mark.parametrize("size", [512, 4096])
def test_a_full_disk(run_of, workshop, tmp_path, size):
    run = run_of("plain")
    before = sorted(path for path in tmp_path.rglob("*"))
    arguments = ["export", run.root, "--out", tmp_path / "bundle", "--target", "onnx", "--json"]
    command = [sys.executable, "-B", "-c", LIMITED, str(size), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=workshop)
    assert done.returncode == ExitCode.DISK == 7, done.stderr
    error = json.loads(done.stdout)["error"]
    assert (error["code"], error["where"]) == ("disk", str(tmp_path / "bundle"))
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_a_disk_that_fills_while_the_manifest_is_written(run_of, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundles, "serialize_manifest", full)
    error = refused(run_of("plain"), tmp_path / "bundle", DiskError, "No space left", targets=("onnx",))
    assert error.exit_code == 7


@pytest.mark.parametrize("found", [None, OnnxRuntimeInstall("onnxruntime", "1.32.0", False)])
def test_without_onnx_runtime_training_its_target_is_refused(run_of, tmp_path, monkeypatch, found):
    monkeypatch.setattr(ort_training, "find_onnxruntime", lambda: found)
    error = refused(
        run_of("plain"), tmp_path / "bundle", ExportError, "ONNX Runtime Training is not installed"
    )
    assert (error.where, error.exit_code) == ("--target ort-training", 4)
    assert "edge-tcur-runtime[ort-training]" in error.hint


def test_failures_of_onnx_runtime_training_are_told_apart():
    disk = _failure("Traceback\nRuntimeError: cannot write: No space left on device\n")
    assert isinstance(disk, OSError)
    assert disk.errno == 28
    unknown = "x != nullptr was false. The gradient builder has not been registered: Foo for node bar_1\n"
    assert "no gradient for Foo (node bar_1)" in str(_failure(unknown))
    assert str(_failure("a\nRuntimeError: other\n")).endswith("RuntimeError: other")
    assert str(_failure("")).endswith("no reason given")
