"""The states of a device over many updates, with a simulated repository."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy

from edge_tcur_runtime.errors import (
    ExitCode,
    HealthCheckError,
    IncompatibleError,
    IntegrityError,
    UsageError,
)
from edge_tcur_runtime.formats.adapter import parse_adapter, serialize_adapter
from edge_tcur_runtime.formats.bundle import open_bundle
from edge_tcur_runtime.formats.digest import digest_bytes
from edge_tcur_runtime.origin import starting_from
from edge_tcur_runtime.predict import Model
from edge_tcur_runtime.store import Store
from edge_tcur_runtime.trial import serve, serve_with
from edge_tcur_runtime.update import run as run_module
from edge_tcur_runtime.update.health import canary_answers, canary_digest, check_health
from edge_tcur_runtime.update.policy import Action, Personal, bucket
from edge_tcur_runtime.update.run import _check


def test_the_first_update_and_an_unchanged_check(simulator, device, adapters):
    offer = simulator.release(adapters[0])
    result = device.update(simulator)
    assert (result.action, result.changed, result.active) == (Action.INSTALL, True, offer.digest)
    assert result.requests == 5
    assert result.received <= offer.entry.size + 8 * 2**10
    again = device.update(simulator)
    assert (again.action, again.changed, again.requests) == (Action.NOTHING, False, 2)
    assert device.asked == ["metadata/2.root.json", "metadata/timestamp.json"]


def test_check_only_changes_nothing(simulator, device, adapters):
    offer = simulator.release(adapters[0])
    result = device.update(simulator, check_only=True)
    assert (result.action, result.changed, result.active) == (Action.INSTALL, False, None)
    assert result.decision.offer.digest == offer.digest
    assert not any(path.endswith(".safetensors") for path in device.asked)
    assert device.state["floor"]["targets"] == 0
    assert device.update(simulator).active == offer.digest


def test_a_withdrawn_adapter_gives_way_to_the_last_good_one_then_to_the_base(simulator, device, adapters):
    first = simulator.release(adapters[0])
    device.update(simulator)
    second = simulator.release(adapters[1])
    device.update(simulator)
    simulator.withdraw(second)
    simulator.publish()
    result = device.update(simulator)
    assert (result.active, result.decision.withdrawn) == (first.digest, second.digest)
    assert not any(path.endswith(".safetensors") for path in device.asked)  # it was still in the store
    assert second.digest not in {line.digest for line in device.store.list()}  # no way back to it
    simulator.withdraw(first)
    simulator.publish()
    assert device.update(simulator).action is Action.BASE
    assert device.active is None
    third = simulator.release(adapters[2], version=3)
    assert device.update(simulator).active == third.digest


def test_a_failed_health_check_keeps_the_old_one_and_is_not_repeated(simulator, device, adapters):
    first = simulator.release(adapters[0])
    device.update(simulator)
    second = simulator.release(adapters[1])

    def unhealthy(*_):
        assert device.active == first.digest  # while it is examined, the device answers with the old one
        raise HealthCheckError("it gives NaN")

    device.healthy = unhealthy
    with pytest.raises(HealthCheckError, match="line version 2 failed") as caught:
        device.update(simulator)
    assert caught.value.exit_code == ExitCode.INCOMPATIBLE
    assert device.active == first.digest
    result = device.update(simulator)
    assert (result.changed, result.active) == (False, first.digest)
    assert "failed its health check" in result.decision.skipped[second.entry.path]
    device.healthy = lambda *_: "looks well"
    assert device.update(simulator, retry=True).active == second.digest


def test_a_health_check_that_crashes_the_process_is_not_repeated_for_ever(simulator, device, adapters):
    first = simulator.release(adapters[0])
    device.update(simulator)
    second = simulator.release(adapters[1])

    class Crash(BaseException):
        pass

    def crash(*_):
        raise Crash

    device.healthy = crash
    for _ in range(3):
        with pytest.raises(Crash):
            device.update(simulator)
        assert device.active == first.digest
    result = device.update(simulator)
    assert result.active == first.digest
    assert "did not come to an end" in result.decision.skipped[second.entry.path]


def test_what_the_user_went_back_from_is_not_installed_again(simulator, device, adapters):
    first = simulator.release(adapters[0])
    device.update(simulator)
    second = simulator.release(adapters[1])
    device.update(simulator)
    device.store.rollback()
    result = device.update(simulator)
    assert result.active == first.digest
    assert "taken out of use" in result.decision.skipped[second.entry.path]
    device.store.activate("base")
    assert device.update(simulator).active is None
    third = simulator.release(adapters[2])
    assert device.update(simulator).active == third.digest


def test_retry_takes_what_was_taken_out_of_use(simulator, device, adapters):
    simulator.release(adapters[0])
    device.update(simulator)
    second = simulator.release(adapters[1])
    device.update(simulator)
    device.store.rollback()
    assert device.update(simulator, retry=True).active == second.digest


def personal(device, adapters, start=0, shift=0.25, says=True):
    """What `personalize` leaves: moved cores, and what it started from; named and active."""
    adapter = parse_adapter(adapters[start])
    provenance = {"personal": "true"} | (starting_from(adapter) if says else {})
    adapter = replace(adapter, header=replace(adapter.header, provenance=provenance))
    factors = {
        n: f.with_core((f.core + np.float32(shift)).astype(np.float32)) for n, f in adapter.factors.items()
    }
    digest = device.store.install(serialize_adapter(replace(adapter, factors=factors)), name="personal")
    device.store.activate(digest)
    return digest


def test_a_personal_adapter_is_kept_by_default(simulator, device, adapters):
    simulator.release(adapters[0])
    device.update(simulator)
    own = personal(device, adapters)
    offer = simulator.release(adapters[1])
    result = device.update(simulator)
    assert (result.action, result.active) == (Action.NOTHING, own)
    assert result.decision.offer.digest == offer.digest  # named, so that the user can choose
    assert not any(path.endswith(".safetensors") for path in device.asked)


def test_a_personal_adapter_is_replaced_where_asked(simulator, device, adapters):
    own = personal(device, adapters)
    offer = simulator.release(adapters[1])
    assert device.update(simulator, personal=Personal.REPLACE).active == offer.digest
    assert device.store.rollback() == own  # and is still there


def test_a_personal_adapter_is_combined_exactly_and_once(simulator, device, adapters):
    simulator.release(adapters[0])
    device.update(simulator)
    personal(device, adapters)
    simulator.release(adapters[1])
    result = device.update(simulator, personal=Personal.COMBINE)
    assert (result.action, result.changed) == (Action.COMBINE, True)
    mixed, new = device.store.load("active"), parse_adapter(adapters[1])
    for name, part in new.factors.items():
        np.testing.assert_allclose(mixed.factors[name].core, part.core + 0.25, atol=1e-6)
    assert not device.update(simulator, personal=Personal.COMBINE).changed
    simulator.release(adapters[2])
    device.update(simulator, personal=Personal.COMBINE)
    mixed, new = device.store.load("active"), parse_adapter(adapters[2])
    for name, part in new.factors.items():
        np.testing.assert_allclose(mixed.factors[name].core, part.core + 0.25, atol=1e-6)


def test_what_a_personal_adapter_started_from_is_kept_though_it_is_withdrawn(simulator, device, adapters):
    first = simulator.release(adapters[0])
    device.update(simulator)
    personal(device, adapters)
    simulator.withdraw(first)
    simulator.release(adapters[1], version=2)
    device.update(simulator)
    device.update(simulator, personal=Personal.COMBINE)
    mixed, new = device.store.load("active"), parse_adapter(adapters[1])
    for name, part in new.factors.items():
        np.testing.assert_allclose(mixed.factors[name].core, part.core + 0.25, atol=1e-6)


def test_retry_does_not_forget_what_a_personal_adapter_started_from(simulator, device, adapters):
    simulator.release(adapters[0])
    device.update(simulator)
    personal(device, adapters)
    device.update(simulator, retry=True)
    simulator.release(adapters[1])
    device.update(simulator, personal=Personal.COMBINE)
    mixed, new = device.store.load("active"), parse_adapter(adapters[1])
    for name, part in new.factors.items():
        np.testing.assert_allclose(mixed.factors[name].core, part.core + 0.25, atol=1e-6)


def test_a_development_version_of_the_runtime_updates_too(simulator, device, adapters, monkeypatch):
    monkeypatch.setattr(run_module, "__version__", "0.1.0.dev3+local")
    offer = simulator.release(adapters[0])
    assert device.update(simulator).active == offer.digest


def test_a_personal_adapter_of_unknown_start_is_kept_with_the_reason(simulator, device, adapters):
    own = personal(device, adapters, says=False)
    simulator.release(adapters[1])
    result = device.update(simulator, personal=Personal.COMBINE)
    assert (result.action, result.active) == (Action.NOTHING, own)
    assert "does not say what it started from" in result.decision.reason
    assert not any(path.endswith(".safetensors") for path in device.asked)


def test_a_personal_adapter_whose_start_is_gone_is_kept_with_the_reason(simulator, device, adapters):
    own = personal(device, adapters, start=3)
    simulator.release(adapters[1])
    result = device.update(simulator, personal=Personal.COMBINE)
    assert (result.action, result.active) == (Action.NOTHING, own)
    assert "is not here any more" in result.decision.reason


def test_a_personal_adapter_of_other_rows_cannot_be_combined_and_stays(simulator, device, adapters):
    adapter = parse_adapter(adapters[0])
    factors = {n: replace(f, rows=np.roll(f.rows, 0)[:, :2], cols=f.cols[:, :2], core=f.core[:, :2, :2])
               for n, f in adapter.factors.items()}  # fmt: skip
    header = replace(adapter.header, provenance=starting_from(None))
    digest = device.store.install(serialize_adapter(replace(adapter, header=header, factors=factors)))
    device.store.activate(digest)
    simulator.release(adapters[1])
    with pytest.raises(IncompatibleError, match="cannot be combined"):
        device.update(simulator, personal=Personal.COMBINE)
    assert device.active == digest


def test_a_rollout_reaches_its_part_of_the_devices_and_never_goes_back(simulator, device, adapters):
    device.update(simulator)
    place = bucket(device.state["device_id"], "line", 1)
    offer = simulator.release(adapters[0], rollout=place)
    result = device.update(simulator)
    assert result.active is None
    assert "rolled out to" in result.decision.skipped[offer.entry.path]
    simulator.withdraw(offer)
    offer = simulator.release(adapters[0], version=1, rollout=place + 1)
    assert device.update(simulator).active == offer.digest
    simulator.withdraw(offer)
    simulator.release(adapters[0], version=1, rollout=0)  # stopped: who has it keeps it
    assert device.update(simulator).active == offer.digest


def test_channels(simulator, device, adapters):
    stable = simulator.release(adapters[0])
    beta = simulator.release(adapters[1], channel="beta")
    assert device.update(simulator).active == stable.digest
    assert device.update(simulator, channel="beta").active == beta.digest
    assert device.update(simulator).active == beta.digest  # no step back; the next stable one replaces it
    newer = simulator.release(adapters[2])
    assert device.update(simulator, channel="beta").active == newer.digest
    with pytest.raises(UsageError, match="no channel"):
        device.update(simulator, channel="nightly")


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"runtime": "99.0"}, "needs edge-tcur-runtime 99.0"),
        ({"format_version": 2}, "format version 2"),
        ({"fit": "0" * 16}, "other groups, labels or another head"),
        ({"channel": "beta"}, "on the channel beta"),
    ],
)
def test_what_does_not_fit_is_skipped_with_the_reason_and_never_downloaded(
    simulator, device, adapters, more, why
):
    offer = simulator.release(adapters[0], **more)
    result = device.update(simulator)
    assert why in result.decision.skipped[offer.entry.path]
    assert not any(path.endswith(".safetensors") for path in device.asked)
    assert result.active is None


@pytest.mark.parametrize(("field", "why"), [("digest", "another base"), ("tokenizer", "another tokenizer")])
def test_another_base_or_tokenizer_is_skipped(simulator, device, adapters, field, why):
    base = replace(simulator.add(adapters[0]).facts.base, **{field: "sha256:" + "0" * 64})
    offer = simulator.release(adapters[0], version=1, base=base)
    assert why in device.update(simulator).decision.skipped[offer.entry.path]
    assert not any(path.endswith(".safetensors") for path in device.asked)


def test_several_lines_need_a_choice(simulator, device, adapters):
    simulator.release(adapters[0], name="one")
    two = simulator.release(adapters[1], name="two")
    with pytest.raises(UsageError, match="one, two"):
        device.update(simulator)
    assert device.update(simulator, name="two").active == two.digest
    assert device.update(simulator).active == two.digest  # the line is remembered


def test_an_entry_of_a_newer_publisher_is_skipped_and_the_others_serve(simulator, device, adapters):
    offer = simulator.add(adapters[0])
    simulator.publish()
    custom = dict(simulator.targets.signed.targets[offer.entry.path].unrecognized_fields["custom"])
    strange = type(simulator.targets.signed.targets[offer.entry.path]).from_data(
        "adapters/line/9.safetensors", adapters[1], ["sha256"]
    )
    strange.unrecognized_fields["custom"] = {**custom, "quantum": True}
    simulator.targets.signed.targets["adapters/line/9.safetensors"] = strange
    simulator.sign("targets")
    simulator.write_from_targets()
    result = device.update(simulator)
    assert result.active == offer.digest
    assert any("quantum" in note for note in result.notes)


def test_an_adapter_that_lies_about_its_base_is_refused(simulator, device, adapters):
    """Signed metadata say that it fits; the file itself says otherwise."""
    adapter = parse_adapter(adapters[0])
    other = serialize_adapter(
        replace(adapter, header=replace(adapter.header, base_digest="sha256:" + "1" * 64))
    )
    honest = simulator.add(adapters[0]).facts
    simulator.facts.clear()
    simulator.release(other, base=honest.base, fit=honest.fit)
    with pytest.raises(IncompatibleError):
        device.update(simulator)
    assert device.active is None


def test_a_bundle_without_a_root_is_refused(simulator, device):
    device.ship_root(b"{}")
    from edge_tcur_runtime.errors import TrustError

    with pytest.raises(TrustError):
        device.update(simulator)
    (device.bundle / "trusted-root.json").write_bytes(b"{ }")
    with pytest.raises(IntegrityError, match=r"bytes; the manifest says"):
        device.update(simulator)


def test_the_real_health_check_compares_the_signed_answers(device, adapters):
    bundle, adapter = open_bundle(device.bundle), parse_adapter(adapters[0])
    answers = canary_answers(bundle, adapter)
    inputs = canary_digest(bundle.root, bundle.manifest)
    assert "signed answers" in check_health(bundle, adapter, answers, inputs)
    assert "finite outputs" in check_health(bundle, adapter, None, None)
    wrong = replace(answers, outputs=tuple(value + 1000 for value in answers.outputs))
    with pytest.raises(HealthCheckError, match="the publisher signed"):
        check_health(bundle, adapter, wrong, inputs)
    wrong = replace(answers, answers=tuple((a + 1) % 4 for a in answers.answers))
    with pytest.raises(HealthCheckError):
        check_health(bundle, adapter, wrong, inputs)


def test_a_canary_that_holds_a_part_of_the_outputs_gives_the_same_answers(device, adapters, resealed):
    """What is signed is counted through all outputs, whatever the file holds of them."""
    bundle, adapter = open_bundle(device.bundle), parse_adapter(adapters[0])
    whole, inputs = canary_answers(bundle, adapter), canary_digest(bundle.root, bundle.manifest)
    path, places = bundle.path(bundle.manifest.canary), np.array([0, 2])
    tensors = safetensors.numpy.load_file(path)
    sizes = np.array(tensors["output.base"].shape)
    for name in ("output.base", "output.adapter"):
        tensors[name] = np.ascontiguousarray(tensors[name][:, places])
    path.write_bytes(safetensors.numpy.save(tensors | {"output.places": places, "output.sizes": sizes}))
    reduced = resealed(bundle.root)
    assert canary_answers(reduced, adapter) == whole
    assert "signed answers" in check_health(reduced, adapter, whole, inputs)


def test_a_published_adapter_that_is_not_applied_fails_its_health_check(device, adapters, monkeypatch):
    """The same check as at load: finite outputs alone would let it pass."""
    bundle, adapter, run = open_bundle(device.bundle), parse_adapter(adapters[1]), Model._run
    monkeypatch.setattr(Model, "_run", lambda self, inputs, feeds: run(self, inputs, {}))
    with pytest.raises(HealthCheckError, match="the adapter changes nothing"):
        check_health(bundle, adapter, None, None)


def test_a_base_that_answers_otherwise_does_not_condemn_an_adapter(simulator, device, adapters, monkeypatch):
    """An ONNX Runtime that computes something else: every version would be remembered as broken."""
    offer, run = simulator.release(adapters[0]), Model._run
    device.healthy = _check
    with monkeypatch.context() as patch:
        patch.setattr(Model, "_run", lambda *arguments: run(*arguments) * np.float32(1.5))
        with pytest.raises(IncompatibleError, match="the base gives outputs that are off by") as caught:
            device.update(simulator)
        assert caught.value.code == "incompatible"
    assert (device.active, device.state["rejected"]) == (None, {})
    assert device.update(simulator).active == offer.digest


def test_a_graph_that_cannot_run_with_the_adapter_condemns_it(simulator, device, adapters, monkeypatch):
    offer, run = simulator.release(adapters[0]), Model._run

    def fails(self, inputs, feeds):
        if feeds:
            raise RuntimeError("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : no such shape")
        return run(self, inputs, feeds)

    device.healthy = _check
    monkeypatch.setattr(Model, "_run", fails)
    with pytest.raises(HealthCheckError, match="cannot run"):
        device.update(simulator)
    assert offer.digest in device.state["rejected"]


def test_an_adapter_that_gives_nan_rolls_back_by_itself(simulator, device, adapters):
    """With the real inference graph: cores of 3e38 overflow."""
    first = simulator.release(adapters[0])
    device.healthy = _check
    assert device.update(simulator).health.startswith("finite outputs")
    adapter = parse_adapter(adapters[1])
    factors = {n: f.with_core(np.full_like(f.core, 3e38)) for n, f in adapter.factors.items()}
    simulator.release(serialize_adapter(replace(adapter, factors=factors)))
    with pytest.raises(HealthCheckError, match="NaN or infinity"):
        device.update(simulator)
    assert device.active == first.digest


@pytest.mark.parametrize("damage", ["altered", "gone"])
def test_a_damaged_adapter_in_use_is_fetched_again(simulator, device, adapters, damage):
    offer = simulator.release(adapters[0])
    device.update(simulator)
    (path,) = (device.store_path / "adapters").glob("*.safetensors")
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"x" + path.read_bytes()[1:])
    result = device.update(simulator)
    assert "fetched again" in result.notes[0]
    assert device.store.load("active")
    assert device.active == offer.digest


def damage_in_use(device):
    """What a failing disk leaves, and what the next prediction makes of it."""
    digest = device.active
    device.store._path(digest).write_bytes(b"nothing of the kind")
    return serve(device.store, lambda adapter: None)


@pytest.mark.parametrize("versions", [1, 2])
def test_what_a_prediction_took_out_as_damaged_is_fetched_again(simulator, device, adapters, versions):
    """It is not what somebody went back from."""
    for raw in adapters[:versions]:
        offer = simulator.release(raw)
        device.update(simulator)
    found = damage_in_use(device)
    assert [one.digest for one in found.passed_over] == [offer.digest]
    assert (device.active is None) == (versions == 1)
    result = device.update(simulator)
    assert (result.action, result.changed, result.active) == (Action.INSTALL, True, offer.digest)
    assert "was in use until it did not work" in result.decision.reason
    assert device.store.load("active")
    assert device.store.state.failed == ()
    assert not device.update(simulator).changed


def test_a_second_damage_before_the_update_forgets_nothing(simulator, device, adapters):
    simulator.release(adapters[0])
    device.update(simulator)
    second = simulator.release(adapters[1])
    device.update(simulator)
    damage_in_use(device)
    damage_in_use(device)
    assert device.active is None
    assert device.update(simulator).active == second.digest


def test_a_newer_version_takes_the_place_of_a_damaged_one(simulator, device, adapters):
    simulator.release(adapters[0])
    device.update(simulator)
    damage_in_use(device)
    second = simulator.release(adapters[1])
    assert device.update(simulator).active == second.digest


@pytest.mark.parametrize("choice", ["rollback first", "base after", "removed after", "other after"])
def test_what_a_person_chose_is_kept_though_a_file_is_damaged(simulator, device, adapters, choice):
    first = simulator.release(adapters[0])
    device.update(simulator)
    second = simulator.release(adapters[1])
    device.update(simulator)
    if choice == "rollback first":
        device.store.rollback()
        device.store._path(second.digest).write_bytes(b"damaged later")
        assert serve(device.store, lambda adapter: None).passed_over == ()
    else:
        damage_in_use(device)
    if choice == "base after":
        device.store.activate("base")
    elif choice == "removed after":
        device.store.remove(second.digest)
    elif choice == "other after":
        device.store.activate(first.digest)
    kept = None if choice == "base after" else first.digest
    result = device.update(simulator)
    assert (result.changed, result.active) == (False, kept)
    assert "taken out of use" in result.decision.skipped[second.entry.path]
    assert device.update(simulator, retry=True).active == second.digest


def test_a_replaced_personal_adapter_that_came_back_gives_way_again(simulator, device, adapters):
    own = personal(device, adapters)
    offer = simulator.release(adapters[1])
    device.update(simulator, personal=Personal.REPLACE)
    assert damage_in_use(device).digest == own
    result = device.update(simulator)
    assert (result.active, result.decision.withdrawn) == (offer.digest, None)
    assert device.store.rollback() == own
    assert device.update(simulator).active == own  # this was by hand


def test_a_damaged_combination_is_made_again(simulator, device, adapters):
    simulator.release(adapters[0])
    device.update(simulator)
    own = personal(device, adapters)
    simulator.release(adapters[1])
    mixed = device.update(simulator, personal=Personal.COMBINE).active
    assert damage_in_use(device).digest == own
    assert device.update(simulator).active == own
    result = device.update(simulator, personal=Personal.COMBINE)
    assert (result.action, result.active) == (Action.COMBINE, mixed)
    assert not device.update(simulator, personal=Personal.COMBINE).changed


def test_what_fails_its_health_check_here_is_tried_once_more_and_no_more(simulator, device, adapters):
    """Whole, but it does not work any more (another ONNX Runtime): the update's check decides."""
    simulator.release(adapters[0])
    device.update(simulator)
    second = simulator.release(adapters[1])
    device.update(simulator)

    def works(adapter):
        if serialize_adapter(adapter) == adapters[1]:
            raise IntegrityError("NaN")

    def unhealthy(*_):
        raise HealthCheckError("NaN")

    assert serve(device.store, works).passed_over[0].digest == second.digest
    device.healthy, first = unhealthy, device.active
    with pytest.raises(HealthCheckError):
        device.update(simulator)
    result = device.update(simulator)
    assert (result.changed, result.active) == (False, first)
    assert "failed its health check" in result.decision.skipped[second.entry.path]


def test_threads_answer_while_updates_swap_and_bring_back_what_is_damaged(simulator, device, adapters):
    """With the real graph: each answer is that of the adapter served, and never the base's."""
    pytest.importorskip("onnxruntime")
    model, stop = Model(open_bundle(device.bundle), threads=1), threading.Event()
    inputs = {"pixel_values": np.full((1, 1, 8, 8), 0.5, np.float32)}
    expected = {}
    for raw in adapters:
        model.attach(parse_adapter(raw))
        expected[digest_bytes(raw)] = model.outputs(inputs).tobytes()
    model.attach(None)
    assert len({*expected.values(), model.outputs(inputs).tobytes()}) == len(adapters) + 1
    for raw in adapters[:2]:
        offer = simulator.release(raw)
        device.update(simulator)

    def answer():
        found = []
        while not stop.is_set():
            serving = serve_with(device.store, model)
            with model.adapter(serving.digest):
                found.append((serving.digest, model.outputs(inputs).tobytes()))
        return found

    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(answer) for _ in range(8)]
        try:
            for raw in adapters[2:]:
                device.store._path(offer.digest).write_bytes(b"nothing of the kind")
                stop.wait(0.1)
                assert device.update(simulator).active == offer.digest  # fetched again
                offer = simulator.release(raw)
                assert device.update(simulator).active == offer.digest
                stop.wait(0.1)
        finally:
            stop.set()
        found = [pair for work in running for pair in work.result()]
    assert {digest for digest, _ in found} >= set(list(expected)[2:])
    assert all(answer == expected.get(digest) for digest, answer in found)


def test_a_prediction_that_goes_back_to_what_an_update_drops_keeps_it(
    simulator, device, adapters, monkeypatch
):
    first = simulator.release(adapters[0])
    device.update(simulator)
    simulator.release(adapters[1])
    device.update(simulator)
    simulator.withdraw(first)
    simulator.publish()
    real = Store.remove

    def late(self, ref):
        damage_in_use(device)
        return real(self, ref)

    monkeypatch.setattr(Store, "remove", late)
    device.update(simulator)
    assert device.active == first.digest
    assert device.store.load("active")


def test_old_published_adapters_do_not_fill_the_disk(simulator, device, adapters):
    mine = device.store.install(adapters[4], name="mine")
    for raw in adapters[:4]:
        offer = simulator.release(raw)
        device.update(simulator)
    found = {line.digest for line in device.store.list()}
    assert found >= {mine, offer.digest}
    assert len(found) == 3  # the one in use, the one to go back to, and the user's own
