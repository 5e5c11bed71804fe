"""Engines: which one is chosen, that both compute the same gradients, and what they say of broken graphs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_tcur_runtime.engines import ENGINES, choose_engine, open_engine
from edge_tcur_runtime.engines.session import import_onnxruntime, open_session, session_options
from edge_tcur_runtime.errors import ConfigError, IncompatibleError, MissingEngineError, UsageError
from edge_tcur_runtime.formats.adapter import Adapter
from edge_tcur_runtime.formats.bundle import open_bundle
from edge_tcur_runtime.formats.factors import Factors, SketchFactors
from edge_tcur_runtime.installed import OnnxRuntimeInstall, find_onnxruntime
from edge_tcur_runtime.personalize import blank_adapter, bundle_adapter

DATA = Path(__file__).parents[1] / "data"
V1 = DATA / "bundle-v1"
INSTALLED = find_onnxruntime()
STOCK = OnnxRuntimeInstall("onnxruntime", "1.31.1", training=False)
TRAINING = OnnxRuntimeInstall("onnxruntime-training-cpu", "1.19.2", training=True)

needs_onnxruntime = pytest.mark.skipif(INSTALLED is None, reason="ONNX Runtime is not installed")
needs_training = pytest.mark.skipif(
    INSTALLED is None or not INSTALLED.training,
    reason="the installed ONNX Runtime has no training interface (onnxruntime-training-cpu has)",
)
ENGINE = [
    pytest.param("ort-step", marks=needs_onnxruntime),
    pytest.param("ort-training", marks=needs_training),
]


@pytest.fixture(scope="module")
def batch():
    """Five pictures as the model takes them, and their classes."""
    generator = np.random.default_rng(5)
    pixels = generator.normal(size=(5, 1, 8, 8)).astype(np.float32)
    return {"pixel_values": pixels}, np.array([0, 1, 2, 3, 1])


def without(bundle, *roles):
    """The bundle as it would be without some graphs."""
    graphs = {role: name for role, name in bundle.manifest.graphs.items() if role not in roles}
    return replace(bundle, manifest=replace(bundle.manifest, graphs=graphs))


def moved(adapter, seed=1, scale=0.02):
    """The adapter with other numbers in its cores."""
    generator = np.random.default_rng(seed)
    return with_cores(adapter, lambda core: core + generator.normal(0, scale, core.shape))


def with_cores(adapter, change):
    factors = {
        group: part.with_core(change(part.core).astype(np.float32)) for group, part in adapter.factors.items()
    }
    return Adapter(adapter.header, factors, adapter.extras)


def of_rank(adapter, rank):
    """An adapter of another rank on the same weights."""
    generator = np.random.default_rng(rank)
    factors = {}
    for group, spec in adapter.header.groups.items():
        core = generator.normal(0, 0.02, (len(spec.parameters), rank, rank)).astype(np.float32)
        old = adapter.factors[group]
        if isinstance(old, Factors):
            rows, cols = (
                np.stack([np.sort(generator.choice(n, rank, replace=False)) for _ in range(old.blocks)])
                for n in (spec.n1, spec.n2)
            )
            factors[group] = Factors(core, rows.astype(np.int32), cols.astype(np.int32))
        else:
            shapes = (len(core), spec.n1, rank), (len(core), rank, spec.n2)
            factors[group] = SketchFactors.pack(
                core, *(generator.integers(-1, 2, shape, np.int8) for shape in shapes)
            )
    return Adapter(adapter.header, factors, adapter.extras)


# --- the choice ------------------------------------------------------------------------------------


def test_auto_prefers_the_training_interface_where_it_is_installed(bundle):
    name, reason = choose_engine("auto", bundle, TRAINING)
    assert name == "ort-training"
    assert reason == "the default where it is installed"


def test_auto_falls_back_to_the_step_graph_and_says_why(bundle):
    name, reason = choose_engine("auto", bundle, STOCK)
    assert name == "ort-step"
    assert reason == "not ort-training: onnxruntime 1.31.1 has no training interface"
    name, reason = choose_engine("auto", without(bundle, "train"), TRAINING)
    assert name == "ort-step"
    assert "the bundle has no train graph" in reason


def test_auto_takes_the_engine_that_can_train_the_adapters_rank(bundle):
    adapter = of_rank(bundle_adapter(bundle), 2)
    name, reason = choose_engine("auto", bundle, TRAINING, adapter)
    assert name == "ort-step"
    assert reason == "not ort-training: the adapter has rank 2; the bundle's training graph is for rank 3"
    with pytest.raises(IncompatibleError, match="rank 2") as caught:
        choose_engine("ort-training", bundle, TRAINING, adapter)
    assert "--engine ort-step" in caught.value.hint
    assert choose_engine("auto", bundle, TRAINING, bundle_adapter(bundle))[0] == "ort-training"


@pytest.mark.parametrize("name", [name for name in ENGINES if ENGINES[name]])
def test_an_engine_that_is_asked_for_is_taken(bundle, name):
    assert choose_engine(name, bundle, TRAINING) == (name, "asked for")


def test_an_engine_that_is_not_installed_is_refused_with_the_command_that_installs_it(bundle):
    with pytest.raises(MissingEngineError, match=r"onnxruntime 1\.31\.1 has no training interface") as caught:
        choose_engine("ort-training", bundle, STOCK)
    assert "edge-tcur-runtime[ort-training]" in caught.value.hint
    for name in ("auto", "ort-training", "ort-step"):
        with pytest.raises(MissingEngineError, match="ONNX Runtime is not installed") as caught:
            choose_engine(name, bundle, None)
        assert "pip install" in caught.value.hint


def test_a_bundle_without_the_graphs_is_refused_with_the_export_that_writes_them(bundle):
    for name, role, target in (("ort-step", "step", "step"), ("ort-training", "checkpoint", "ort-training")):
        with pytest.raises(IncompatibleError, match=f"the bundle has no {role} graph") as caught:
            choose_engine(name, without(bundle, role), TRAINING)
        assert f"--target {target}" in caught.value.hint
        assert caught.value.where == str(V1)
    with pytest.raises(IncompatibleError, match="no engine can fine-tune this bundle here") as caught:
        choose_engine("auto", without(bundle, "step", "train"), TRAINING)
    assert "--target step" in caught.value.hint


def test_an_unknown_engine_is_a_usage_error(bundle):
    with pytest.raises(
        UsageError, match="'torch' is not known; expected auto or one of ort-training, ort-step"
    ):
        choose_engine("torch", bundle, TRAINING)
    with pytest.raises(UsageError, match="'torch' is not known"):
        open_engine("torch", bundle)


@pytest.mark.parametrize("name", ENGINE)
def test_opening_an_engine_without_its_graph_is_refused(bundle, name):
    with pytest.raises(IncompatibleError, match="the bundle has no"):
        open_engine(name, without(bundle, "step", "train"))


def test_the_training_engine_on_stock_onnxruntime_is_refused(bundle, monkeypatch):
    monkeypatch.setattr("edge_tcur_runtime.engines.engine.find_onnxruntime", lambda: STOCK)
    with pytest.raises(MissingEngineError, match="has no training interface"):
        open_engine("ort-training", bundle)


# --- gradients -------------------------------------------------------------------------------------


def softmax_loss(outputs, targets):
    outputs = outputs.astype(np.float64)
    shifted = outputs - outputs.max(axis=-1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return -logs[np.arange(len(targets)), targets].mean()


@needs_training
@pytest.mark.parametrize("count", [1, 2, 5])
def test_both_engines_compute_the_same_loss_outputs_and_gradients(bundle, batch, count):
    inputs, targets = {name: value[:count] for name, value in batch[0].items()}, batch[1][:count]
    feeds = moved(bundle_adapter(bundle)).feeds()
    step, train = (
        open_engine(name, bundle, threads=1).step(inputs, targets, feeds)
        for name in ("ort-step", "ort-training")
    )
    assert step.loss == pytest.approx(train.loss, rel=1e-5)
    np.testing.assert_allclose(step.outputs, train.outputs, rtol=1e-5, atol=1e-5)
    assert (
        set(step.gradients) == set(train.gradients) == {f"{group}.core" for group in bundle.manifest.groups}
    )
    for name, gradient in step.gradients.items():
        scale = np.abs(gradient).max()
        assert scale > 0
        assert np.abs(gradient - train.gradients[name]).max() <= 1e-5 * scale, name


@needs_onnxruntime
def test_the_step_graph_and_the_inference_graph_give_the_same_outputs(bundle, batch):
    check_outputs(bundle, batch)


@needs_onnxruntime
def test_the_step_graph_and_the_inference_graph_of_sketches_give_the_same_outputs(sketched, batch):
    check_outputs(sketched, batch)


def check_outputs(bundle, batch):
    inputs, targets = batch
    feeds = moved(bundle_adapter(bundle)).feeds()
    result = open_engine("ort-step", bundle, threads=1).step(inputs, targets, feeds)
    outputs = open_session(bundle.graph("infer"), threads=1).run(["logits"], {**inputs, **feeds})[0]
    np.testing.assert_allclose(result.outputs, outputs, rtol=1e-5, atol=1e-5)
    assert result.loss == pytest.approx(softmax_loss(outputs, targets), rel=1e-5)


@pytest.mark.parametrize("name", ENGINE)
def test_the_gradient_of_every_core_agrees_with_finite_differences(bundle, batch, name):
    check_gradient(bundle, batch, name, rank=3)


@needs_onnxruntime
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_step_graph_trains_a_core_of_any_rank(bundle, batch, rank):
    check_gradient(bundle, batch, "ort-step", rank)


@needs_onnxruntime
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_step_graph_trains_a_core_between_sketches_and_a_module_in_full(sketched, batch, rank):
    check_gradient(sketched, batch, "ort-step", rank)


def check_gradient(bundle, batch, name, rank):
    """Against the inference graph's loss, in float32, along the gradient and a random direction."""
    inputs, targets = batch
    adapter = of_rank(bundle_adapter(bundle), rank)
    session = open_session(bundle.graph("infer"), threads=1)
    result = open_engine(name, bundle, threads=1).step(inputs, targets, adapter.feeds())
    generator = np.random.default_rng(0)

    def loss(feed, value):
        feeds = {**inputs, **adapter.feeds(), feed: value.astype(np.float32)}
        return softmax_loss(session.run(["logits"], feeds)[0], targets)

    trained = {f"{group}.core": part.core for group, part in adapter.factors.items()} | dict(adapter.extras)
    assert set(result.gradients) == set(trained)
    for feed, value in trained.items():
        gradient = result.gradients[feed].astype(np.float64)
        assert gradient.shape == value.shape
        for along in (gradient, generator.normal(size=gradient.shape)):
            direction = along / np.linalg.norm(along)
            step = 3e-3
            difference = (loss(feed, value + step * direction) - loss(feed, value - step * direction)) / (
                2 * step
            )
            expected = float((gradient * direction).sum())
            assert difference == pytest.approx(
                expected, rel=2e-2, abs=1e-4 + 2e-3 * np.linalg.norm(gradient)
            ), feed


@pytest.mark.parametrize("name", ENGINE)
def test_a_step_changes_neither_its_feeds_nor_the_next_step(bundle, batch, name):
    inputs, targets = batch
    engine = open_engine(name, bundle, threads=1)
    feeds = moved(bundle_adapter(bundle)).feeds()
    before = {key: value.copy() for key, value in feeds.items()}
    first = engine.step(inputs, targets, feeds)
    kept = {key: value.copy() for key, value in first.gradients.items()}
    other = engine.step(inputs, targets, blank_adapter(bundle).feeds())
    again = engine.step(inputs, targets, feeds)
    assert first.loss == again.loss != other.loss
    for key, value in kept.items():
        np.testing.assert_array_equal(value, again.gradients[key])
        np.testing.assert_array_equal(value, first.gradients[key])  # not overwritten in place
    for key, value in before.items():
        np.testing.assert_array_equal(value, feeds[key])


@needs_training
def test_the_training_engine_refuses_a_core_of_another_rank_with_a_way_out(bundle, batch):
    inputs, targets = batch
    adapter = of_rank(bundle_adapter(bundle), 2)
    with pytest.raises(
        IncompatibleError, match=r"\(8, 2, 2\); this bundle's training graph is for \(8, 3, 3\)"
    ) as caught:
        open_engine("ort-training", bundle, threads=1).step(inputs, targets, adapter.feeds())
    assert "--engine ort-step, which trains any rank" in caught.value.hint


@pytest.mark.parametrize("name", ENGINE)
def test_engines_have_the_name_they_are_opened_by(bundle, name):
    assert open_engine(name, bundle).name == name


# --- graphs that cannot be used --------------------------------------------------------------------


def cut(name, count=1000):
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:-count])


def junk(name, content=b"junk" * 100):
    return lambda root: (root / name).write_bytes(content)


def copied(source, target):
    return lambda root: shutil.copyfile(root / source, root / target)


def gone(name):
    return lambda root: (root / name).unlink()


def renamed(old, new):
    return lambda root: (root / "checkpoint").write_bytes(
        (root / "checkpoint").read_bytes().replace(old.encode(), new.encode())
    )


BROKEN = [
    ("ort-step", gone("step.onnx"), "doesn't exist"),
    ("ort-step", junk("step.onnx", b""), "does not have a graph|No graph was found"),
    ("ort-step", junk("step.onnx"), "Protobuf parsing failed"),
    ("ort-step", cut("step.onnx"), "Protobuf parsing failed"),
    ("ort-step", gone("base.bin"), "No such file|base.bin"),
    ("ort-step", junk("base.bin"), "out of bounds"),
    ("ort-step", copied("infer.onnx", "step.onnx"), "has no output 'loss'"),
    ("ort-training", gone("train.onnx"), "doesn't exist"),
    ("ort-training", junk("train.onnx"), "Protobuf parsing failed"),
    ("ort-training", cut("train.onnx"), "Protobuf parsing failed"),
    ("ort-training", gone("base.bin"), "No such file"),
    ("ort-training", junk("base.bin"), "out of bounds"),
    ("ort-training", gone("checkpoint"), "checkpoint"),
    ("ort-training", junk("checkpoint"), "checkpoint"),
    ("ort-training", junk("checkpoint", b""), "checkpoint"),
    ("ort-training", renamed("16x32.core", "16x99.core"), "16x"),
    ("ort-training", copied("eval.onnx", "train.onnx"), "."),
    ("ort-training", copied("infer.onnx", "train.onnx"), "has no output 'loss'"),
    ("ort-training", copied("step.onnx", "train.onnx"), "."),
]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        pytest.param(*row, marks=needs_training if row[0] == "ort-training" else needs_onnxruntime)
        for row in BROKEN
    ],
)
def test_a_graph_that_cannot_be_used_is_named_with_a_short_reason(tmp_path, name, damage, message, capfd):
    root = shutil.copytree(V1, tmp_path / "bundle")
    damage(root)
    with pytest.raises(IncompatibleError, match=message) as caught:
        open_engine(name, open_bundle(root, verify=False), threads=1)
    assert Path(caught.value.where).parent == root
    assert "export" in caught.value.hint
    assert "\n" not in caught.value.message
    assert "onnxruntime_src" not in caught.value.message
    assert len(caught.value.message) < 400
    assert capfd.readouterr().err == ""  # the error says it; the library is quiet


@needs_onnxruntime
def test_a_negative_number_of_threads_is_refused():
    with pytest.raises(ConfigError, match="-1; expected 0 or more") as caught:
        session_options(-1)
    assert caught.value.where == "threads"


# --- torch is not needed, and not imported ----------------------------------------------------------


def run_python(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


STEP = """
import sys
{block}
import numpy as np
from edge_tcur_runtime.engines import open_engine
from edge_tcur_runtime.formats.bundle import open_bundle
from edge_tcur_runtime.personalize import bundle_adapter
bundle = open_bundle(__import__("pathlib").Path(sys.argv[1]))
engine = open_engine(sys.argv[2], bundle, threads=1)
pixels = np.zeros((2, 1, 8, 8), np.float32)
result = engine.step({{"pixel_values": pixels}}, np.array([0, 1]), bundle_adapter(bundle).feeds())
print(np.isfinite(result.loss), sys.modules.get("torch"), sys.modules.get("onnx"))
"""


@pytest.mark.parametrize("name", ENGINE)
@pytest.mark.parametrize("block", ["sys.modules['torch'] = None", ""])
def test_an_engine_runs_where_torch_cannot_be_imported_and_never_imports_it(name, block):
    assert run_python(STEP.format(block=block), V1, name) == "True None None"


def test_no_part_of_the_runtime_imports_torch_but_the_engine_that_needs_it():
    """Every module but that one is imported; ExecuTorch's absence or presence is found from its files."""
    code = """
import importlib, pkgutil, sys
import edge_tcur_runtime
from edge_tcur_runtime.installed import executorch_problem
for found in pkgutil.walk_packages(edge_tcur_runtime.__path__, "edge_tcur_runtime."):
    if found.name not in ("edge_tcur_runtime.__main__", "edge_tcur_runtime.engines.executorch"):
        importlib.import_module(found.name)
executorch_problem()
print([name for name in ("torch", "executorch", "torchao") if name in sys.modules])
"""
    assert run_python(code) == "[]"


@needs_training
@pytest.mark.parametrize("first", ["", "import onnxruntime"])
def test_the_training_interface_can_be_imported_without_torch(first):
    code = f"""
import sys
sys.modules["torch"] = None
{first}
from edge_tcur_runtime.engines.ort_training import import_training_api
api = import_training_api()
assert import_training_api() is api
print(api.__name__, hasattr(api, "Module"), hasattr(api, "CheckpointState"))
"""
    assert run_python(code) == "onnxruntime.training.api True True"


def test_an_onnxruntime_that_cannot_be_imported_is_an_engine_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr("edge_tcur_runtime.engines.engine.find_onnxruntime", lambda: STOCK)
    with pytest.raises(MissingEngineError, match=r"onnxruntime 1\.31\.1 cannot be imported") as caught:
        import_onnxruntime()
    assert "install it again" in caught.value.hint
    monkeypatch.setattr("edge_tcur_runtime.engines.engine.find_onnxruntime", lambda: None)
    with pytest.raises(MissingEngineError, match="ONNX Runtime is not installed"):
        import_onnxruntime()
