"""DP-SGD: each sample's gradient is bounded, the noise is what was promised, and a break changes no bit."""

from __future__ import annotations

import json
import math
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_tcur_runtime import keeper as keeper_module
from edge_tcur_runtime import optimizer as optimizer_module
from edge_tcur_runtime import personalize as personalize_module
from edge_tcur_runtime import trainer as trainer_module
from edge_tcur_runtime.accountant import epsilon
from edge_tcur_runtime.arithmetic import combine
from edge_tcur_runtime.budget import Budget
from edge_tcur_runtime.cli import device
from edge_tcur_runtime.cli.framework import run
from edge_tcur_runtime.coordinates import read_coordinates
from edge_tcur_runtime.data import encode_labels
from edge_tcur_runtime.engines import open_engine
from edge_tcur_runtime.errors import ConfigError, PausedError
from edge_tcur_runtime.formats.adapter import serialize_adapter
from edge_tcur_runtime.installed import find_onnxruntime
from edge_tcur_runtime.optimizer import global_norm
from edge_tcur_runtime.personalize import bundle_adapter, personalize
from edge_tcur_runtime.preprocess import build_preprocessor
from edge_tcur_runtime.privacy import Mechanism, PrivacyPlan, new_key, noise_bytes, plan_privacy
from edge_tcur_runtime.settings import KeepSettings, PersonalizeSettings, PrivacySettings, SGDSettings
from edge_tcur_runtime.tasks import find_device_task

DATA = Path(__file__).parents[1] / "data"
V1, USER = DATA / "bundle-v1", DATA / "user.npz"
needs_engine = pytest.mark.skipif(find_onnxruntime() is None, reason="ONNX Runtime is not installed")
KEY = new_key(PrivacySettings(noise_seed=1))
PRIVATE = PersonalizeSettings(
    epochs=3, threads=1, engine="ort-step", batch_size=20, privacy=PrivacySettings(noise_seed=1)
)


def plan(**changes):
    values = {"noise_multiplier": 1.0, "clip": 1.0, "delta": 1e-3, "samples": 100, "rate": 0.2, "steps": 10}
    return PrivacyPlan(**{**values, "epsilon": 1.0, "promised": True, **changes})


# --- the mechanism ---------------------------------------------------------------------------------

VECTOR = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=5)


@given(st.dictionaries(st.text("abc", min_size=1), VECTOR, min_size=1), st.floats(1e-3, 1e3))
def test_no_sample_weighs_more_than_the_bound_over_all_parameters_together(gradients, clip):
    arrays = {name: np.array(values) for name, values in gradients.items()}
    bounded = Mechanism(plan(clip=clip), KEY).bounded(arrays)
    norm = global_norm(arrays)
    assert global_norm(bounded) <= clip * (1 + 1e-12)
    for name, value in arrays.items():  # the direction stays, and what is below the bound stays whole
        np.testing.assert_allclose(bounded[name], value * min(1, clip / norm) if norm else value, rtol=1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e200])
def test_a_gradient_that_cannot_be_bounded_is_refused(bad):
    with pytest.raises(FloatingPointError, match="not finite"):
        Mechanism(plan(), KEY).bounded({"a": np.array([1.0, bad])})


def test_the_noise_is_normal_with_the_promised_deviation_and_fresh_in_every_update():
    mechanism = Mechanism(plan(noise_multiplier=3.0, clip=0.5, rate=0.25, samples=80), KEY)
    zero = {"a": np.zeros((40, 50)), "b": np.zeros(3000)}
    updates = [mechanism.noised(zero, step) for step in range(20)]
    values = np.concatenate([np.concatenate([part.ravel() for part in one.values()]) for one in updates])
    values *= 20 / (3.0 * 0.5)  # over the expected number of samples
    count = len(values)
    assert abs(values.mean()) < 5 / math.sqrt(count)
    assert abs(values.var() - 1) < 5 * math.sqrt(2 / count)
    assert abs((values**4).mean() - 3) < 5 * math.sqrt(96 / count)
    within = [np.mean(np.abs(values) < limit) for limit in (0.5, 1, 2, 3)]
    np.testing.assert_allclose(within, [math.erf(x / math.sqrt(2)) for x in (0.5, 1, 2, 3)], atol=5e-3)
    assert abs(np.corrcoef(updates[0]["b"], updates[1]["b"])[0, 1]) < 0.1
    assert abs(np.corrcoef(updates[0]["a"].ravel()[1:], updates[0]["a"].ravel()[:-1])[0, 1]) < 0.1
    again = Mechanism(mechanism.plan, KEY).noised(zero, 7)
    np.testing.assert_array_equal(again["a"], updates[7]["a"])
    other = Mechanism(mechanism.plan, new_key(PrivacySettings())).noised(zero, 7)
    assert not np.array_equal(other["a"], updates[7]["a"])


def test_every_sample_takes_part_on_its_own_with_the_rate():
    mechanism = Mechanism(plan(samples=50, rate=0.3), KEY)
    taken = np.zeros((2000, 50))
    for step in range(len(taken)):
        taken[step, mechanism.chosen(step)] = 1
    counts = taken.sum(axis=1)
    assert abs(taken.mean() - 0.3) < 0.01
    assert abs(counts.var() - 50 * 0.3 * 0.7) < 1.5  # binomial: batches differ in size
    np.testing.assert_allclose(taken.mean(axis=0), 0.3, atol=0.06)
    pairs = np.corrcoef(taken.T)[~np.eye(50, dtype=bool)]
    assert np.abs(pairs).max() < 0.15
    assert list(Mechanism(plan(samples=5, rate=1.0), KEY).chosen(3)) == [0, 1, 2, 3, 4]


def test_keys_are_secret_unless_a_seed_is_given():
    keys = {new_key(PrivacySettings()) for _ in range(50)}
    assert len(keys) == 50
    assert all(len(bytes.fromhex(key)) == 32 for key in keys)
    assert new_key(PrivacySettings(noise_seed=1)) == KEY != new_key(PrivacySettings(noise_seed=2))


# --- the plan --------------------------------------------------------------------------------------


def test_the_plan_is_what_the_accountant_says():
    found = plan_privacy(replace(PRIVATE, privacy=PrivacySettings(noise_multiplier=2.0)), 100)
    assert (found.rate, found.steps, found.promised) == (0.2, 15, True)
    assert found.delta == pytest.approx(100**-1.1)
    assert found.epsilon == epsilon(2.0, 0.2, 15, found.delta)
    assert plan_privacy(replace(PRIVATE, privacy=None), 100) is None
    whole = plan_privacy(PRIVATE, 7)  # fewer samples than a batch: all take part
    assert (whole.rate, whole.steps, whole.promised) == (1.0, 3, False)


@given(st.floats(0.3, 50), st.integers(2, 5000))
@settings(max_examples=10)
def test_a_target_is_met(target, samples):
    found = plan_privacy(replace(PRIVATE, privacy=PrivacySettings(epsilon=target, delta=1e-4)), samples)
    assert found.epsilon <= target


def test_a_target_beyond_reach_is_refused_and_named():
    wanted = replace(PRIVATE, privacy=PrivacySettings(epsilon=1e-9, delta=1e-9))
    with pytest.raises(ConfigError, match="no noise multiplier") as caught:
        plan_privacy(wanted, 5)
    assert caught.value.where == "epsilon"


@pytest.mark.parametrize("noise", [1e-160, 1e-200, 1e-320])
@pytest.mark.parametrize("samples", [5, 500])
def test_noise_that_bounds_nothing_is_refused(noise, samples):
    """Its square is too small for a float: no epsilon can be told, and JSON holds no infinity."""
    wanted = replace(PRIVATE, privacy=PrivacySettings(noise_multiplier=noise))
    with pytest.raises(ConfigError, match="promises nothing") as caught:
        plan_privacy(wanted, samples)
    assert caught.value.where == "noise_multiplier"


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"noise_multiplier": 0.0}, "noise_multiplier"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"epsilon": 1.0, "noise_multiplier": 1.0}, "epsilon"),
        ({"clip": 0.0}, "clip"),
        ({"delta": 1.0}, "delta"),
        ({"noise_seed": -1}, "noise_seed"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, where):
    with pytest.raises(ConfigError) as caught:
        PrivacySettings(**values)
    assert caught.value.where == where


PERSONAL = {"personal": "true"}


def test_runs_add_up_in_the_adapters_provenance():
    first = plan(epsilon=1.5, delta=1e-3)
    assert first.total({}) == first.total({"tool": "x"}) == (1.5, 1e-3)
    said = {**PERSONAL, **first.provenance({})}
    assert said == {**PERSONAL, "epsilon": "1.5", "delta": "0.001"}
    assert plan(epsilon=2.0, delta=2e-3).total(said) == (3.5, 3e-3)
    for unbounded in (
        PERSONAL,
        {**PERSONAL, "epsilon": "?"},
        {**said, "epsilon": "-5"},
        {**said, "delta": "nan"},
    ):
        assert math.inf in first.total(unbounded)
        assert None in first.facts(unbounded).values()
    assert plan(promised=False).total({})[0] == math.inf


def test_what_several_adapters_spent_adds_up_where_they_are_combined(bundle):
    """The mean of two private adapters tells of the samples of both."""

    def adapter(**provenance):
        own = bundle_adapter(bundle)
        return replace(own, header=replace(own.header, provenance=provenance))

    published = adapter(tool="x", start="sha256:a")
    one = adapter(**PERSONAL, start="base", epsilon="1.5", delta="0.25")
    two = adapter(**PERSONAL, start="base", epsilon="2.0", delta="0.5")
    unbounded = adapter(**PERSONAL, start="base")

    def made_of(*parts, weights=None):
        weights = weights or [1 / len(parts)] * len(parts)
        return combine(parts, weights, extras_from=0).header.provenance

    assert made_of(one, two) == {**PERSONAL, "start": "base", "epsilon": "3.5", "delta": "0.75"}
    for order in ((published, one), (one, published)):
        found = made_of(*order)
        assert plan(epsilon=1.0, delta=0.0).total(found) == (2.5, 0.25)
        assert "start" not in found  # what differs from it is not all that was learned
    assert "start" not in made_of(one, two, weights=[1.0, 1.0])
    for order in ((one, unbounded), (unbounded, one), (published, unbounded)):
        assert plan().total(made_of(*order))[0] == math.inf
    assert made_of(published, published) == {"tool": "x", "start": "sha256:a"}


# --- real runs -------------------------------------------------------------------------------------


@needs_engine
def test_without_noise_and_bound_an_update_is_that_of_the_ordinary_training(bundle, user, monkeypatch):
    """All samples take part: the mean of single gradients is the gradient of the mean."""
    monkeypatch.setattr(Mechanism, "_normal", lambda self, step, count: np.zeros(count))
    ordinary = replace(PRIVATE, privacy=None, optimizer=SGDSettings(max_gradient_norm=0.0), batch_size=80)
    values = []
    for settings_ in (ordinary, replace(ordinary, privacy=PrivacySettings(clip=1e5))):
        preprocess = build_preprocessor(bundle.manifest.preprocessing, bundle.root)
        labels = encode_labels(user, bundle.manifest.labels)
        data = trainer_module.Batch(user, labels, preprocess, find_device_task(bundle.manifest.task))
        coordinates = read_coordinates(bundle, bundle_adapter(bundle))
        engine = open_engine("ort-step", bundle, threads=1)
        trainer = trainer_module.Trainer(engine, coordinates, data, settings_, Budget())
        if settings_.privacy is not None:
            trainer.protect(plan_privacy(settings_, len(user)), KEY)
        loss = trainer.step(trainer.batch(np.arange(80), 0, 0), 1.0)
        values.append((loss, trainer.values))
    assert values[0][0] == pytest.approx(values[1][0], rel=1e-5)
    for name, value in values[0][1].items():
        np.testing.assert_allclose(values[1][1][name], value, atol=1e-5)


@needs_engine
def test_one_sample_moves_an_update_by_no_more_than_its_bound(bundle, user, monkeypatch):
    """The sensitivity that the noise is measured against: add a sample, and the sum moves by the bound."""
    sums = []
    real = Mechanism.noised
    monkeypatch.setattr(
        Mechanism, "noised", lambda self, total, step: sums.append(dict(total)) or real(self, total, step)
    )
    preprocess = build_preprocessor(bundle.manifest.preprocessing, bundle.root)
    data = trainer_module.Batch(
        user, encode_labels(user, bundle.manifest.labels), preprocess, find_device_task(bundle.manifest.task)
    )
    wanted = replace(PRIVATE, privacy=PrivacySettings(clip=0.01))
    for chosen in (np.arange(10), np.arange(11)):
        coordinates = read_coordinates(bundle, bundle_adapter(bundle))
        engine = open_engine("ort-step", bundle, threads=1)
        trainer = trainer_module.Trainer(engine, coordinates, data, wanted, Budget())
        trainer.protect(plan_privacy(wanted, len(user)), KEY)
        trainer.step(chosen, 1.0)
    moved = {name: sums[1][name] - sums[0][name] for name in sums[0]}
    assert 0 < global_norm(moved) <= 0.01 * (1 + 1e-9)


@needs_engine
def test_a_private_run_learns_says_what_it_spent_and_writes_it_down(bundle, user):
    wanted = replace(PRIVATE, epochs=30, privacy=PrivacySettings(epsilon=20, delta=1e-3, noise_seed=None))
    result = personalize(bundle, user, wanted, start=bundle_adapter(bundle))
    assert result.holdout_samples == 0
    assert result.micro_batch == 1
    found = result.privacy
    assert found["epsilon"] == found["total_epsilon"] <= 20
    assert found["epsilon"] == epsilon(found["noise_multiplier"], 0.25, 120, 1e-3)
    assert result.adapter.header.provenance["epsilon"] == repr(found["epsilon"])
    assert np.mean(result.losses[-20:]) < np.mean(result.losses[:20])
    assert "nothing was kept apart" in result.notes[0]
    again = personalize(bundle, user, replace(wanted, epochs=1), start=result.adapter)
    assert again.privacy["total_epsilon"] == pytest.approx(found["epsilon"] + again.privacy["epsilon"])
    assert again.privacy["total_delta"] == pytest.approx(2e-3)


@needs_engine
def test_two_private_runs_differ_and_seeded_ones_do_not_but_promise_nothing(bundle, user):
    secret = replace(PRIVATE, epochs=1, privacy=PrivacySettings())
    one, other = (serialize_adapter(personalize(bundle, user, secret).adapter) for _ in range(2))
    assert one != other
    seeded = replace(PRIVATE, epochs=1)
    results = [personalize(bundle, user, seeded) for _ in range(2)]
    assert serialize_adapter(results[0].adapter) == serialize_adapter(results[1].adapter)
    assert results[0].privacy["promised"] is False
    assert results[0].privacy["total_epsilon"] is None
    assert any("nothing is promised" in note for note in results[0].notes)


@needs_engine
def test_a_break_after_any_update_changes_no_bit_and_draws_nothing_twice(bundle, user, tmp_path, monkeypatch):
    """The key is drawn once for a run, and goes on in its checkpoint."""
    monkeypatch.setattr(keeper_module, "GATE_SECONDS", 0.0)
    wanted, keys = replace(PRIVATE, privacy=PrivacySettings()), []
    monkeypatch.setattr(personalize_module, "new_key", lambda _: keys.append(1) or "07" * 32)
    whole = personalize(bundle, user, wanted)
    for place in (1, 5, len(whole.losses) - 1):
        keys.clear()
        left = [place]
        keep = KeepSettings(tmp_path / f"{place}", 1e9, gates=[lambda: "stop" if left[0] <= 0 else None])  # noqa: B023

        def count(*_):
            left[0] -= 1  # noqa: B023

        with pytest.raises(PausedError):
            personalize(bundle, user, wanted, keep=keep, on_step=count)
        rest = personalize(bundle, user, wanted, keep=replace(keep, gates=()))
        assert len(keys) == 1
        assert rest.resumed_from == place
        assert rest.losses == whole.losses
        assert serialize_adapter(rest.adapter) == serialize_adapter(whole.adapter)


@needs_engine
def test_held_out_samples_on_request_and_a_note_that_they_are_not_protected(bundle, user):
    result = personalize(bundle, user, replace(PRIVATE, epochs=1, holdout=0.2))
    assert result.holdout_samples == 16
    assert any("for them nothing is promised" in note for note in result.notes)


@needs_engine
def test_a_divergence_is_the_same_clear_error(bundle, user, monkeypatch):
    monkeypatch.setattr(optimizer_module, "global_norm", lambda gradients: math.nan)
    with pytest.raises(ConfigError, match="training diverged: a gradient is not finite"):
        personalize(bundle, user, PRIVATE)


@needs_engine
def test_the_command(tmp_path, capsys):
    store = tmp_path / "store"
    arguments = ["personalize", str(V1), "--data", str(USER), "--store", str(store), "--threads", "1",
                 "--engine", "ort-step", "--epochs", "2"]  # fmt: skip

    def call(*more):
        with pytest.raises(SystemExit) as caught:
            run(device, [*arguments, *more])
        return caught.value.code, capsys.readouterr()

    code, out = call("--private", "--epsilon", "5", "--clip", "0.5", "--json")
    assert code == 0
    result = json.loads(out.out)
    assert 0 < result["privacy"]["epsilon"] <= 5
    assert result["privacy"]["clip"] == 0.5
    code, out = call("--private", "--noise-multiplier", "2")
    assert "privacy of this run" in out.out
    assert "of the adapter, all runs" in out.out
    assert call("--epsilon", "5")[0] == 2
    assert call("--private", "--epsilon", "5", "--noise-multiplier", "1")[0] == 3


def test_making_the_noise_takes_no_more_than_is_planned_for_it():
    mechanism = Mechanism(plan_privacy(PersonalizeSettings(privacy=PrivacySettings()), 100), "00" * 32)
    total = {"core": np.zeros(20_000), "head": np.zeros(30_000)}
    tracemalloc.start()
    mechanism.noised(total, 0)
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.6 * noise_bytes(50_000) < taken <= noise_bytes(50_000)
