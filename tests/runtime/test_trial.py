"""Never without a working model: an adapter is on trial until it works; what does not work is passed over."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_tcur_runtime.arithmetic import combine
from edge_tcur_runtime.cli import device
from edge_tcur_runtime.cli import ending as ending_module
from edge_tcur_runtime.cli.ending import Ending
from edge_tcur_runtime.cli.framework import run
from edge_tcur_runtime.data import load_dataset
from edge_tcur_runtime.errors import BudgetError, IntegrityError, UsageError
from edge_tcur_runtime.formats.adapter import parse_adapter, read_adapter, serialize_adapter
from edge_tcur_runtime.formats.bundle import open_bundle
from edge_tcur_runtime.formats.digest import digest_bytes
from edge_tcur_runtime.installed import find_onnxruntime
from edge_tcur_runtime.origin import PERSONAL, UNJUDGED, is_judged
from edge_tcur_runtime.personalize import personalize as run_personalize
from edge_tcur_runtime.predict import Model
from edge_tcur_runtime.settings import PersonalizeSettings
from edge_tcur_runtime.store import State, Store
from edge_tcur_runtime.trial import Incumbent, serve, serve_with

DATA = Path(__file__).parents[1] / "data"
V1, USER, ADAPTER = DATA / "bundle-v1", DATA / "user.npz", DATA / "adapter-v1.safetensors"

needs_engine = pytest.mark.skipif(find_onnxruntime() is None, reason="ONNX Runtime is not installed")


def cores(change):
    """The bytes of the committed adapter with other cores."""
    own = read_adapter(ADAPTER)
    factors = {group: part.with_core(change(part.core)) for group, part in own.factors.items()}
    return serialize_adapter(replace(own, factors=factors))


GOOD, OTHER = cores(lambda core: core), cores(lambda core: core * np.float32(0.5))
WILD = cores(lambda core: np.full_like(core, 3e38))  # a valid file whose answers are no numbers
OWN = read_adapter(ADAPTER)
FOREIGN = serialize_adapter(replace(OWN, header=replace(OWN.header, base_digest="sha256:" + "0" * 64)))
DIGEST = {name: digest_bytes(raw) for name, raw in
          (("good", GOOD), ("other", OTHER), ("wild", WILD), ("foreign", FOREIGN))}  # fmt: skip


@pytest.fixture
def place(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def store(place):
    """Four adapters, none in use."""
    opened = Store.open(place)
    for name, raw in (("good", GOOD), ("other", OTHER), ("wild", WILD), ("foreign", FOREIGN)):
        opened.install(raw, name=name)
    return opened


@pytest.fixture
def cli(place, capsys):
    """The command in this process: exit code, its JSON, stderr."""

    def call(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            run(device, [*map(str, arguments), "--store", str(place), "--json"])
        out, err = capsys.readouterr()
        (line,) = out.splitlines()
        return caught.value.code, json.loads(line), err

    return call


def predict(cli, *more, bundle=V1):
    return cli("predict", bundle, "--data", USER, *more)


def damage(store, digest):
    store._path(digest).write_bytes(b"nothing of the kind")


def left_over(place):
    """Files of checkpoints."""
    return [path for path in (place / "checkpoints").rglob("*") if path.is_file()]


def uses(store):
    state = store.state
    return state.active, state.previous, state.pending


# --- activate ---------------------------------------------------------------------------------------


@needs_engine
def test_an_adapter_that_fails_its_health_check_is_never_the_active_one(cli, store):
    assert cli("adapters", "activate", "good", "--bundle", V1)[1]["pending"] is False
    code, out, _ = cli("adapters", "activate", "wild", "--bundle", V1)
    assert (code, out["error"]["code"]) == (6, "integrity")
    assert "NaN or infinity" in out["error"]["message"]
    assert uses(store) == (DIGEST["good"], None, None)
    assert predict(cli)[1]["adapter"] == DIGEST["good"]


@needs_engine
def test_without_a_bundle_the_first_prediction_confirms_it(cli, store):
    code, out, _ = cli("adapters", "activate", "good")
    assert (code, out["active"], out["pending"]) == (0, DIGEST["good"], True)
    code, out, err = predict(cli)
    assert (code, out["adapter"], out["passed_over"]) == (0, DIGEST["good"], [])
    assert "passed its health check and is confirmed" in err
    assert uses(store) == (DIGEST["good"], None, None)
    assert predict(cli)[2] == ""


@needs_engine
@pytest.mark.parametrize("bad", ["wild", "foreign"])
def test_without_a_bundle_the_first_prediction_goes_back_by_itself(cli, store, bad):
    store.activate("good")
    cli("adapters", "activate", bad)
    assert store.active_digest() == DIGEST[bad]
    code, out, err = predict(cli)
    assert (code, out["adapter"]) == (0, DIGEST["good"])
    assert out["accuracy"] is not None
    (passed,) = out["passed_over"]
    assert passed["digest"] == DIGEST[bad]
    assert passed["reason"] in err
    assert uses(store) == (DIGEST["good"], None, None)
    assert predict(cli)[2] == ""


# --- what is in use is damaged -----------------------------------------------------------------------


@needs_engine
def test_a_damaged_active_adapter_gives_way_to_the_previous_one_and_then_to_the_base(cli, store):
    store.activate("good")
    store.activate("other")
    damage(store, DIGEST["other"])
    code, out, err = predict(cli)
    assert (code, out["adapter"]) == (0, DIGEST["good"])
    assert "was altered" in err
    assert uses(store) == (DIGEST["good"], None, None)
    damage(store, DIGEST["good"])
    code, out, _ = predict(cli)
    assert (code, out["adapter"], len(out["passed_over"])) == (0, None, 1)
    assert uses(store) == (None, None, None)
    code, out, _ = predict(cli, "--adapter", "good")  # asked for by its name it is an error
    assert (code, out["error"]["code"]) == (6, "integrity")


@needs_engine
def test_an_adapter_of_another_base_is_passed_over_and_stays_in_use_for_its_own_bundle(cli, store):
    store.activate("foreign")
    code, out, err = predict(cli)
    assert (code, out["adapter"]) == (0, None)
    assert DIGEST["foreign"] in err
    assert uses(store) == (DIGEST["foreign"], None, None)


@needs_engine
def test_a_store_that_cannot_be_changed_still_answers(cli, store, monkeypatch):
    store.activate("good")
    store.activate("wild")

    def full(*_):
        raise BudgetError("no room")

    monkeypatch.setattr(Store, "settle", full)
    code, out, err = predict(cli)
    assert (code, out["adapter"]) == (0, DIGEST["good"])
    assert "could not be changed" in err


def compare(cli, *refs):
    options = [word for ref in refs for word in ("--adapter", ref)]
    return cli("adapters", "compare", V1, "--data", USER, *options)


@needs_engine
def test_a_comparison_with_a_damaged_active_adapter_goes_on_as_a_prediction_does(cli, store):
    """What is damaged and what is used instead is said; a comparison changes nothing."""
    store.activate("good")
    store.activate("other")
    damage(store, DIGEST["other"])
    code, out, err = compare(cli, "base", "active", "good")
    assert code == 0
    base, active, good = out["adapters"]
    assert (base["digest"], active["digest"], good["digest"]) == (None, DIGEST["good"], DIGEST["good"])
    assert active["score"] == good["score"]
    (passed,) = active["passed_over"]
    assert passed["digest"] == DIGEST["other"]
    assert (base["passed_over"], good["passed_over"]) == ([], [])
    assert f"the adapter {DIGEST['other']} does not work here" in err
    assert "was altered" in err
    assert f"used instead: {DIGEST['good']}" in err
    assert uses(store) == (DIGEST["other"], DIGEST["good"], None)
    assert predict(cli)[1]["score"] == active["score"]
    damage(store, DIGEST["good"])
    code, out, err = compare(cli, "active")
    assert (code, out["adapters"][0]["digest"]) == (0, None)
    assert "used instead: the base without an adapter" in err
    code, out, _ = compare(cli, "active", "good")  # asked for by its name it must work
    assert (code, out["error"]["code"]) == (6, "integrity")


@needs_engine
def test_a_comparison_ends_no_trial(cli, store):
    store.activate("good")
    cli("adapters", "activate", "wild")
    code, out, err = compare(cli, "active")
    assert (code, out["adapters"][0]["digest"]) == (0, DIGEST["good"])
    assert "on trial does not work here" in err
    assert uses(store) == (DIGEST["good"], None, DIGEST["wild"])


# --- threads -----------------------------------------------------------------------------------------


@pytest.fixture
def served():
    """A model, inputs, and the bytes that each of some adapters answers; None is the base."""
    bundle = open_bundle(V1)
    model, inputs = Model(bundle, threads=1), {"pixel_values": np.full((1, 1, 8, 8), 0.5, np.float32)}
    raws = [cores(lambda core, scale=scale: core * np.float32(scale)) for scale in np.linspace(0.5, 2, 24)]
    expected = {None: model.outputs(inputs).tobytes()}
    for raw in (GOOD, OTHER, *raws):
        model.attach(parse_adapter(raw))
        expected[digest_bytes(raw)] = model.outputs(inputs).tobytes()
    model.attach(None)
    assert len(set(expected.values())) >= 24
    return model, inputs, raws, expected


def answers(place, model, inputs, stop):
    """What a thread of a server does until it is told to stop: (digest served, bytes answered)."""
    store, found = Store.open(place, create=False), []
    while not stop.is_set() or not found:
        serving = serve_with(store, model)
        with model.adapter(serving.digest):
            found.append((serving.digest, model.outputs(inputs).tobytes()))
    return found


@needs_engine
def test_eight_threads_fall_back_from_a_damaged_adapter(place, store, served):
    model, inputs, _, expected = served
    store.activate("good")
    store.activate("other")
    damage(store, DIGEST["other"])
    stop = threading.Event()
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(answers, place, model, inputs, stop) for _ in range(8)]
        stop.wait(1)
        stop.set()
        found = [pair for work in running for pair in work.result()]
    assert set(found) == {(DIGEST["good"], expected[DIGEST["good"]])}
    assert uses(store) == (DIGEST["good"], None, None)


@needs_engine
def test_eight_threads_while_an_update_swaps_and_files_are_damaged(place, store, served):
    """Each answer is that of the adapter that was served, and the base never takes a working one's place."""
    model, inputs, raws, expected = served
    store.activate("good")
    stop, kept = threading.Event(), [DIGEST["good"]]
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(answers, place, model, inputs, stop) for _ in range(8)]
        for number, raw in enumerate(raws):  # as `update` does: install, put in use, remove an old one
            kept.append(store.install(raw))
            store.activate(kept[-1])
            if len(kept) > 2:
                store.remove(kept.pop(0))
            if number % 3 == 2:
                damage(store, kept[-1])  # the one before it works
            stop.wait(0.05)
        stop.set()
        found = [pair for work in running for pair in work.result()]
    assert {digest for digest, _ in found} > {DIGEST["good"]}
    assert all(digest is not None for digest, _ in found)
    assert all(answer == expected[digest] for digest, answer in found)


def test_a_store_that_changes_while_it_is_looked_at_is_looked_at_again(store, monkeypatch):
    """An update removes what was in use when the look began: its successor is served, and not the base."""
    store.activate("good")
    real, changes = Store.verified, [lambda: store.activate("other"), lambda: store.remove("good")]

    def late(self, digest):
        while changes:
            changes.pop(0)()
        return real(self, digest)

    monkeypatch.setattr(Store, "verified", late)
    found = serve(store, lambda adapter: None)
    assert (found.digest, found.passed_over, found.notes) == (DIGEST["other"], (), ())
    assert uses(store) == (DIGEST["other"], None, None)


@needs_engine
def test_adapters_are_loaded_listed_and_unloaded_by_many_threads(served):
    model, own, stop = served[0], parse_adapter(GOOD), threading.Event()
    model._canary = None  # faster swaps

    def work(number):
        while not stop.is_set():
            for name in ("one", "two", f"own{number}"):
                model.load(name, own)
                assert f"own{number}" in model.loaded or name != f"own{number}"
                with suppress(UsageError):
                    model.unload(name)

    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(work, number) for number in range(8)]
        stop.wait(1.5)
        stop.set()
        for done in running:
            done.result()


# --- roll back ---------------------------------------------------------------------------------------


@needs_engine
def test_rollback_goes_nowhere_that_does_not_work(cli, store):
    store.activate("wild")
    store.activate("good")
    code, out, _ = cli("adapters", "rollback", "--bundle", V1)
    assert (code, out["error"]["code"]) == (6, "integrity")
    assert uses(store) == (DIGEST["good"], DIGEST["wild"], None)
    damage(store, DIGEST["wild"])
    assert cli("adapters", "rollback")[0] == 6
    assert uses(store) == (DIGEST["good"], DIGEST["wild"], None)
    store.activate("other")
    assert cli("adapters", "rollback", "--bundle", V1)[1]["active"] == DIGEST["good"]


# --- the rule by itself ------------------------------------------------------------------------------

NAMES = ("good", "other", "wild")
choice = st.one_of(st.none(), st.sampled_from(NAMES))


@given(choice, choice, choice, st.sets(st.sampled_from(NAMES)))
def test_what_is_served_is_the_first_that_works_and_stays_served(active, previous, pending, broken):
    state = State(*(None if name is None else DIGEST[name] for name in (active, previous, pending)))
    bad = {DIGEST[name] for name in broken}

    class Memory:
        """A store without a disk."""

        def __init__(self):
            self.state = state

        def verified(self, digest):
            return digest

        def settle(self, seen, digest):
            self.state = self.state.settle(digest)
            return True

    def works(digest):
        if digest in bad:
            raise IntegrityError("broken")

    memory = Memory()
    found = serve(memory, works)
    order = [*([state.pending] if state.pending else []), state.active]
    order += [state.previous] if state.active else []
    assert found.digest == next((digest for digest in order if digest and digest not in bad), None) or (
        state.active is None and found.digest is None
    )
    assert memory.state.in_use == found.digest
    assert memory.state.pending is None
    again = serve(memory, works)
    assert (again.digest, again.passed_over, again.notes) == (found.digest, (), ())


def test_a_name_goes_back_where_the_check_failed():
    before = State(active="a", names={"mine": "a"})
    trial = before.install("b", "mine").activate("b", pending=True)
    assert trial.withdraw("b", before) == before


def test_a_trial_of_another_process_is_not_confirmed(store):
    store.activate("good", pending=True)
    store.confirm(DIGEST["other"])
    assert uses(store) == (None, None, DIGEST["good"])
    assert not store.settle(State(), None)


# --- personalize -------------------------------------------------------------------------------------


def personalize(cli, data=USER, *more):
    return cli("personalize", V1, "--data", data, "--engine", "ort-step", "--threads", "1", *more)


@pytest.fixture
def few(tmp_path):
    """One sample of each class."""
    with np.load(USER) as found:
        arrays = dict(found)
    (name,) = [key for key, value in arrays.items() if value.ndim == 1]
    places = [np.flatnonzero(arrays[name] == label)[0] for label in np.unique(arrays[name])]
    np.savez(tmp_path / "few.npz", **{key: value[places] for key, value in arrays.items()})
    return tmp_path / "few.npz"


@pytest.fixture
def learned(cli, place):
    """The digest of an adapter in use that answers the user's data far better than the base."""
    code, out, _ = personalize(cli)
    assert code == 0
    assert out["score_after"] > 0.8
    return out["installed"]


@needs_engine
def test_a_new_adapter_takes_no_better_ones_place(cli, place, learned):
    """Better than where it started from is not better than what is in use."""
    _, out, _ = personalize(cli, USER, "--start", "base", "--epochs", "1", "--name", "worse")
    assert out["score_after"] > out["score_before"]
    assert (out["better"], out["installed"]) == (False, None)
    assert out["in_use"]["score"] > out["score_after"]
    assert "no better than the adapter in use" in out["verdict"]
    assert Store.open(place).state.in_use == learned


@needs_engine
def test_the_adapter_in_use_after_training_is_the_one_to_beat(cli, place, learned):
    """It may be another one than when training began."""
    bundle, data = open_bundle(V1), load_dataset(USER, "image", image_size=(8, 8), channels=1)
    settings = PersonalizeSettings(epochs=1, threads=1, engine="ort-step")
    result = run_personalize(bundle, data, settings, in_use=Incumbent(place, bundle))
    assert not result.better
    assert run_personalize(bundle, data, settings).better  # compared with its start, the base, alone


@needs_engine
def test_what_was_compared_with_another_adapter_is_not_put_in_use(cli, place, learned, monkeypatch):
    real = Ending.put_away

    def late(self, *arguments):
        Store.open(place).activate(Store.open(place).install(OTHER))
        return real(self, *arguments)

    monkeypatch.setattr(Ending, "put_away", late)
    monkeypatch.setattr(Incumbent, "__call__", lambda self: setattr(self, "seen", State()))  # of the base
    code, out, _ = personalize(cli, USER, "--start", "base", "--epochs", "4")
    assert code == 3
    assert "another adapter was put in use meanwhile" in out["error"]["message"]
    assert Store.open(place).state.in_use == DIGEST["other"]


@needs_engine
def test_few_samples_and_a_wild_rate_do_not_replace_what_works(cli, place, learned, few):
    _, out, _ = personalize(
        cli, few, "--epochs", "5", "--learning-rate", "3", "--head-learning-rate", "3", "--name", "few"
    )
    assert out["holdout_samples"] == 0
    assert (out["better"], out["installed"]) == (False, None)
    assert Store.open(place).state.in_use == learned
    _, out, _ = personalize(cli, few, "--start", "base", "--name", "few", "--epochs", "1")
    assert out["judged_by"] == ["training"]
    assert "no better than the adapter in use" in out["verdict"]


@needs_engine
def test_an_adapter_that_does_not_work_is_not_installed_as_the_active_one(cli, place, learned, monkeypatch):
    def fails(*_):
        raise IntegrityError("NaN")

    monkeypatch.setattr(ending_module, "examine", fails)
    code, out, _ = personalize(cli, USER, "--private", "--epochs", "1", "--accept-unjudged")
    assert (code, out["error"]["code"]) == (6, "integrity")
    assert uses(Store.open(place)) == (learned, None, None)
    assert Store.open(place).resolve("personal") == learned  # the name went back too
    assert not left_over(place)


@needs_engine
def test_without_room_for_the_check_it_stays_on_trial(cli, place, monkeypatch):
    monkeypatch.setattr(ending_module, "affordable", lambda *_: False)
    _, out, err = personalize(cli)
    assert "the first prediction does" in err
    assert uses(Store.open(place)) == (None, None, out["installed"])
    assert "is confirmed" in predict(cli)[2]
    assert uses(Store.open(place)) == (out["installed"], None, None)


@needs_engine
def test_a_run_starts_from_what_works(cli, place, learned):
    store = Store.open(place)
    store.activate(store.install(OTHER))
    damage(store, DIGEST["other"])
    code, out, err = personalize(cli, USER, "--epochs", "1", "--name", "next")
    assert code == 0
    assert "was altered" in err
    assert out["score_before"] > 0.8
    store.activate(store.install(WILD), pending=True)
    code, out, err = personalize(cli, USER, "--epochs", "1", "--name", "next")
    assert (code, DIGEST["wild"] in err) == (0, True)
    assert out["score_before"] > 0.8


# --- private, and judged by nothing ------------------------------------------------------------------


def private(cli, *more):
    return personalize(cli, USER, "--private", "--epochs", "1", *more)


@needs_engine
def test_an_unjudged_adapter_takes_no_judged_ones_place(cli, place, learned):
    """It is kept under a name of its own, and the command that puts it in use is said."""
    code, out, _ = private(cli)
    assert (code, out["judged_by"], out["better"]) == (0, [], True)
    assert "the one in use was judged" in out["withheld"]
    store = Store.open(place)
    assert uses(store) == (learned, None, None)
    assert store.state.names == {"personal": learned, "personal-unjudged": out["installed"]}
    assert out["installed_as"] == "personal-unjudged"
    assert not left_over(place)
    again = private(cli)[1]["installed"]  # however often
    assert again != out["installed"]  # other noise
    assert Store.open(place).state.names == {"personal": learned, "personal-unjudged": again}
    assert cli("adapters", "activate", "personal-unjudged", "--bundle", V1)[1]["active"] == again


@needs_engine
def test_the_report_says_how_to_put_an_unjudged_adapter_in_use(place, learned, capsys):
    arguments = ["personalize", V1, "--data", USER, "--engine", "ort-step", "--threads", "1", "--private"]
    with pytest.raises(SystemExit) as caught:
        run(device, [*map(str, arguments), "--epochs", "1", "--store", str(place)])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "installed as 'personal-unjudged'" in out
    assert "not put in use: nothing judged it, and the one in use was judged" in out
    assert "edge-tcur-device adapters activate personal-unjudged" in out
    assert "--accept-unjudged" in out


@needs_engine
def test_an_unjudged_adapter_that_is_accepted_is_put_in_use(cli, place, learned):
    code, out, _ = private(cli, "--accept-unjudged")
    first = out["installed"]
    assert (code, out["withheld"], out["installed_as"]) == (0, None, "personal-unjudged")
    assert uses(Store.open(place)) == (first, learned, None)
    # From now on no judged one is in use; the judged one keeps its name, however many come after.
    second = private(cli)[1]["installed"]
    store = Store.open(place)
    assert uses(store) == (second, first, None)
    assert store.resolve("personal") == learned
    assert store.resolve("personal-unjudged") == second


@needs_engine
def test_where_nothing_judged_is_in_use_an_unjudged_adapter_is_put_in_use(cli, place):
    first, second = (private(cli)[1] for _ in range(2))
    assert first["withheld"] is second["withheld"] is None
    store = Store.open(place)
    assert uses(store) == (second["installed"], first["installed"], None)
    assert store.state.names == {"personal": second["installed"]}
    judged = personalize(cli, USER, "--start", "base", "--name", "judged")[1]
    assert judged["better"]
    assert uses(store)[0] == judged["installed"]
    assert private(cli)[1]["withheld"] is not None


@needs_engine
def test_a_published_adapter_counts_as_judged(cli, place, store):
    store.activate("good")
    assert private(cli)[1]["withheld"] is not None
    assert uses(store) == (DIGEST["good"], None, None)


@needs_engine
def test_held_out_samples_judge_a_private_run(cli, place, learned):
    out = private(cli, "--holdout", "0.2", "--start", "base")[1]
    assert (out["judged_by"], out["withheld"], out["better"]) == (["held-out"], None, False)
    assert Store.open(place).state.in_use == learned


@pytest.fixture
def cut_short(cli, place, learned, monkeypatch):
    """The digest of a private run that was killed after its adapter had been put away."""

    class Killed(BaseException):
        pass

    def killed(_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ending_module, "clear_checkpoints", killed)
        with pytest.raises(Killed):
            private(cli)
    assert left_over(place)
    return Store.open(place).resolve("personal-unjudged")


@needs_engine
def test_a_withheld_run_that_was_killed_at_its_end_is_not_trained_again(cli, place, learned, cut_short):
    code, out, err = private(cli)
    assert (code, out["installed"]) == (0, cut_short)
    assert "nothing was trained" in err
    assert uses(Store.open(place)) == (learned, None, None)


@needs_engine
def test_a_withheld_run_that_was_killed_is_accepted_without_spending_again(cli, place, learned, cut_short):
    """It goes on from its last checkpoint, with the same noise."""
    code, out, _ = private(cli, "--accept-unjudged")
    assert (code, out["installed"], out["resumed_from"] > 0) == (0, cut_short, True)
    assert uses(Store.open(place)) == (cut_short, learned, None)


def test_options_that_contradict_each_other_are_refused(cli):
    code, out, _ = personalize(cli, USER, "--private", "--accept-unjudged", "--keep-active")
    assert (code, out["error"]["code"]) == (2, "usage")


def test_what_is_made_of_an_unjudged_adapter_is_unjudged():
    own = read_adapter(ADAPTER)
    marked = replace(own, header=replace(own.header, provenance={**PERSONAL, **UNJUDGED}))
    assert is_judged(own)
    assert not is_judged(marked)
    assert not is_judged(combine([own, marked], [0.5, 0.5]))
    assert is_judged(combine([own, own], [0.5, 0.5]))
