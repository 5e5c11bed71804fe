"""A personalisation that is killed, paused or stopped goes on and ends with the very same adapter."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_tcur_runtime import budget as budget_module
from edge_tcur_runtime import keeper as keeper_module
from edge_tcur_runtime import personalize as module
from edge_tcur_runtime.budget import Memory
from edge_tcur_runtime.checkpoint import FILES, Checkpoints, parse_checkpoint
from edge_tcur_runtime.engines import selfcheck
from edge_tcur_runtime.engines.providers import ON_CPU, PROVIDERS, Placement
from edge_tcur_runtime.engines.selfcheck import Choice
from edge_tcur_runtime.errors import BadInputError, BudgetError, DiskError, IncompatibleError, PausedError
from edge_tcur_runtime.formats.adapter import serialize_adapter
from edge_tcur_runtime.formats.bundle import open_bundle
from edge_tcur_runtime.formats.digest import digest_file
from edge_tcur_runtime.installed import find_onnxruntime
from edge_tcur_runtime.personalize import blank_adapter, bundle_adapter, personalize
from edge_tcur_runtime.settings import KeepSettings, PersonalizeSettings

DATA = Path(__file__).parents[1] / "data"
V1, SKETCH_V1, USER = DATA / "bundle-v1", DATA / "sketch-v1", DATA / "user.npz"
INSTALLED = find_onnxruntime()
pytestmark = pytest.mark.skipif(INSTALLED is None, reason="ONNX Runtime is not installed")
needs_training = pytest.mark.skipif(
    INSTALLED is None or not INSTALLED.training,
    reason="the installed ONNX Runtime has no training interface (onnxruntime-training-cpu has)",
)
SETTINGS = PersonalizeSettings(epochs=3, threads=1, engine="ort-step", batch_size=32, holdout=0.25)
WEBGPU = PROVIDERS["webgpu"]
NEVER = 1e9  # seconds between checkpoints: only what ends the run saves


class ClosesAfter:
    """A gate that closes once `updates` more updates are done."""

    def __init__(self, updates):
        self.left = updates

    def __call__(self):
        return "enough" if self.left <= 0 else None

    def on_step(self, *_):
        self.left -= 1


@pytest.fixture(autouse=True)
def look_at_gates_always(monkeypatch):
    monkeypatch.setattr(keeper_module, "GATE_SECONDS", 0.0)


def paused(bundle, user, settings, directory, updates, start=None):
    """Runs until `updates` updates are done, and pauses."""
    gate = ClosesAfter(updates)
    keep = KeepSettings(directory, NEVER, gates=(gate,))
    with pytest.raises(PausedError, match="enough: paused after") as caught:
        personalize(bundle, user, settings, start=start, keep=keep, on_step=gate.on_step)
    assert caught.value.exit_code == 9
    assert "same command" in caught.value.hint


def in_parts(bundle, user, settings, directory, lengths, start=None):
    """The result of a run that pauses after each of `lengths` updates and goes on."""
    for length in lengths:
        paused(bundle, user, settings, directory, length, start)
    return personalize(bundle, user, settings, start=start, keep=KeepSettings(directory, NEVER))


def outcome(result):
    """What must not depend on breaks."""
    fields = (result.losses, result.scores, result.score_before, result.score_after, result.better)
    return serialize_adapter(result.adapter), *fields


@pytest.mark.parametrize("engine", ["ort-step", pytest.param("ort-training", marks=needs_training)])
def test_a_break_after_any_update_changes_no_bit(tmp_path, user, engine):
    bundle, settings = open_bundle(V1), replace(SETTINGS, engine=engine)
    whole = personalize(bundle, user, settings)
    assert whole.resumed_from == 0
    updates = len(whole.losses)
    assert updates >= 6
    for place in range(1, updates):
        result = in_parts(bundle, user, settings, tmp_path / str(place), [place])
        assert outcome(result) == outcome(whole)
        assert result.resumed_from == place
    every = in_parts(bundle, user, settings, tmp_path / "every", [1] * (updates - 1))
    assert outcome(every) == outcome(whole)
    assert every.resumed_from == updates - 1


def test_sketches_heads_and_another_start_go_on_too(tmp_path, user):
    bundle = open_bundle(SKETCH_V1)
    for number, start in enumerate((bundle_adapter(bundle), blank_adapter(bundle))):
        whole = personalize(bundle, user, SETTINGS, start=start)
        parts = in_parts(bundle, user, SETTINGS, tmp_path / str(number), [2, 1], start)
        assert outcome(parts) == outcome(whole)


def test_a_small_budget_keeps_its_micro_batch(tmp_path, user, monkeypatch):
    """The micro-batch decides the order of additions, so it is part of the checkpoint."""
    bundle, settings = open_bundle(V1), replace(SETTINGS, budget=10**12)
    monkeypatch.setattr("edge_tcur_runtime.trainer.choose_micro_batch", lambda *_: 5)
    whole = personalize(bundle, user, settings)
    paused(bundle, user, settings, tmp_path, 2)
    monkeypatch.setattr("edge_tcur_runtime.trainer.choose_micro_batch", lambda *_: 7)
    settings = replace(settings, budget=2 * 10**12)  # more memory now: still the same run
    result = personalize(bundle, user, settings, keep=KeepSettings(tmp_path))
    assert result.micro_batch == 5
    assert outcome(result) == outcome(whole)


@pytest.mark.parametrize("change", ["data", "settings", "start", "bundle"])
def test_a_checkpoint_of_another_run(tmp_path, user, change):
    bundle = open_bundle(V1)
    paused(bundle, user, SETTINGS, tmp_path, 2)
    settings, start, data = SETTINGS, None, user
    if change == "settings":
        settings = replace(settings, seed=1)
    elif change == "start":
        start = bundle_adapter(bundle)
    elif change == "data":
        data = user.select(np.arange(len(user) - 1))
    else:
        bundle = replace(bundle, manifest=replace(bundle.manifest, device="another"))
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(IncompatibleError, match=f"of another run: {change} differ"):
        personalize(bundle, data, settings, start=start, keep=KeepSettings(tmp_path, resume="yes"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept
    result = personalize(bundle, data, settings, start=start, keep=KeepSettings(tmp_path))
    assert result.resumed_from == 0
    assert f"{change} differ; it is given up" in result.notes[0]
    assert outcome(result) == outcome(personalize(bundle, data, settings, start=start))


def test_to_insist_on_a_checkpoint_and_to_refuse_one(tmp_path, user):
    bundle = open_bundle(V1)
    with pytest.raises(BadInputError, match="no checkpoint to go on from"):
        personalize(bundle, user, SETTINGS, keep=KeepSettings(tmp_path, resume="yes"))
    paused(bundle, user, SETTINGS, tmp_path, 2)
    assert personalize(bundle, user, SETTINGS, keep=KeepSettings(tmp_path, resume="no")).resumed_from == 0


def test_a_run_that_is_paused_before_it_goes_on_still_says_how_far_it_is(tmp_path, user):
    bundle = open_bundle(V1)
    paused(bundle, user, SETTINGS, tmp_path, 2)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(PausedError, match="paused after 2 updates, and kept"):
        personalize(bundle, user, SETTINGS, keep=KeepSettings(tmp_path, NEVER, gates=(lambda: "closed",)))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_what_stops_a_run_leaves_its_progress(tmp_path, user, monkeypatch):
    """A crossed budget, an interrupt: the run ends, and what was done is kept."""
    bundle = open_bundle(V1)
    whole = personalize(bundle, user, SETTINGS)
    for number, (error, raised) in enumerate(((BudgetError, None), (KeyboardInterrupt, KeyboardInterrupt()))):
        done = []

        def on_step(*_, done=done, raised=raised):
            done.append(1)
            if len(done) == 3 and raised is not None:
                raise raised

        def memory(done=done, raised=raised):
            return Memory(peak=10**13 if len(done) >= 3 and raised is None else 1, resident=1)

        with monkeypatch.context() as patch:
            patch.setattr(budget_module, "read_memory", memory)
            for name in ("personalize", "trainer"):
                patch.setattr(f"edge_tcur_runtime.{name}.read_memory", memory)
            settings = replace(SETTINGS, budget=10**12)
            keep = KeepSettings(tmp_path / str(number), NEVER)
            with pytest.raises(error):
                personalize(bundle, user, settings, keep=keep, on_step=on_step)
        result = personalize(bundle, user, SETTINGS, keep=KeepSettings(tmp_path / str(number)))
        assert result.resumed_from == 3
        assert outcome(result) == outcome(whole)


def test_a_disk_that_is_full_ends_the_run_with_its_own_error(tmp_path, user, monkeypatch):
    def full(self, progress):
        raise DiskError("no space", where=str(self.directory))

    monkeypatch.setattr(Checkpoints, "save", full)
    with pytest.raises(DiskError):
        personalize(open_bundle(V1), user, SETTINGS, keep=KeepSettings(tmp_path, seconds=0.0))


# --- the provider ----------------------------------------------------------------------------------------


def on_webgpu(monkeypatch):
    """``auto`` takes WebGPU, whose sessions run on the CPU here."""
    monkeypatch.setattr(module, "choose_for_training", lambda *_: Choice(Placement(WEBGPU), "faster"))
    real = module.open_engine

    def on_the_cpu(*names, placement, **options):
        assert placement.provider in (WEBGPU, PROVIDERS["cpu"])
        return real(*names, **options)

    monkeypatch.setattr(module, "open_engine", on_the_cpu)


def test_auto_keeps_the_provider_of_the_checkpoint(tmp_path, user, monkeypatch):
    """What is faster by a little may be slower at the next start."""
    bundle, whole = open_bundle(V1), personalize(open_bundle(V1), user, SETTINGS)
    paused(bundle, user, SETTINGS, tmp_path / "cpu", 2)
    with monkeypatch.context() as patch:
        on_webgpu(patch)
        paused(bundle, user, SETTINGS, tmp_path / "webgpu", 2)
        result = personalize(bundle, user, SETTINGS, keep=KeepSettings(tmp_path / "cpu"))
        assert (result.provider, result.resumed_from) == ("cpu", 2)
        assert result.provider_reason == "the checkpoint's run went on it"
        assert outcome(result) == outcome(whole)
        patch.setattr(selfcheck, "choose_for_training", lambda *_: Choice(Placement(WEBGPU), "trusted"))
        patch.setattr(module, "choose_for_training", lambda *_: Choice(ON_CPU, "not webgpu: not faster"))
        patch.setattr(module, "choose_engine", lambda name, *_: (name, "asked for"))
        result = personalize(bundle, user, SETTINGS, keep=KeepSettings(tmp_path / "webgpu"))
        assert (result.provider, result.resumed_from) == ("webgpu", 2)
        assert result.provider_reason == "the checkpoint's run went on it; trusted"
        assert outcome(result) == outcome(whole)


@pytest.mark.parametrize("problem", ["gone", "not trusted"])
def test_a_provider_of_the_checkpoint_that_cannot_be_used_any_more(tmp_path, user, monkeypatch, problem):
    """The progress stays, also where a checkpoint of another run would be given up."""
    bundle = open_bundle(V1)
    with monkeypatch.context() as patch:
        on_webgpu(patch)
        paused(bundle, user, SETTINGS, tmp_path, 2)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        why = "has no provider 'webgpu'"
        if problem == "not trusted":
            why = "not webgpu: the gradients differ"
            patch.setattr(selfcheck, "choose_for_training", lambda *_: Choice(ON_CPU, why))
        for resume in ("auto", "yes"):
            with pytest.raises(IncompatibleError, match="run went on webgpu, which cannot be") as caught:
                personalize(bundle, user, SETTINGS, keep=KeepSettings(tmp_path, resume=resume))
            assert why in caught.value.message
            assert "--resume no" in caught.value.hint
            assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept
    result = personalize(bundle, user, SETTINGS, keep=KeepSettings(tmp_path, resume="no"))
    assert (result.provider, result.resumed_from) == ("cpu", 0)


def test_a_provider_that_is_asked_for_belongs_to_another_run(tmp_path, user, monkeypatch):
    bundle = open_bundle(V1)
    with monkeypatch.context() as patch:
        on_webgpu(patch)
        paused(bundle, user, SETTINGS, tmp_path, 2)
    keep = KeepSettings(tmp_path, resume="yes")
    with pytest.raises(IncompatibleError, match="of another run: settings, engine differ"):
        personalize(bundle, user, replace(SETTINGS, provider="cpu"), keep=keep)


# --- the command, killed for real ------------------------------------------------------------------------


def command(store, *more, data=USER, code="from edge_tcur_runtime.cli import main; main()"):
    return [
        sys.executable, "-c", code, "personalize", str(V1), "--data", str(data), "--start", "bundle",
        "--engine", "ort-step", "--threads", "1", "--epochs", "30", "--batch-size", "8", "--json",
        "--learning-rate", "0.002", "--head-learning-rate", "0.002", "--holdout", "0.3",
        "--store", str(store), *more,
    ]  # fmt: skip


def generation(folder):
    found = [0]
    for path in (folder / name for name in FILES):
        with contextlib.suppress(FileNotFoundError):  # not written yet, or the run has ended
            found += [parse_checkpoint(path.read_bytes(), path.name)[2]]
    return max(found)


def test_killed_again_and_again_it_ends_with_the_same_adapter(tmp_path):
    whole = json.loads(subprocess.run(command(tmp_path / "whole"), capture_output=True, check=True).stdout)
    store = tmp_path / "store"
    folder = store / "checkpoints" / "personal"
    killed = []  # the checkpoint that was there when the process died
    for updates in (1, 40, 90, 10**6):  # of each process before it is killed, in the middle of anything
        arguments = command(store, "--checkpoint-seconds", "0")
        limit = generation(folder) + updates
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None:
                if generation(folder) >= limit:
                    process.kill()
                    process.wait()
                    killed.append(generation(folder))
                time.sleep(0.001)
            out = process.stdout.read()
    assert process.returncode == 0
    result = json.loads(out)
    assert len(killed) == 3
    assert 0 < result["resumed_from"] <= killed[-1]  # a generation is an update, or the score of an epoch
    assert result["losses"] == whole["losses"]
    assert result["installed"] == whole["installed"]
    files = [next((tmp_path / name / "adapters").iterdir()) for name in ("whole", "store")]
    assert digest_file(files[0]) == digest_file(files[1])
    assert not (store / "checkpoints").exists()  # the run has ended


SLOW = """
import sys, time
from edge_tcur_runtime.engines.ort_step import OrtStepEngine
step, passes = OrtStepEngine.step, []
def slow(self, *arguments):
    passes.append(1)
    if len(passes) == 20:
        print("in a long pass", file=sys.stderr, flush=True)
        end = time.monotonic() + 3
        while time.monotonic() < end:
            time.sleep(0.01)
    return step(self, *arguments)
OrtStepEngine.step = slow
from edge_tcur_runtime.cli import main
main()
"""


def test_sigterm_is_answered_by_a_checkpoint_within_a_second(tmp_path):
    """Also in the middle of a pass that takes longer."""
    folder = tmp_path / "checkpoints" / "personal"
    arguments = command(tmp_path, "--checkpoint-seconds", "1000", code=SLOW)
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr.readline() == "in a long pass\n"
    assert not list(folder.iterdir())
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    while not list(folder.glob("checkpoint-*")) and time.monotonic() < sent + 10:
        time.sleep(0.01)
    assert time.monotonic() - sent < 1
    assert process.poll() is None  # the pass goes on; what was done is safe already
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 9
    error = json.loads(out)["error"]
    assert (error["code"], error["exit_code"]) == ("paused", 9)
    whole = json.loads(subprocess.run(command(tmp_path / "whole"), capture_output=True, check=True).stdout)
    done = json.loads(subprocess.run(command(tmp_path), capture_output=True, check=True).stdout)
    assert done["resumed_from"] > 0
    assert done["installed"] == whole["installed"]


def test_in_another_thread_signals_are_left_alone(tmp_path, user):
    import threading

    before, results = signal.getsignal(signal.SIGTERM), []

    def work():
        keep = KeepSettings(tmp_path, NEVER)
        results.append(personalize(open_bundle(V1), user, SETTINGS, keep=keep))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results
    assert signal.getsignal(signal.SIGTERM) is before


def test_handlers_are_given_back(tmp_path, user):
    before = signal.getsignal(signal.SIGTERM)
    personalize(open_bundle(V1), user, SETTINGS, keep=KeepSettings(tmp_path, NEVER))
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1
