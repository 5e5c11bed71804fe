"""The decision core and its formats: pure, over everything that hypothesis can think of."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import edge_tcur_runtime
from edge_tcur_runtime.errors import (
    EdgeError,
    FileFormatError,
    FormatVersionError,
    IntegrityError,
    UsageError,
)
from edge_tcur_runtime.formats.chunks import BundleIndex, ChunkedFile, parse_index, serialize_index
from edge_tcur_runtime.formats.offer import (
    AdapterFacts,
    BaseFacts,
    CanaryAnswers,
    Catalogue,
    Entry,
    Offer,
    adapter_path,
    check_offer_name,
    parse_catalogue,
    serialize_adapter_facts,
    serialize_extra,
    usual_facts,
)
from edge_tcur_runtime.update.floor import (
    MAX_ATTEMPTS,
    UpdateState,
    Versions,
    new_state,
    parse_update_state,
    serialize_update_state,
)
from edge_tcur_runtime.update.policy import (
    Action,
    Committed,
    Device,
    Personal,
    Situation,
    bucket,
    decide,
)

BASES = [BaseFacts("sha256:" + digit * 64, "text-classification", "sha256:" + "a" * 64) for digit in "12"]
DEVICE = Device(BASES[0].digest, "f" * 16, BASES[0].tokenizer, "0.1.0", 1, "stable", "id")

facts = st.builds(
    AdapterFacts,
    name=st.just("line"),
    version=st.integers(1, 8),
    channel=st.sampled_from(["stable", "beta"]),
    rollout=st.sampled_from([0, 3000, 10_000]),
    base=st.sampled_from(BASES),
    fit=st.sampled_from(["f" * 16, "0" * 16]),
    rank=st.integers(1, 64),
    format_version=st.sampled_from([1, 2]),
    runtime=st.sampled_from(["0.1.0", "0.0.9", "2.0"]),
    metrics=st.dictionaries(st.sampled_from(["accuracy", "f1"]), st.sampled_from(["0.5", "0.9312"])),
    canary=st.sampled_from([None, CanaryAnswers((0, 3), (-9999, 7))]),
    card=st.none() | st.just("c" * 32),
)  # fmt: skip


def offer(fact):
    return Offer(Entry(adapter_path(fact.name, fact.version), 10, f"{fact.version:064x}"), fact)


catalogues = st.lists(facts, max_size=6, unique_by=lambda fact: fact.version).map(
    lambda found: tuple(offer(fact) for fact in sorted(found, key=lambda fact: fact.version))
)
digests = st.sampled_from([None, *(f"sha256:{n:064x}" for n in range(1, 10)), "sha256:" + "9" * 64])
situations = st.builds(
    Situation,
    active=digests,
    committed=st.none() | st.builds(lambda n: Committed(f"sha256:{n:064x}", "line", n), st.integers(1, 8)),
    published=st.frozensets(digests.filter(bool), max_size=6),
    rejected=st.dictionaries(digests.filter(bool), st.just("failed"), max_size=3),
    personal=st.sampled_from(list(Personal)),
)


@given(catalogues, situations)
def test_what_is_installed_is_listed_fits_and_is_meant_for_this_device(offers, situation):
    decision = decide(offers, DEVICE, situation)
    if decision.action in (Action.INSTALL, Action.COMBINE):
        fact = decision.offer.facts
        assert decision.offer in offers
        assert (fact.base, fact.fit, fact.format_version) == (BASES[0], "f" * 16, 1)
        assert (fact.channel, fact.runtime != "2.0") == ("stable", True)
        assert bucket("id", "line", fact.version) < fact.rollout
        assert decision.offer.digest not in situation.rejected
        assert decision.offer.digest != situation.active


@given(catalogues, situations)
def test_an_update_settles(offers, situation):
    """After a decision is carried out the next one is to do nothing: no device goes to and fro."""
    decision = decide(offers, DEVICE, situation)
    if decision.action is Action.BASE:
        after = replace(situation, active=None, committed=None)
    elif decision.action is Action.INSTALL:
        digest, fact = decision.offer.digest, decision.offer.facts
        after = replace(
            situation,
            active=digest,
            committed=Committed(digest, "line", fact.version),
            published=situation.published | {digest},
        )
    elif decision.action is Action.COMBINE:
        fact = decision.offer.facts
        committed = Committed(decision.offer.digest, "line", fact.version)
        after = replace(situation, active="sha256:" + "8" * 64, committed=committed)
    else:
        after = situation
    again = decide(offers, DEVICE, after)
    if decision.action is Action.BASE:
        assert again.action in (Action.NOTHING, Action.INSTALL)
    else:
        assert again.action is Action.NOTHING


@given(catalogues, situations)
def test_what_was_withdrawn_does_not_stay_in_use(offers, situation):
    listed = {found.digest for found in offers}
    if situation.active in situation.published and situation.active not in listed:
        decision = decide(offers, DEVICE, situation)
        assert decision.action in (Action.INSTALL, Action.BASE)
        assert decision.withdrawn == situation.active


@given(catalogues, situations)
def test_a_personal_adapter_is_never_replaced_unasked(offers, situation):
    listed = {found.digest for found in offers}
    if situation.active is not None and situation.active not in situation.published | listed:
        decision = decide(offers, DEVICE, replace(situation, personal=Personal.KEEP))
        assert decision.action is Action.NOTHING


def test_rollouts_spread_evenly_and_differently_for_each_version():
    places = [[bucket(f"device {n}", "line", version) for n in range(2000)] for version in (1, 2)]
    for line in places:
        assert 900 < sum(place < 5000 for place in line) < 1100
    both = sum(a < 5000 and b < 5000 for a, b in zip(*places, strict=True))
    assert 430 < both < 570


@given(catalogues)
def test_a_catalogue_is_read_as_it_was_written(offers):
    catalogue = Catalogue(offers, versions={"line": 9, "gone": 4})
    extra = json.loads(json.dumps(serialize_extra(catalogue)))
    usual = extra.get("usual", {})
    entries = [
        replace(o.entry, custom=json.loads(json.dumps(serialize_adapter_facts(o.facts, usual))))
        for o in offers
    ]
    found = parse_catalogue(extra, entries, "targets")
    assert [o.facts for o in found.adapters] == [o.facts for o in offers]
    assert dict(found.versions) == {"line": 9, "gone": 4}
    assert not found.skipped


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
def test_a_strange_entry_is_skipped_with_the_reason(data):
    good = offer(AdapterFacts("line", 1, "stable", 10_000, BASES[0], "f" * 16, 2, 1, "0.1.0"))
    custom = serialize_adapter_facts(good.facts)
    key = data.draw(st.sampled_from([*custom, "new"]))
    strange = {**custom, key: data.draw(json_values)}
    entries = [
        replace(good.entry, custom=custom),
        Entry(adapter_path("line", 2), 1, "0" * 64, strange),
        Entry("elsewhere", 1, "0" * 64, custom),
        Entry(adapter_path("line", 3), 1, "0" * 64, data.draw(json_values)),
    ]
    found = parse_catalogue(serialize_extra(Catalogue((good,))), entries, "targets")
    assert good.entry.path in {o.entry.path for o in found.adapters}
    assert "elsewhere" in found.skipped


def test_what_is_usual_stays_while_an_entry_is_not_understood():
    """It may lean on it: an older publisher must not change what it cannot read."""
    offers = tuple(
        offer(AdapterFacts("line", n, "stable", 10_000, BASES[0], "f" * 16, 2, 1, "0.1.0")) for n in (1, 2)
    )
    before = {"runtime": "0.0.5"}
    assert usual_facts(Catalogue(offers, skipped={"x": "why"}, usual=before)) == before
    assert usual_facts(Catalogue(offers, usual=before))["runtime"] == "0.1.0"


def test_a_newer_catalogue_is_refused_and_a_foreign_one_is_empty():
    with pytest.raises(FormatVersionError):
        parse_catalogue({"format_version": 2}, [], "targets")
    with pytest.raises(FileFormatError):
        parse_catalogue("x", [], "targets")
    assert parse_catalogue(None, [Entry("a", 1, "0" * 64)], "targets").skipped


@pytest.mark.parametrize("name", ["", "A", "../x", "a/b", ".a", "a" * 49, "a\n"])
def test_names_that_cannot_be_published(name):
    with pytest.raises(UsageError):
        check_offer_name(name)


def test_an_index_is_read_as_it_was_written_and_checked():
    index = BundleIndex(4, {"manifest.json": ChunkedFile(5, "sha256:0", ("a" * 64, "b" * 64))})
    raw = serialize_index(index)
    assert parse_index(raw, "index") == index
    changes = (
        (b'"size":5', b'"size":9'),
        (b"manifest.json", b"../x.json"),
        (b'"chunk":4', b'"chunk":0'),
        (b"a" * 64, b"../" * 21 + b"a"),
        (b'"format_version":1', b'"format_version":2'),
    )
    for old, new in changes:
        assert old in raw
        with pytest.raises(EdgeError):
            parse_index(raw.replace(old, new), "index")


@given(st.binary(max_size=200))
def test_any_bytes_as_an_index_are_an_error_for_people(raw):
    with pytest.raises(EdgeError):
        parse_index(raw, "index")


def test_the_state_is_read_as_it_was_written_and_every_changed_byte_is_found():
    state = UpdateState(
        "ab", Versions(1, 2, 3, 4, {"targets": "x"}), 5, Committed("d", "n", 6), ("p",), {"r": "why"}
    )
    state = state.begin(Committed("e", "n", 7), "f")
    raw = serialize_update_state(state, 3)
    assert parse_update_state(raw, "state") == (state, 3)
    for place in range(len(raw)):
        changed = raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]
        try:
            found = parse_update_state(changed, "state")
        except EdgeError:
            continue
        assert found == (state, 3)  # white space
    with pytest.raises(IntegrityError):
        parse_update_state(raw.replace(b'"root": 1', b'"root": 9'), "state")


def test_an_update_that_never_ends_is_given_up():
    state, tried = new_state(), Committed("d", "line", 1)
    for _ in range(MAX_ATTEMPTS):
        assert not state.rejected
        state = state.recover(None).begin(tried, "d")
    assert "d" in state.recover(None).rejected
    assert state.recover("d").committed == tried  # it was in use after all


def test_only_updates_may_open_a_connection():
    """No other module of the runtime imports anything that does."""
    root = Path(edge_tcur_runtime.__file__).parent
    network = {
        "socket",
        "ssl",
        "http",
        "urllib",
        "urllib3",
        "requests",
        "ftplib",
        "smtplib",
        "asyncio",
        "tuf",
    }
    found = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            if network & {name.partition(".")[0] for name in names}:
                found.add(path.relative_to(root).as_posix())
    assert found == {"update/client.py", "update/fetch.py"}
