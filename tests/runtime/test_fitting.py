"""From the bundle's tables to a run within its budget: what is opened, measured, chosen, kept and shown."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edge_tcur_runtime import fitting, heap
from edge_tcur_runtime import personalize as module
from edge_tcur_runtime.budget import Memory, read_memory
from edge_tcur_runtime.checkpoint import parse_checkpoint
from edge_tcur_runtime.cli import device
from edge_tcur_runtime.cli.framework import run
from edge_tcur_runtime.cli.plan import shown
from edge_tcur_runtime.engines import open_engine, session
from edge_tcur_runtime.engines.graphs import LAST
from edge_tcur_runtime.errors import BudgetError, ConfigError, IncompatibleError, PausedError
from edge_tcur_runtime.formats.bundle import LastBlocks, open_bundle, serialize_manifest
from edge_tcur_runtime.formats.memory import GraphTable, MemoryTables
from edge_tcur_runtime.guard import Guard
from edge_tcur_runtime.personalize import RunPlan, personalize, plan_personalize
from edge_tcur_runtime.planner import Candidate, Footprint, Passes, Plan, room
from edge_tcur_runtime.privacy import plan_privacy
from edge_tcur_runtime.settings import KeepSettings, PrivacySettings
from referring import tensors_of, with_reference
from short_runs import ENGINE, INSTALLED, Quadratic, quadratic_trainer, quick

DATA = Path(__file__).parents[1] / "data"
V1, USER = DATA / "bundle-v1", DATA / "user.npz"
MIB = 2**20
pytestmark = pytest.mark.skipif(INSTALLED is None, reason="ONNX Runtime is not installed")
SAMPLES = (1, 2, 64)


def table(nodes=600, each=2**14):
    line = tuple(each * count for count in SAMPLES)
    return GraphTable(nodes, 2**16, (), (line,), (line,))


TABLES = MemoryTables(SAMPLES, (0,), {"step": table(), "train": table(400)})


@pytest.fixture
def bundle():
    found = open_bundle(V1)
    return replace(found, manifest=replace(found.manifest, memory=TABLES))


def roomy():
    return read_memory().peak + 200 * MIB


# --- the run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENGINE)
def test_a_budget_with_room_gives_the_whole_batch_and_the_same_adapter(bundle, user, name):
    free = personalize(bundle, user, quick(engine=name))
    result = personalize(bundle, user, quick(engine=name, budget=roomy()))
    assert (result.engine, result.micro_batch) == (name, 16)
    assert free.predicted_peak_bytes is None
    assert result.peak_rss_bytes <= result.budget_bytes
    assert result.predicted_peak_bytes <= result.budget_bytes
    assert result.losses == free.losses


def test_nothing_is_opened_where_nothing_fits(bundle, user, monkeypatch):
    monkeypatch.setattr(module, "open_engine", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(BudgetError, match="the least that training takes here is about") as caught:
        personalize(bundle, user, quick(budget=MIB))
    assert "give at least --budget" in caught.value.hint


def faked(monkeypatch, each):
    """Memory that grows by `each` bytes for a sample of the pass that runs; returns the passes."""
    state = {"peak": 100 * MIB, "passes": [], "each": each}
    real = open_engine

    def opened(*arguments, **options):
        engine = real(*arguments, **options)
        step = engine.step

        def counted(inputs, targets, feeds):
            state["passes"].append(len(targets))
            state["peak"] = max(state["peak"], 100 * MIB + state["each"] * len(targets))
            return step(inputs, targets, feeds)

        engine.step = counted
        return engine

    def memory():
        return Memory(state["peak"], 100 * MIB, 0, 0)

    monkeypatch.setattr(module, "open_engine", opened)
    for part in ("fitting", "trainer", "budget", "personalize"):
        monkeypatch.setattr(f"edge_tcur_runtime.{part}.read_memory", memory)
    return state


@pytest.mark.parametrize(("room", "micro"), [(40, 16), (12, 8), (6, 4), (1.5, 1)])
def test_passes_are_as_large_as_what_was_measured_allows(bundle, user, monkeypatch, room, micro):
    """A sample takes a MiB; the table says a third of it and is corrected."""
    monkeypatch.setattr(fitting, "FACTORS", dict.fromkeys(fitting.FACTORS, 1.0))
    monkeypatch.setattr(fitting, "session_bytes", lambda *_: 0)
    tables = replace(TABLES, graphs={"step": replace(table(each=MIB // 3), base=0)})
    bundle = replace(bundle, manifest=replace(bundle.manifest, memory=tables))
    state, limit = faked(monkeypatch, MIB), int((100 + room) * MIB * 32 / 31)
    result = personalize(bundle, user, quick(budget=limit))
    assert result.micro_batch == micro
    assert max(state["passes"]) == micro
    assert state["peak"] <= limit


def test_auto_takes_the_engine_that_fits(bundle, user, monkeypatch):
    """The preferred engine's graph takes far more than the limit by its table."""
    large = {"train": table(each=2**30), "step": table()}
    bundle = replace(bundle, manifest=replace(bundle.manifest, memory=replace(TABLES, graphs=large)))
    result = personalize(bundle, user, quick(engine="auto", budget=roomy()))
    assert (result.engine, result.graph) == ("ort-step", "step")
    if INSTALLED.training:
        assert result.engine_reason == "the plan: the fastest that fits the budget"


PRIVATE = PrivacySettings(noise_multiplier=1.0, noise_seed=5)


@pytest.mark.parametrize("tables", [True, False])
def test_private_passes_have_one_sample_and_a_budget_changes_nothing(bundle, user, monkeypatch, tables):
    """Not even while it is measured: a pass of two might not fit."""
    if not tables:
        bundle = replace(bundle, manifest=replace(bundle.manifest, memory=None))
    free = personalize(bundle, user, quick(privacy=PRIVATE, epochs=2))
    state = faked(monkeypatch, MIB)
    result = personalize(bundle, user, quick(privacy=PRIVATE, epochs=2, budget=200 * MIB))
    assert set(state["passes"]) == {1}
    assert result.micro_batch == 1
    assert result.losses == free.losses
    for group, part in free.adapter.factors.items():
        np.testing.assert_array_equal(result.adapter.factors[group].core, part.core)


def test_a_guard_does_not_change_a_private_update(user, bundle):
    whole, tight = (quadratic_trainer(Quadratic(), quick(privacy=PRIVATE)) for _ in range(2))
    for trainer in (whole, tight):
        trainer.protect(plan_privacy(quick(privacy=PRIVATE), 7), "00" * 32)
    tight.guard = Guard(1, footprint(10 * MIB))  # nothing fits
    assert whole.step(np.arange(7), 1.0) == tight.step(np.arange(7), 1.0)
    assert set(tight._engine.sizes) == {1}
    for key, value in whole.values.items():
        np.testing.assert_array_equal(tight.values[key], value)


def test_the_reference_set_is_planned_for_and_scored_within_the_plan(user, tmp_path, monkeypatch):
    """Twice as large a pass as the budget has room for is never run, on the reference set either."""
    tensors = tensors_of(open_bundle(V1), user, own_answers=False)
    found = with_reference(tmp_path / "b", tensors, score=0.0, loss=3.0)
    tables = replace(TABLES, graphs={"step": replace(table(each=MIB), base=0)})
    found = replace(found, manifest=replace(found.manifest, memory=tables))
    monkeypatch.setattr(fitting, "session_bytes", lambda *_: 0)
    state, limit = faked(monkeypatch, MIB), int((100 + 6) * MIB * 32 / 31)
    result = personalize(found, user, quick(budget=limit))
    assert result.judged_by == ["held-out", "reference"]
    assert max(state["passes"]) == result.micro_batch == 4
    assert state["peak"] <= limit


# --- threads ---------------------------------------------------------------------------------------------


def timed(monkeypatch, seconds, opening=0.5, long=1):
    """A clock that only opening an engine and its passes move: `seconds` by the number of threads."""
    monkeypatch.setattr(fitting, "_LONG", long)
    state = {"clock": 0.0, "opened": [], "passes": []}
    real = open_engine

    def opened(*arguments, threads, **options):
        engine = real(*arguments, threads=threads, **options)
        state["clock"] += opening
        state["opened"].append(threads)
        step = engine.step

        def counted(*fed):
            state["clock"] += seconds[threads]
            state["passes"].append(threads)
            return step(*fed)

        engine.step = counted
        return engine

    monkeypatch.setattr(module, "open_engine", opened)
    monkeypatch.setattr(fitting, "thread_counts", lambda asked: (asked,) if asked else tuple(seconds))
    for part in ("fitting", "trainer"):
        clock = SimpleNamespace(perf_counter=lambda: state["clock"])
        monkeypatch.setattr(f"edge_tcur_runtime.{part}.time", clock)
    return state


@pytest.fixture
def one_graph(bundle):
    return replace(
        bundle, manifest=replace(bundle.manifest, memory=replace(TABLES, graphs={"step": table()}))
    )


@pytest.mark.parametrize(
    ("seconds", "taken", "order"),
    [
        ({1: 1.0, 2: 2.0}, 1, [2, 1]),
        ({1: 2.0, 2: 1.0}, 2, [2, 1, 2]),
        ({1: 1.0, 3: 0.5, 4: 0.6}, 3, [4, 1, 3]),
    ],
)
def test_threads_are_those_that_were_measured_to_be_the_fastest(
    one_graph, user, monkeypatch, seconds, taken, order
):
    """Whatever was believed before: all cores are tried first."""
    state = timed(monkeypatch, seconds)
    plan = plan_personalize(one_graph, user, quick(budget=roomy(), threads=0)).plan
    assert state["opened"][: len(seconds)] == order[: len(seconds)]
    assert plan.chosen.footprint.threads == taken
    assert plan.chosen.seconds == pytest.approx(seconds[taken], rel=0.01)
    assert {c.footprint.threads for c in plan.candidates} == set(seconds)
    state["opened"].clear()
    result = personalize(one_graph, user, quick(budget=roomy(), threads=0))
    assert (state["opened"], result.threads) == (order, taken)
    assert set(state["passes"][-16:]) == {taken}


def test_a_run_of_a_few_seconds_is_not_held_up_by_measuring_threads(one_graph, user, monkeypatch):
    """80 updates of 0.1 s are worth opening no second session, which takes half a second."""
    state = timed(monkeypatch, {1: 0.01, 2: 0.1}, long=fitting._LONG)
    result = personalize(one_graph, user, quick(budget=roomy(), epochs=20, threads=0))
    assert (state["opened"], result.threads) == ([2], 2)


def test_what_trying_threads_takes_is_a_small_part_of_the_run(one_graph, user, monkeypatch):
    """It begins where the run is 40 times as long as opening and measuring, a third time for the last one."""
    spent, long = {}, fitting._LONG
    for epochs in (80, 800):
        state = timed(monkeypatch, {1: 0.2, 2: 0.1}, long=long)
        plan_personalize(one_graph, user, quick(budget=roomy(), threads=0, epochs=epochs))
        spent[epochs] = state["clock"], state["opened"]
    assert spent[80][1] == [2]  # 320 updates of 0.1 s
    assert spent[800][1] == [2, 1, 2]
    assert spent[800][0] - spent[80][0] < 320 / 20


def test_a_number_of_threads_that_is_asked_for_is_an_order(one_graph, user, monkeypatch):
    state = timed(monkeypatch, {1: 1.0, 2: 2.0})
    result = personalize(one_graph, user, quick(budget=roomy(), threads=2))
    assert (state["opened"], result.threads) == ([2], 2)


def test_threads_are_not_tried_where_the_budget_has_nothing_over_for_it(one_graph, user, monkeypatch):
    """What a closed session leaves in the heap must not refuse a run that fits."""
    state = timed(monkeypatch, {1: 1.0, 2: 2.0})
    peak = plan_personalize(one_graph, user, quick(budget=roomy(), threads=0)).plan.chosen.peak
    monkeypatch.setattr(fitting, "_TRIAL_BYTES", room(roomy()) - peak + MIB)
    state["opened"].clear()
    result = personalize(one_graph, user, quick(budget=roomy(), threads=0))
    assert (state["opened"], result.threads) == ([2], 2)


def test_a_run_goes_on_with_its_threads_whatever_would_be_faster_now(one_graph, user, tmp_path, monkeypatch):
    """Even with more than there are cores now."""
    settings = quick(budget=roomy(), threads=0)
    timed(monkeypatch, {1: 2.0, 3: 1.0})
    whole = personalize(one_graph, user, settings)
    done = []
    monkeypatch.setattr("edge_tcur_runtime.keeper.GATE_SECONDS", 0.0)
    keep = KeepSettings(tmp_path, 1e9, gates=(partial(enough, done),))
    with pytest.raises(PausedError):
        personalize(one_graph, user, settings, keep=keep, on_step=lambda *_: done.append(1))
    kept = parse_checkpoint(next(tmp_path.iterdir()).read_bytes(), "c")[0]
    assert kept.threads == whole.threads == 3
    state = timed(monkeypatch, {1: 1.0, 2: 2.0, 3: 9.0})
    monkeypatch.setattr(fitting, "thread_counts", lambda _: (1, 2))
    for budget in (settings.budget, None):
        copy = shutil.copytree(tmp_path, tmp_path.with_name(f"copy{budget}"))
        state["opened"].clear()
        result = personalize(one_graph, user, replace(settings, budget=budget), keep=KeepSettings(copy))
        assert result.resumed_from == 3
        assert (state["opened"], result.threads) == ([3], 3)
        assert result.losses == whole.losses


@pytest.mark.parametrize("name", ENGINE)
def test_the_session_has_the_threads_that_were_chosen(bundle, name):
    for threads in (1, 3):
        found = session.session_options(threads)
        assert found.intra_op_num_threads == threads
        assert open_engine(name, bundle, threads=threads)


# --- the last blocks alone, with consent -------------------------------------------------------------------


@pytest.fixture
def partial_bundle(bundle):
    """Its graph of the last blocks is the whole one, and takes a MiB a sample by its table, the other 8."""
    manifest = bundle.manifest
    last = LastBlocks(1, {name: (len(g.parameters) - 1,) for name, g in manifest.groups.items()}, ())
    graphs = {"step": replace(table(each=8 * MIB), base=0), LAST: replace(table(each=MIB), base=0)}
    return replace(
        bundle,
        manifest=replace(
            manifest,
            graphs={**manifest.graphs, LAST: manifest.graphs["step"]},
            last_blocks=last,
            memory=replace(TABLES, graphs=graphs),
        ),
    )


def between(monkeypatch, samples):
    """A budget for passes of so many samples of the last blocks, too small for one of the whole model."""
    monkeypatch.setattr(fitting, "FACTORS", dict.fromkeys(fitting.FACTORS, 1.0))
    monkeypatch.setattr(fitting, "session_bytes", lambda *_: 0)
    faked(monkeypatch, MIB // 2)
    return int((100 + samples) * MIB * 32 / 31) + MIB // 8


def test_without_consent_the_refusal_tells_that_it_would_do(partial_bundle, user, monkeypatch):
    budget = between(monkeypatch, 4)
    with pytest.raises(BudgetError, match="cannot be met") as caught:
        personalize(partial_bundle, user, quick(budget=budget))
    assert re.match(r"give at least --budget 11[23]MiB; ", caught.value.hint)
    assert (
        "this budget does with --allow-last-blocks: the last 1 blocks alone learn then, which takes about "
        "104.0 MiB" in caught.value.hint
    )
    with pytest.raises(BudgetError) as caught:
        personalize(partial_bundle, user, quick(budget=90 * MIB))
    found = re.search(r"--budget (\d+)MiB does with --allow-last-blocks", caught.value.hint)
    named = int(found.group(1)) * MIB
    result = personalize(partial_bundle, user, quick(budget=named, allow_last_blocks=True))
    assert result.graph == LAST


def test_with_consent_the_last_blocks_learn_where_nothing_else_fits(partial_bundle, user, monkeypatch):
    budget, own = between(monkeypatch, 6), module.bundle_adapter(partial_bundle)
    settings = quick(budget=budget, allow_last_blocks=True, engine="auto")
    plan = plan_personalize(partial_bundle, user, settings, start=own).plan
    assert plan.chosen.verdict == "chosen: a part alone, as nothing else fits"
    result = personalize(partial_bundle, user, settings, start=own)
    assert (result.engine, result.graph, result.micro_batch) == ("ort-step", LAST, 4)
    assert (
        "nothing else fits the budget: the last 1 blocks alone learned (--allow-last-blocks)" in result.notes
    )
    assert result.peak_rss_bytes <= budget
    for group, part in own.factors.items():
        moved = result.adapter.factors[group].core != part.core
        assert moved[-1].all()
        assert not moved[:-1].any()


def test_with_consent_the_whole_model_learns_where_it_fits_slower_or_not(partial_bundle, user, monkeypatch):
    budget = between(monkeypatch, 9)
    settings = quick(budget=budget, allow_last_blocks=True)
    found = plan_personalize(partial_bundle, user, settings).plan
    assert found.chosen.runs == ("ort-step", "step")
    others = [c for c in found.candidates if c.runs[1] == LAST and c.peak <= room(budget)]
    assert others[0].seconds < found.chosen.seconds
    assert {c.verdict for c in others} == {"a part alone: only where nothing else fits"}
    result = personalize(partial_bundle, user, settings)
    assert (result.graph, result.micro_batch) == ("step", 1)
    assert not any("last" in note for note in result.notes)


def test_consent_that_the_bundle_or_engine_cannot_use(bundle, user):
    with pytest.raises(BudgetError) as caught:
        personalize(bundle, user, quick(budget=MIB, allow_last_blocks=True))
    assert "edge-tcur export --last-blocks K" in caught.value.hint
    with pytest.raises(ConfigError, match="--allow-last-blocks is of the step graph") as found:
        personalize(bundle, user, quick(allow_last_blocks=True, engine="ort-training"))
    assert found.value.hint == "use --engine ort-step, or leave --allow-last-blocks out"


# --- the guard, and going on -----------------------------------------------------------------------------


def footprint(each):
    return Footprint("ort-step", "step", table(each=each), SAMPLES, (0,), 0, 1.0)


def test_the_guard_splits_what_is_left_of_an_update(monkeypatch):
    """Seven samples, of which two fit at once from the second pass on: the update is the same."""
    whole, parts = (quadratic_trainer(Quadratic(), quick()) for _ in range(2))
    engine = parts._engine
    parts.passes, parts.guard = Passes(3), Guard(100 * MIB, footprint(10 * MIB))
    monkeypatch.setattr(
        "edge_tcur_runtime.trainer.read_memory",
        lambda: Memory(90 * MIB, (60 if not engine.sizes else 80) * MIB, 0, 0),
    )
    assert whole.step(np.arange(7), 1.0) == pytest.approx(parts.step(np.arange(7), 1.0), rel=1e-6)
    assert engine.sizes == [3, 2, 2]
    assert parts.micro_batch == 2
    assert len(parts.notes) == 1
    for key, value in whole.values.items():
        np.testing.assert_allclose(parts.values[key], value, atol=1e-6)


@pytest.mark.parametrize("limits", [{8: 7, 16: 2}, {8: 1, 16: 1}, {8: 3}])
def test_samples_sorted_by_length_give_the_same_update(limits):
    whole, parts = (quadratic_trainer(Quadratic(), quick()) for _ in range(2))
    parts._data.__dict__["lengths"] = np.array([8, 16, 8, 8, 16, 16, 8])
    parts.passes = Passes(2, limits)
    for number in range(5):
        assert whole.step(np.arange(7), 1.0) == pytest.approx(parts.step(np.arange(7), 1.0), rel=1e-6), number
    assert len(parts._engine.sizes) > 5
    for key, value in whole.values.items():
        np.testing.assert_allclose(parts.values[key], value, atol=1e-6)


def test_a_run_goes_on_with_its_engine_graph_and_passes(bundle, user, tmp_path, monkeypatch):
    """More memory, and another engine that would now be chosen: still the same run, bit for bit."""
    settings = quick(engine="auto", budget=roomy())
    only = {"step": table()}
    narrow = replace(bundle, manifest=replace(bundle.manifest, memory=replace(TABLES, graphs=only)))
    real = fitting.make_plan

    def small(*arguments):
        found = real(*arguments)
        chosen = next(c for c in found.candidates if c.passes.micro_batch == 4)
        return replace(found, chosen=chosen)

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "make_plan", small)
        whole = personalize(narrow, user, settings)
        assert (whole.engine, whole.micro_batch) == ("ort-step", 4)
        left = [3]

        def gate():
            left[0] -= 1
            return "enough" if left[0] < -20 else None

        patch.setattr("edge_tcur_runtime.keeper.GATE_SECONDS", 0.0)
        with pytest.raises(PausedError):
            personalize(narrow, user, settings, keep=KeepSettings(tmp_path, 1e9, gates=(gate,)))
    kept = max(
        (parse_checkpoint(p.read_bytes(), "c") for p in tmp_path.iterdir()), key=lambda found: found[2]
    )
    assert (kept[0].engine, kept[0].micro_batch) == ("ort-step", 4)
    result = personalize(narrow, user, replace(settings, budget=roomy()), keep=KeepSettings(tmp_path))
    assert result.resumed_from > 0
    assert (result.engine, result.micro_batch) == ("ort-step", 4)
    assert result.losses == whole.losses
    for group, part in whole.adapter.factors.items():
        np.testing.assert_array_equal(result.adapter.factors[group].core, part.core)


def memory_of_eight_mib_a_sample(bundle, monkeypatch):
    """As `faked`; nothing but samples takes memory, and the table is a little too low."""
    monkeypatch.setattr(fitting, "session_bytes", lambda *_: 0)
    tables = replace(TABLES, graphs={"step": replace(table(each=6 * MIB), base=0)})
    state = faked(monkeypatch, 8 * MIB)
    return replace(bundle, manifest=replace(bundle.manifest, memory=tables)), state


def enough(done):
    return "enough" if len(done) == 3 else None


def of(samples):
    """A budget for passes of so many."""
    return int((100 + 12 * samples) * MIB * 32 / 31)


@pytest.mark.parametrize(("now", "passes"), [(4, 4), (16, 4), (1, 1)])
def test_a_run_that_goes_on_tells_what_it_was_accepted_under(
    bundle, user, tmp_path, monkeypatch, now, passes
):
    """And keeps its passes, without trying larger ones; under a budget that no longer holds them it is
    accepted anew."""
    bundle, state = memory_of_eight_mib_a_sample(bundle, monkeypatch)
    whole = personalize(bundle, user, quick(budget=of(4)))
    assert whole.micro_batch == 4
    done = []
    gate = partial(enough, done)
    monkeypatch.setattr("edge_tcur_runtime.keeper.GATE_SECONDS", 0.0)
    state["peak"] = 100 * MIB
    keep = KeepSettings(tmp_path, 1e9, gates=(gate,))
    with pytest.raises(PausedError):
        personalize(bundle, user, quick(budget=of(4)), keep=keep, on_step=lambda *_: done.append(1))
    (path,) = tmp_path.iterdir()
    kept = parse_checkpoint(path.read_bytes(), "c")[0]
    assert kept.predicted == whole.predicted_peak_bytes
    state.update(peak=100 * MIB, passes=[], each=15 * MIB // 2)  # a little less than in the first process
    result = personalize(bundle, user, quick(budget=of(now)), keep=KeepSettings(tmp_path))
    assert result.resumed_from == 3
    assert max(state["passes"]) == result.micro_batch == passes
    assert state["peak"] <= result.budget_bytes
    if passes == 4:
        assert result.predicted_peak_bytes == whole.predicted_peak_bytes
        assert result.losses == whole.losses
        assert result.notes == whole.notes
    else:
        assert result.predicted_peak_bytes < whole.predicted_peak_bytes


def test_a_process_that_needs_a_little_more_keeps_the_passes_of_its_checkpoint(
    bundle, user, tmp_path, monkeypatch
):
    """A part of the budget is left free for what two processes differ by; smaller passes would end with other
    bits."""
    bundle, state = memory_of_eight_mib_a_sample(bundle, monkeypatch)
    settings = quick(budget=of(4))
    whole = personalize(bundle, user, settings)
    done = []
    gate = partial(enough, done)
    monkeypatch.setattr("edge_tcur_runtime.keeper.GATE_SECONDS", 0.0)
    state["peak"] = 100 * MIB
    keep = KeepSettings(tmp_path, 1e9, gates=(gate,))
    with pytest.raises(PausedError):
        personalize(bundle, user, settings, keep=keep, on_step=lambda *_: done.append(1))
    state["peak"] = 150 * MIB  # loading left this; 148 may be planned with, 152.8 used
    assert room(settings.budget) < state["peak"] < settings.budget
    result = personalize(bundle, user, settings, keep=KeepSettings(tmp_path))
    assert result.micro_batch == 4
    assert result.losses == whole.losses


# --- the dry run -----------------------------------------------------------------------------------------


@pytest.fixture
def cli(tmp_path, capsys, bundle):
    root = shutil.copytree(V1, tmp_path / "bundle")
    (root / "manifest.json").write_bytes(serialize_manifest(bundle.manifest))

    def call(*arguments, source=root):
        command = ["personalize", str(source), "--data", str(USER), "--store", str(tmp_path / "store")]
        with pytest.raises(SystemExit) as caught:
            run(device, [*command, "--threads", "1", "--dry-run", *arguments])
        assert not (tmp_path / "store").exists()
        return caught.value.code, capsys.readouterr().out

    return call


def test_a_dry_run_shows_every_candidate_and_changes_nothing(cli):
    code, out = cli("--json", "--budget", f"{roomy() // MIB}MiB")
    found = json.loads(out)
    assert code == 0
    assert found["fits"]
    assert found["chosen"]["verdict"] == "chosen: the fastest that fits"
    assert found["chosen"]["measured"]
    assert found["updates"] == 80
    runs = {(c["engine"], c["graph"], c["micro_batch"]) for c in found["candidates"]}
    engines = [("ort-step", "step"), *([("ort-training", "train")] if INSTALLED.training else [])]
    assert runs == {(*pair, micro) for pair in engines for micro in (16, 8, 4, 2, 1)}
    for candidate in found["candidates"]:
        assert candidate["predicted_seconds"] == pytest.approx(80 * candidate["predicted_step_seconds"])
    code, out = cli()
    assert code == 0
    assert "no budget, 80 updates; nothing was changed" in out


def test_a_dry_run_that_nothing_fits_says_what_would(cli):
    code, out = cli("--budget", "1MiB")
    assert code == 5
    named = int(re.search(r"NOTHING FITS: give at least --budget (\d+)MiB", out).group(1)) * MIB
    code, out = cli("--budget", "1MiB", "--json")
    assert code == 5
    found = json.loads(out)
    assert found["fits"] is False
    least = min(c["predicted_peak_bytes"] for c in found["candidates"])
    # What is named must do: a part of every budget is left free.
    assert room(named) >= least
    assert room(found["smallest_budget_bytes"]) >= least


def test_a_dry_run_shows_what_is_taken_where_a_faster_one_would_fill_what_is_left_free():
    def found(micro):
        table = GraphTable(1, 0, (), ((1, 2, 3),), ((1, 2, 3),))
        footprint = Footprint("ort-step", "step", table, (1, 2, 3), (0,), (60 + 2 * micro) * MIB, 0.0)
        return Candidate(footprint, Passes(micro), (60 + 2 * micro) * MIB, 1 / micro)

    candidates = tuple(map(found, (16, 8, 4)))  # 92, 76 and 68 MiB; 90.1 of 93 MiB may be used
    plan = Plan(candidates, candidates[1], 93 * MIB)
    run_plan = RunPlan(plan, 1, (), 1, 0, 0, 0, None)
    assert [c.passes.micro_batch for c in shown(run_plan)] == [16, 8]


def test_a_dry_run_tells_what_it_hides_and_shows_it_when_asked(cli):
    short, whole = (cli("--engine", "ort-step", *more)[1] for more in ((), ("--all",)))
    assert "4 more that one above makes pointless: --all shows them, --json has them" in short
    assert "makes pointless" not in whole
    assert (short.count("ort-step"), whole.count("ort-step")) == (1, 5)


def test_all_is_of_the_dry_run(capsys, tmp_path):
    command = ["personalize", str(V1), "--data", str(USER), "--store", str(tmp_path / "store"), "--all"]
    with pytest.raises(SystemExit) as caught:
        run(device, command)
    assert caught.value.code == 2
    assert "add --dry-run" in capsys.readouterr().err


def test_the_text_has_no_passes_twice_that_do_not_fit_on_any_number_of_threads():
    def found(threads, micro, peak):
        line = ((1, 2, 3),)
        table = GraphTable(1, 0, (), line, line)
        footprint = Footprint("e", "g", table, (1, 2, 3), (0,), peak * MIB, 0.0, threads=threads)
        return Candidate(footprint, Passes(micro), peak * MIB, 1 / micro / threads)

    rows = [(2, 16, 200), (1, 16, 199), (2, 8, 102), (1, 8, 101), (2, 4, 60), (1, 4, 59)]
    candidates = tuple(found(*row) for row in rows)
    for limit, expected in (
        (100, [(2, 16), (2, 8), (2, 4), (1, 4)]),
        (50, [(2, 16), (2, 8), (2, 4), (1, 4)]),
    ):
        chosen = candidates[4] if limit == 100 else None
        run_plan = RunPlan(Plan(candidates, chosen, limit * MIB), 1, (), 1, 0, 0, 0, None)
        kept = [(c.footprint.threads, c.passes.micro_batch) for c in shown(run_plan)]
        assert kept == expected


def test_a_dry_run_tells_how_the_adapter_will_be_judged_and_when_the_run_may_end(cli):
    found = json.loads(cli("--json")[1])
    assert (found["samples"], found["holdout_samples"], found["reference_samples"]) == (64, 16, 0)
    assert (found["patience"], found["judged_by"], found["privacy"]) == (5, ["held-out"], None)
    out = cli()[1]
    assert "judged by: 16 held-out samples" in out
    assert "stops early: after 5 epochs without a lower held-out loss" in out
    out = cli("--holdout", "0")[1]
    assert "judged by: no worse on its own training samples" in out
    assert "stops early: never" in out


def test_a_dry_run_tells_what_a_private_run_would_spend_and_plans_single_samples(cli):
    options = ("--private", "--epsilon", "8", "--delta", "0.01")
    found = json.loads(cli("--json", *options)[1])
    assert found["privacy"]["epsilon"] == pytest.approx(8, rel=1e-2)
    assert found["privacy"]["steps"] == found["updates"] == 100
    assert (found["patience"], found["judged_by"], found["holdout_samples"]) == (0, [], 0)
    assert {candidate["micro_batch"] for candidate in found["candidates"]} == {1}
    assert (
        "privacy of this run: epsilon 7.99 at delta 1.0e-02 (noise 1.12, bound 1, 100 updates)"
        in cli(*options)[1]
    )


def test_a_bundle_without_tables_cannot_be_planned(cli, user):
    code, out = cli("--json", source=V1)
    assert code == 4
    assert "nothing can be planned" in json.loads(out)["error"]["message"]


def test_what_the_tables_are_not_of_is_not_blamed_on_the_bundle(bundle, user, monkeypatch):
    """ExecuTorch's programs: exporting again would not help."""
    monkeypatch.setattr(fitting.Site, "runs", lambda _: [])
    with pytest.raises(IncompatibleError, match="no table of what passes of ort-step take") as caught:
        plan_personalize(bundle, user, quick())
    assert "export it again" not in caught.value.hint
    assert "--budget measures" in caught.value.hint


def test_the_plan_is_that_of_the_run(bundle, user):
    settings = quick(budget=roomy())
    plan = plan_personalize(bundle, user, settings)
    assert plan.plan.chosen.passes.micro_batch == personalize(bundle, user, settings).micro_batch


# --- the heap ----------------------------------------------------------------------------------------


HEAP = """
import ctypes, sys
from edge_tcur_runtime.budget import read_memory
from edge_tcur_runtime.heap import give_back_at_once
if sys.argv[1] == "on":
    assert give_back_at_once()
c = ctypes.CDLL(None)
c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def block(size):
    place = c.malloc(size)
    ctypes.memset(place, 1, size)
    return place
c.free(block(8 * 2**20))  # glibc now keeps blocks up to this size
before = read_memory().resident
blocks = [block(2**20) for _ in range(32)]
for place in blocks[:-1]:
    c.free(place)
print(read_memory().resident - before)
"""


@pytest.mark.skipif(not heap.give_back_at_once(), reason="needs glibc on Linux")
def test_what_is_freed_is_given_back_at_once():
    kept, given = (
        int(subprocess.run([sys.executable, "-c", HEAP, way], capture_output=True, check=True).stdout)
        for way in ("off", "on")
    )
    assert kept > 24 * MIB  # the last block holds what lies below it
    assert given < 4 * MIB


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(heap.os, "confstr_names", {})
    assert not heap.give_back_at_once()
    monkeypatch.setattr(heap.sys, "platform", "darwin")
    assert not heap.give_back_at_once()
