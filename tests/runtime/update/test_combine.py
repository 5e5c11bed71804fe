"""`combine` with adapters that `personalize` really trained: what it learned here is added, exactly."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_tcur_runtime.data import load_dataset
from edge_tcur_runtime.formats.adapter import parse_adapter, serialize_adapter
from edge_tcur_runtime.formats.bundle import open_bundle
from edge_tcur_runtime.origin import blank_adapter, bundle_adapter, content_digest, start_of, starting_from
from edge_tcur_runtime.personalize import personalize
from edge_tcur_runtime.settings import PersonalizeSettings, PrivacySettings
from edge_tcur_runtime.store import Store
from edge_tcur_runtime.update.blend import read_learnt
from edge_tcur_runtime.update.policy import Action, Personal

pytest.importorskip("onnxruntime")
USER = Path(__file__).parents[2] / "data" / "user.npz"


def train(device, start, privacy=None):
    """Trains two epochs from `start` (None is the base) and puts the result in use."""
    settings = PersonalizeSettings(epochs=2, engine="ort-step", seed=1, privacy=privacy)
    bundle = open_bundle(device.bundle)
    trained = personalize(
        bundle, load_dataset(USER, "image", image_size=(8, 8), channels=1), settings, start=start
    ).adapter
    device.store.activate(device.store.install(serialize_adapter(trained), name="personal"))
    return trained


def check_sum(mixed, new, trained, start):
    """`mixed` is new + trained - start, in every core and every extra."""
    for name, part in new.factors.items():
        learned = trained.factors[name].core - start.factors[name].core
        assert np.abs(learned).max() > 1e-4  # or this would show nothing
        np.testing.assert_allclose(mixed.factors[name].core, part.core + learned, atol=1e-5)
    for name, value in new.extras.items():
        np.testing.assert_allclose(
            mixed.extras[name], value + trained.extras[name] - start.extras[name], atol=1e-5
        )


@pytest.mark.parametrize("kind", ["base", "bundle", "published"])
def test_what_was_learned_is_added_wherever_it_started(simulator, device, adapters, kind):
    """Also where an adapter had been published and the user trained from the base all the same."""
    first = simulator.release(adapters[1])
    device.update(simulator)
    start = {"base": None, "bundle": bundle_adapter(open_bundle(device.bundle)),
             "published": parse_adapter(adapters[1])}[kind]  # fmt: skip
    trained = train(device, start)
    expected = {"base": "base", "published": first.digest}.get(kind) or content_digest(start)
    assert start_of(trained) == expected
    second = simulator.release(adapters[2])
    result = device.update(simulator, personal=Personal.COMBINE)
    assert result.action is Action.COMBINE
    mixed = device.store.load("active")
    check_sum(mixed, parse_adapter(adapters[2]), trained, start or blank_adapter(open_bundle(device.bundle)))
    assert start_of(mixed) == second.digest
    assert not device.update(simulator, personal=Personal.COMBINE).changed


def test_an_update_reads_the_stores_adapters_once_to_combine_them(simulator, device, adapters, monkeypatch):
    """A personal adapter once more, for what the store may forget at the end of the update."""
    first = simulator.release(adapters[1])
    device.update(simulator)
    train(device, parse_adapter(adapters[1]))
    personal = device.store.active_digest()
    other = device.store.install(adapters[4], name="other")
    second = simulator.release(adapters[2])
    reads, load = Counter(), Store._load

    def counted(store, digest):
        reads[digest] += 1
        return load(store, digest)

    monkeypatch.setattr(Store, "_load", counted)
    assert device.update(simulator, personal=Personal.COMBINE).action is Action.COMBINE
    assert {digest: reads[digest] for digest in (first.digest, personal, other, second.digest)} == {
        first.digest: 1, personal: 2, other: 1, second.digest: 1,
    }  # fmt: skip


@pytest.mark.parametrize("word", ["active", "personal", "previous", "sha256:", "base "])
def test_a_start_is_a_digest_and_no_name_in_the_store(device, adapters, word):
    adapter = parse_adapter(adapters[0])
    adapter = replace(adapter, header=replace(adapter.header, provenance={"start": word}))
    digest = device.store.install(serialize_adapter(adapter), name="personal")
    device.store.activate(digest)
    learnt = read_learnt(digest, device.store, open_bundle(device.bundle))
    assert (learnt.origin, learnt.start) == (word, None)
    assert "not here any more" in learnt.obstacle


def test_training_on_keeps_the_first_start(simulator, device, adapters):
    """Twice personalized, then combined, then personalized again: always all that was learned here."""
    first = simulator.release(adapters[1])
    device.update(simulator)
    once = train(device, parse_adapter(adapters[1]))
    twice = train(device, once)
    assert start_of(once) == start_of(twice) == first.digest
    simulator.release(adapters[2])
    device.update(simulator, personal=Personal.COMBINE)
    mixed = device.store.load("active")
    check_sum(mixed, parse_adapter(adapters[2]), twice, parse_adapter(adapters[1]))
    again = train(device, mixed)
    third = simulator.release(adapters[3])
    device.update(simulator, personal=Personal.COMBINE)
    last = device.store.load("active")
    check_sum(last, parse_adapter(adapters[3]), again, parse_adapter(adapters[2]))
    assert start_of(last) == third.digest


def test_what_a_private_run_spent_goes_with_what_it_learned(simulator, device, adapters):
    simulator.release(adapters[1])
    device.update(simulator)
    spent = train(device, parse_adapter(adapters[1]), PrivacySettings(epsilon=8.0)).header.provenance
    simulator.release(adapters[2])
    device.update(simulator, personal=Personal.COMBINE)
    found = device.store.load("active").header.provenance
    assert found["method"] == "published and personal, combined"
    assert 0 < float(spent["epsilon"]) <= 8
    assert {key: found[key] for key in ("personal", "epsilon", "delta")} == {
        key: spent[key] for key in ("personal", "epsilon", "delta")
    }


def test_an_older_adapter_that_is_trained_on_stays_of_unknown_start(adapters):
    adapter = parse_adapter(adapters[0])
    old = replace(adapter, header=replace(adapter.header, provenance={"personal": "true"}))
    assert starting_from(old) == {}
