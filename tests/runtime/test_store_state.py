"""The state of a store, without any file: what each action makes of it."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edge_tcur_runtime import state as state_module
from edge_tcur_runtime import store as store_module
from edge_tcur_runtime.errors import (
    EdgeError,
    UsageError,
)
from edge_tcur_runtime.formats.digest import digest_bytes
from edge_tcur_runtime.store import State, parse_state, serialize_state
from stored import DA, DB

DIGESTS = [f"sha256:{letter * 64}" for letter in "0123456789"]


digests = st.sampled_from(DIGESTS)
optional_digests = st.none() | digests
names = st.from_regex(r"[g-z][a-z._-]{0,8}", fullmatch=True)
states = st.builds(
    State,
    active=optional_digests,
    previous=optional_digests,
    pending=st.none(),
    names=st.dictionaries(names, digests, max_size=5),
)


@given(states, digests)
def test_a_confirmed_trial_is_an_activation(state, digest):
    trial = state.activate(digest, pending=True)
    assert trial.in_use == digest
    assert trial.confirm() == state.activate(digest)


@given(states, digests, st.booleans())
def test_what_failed_is_remembered_until_anybody_chooses(state, other, pending):
    state = replace(state, active=DA, previous=None, failed=())
    failed = state.settle(None)
    assert (failed.active, failed.previous, failed.failed) == (None, None, (DA,))
    assert parse_state(serialize_state(failed, 3), "x") == (failed, 3)
    assert b"failed" not in serialize_state(state, 3)  # as before this field was
    trial = failed.activate(other, pending=True)
    assert trial.failed == trial.recover().failed == (DA,)
    assert trial.settle(None).failed == (DA,)  # a trial that failed was no choice that holds
    assert (trial.confirm() if pending else failed.activate(other)).failed == ()
    assert failed.activate(None).failed == failed.remove(DA).failed == ()
    assert replace(failed, active=DB).rollback().failed == ()
    assert replace(failed, active=DB).settle(None).failed == (DA, DB)


@given(states, digests)
def test_an_unconfirmed_trial_leaves_no_trace(state, digest):
    trial = state.activate(digest, pending=True)
    assert trial.recover() == state
    assert trial.pending is None or trial.rollback() == state


@given(states, optional_digests)
def test_rollback_undoes_an_activation(state, digest):
    after = state.activate(digest)
    if digest == state.active:
        assert after == state
    else:
        assert after.fallback == state.active
        assert after.rollback().in_use == state.active
        assert after.rollback().rollback() == after


@given(states, digests, names)
def test_a_name_belongs_to_one_digest_and_a_digest_has_one_name(state, digest, name):
    after = state.install(digest, name)
    assert after.names[name] == digest
    assert list(after.names.values()).count(digest) == 1
    assert state.install(digest) == state


@given(states, st.integers(1, 2**53))
def test_a_state_reads_back(state, generation):
    assert parse_state(serialize_state(state, generation), "state") == (state, generation)


@given(states, st.integers(1, 2**53), st.data())
def test_no_changed_byte_of_a_state_is_accepted_as_another_state(state, generation, data):
    raw = serialize_state(state, generation)
    place = data.draw(st.integers(0, len(raw) - 1))
    changed = raw[:place] + bytes([raw[place] ^ (1 << data.draw(st.integers(0, 7)))]) + raw[place + 1 :]
    with contextlib.suppress(EdgeError):
        assert parse_state(changed, "state") == (state, generation)  # white space


def test_nothing_to_go_back_to():
    with pytest.raises(UsageError, match="no previous"):
        State().rollback()


@pytest.mark.parametrize(
    "name", ["", "base", "active", "pending", "abcdef", "ABCDEF12", "../x", "a/b", ".a", "a" * 65]
)
def test_names_that_could_mean_something_else_are_refused(name):
    with pytest.raises(UsageError, match="cannot be the name"):
        State().install(DA, name)


def test_the_number_of_names_is_bounded_and_the_state_file_with_it():
    state = State()
    for number in range(state_module.MAX_NAMES):
        digest = digest_bytes(str(number).encode())
        state = State(names={**state.names, f"{number:04}".rjust(64, "n"): digest})
    assert len(serialize_state(state, 1)) < store_module.MAX_STATE_BYTES
    with pytest.raises(UsageError, match="1024 names"):
        state.install(DA, "one-more")


class Transitions(RuleBasedStateMachine):
    """State against a model that keeps what is in use as a history of choices."""

    def __init__(self):
        super().__init__()
        self.state = State()
        self.installed, self.trial, self.current, self.back = set(), None, None, None

    @rule(digest=digests, name=st.none() | names)
    def install(self, digest, name):
        self.state = self.state.install(digest, name)
        self.installed.add(digest)

    @precondition(lambda self: self.installed)
    @rule(data=st.data(), pending=st.booleans())
    def activate(self, data, pending):
        digest = data.draw(st.sampled_from([None, *sorted(self.installed)]))
        self.state = self.state.activate(digest, pending=pending)
        self.trial = None
        if digest != self.current:
            if pending and digest is not None:
                self.trial = digest
            else:
                self.current, self.back = digest, self.current

    @rule()
    def confirm(self):
        self.state = self.state.confirm()
        if self.trial is not None:
            self.current, self.back, self.trial = self.trial, self.current, None

    @rule()
    def recover(self):
        self.state = self.state.recover()
        self.trial = None

    @rule()
    def rollback(self):
        if self.trial is None and self.current == self.back:
            with pytest.raises(UsageError):
                self.state.rollback()
            return
        self.state = self.state.rollback()
        if self.trial is None:
            self.current, self.back = self.back, self.current
        self.trial = None

    @precondition(lambda self: self.installed)
    @rule(data=st.data())
    def remove(self, data):
        digest = data.draw(st.sampled_from(sorted(self.installed)))
        if digest in (self.trial, self.current):
            with pytest.raises(UsageError):
                self.state.remove(digest)
            return
        self.state = self.state.remove(digest)
        self.installed.discard(digest)
        self.back = None if self.back == digest else self.back

    @invariant()
    def agrees_with_the_model(self):
        assert self.state.in_use == (self.trial or self.current)
        assert self.state.fallback == (self.current if self.trial else self.back)
        assert self.state.referenced <= self.installed
        assert parse_state(serialize_state(self.state, 1), "state")[0] == self.state


TestTransitions = Transitions.TestCase
