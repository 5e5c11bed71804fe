"""The engine ``executorch``: the same training as the others, on ExecuTorch's own runtime."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from edge_tcur.training import TrainConfig
from edge_tcur_export.settings import ProgramSettings
from edge_tcur_runtime.data import load_dataset
from edge_tcur_runtime.doctor import examine
from edge_tcur_runtime.engines import ENGINES, choose_engine, open_engine
from edge_tcur_runtime.errors import IncompatibleError, MissingEngineError, PausedError
from edge_tcur_runtime.feeds import build_feeds
from edge_tcur_runtime.formats.adapter import Adapter, serialize_adapter
from edge_tcur_runtime.formats.bundle import open_bundle
from edge_tcur_runtime.installed import find_onnxruntime
from edge_tcur_runtime.personalize import bundle_adapter, personalize
from edge_tcur_runtime.settings import KeepSettings, PersonalizeSettings

SETTINGS = PersonalizeSettings(epochs=7, batch_size=8, threads=1, engine="executorch")
TARGETS = ("onnx", "step", "ort-training", "executorch")


@pytest.fixture(scope="session")
def minilm(bert_dir, texts_csv, tmp_path_factory, kit):
    """A block of MiniLM's shape, one of its six: lowering all of them takes minutes, and
    `tests/benchmarks/engines.py` compares the loss curves of the whole. Batches of up to 4."""
    import torch
    from transformers import BertConfig, BertModel

    root = shutil.copytree(bert_dir, tmp_path_factory.mktemp("minilm-shape") / "base")
    torch.manual_seed(3)
    shape = BertConfig(
        vocab_size=500, hidden_size=384, num_hidden_layers=1, num_attention_heads=12,
        intermediate_size=1536, max_position_embeddings=24,
    )  # fmt: skip
    BertModel(shape).save_pretrained(root)
    config = TrainConfig(str(root), str(texts_csv), rank=4, epochs=1, batch_size=4, threads=1)
    out = tmp_path_factory.mktemp("minilm-executorch")
    return kit.export(config, out, TARGETS, ProgramSettings(("xnnpack",)), verify=False)


@pytest.fixture(scope="session")
def texts(texts_csv):
    return load_dataset(texts_csv, "text")


def test_the_three_engines_give_one_loss_curve(minilm, texts):
    """Updates of 8 samples: two passes of the program, whose largest batch is 4."""
    assert minilm.bundle.manifest.programs["train-xnnpack"].limits["batch"] == 4
    found = {name: personalize(minilm.bundle, texts, replace(SETTINGS, engine=name)) for name in ENGINES}
    assert len(found) == 3
    losses = {name: np.array(result.losses[:20]) for name, result in found.items()}
    expected = losses["ort-step"]
    assert len(expected) == 20
    assert expected[-1] < expected[0] / 2  # it learns, so that the curves could part
    for name, curve in losses.items():
        assert found[name].engine == name
        assert np.abs(curve / expected - 1).max() < 1e-3, name
        assert found[name].score_after == found["ort-step"].score_after


def test_a_larger_batch_is_computed_in_parts(minilm, kit):
    feeds = build_feeds(minilm.bundle.manifest, minilm.run.adapter())
    inputs, targets = kit.inputs_of(minilm, 7, 9), np.array([0, 1, 1, 0, 1, 1, 1])
    expected, found = (
        open_engine(name, minilm.bundle, threads=1).step(inputs, targets, feeds)
        for name in ("ort-step", "executorch")
    )
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.metric == pytest.approx(expected.metric)
    kit.close(found.outputs, expected.outputs)
    assert set(found.gradients) == set(expected.gradients)
    for name, gradient in expected.gradients.items():
        assert found.gradients[name].dtype == np.float32
        assert np.abs(found.gradients[name] - gradient).max() <= 1e-4 * np.abs(gradient).max()


def test_a_break_changes_no_bit(minilm, texts, tmp_path):
    settings, updates = replace(SETTINGS, epochs=2), []
    whole = personalize(minilm.bundle, texts, settings)
    keep = KeepSettings(tmp_path, 1e9, gates=(lambda: "enough" if len(updates) == 2 else None,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edge_tcur_runtime.keeper.GATE_SECONDS", 0.0)
        with pytest.raises(PausedError):
            personalize(minilm.bundle, texts, settings, keep=keep, on_step=lambda *step: updates.append(step))
    result = personalize(minilm.bundle, texts, settings, keep=KeepSettings(tmp_path))
    assert (result.resumed_from, result.engine) == (2, "executorch")
    assert result.losses == whole.losses
    assert serialize_adapter(result.adapter) == serialize_adapter(whole.adapter)


def test_personalize_on_the_command_line(minilm, texts_csv, tmp_path):
    """In a process that has neither the workstation nor ExecuTorch's compiler; with a budget it measures."""
    code = (
        "import sys, warnings; warnings.simplefilter('error'); from edge_tcur_runtime.cli import main\n"
        "try: main()\n"
        "finally: assert not {'edge_tcur', 'edge_tcur_export', 'torchao'} & set(sys.modules)"
    )
    command = [
        sys.executable, "-c", code, "personalize", str(minilm.bundle.root), "--data", str(texts_csv),
        "--engine", "executorch", "--epochs", "3", "--threads", "1", "--budget", "4GiB", "--start", "base",
        "--store", str(tmp_path / "store"), "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "threadpool" not in done.stderr  # nor anything else of ExecuTorch's own
    assert "cpuinfo" not in done.stderr
    result = json.loads(done.stdout)
    result = result.get("result", result)
    assert (result["engine"], result["engine_reason"], result["provider"]) == (
        "executorch",
        "asked for",
        "cpu",
    )
    assert result["losses"][-1] < result["losses"][0]
    assert result["base_digest_before"] == result["base_digest_after"]


def without(bundle, *programs, graphs=()):
    """The bundle as it would be without some programs and graphs."""
    manifest = bundle.manifest
    kept = {name: spec for name, spec in manifest.programs.items() if name not in programs}
    roles = {role: name for role, name in manifest.graphs.items() if role not in graphs}
    return replace(bundle, manifest=replace(manifest, programs=kept, graphs=roles))


def test_auto_takes_it_last_and_says_why(minilm):
    installed = find_onnxruntime()
    assert choose_engine("auto", minilm.bundle, installed)[0] != "executorch"
    name, reason = choose_engine("auto", without(minilm.bundle, graphs=("step", "train")), installed)
    assert name == "executorch"
    assert "not ort-training" in reason
    assert "not ort-step: the bundle has no step graph" in reason
    assert choose_engine("auto", minilm.bundle, None)[0] == "executorch"


def test_what_it_cannot_train_is_refused(minilm, kit, tmp_path):
    bare = without(minilm.bundle, "train-xnnpack")
    for refused in (lambda: choose_engine("executorch", bare, None), lambda: open_engine("executorch", bare)):
        with pytest.raises(IncompatibleError, match="no training program of ExecuTorch") as caught:
            refused()
        assert "--target executorch" in caught.value.hint
    with pytest.raises(IncompatibleError, match="does not run on webgpu"):
        choose_engine("executorch", minilm.bundle, None, provider="webgpu")
    own = bundle_adapter(minilm.bundle)
    smaller = Adapter(own.header, kit.random_factors(minilm, 2, 1), own.extras)
    with pytest.raises(
        IncompatibleError, match="rank 2; the bundle's training program is for rank 4"
    ) as caught:
        choose_engine("executorch", minilm.bundle, None, smaller)
    assert caught.value.exit_code == 4
    engine, feeds = (
        open_engine("executorch", minilm.bundle, threads=1),
        build_feeds(minilm.bundle.manifest, own),
    )
    targets = np.array([0, 1])
    with pytest.raises(IncompatibleError, match=r"core has rank 2; .* for rank 4"):
        engine.step(kit.inputs_of(minilm, 2, 9), targets, {**feeds, **smaller.feeds()})
    with pytest.raises(IncompatibleError, match="a sequence of 25 is above the 24"):
        engine.step(kit.inputs_of(minilm, 2, 25), targets, feeds)
    root = shutil.copytree(minilm.bundle.root, tmp_path / "cut")
    whole = (root / "train-xnnpack.pte").read_bytes()
    (root / "train-xnnpack.pte").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(IncompatibleError, match="ExecuTorch cannot load the program"):
        open_engine("executorch", open_bundle(root, verify=False))


def test_another_adapters_rows_and_columns_are_inputs(minilm, kit):
    """Only the rank is fixed by the program."""
    own = bundle_adapter(minilm.bundle)
    other = Adapter(own.header, kit.random_factors(minilm, 4, 5), own.extras)
    inputs, targets, feeds = kit.inputs_of(minilm, 3, 6), np.array([1, 0, 1]), other.feeds()
    expected, found = (
        open_engine(name, minilm.bundle, threads=1).step(inputs, targets, feeds)
        for name in ("ort-step", "executorch")
    )
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)


def test_a_library_that_is_missing_is_named_with_the_extra(minilm, monkeypatch):
    for problem in ("ExecuTorch is not installed", "ExecuTorch's Python interface needs torch"):
        monkeypatch.setattr(
            "edge_tcur_runtime.engines.engine.executorch_problem", lambda problem=problem: problem
        )
        for refused in (
            lambda: choose_engine("executorch", minilm.bundle, None),
            lambda: open_engine("executorch", minilm.bundle),
        ):
            with pytest.raises(MissingEngineError, match=problem) as caught:
                refused()
            assert "edge-tcur-runtime[executorch]" in caught.value.hint


def test_the_doctor_lists_it(minilm, tmp_path):
    report = examine(tmp_path, minilm.bundle.root)
    assert {engine.name: engine.available for engine in report.engines}["executorch"]
    assert report.bundle.engines == tuple(ENGINES)
