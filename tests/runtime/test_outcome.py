"""Which epoch's values a run keeps, when it stops early, and whether they take the start's place."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_tcur_runtime import keeper as keeper_module
from edge_tcur_runtime import personalize as module
from edge_tcur_runtime.engines import open_engine
from edge_tcur_runtime.errors import ConfigError, PausedError
from edge_tcur_runtime.formats.adapter import serialize_adapter
from edge_tcur_runtime.installed import find_onnxruntime
from edge_tcur_runtime.outcome import MIN_HELD_OUT, Outcome, beats, patience_for
from edge_tcur_runtime.personalize import personalize
from edge_tcur_runtime.settings import KeepSettings, PersonalizeSettings, SGDSettings
from edge_tcur_runtime.tasks import find_device_task

TASK = find_device_task("image-classification")
needs_engine = pytest.mark.skipif(find_onnxruntime() is None, reason="ONNX Runtime is not installed")
LOSSES = st.lists(st.floats(0, 10) | st.just(math.nan) | st.just(math.inf), min_size=1, max_size=12)


def scored(losses, patience):
    """The outcome after epochs with these held-out losses, stopped where it stalls; and each's values."""
    outcome, values = Outcome(TASK, {}, before=(0.0, 1.0), patience=patience), []
    for number, loss in enumerate(losses):
        values.append({"a": np.array([float(number)])})
        outcome.scored(values[-1], (0.5, loss))
        if outcome.stalled:
            break
    return outcome, values


@given(LOSSES, st.integers(1, 5))
def test_the_kept_epoch_is_the_first_with_the_lowest_loss_seen(losses, patience):
    outcome, values = scored(losses, patience)
    seen = losses[: len(values)]
    finite = [loss for loss in seen if math.isfinite(loss)]
    best = seen.index(min(finite)) if finite else len(seen) - 1
    assert outcome.values is values[best]
    assert outcome.kept_epoch == best + 1
    assert outcome.after[1] == seen[best] or not finite
    assert len(values) - outcome.kept_epoch <= patience
    if len(values) < len(losses):
        assert len(values) - outcome.kept_epoch == patience


@given(LOSSES)
def test_without_patience_the_last_epoch_is_kept_and_nothing_stops(losses):
    outcome, values = scored(losses, 0)
    assert len(values) == len(losses) == outcome.kept_epoch
    assert outcome.values is values[-1]


def test_too_small_a_held_out_part_chooses_no_epoch():
    assert patience_for(5, MIN_HELD_OUT) == 5
    assert patience_for(5, MIN_HELD_OUT - 1) == patience_for(5, 0) == 0


def test_a_patience_below_nothing_is_refused():
    with pytest.raises(ConfigError, match="expected at least 0") as caught:
        PersonalizeSettings(patience=-1)
    assert caught.value.where == "patience"


# --- real runs -------------------------------------------------------------------------------------


# A rate at which the held-out loss rises again after some epochs.
WILD = PersonalizeSettings(
    epochs=12,
    threads=1,
    engine="ort-step",
    patience=2,
    optimizer=SGDSettings(learning_rate=0.4, head_learning_rate=0.4),
)


@needs_engine
def test_a_run_stops_early_and_keeps_the_values_of_its_best_epoch(bundle, user):
    result = personalize(bundle, user, WILD)
    losses = result.held_out_losses
    assert result.stopped_early
    assert len(losses) == len(result.scores) == result.kept_epoch + WILD.patience < WILD.epochs
    assert result.loss_after == min(losses) == losses[result.kept_epoch - 1]
    assert result.score_after == result.scores[result.kept_epoch - 1]
    whole = personalize(bundle, user, replace(WILD, patience=0))
    assert whole.held_out_losses[: len(losses)] == losses  # the schedule does not depend on where it stops
    assert (whole.kept_epoch, whole.stopped_early) == (WILD.epochs, False)
    assert whole.loss_after == whole.held_out_losses[-1]
    assert serialize_adapter(whole.adapter) != serialize_adapter(result.adapter)


@needs_engine
def test_an_early_end_is_the_same_after_a_break_anywhere(bundle, user, tmp_path, monkeypatch):
    """The kept values lie in the checkpoint; SGD's velocity too."""
    monkeypatch.setattr(keeper_module, "GATE_SECONDS", 0.0)
    settings = replace(WILD, batch_size=64)
    whole = personalize(bundle, user, settings)
    assert whole.stopped_early
    assert whole.kept_epoch < len(whole.scores)
    for place in range(1, len(whole.losses) + 1):
        left = [place]
        keep = KeepSettings(tmp_path / str(place), 1e9, gates=[lambda: "enough" if left[0] <= 0 else None])  # noqa: B023

        def count(*_):
            left[0] -= 1  # noqa: B023

        with pytest.raises(PausedError):
            personalize(bundle, user, settings, keep=keep, on_step=count)
        rest = personalize(bundle, user, settings, keep=replace(keep, gates=()))
        assert rest.resumed_from == place
        for name in ("losses", "scores", "held_out_losses", "kept_epoch", "stopped_early", "loss_after"):
            assert getattr(rest, name) == getattr(whole, name), name
        assert serialize_adapter(rest.adapter) == serialize_adapter(whole.adapter)


@needs_engine
def test_a_run_killed_after_its_last_score_ends_early_again(bundle, user, tmp_path, monkeypatch):
    """The checkpoint says that it has stalled: no further update is done."""
    settings = replace(WILD, batch_size=64)
    whole = personalize(bundle, user, settings)
    real = module.Budget.check

    def dies(self, what):
        if what == "at the end":
            raise KeyboardInterrupt
        return real(self, what)

    with monkeypatch.context() as patch:
        patch.setattr(module.Budget, "check", dies)
        with pytest.raises(KeyboardInterrupt):
            personalize(bundle, user, settings, keep=KeepSettings(tmp_path))
    passes = []

    def opened(*arguments, **options):
        engine = open_engine(*arguments, **options)
        step = engine.step
        engine.step = lambda *batch: passes.append(1) or step(*batch)
        return engine

    monkeypatch.setattr(module, "open_engine", opened)
    rest = personalize(bundle, user, settings, keep=KeepSettings(tmp_path))
    assert not passes
    assert rest.stopped_early
    assert serialize_adapter(rest.adapter) == serialize_adapter(whole.adapter)


@pytest.mark.parametrize("ties", [False, True])
def test_a_loss_that_is_no_number_beats_nothing_and_loses_to_any_number(ties):
    nothing, good, better = (1.0, float("nan")), (0.5, 1.0), (0.5, 0.9)
    assert not beats(TASK, nothing, good, ties=ties)
    assert not beats(TASK, nothing, nothing, ties=ties)
    assert beats(TASK, good, nothing, ties=ties)
    assert beats(TASK, better, good, ties=ties)
    assert beats(TASK, good, good, ties=ties) is ties


def test_an_unscored_adapter_in_use_stays_in_use():
    outcome = Outcome(TASK, {}, before=(0.5, 1.0), after=(0.9, 0.5))
    assert outcome.better
    outcome.unmatched = "it has another rank"
    assert not outcome.better
    assert outcome.verdict == "it has another rank"
