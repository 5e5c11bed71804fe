"""The store: pure transitions against a model, and a device that fails or is cut at every call."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edge_tcur_runtime import state as state_module
from edge_tcur_runtime import store as store_module
from edge_tcur_runtime.errors import (
    BadInputError,
    BaseMismatchError,
    DiskError,
    EdgeError,
    FormatVersionError,
    IntegrityError,
    UsageError,
)
from edge_tcur_runtime.formats.adapter import Adapter, AdapterHeader, parse_adapter, serialize_adapter
from edge_tcur_runtime.formats.digest import digest_bytes
from edge_tcur_runtime.formats.factors import Factors, GroupSpec
from edge_tcur_runtime.store import State, Store, parse_state, serialize_state

BASE = "sha256:" + "b" * 64
OTHER_BASE = "sha256:" + "c" * 64
DIGESTS = [f"sha256:{letter * 64}" for letter in "0123456789"]
CALLS = ("open", "write", "fsync", "replace", "unlink", "mkdir")


def adapter_bytes(seed, base=BASE):
    """A valid adapter file of rank 2 over two 4 x 5 weights."""
    core = np.random.default_rng(seed).normal(size=(2, 2, 2)).astype(np.float32)
    factors = Factors(core, np.array([[0, 3]], np.int32), np.array([[1, 4]], np.int32))
    header = AdapterHeader(base, {"q": GroupSpec(("q.0", "q.1"), 4, 5)}, "text-classification", ("a", "b"))
    return serialize_adapter(Adapter(header, {"q": factors}, {"head": np.ones(3, np.float32)}))


A, B, C, UNUSED = (adapter_bytes(seed) for seed in range(4))
DA, DB, DC = (digest_bytes(raw) for raw in (A, B, C))
HEX = DA.removeprefix("sha256:")


def core_of(raw):
    """The trained numbers of an adapter file, as bytes."""
    return parse_adapter(raw).factors["q"].core.tobytes()


def loaded(store, ref="active"):
    """Which of A, B, C a reference loads."""
    core = store.load(ref).factors["q"].core.tobytes()
    return next(raw for raw in (A, B, C) if core_of(raw) == core)


@pytest.fixture
def store(tmp_path):
    """A store with `a` active after `b`: rollback goes to `b`."""
    opened = Store.open(tmp_path / "store")
    opened.install(A, name="a")
    opened.install(B, name="b")
    opened.activate("b")
    opened.activate("a")
    return opened


# --- the pure core -------------------------------------------------------------------------------

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


# --- the store -----------------------------------------------------------------------------------


def test_a_new_store_uses_the_base(tmp_path):
    store = Store.open(tmp_path / "deep" / "store")
    assert store.active_digest() is None
    assert store.list() == []
    assert store.warnings == ()
    assert stat.S_IMODE((tmp_path / "deep" / "store").stat().st_mode) == 0o700
    with pytest.raises(UsageError, match="is the base"):
        store.load("active")


def test_a_missing_store_is_an_error_unless_it_is_to_be_made(tmp_path):
    with pytest.raises(BadInputError, match="no store"):
        Store.open(tmp_path / "store", create=False)
    assert not (tmp_path / "store").exists()


def test_install_keeps_the_bytes_private_under_their_digest(store):
    path = store.root / "adapters" / f"{HEX}.safetensors"
    assert path.read_bytes() == A
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {stat.S_IMODE((store.root / name).stat().st_mode) for name in store_module.STATE_FILES} == {0o600}


def test_install_twice_is_install_once(store):
    before = store.state
    assert store.install(A, name="a") == DA
    assert store.state == before
    assert len(store.list()) == 2


def test_install_heals_a_damaged_file(store):
    path = store.root / "adapters" / f"{HEX}.safetensors"
    path.write_bytes(A[:-1])
    store.install(A)
    assert store.load("a").trained_numbers == 8


@pytest.mark.parametrize(
    "raw",
    [b"", b"x" * 100, A[:-1], A + b"\0", A[:-3] + b"\1\1\1"],
    ids=["empty", "noise", "cut", "longer", "changed"],
)
def test_what_is_no_whole_adapter_is_not_installed(store, raw):
    with pytest.raises(EdgeError):
        store.install(raw, name="new")
    assert [line.name for line in store.list()] == ["a", "b"]


def test_install_file_names_the_file_in_its_error(store, tmp_path):
    path = tmp_path / "new.safetensors"
    path.write_bytes(C)
    assert store.install_file(path) == DC
    path.write_bytes(C[:-1])
    with pytest.raises(EdgeError, match=r"new\.safetensors"):
        store.install_file(path)


def test_an_adapter_of_another_base_is_refused_and_both_bases_named(store):
    foreign = adapter_bytes(9, OTHER_BASE)
    with pytest.raises(BaseMismatchError, match=f"{OTHER_BASE}.*{BASE}"):
        store.install(foreign, expected_base=BASE)
    digest = store.install(foreign)
    with pytest.raises(BaseMismatchError, match=f"{OTHER_BASE}.*{BASE}"):
        store.activate(digest, expected_base=BASE)
    assert store.active_digest() == DA
    store.activate(digest, expected_base=OTHER_BASE)
    store.activate("base", expected_base=BASE)


def test_list_shows_what_an_adapter_is(store):
    first, second = store.list()
    assert (first.digest, first.name, first.active, first.previous, first.pending) == (
        DA,
        "a",
        True,
        False,
        False,
    )
    assert (second.digest, second.name, second.active, second.previous) == (DB, "b", False, True)
    assert (first.size, first.base_digest, first.task) == (len(A), BASE, "text-classification")
    assert first.trained_numbers == 11
    assert first.problem is None


def test_an_adapter_has_many_references(store):
    for ref in ("a", "active", DA, HEX, DA[:13], HEX[:6], HEX[:6].upper()):
        assert store.resolve(ref) == DA
        assert loaded(store, ref) == A


def test_previous_and_base_are_references(store):
    assert store.resolve("previous") == DB
    assert store.resolve("base") is None
    assert store.activate("previous") == DB
    assert store.activate(None) is None


def test_an_unknown_reference_is_a_usage_error(store):
    for ref in ("", "c", HEX[:5], DC, "pending", "../a", "*"):
        with pytest.raises(UsageError, match="no adapter"):
            store.load(ref)


def test_a_misspelt_name_is_guessed(store):
    store.install(C, name="banking")
    with pytest.raises(UsageError) as caught:
        store.activate("bankin")
    assert "banking" in caught.value.hint


def test_an_ambiguous_prefix_names_its_meanings(store):
    twin = DA[:20] + ("0" if DA[20] != "0" else "1") + DA[21:]
    (store.root / "adapters" / f"{twin.removeprefix('sha256:')}.safetensors").write_bytes(B)
    with pytest.raises(UsageError, match=f"2 adapters.*{DA}|2 adapters.*{twin}"):
        store.resolve(DA[7:20])


def test_rollback_and_redo(store):
    assert store.rollback() == DB
    assert store.rollback() == DA


def test_the_active_adapter_cannot_be_removed_and_others_can(store):
    with pytest.raises(UsageError, match="is active"):
        store.remove("a")
    assert store.remove("b") == DB
    assert [line.digest for line in store.list()] == [DA]
    assert store.rollback() is None
    with pytest.raises(UsageError):
        store.remove("base")


def test_a_trial_ends_confirmed_or_recovered(store):
    store.install(C)
    store.activate(DC, pending=True)
    assert store.active_digest() == DC
    assert [(line.digest, line.pending, line.previous) for line in store.list()][:1] == [(DC, True, False)]
    for ref in ("a", DC):
        with pytest.raises(UsageError, match="is active"):
            store.remove(ref)
    reopened = Store.open(store.root)
    assert reopened.recover() is True
    assert reopened.recover() is False
    assert (reopened.active_digest(), reopened.resolve("previous")) == (DA, DB)
    reopened.activate(DC, pending=True)
    reopened.confirm()
    assert Store.open(store.root).recover() is False
    assert (reopened.active_digest(), reopened.resolve("previous")) == (DC, DA)


def test_a_damaged_adapter_is_refused_and_listed_as_damaged(store):
    path = store.root / "adapters" / f"{DB.removeprefix('sha256:')}.safetensors"
    path.write_bytes(A)  # a whole adapter, but not the one that was promised
    for action in (store.load, store.activate):
        with pytest.raises(IntegrityError, match=DA):
            action("b")
    assert [line.problem is None for line in store.list()] == [True, False]
    path.unlink()
    with pytest.raises(IntegrityError, match="missing"):
        store.load("previous")
    assert store.active_digest() == DA


def test_gc_keeps_what_is_referenced(store):
    digest = store.install(C)
    leftovers = [
        store.root / ".state-0.json.0123456789ab.tmp",
        store.root / "adapters" / ".x.0123456789ab.tmp",
    ]
    for path in leftovers:
        path.write_bytes(b"half")
    (store.root / "notes.txt").write_text("not ours")
    assert len(store.gc()) == 3
    assert {line.digest for line in store.list()} == {DA, DB}
    assert digest not in {line.digest for line in store.list()}
    assert not any(path.exists() for path in leftovers)
    assert (store.root / "notes.txt").exists()
    assert store.gc() == ()


def damage(path):
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"sha256:", b"sha255:", 1))


def newest(store):
    """The state file that holds, and the other one."""
    paths = [store.root / name for name in store_module.STATE_FILES]
    return sorted(paths, key=lambda path: -json.loads(path.read_bytes())["generation"])


def test_states_are_written_in_turn(store):
    seen = []
    for ref in ("b", "a", "b"):
        store.activate(ref)
        seen.append(newest(store)[0])
    assert seen[0] == seen[2] != seen[1]


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b"[1", b"0" * 2**21, None])
def test_a_damaged_copy_falls_back_to_the_other_and_is_healed(store, content):
    path = newest(store)[0]
    damage(path) if content is None else path.write_bytes(content)
    reopened = Store.open(store.root)
    assert len(reopened.warnings) == 1
    assert str(path) in reopened.warnings[0]
    assert reopened.active_digest() == DB  # the state before the last change
    reopened.activate("a")
    reopened.activate("b")
    assert reopened.warnings == ()
    assert reopened.active_digest() == DB


def test_a_damaged_older_copy_changes_nothing_and_is_healed(store):
    damage(newest(store)[1])
    assert Store.open(store.root).active_digest() == DA
    assert store.warnings
    store.confirm()
    assert store.warnings == ()
    assert store.active_digest() == DA


def test_both_copies_damaged_leave_the_base_and_every_adapter(store):
    for path in newest(store):
        damage(path)
    reopened = Store.open(store.root)
    assert reopened.active_digest() is None
    assert any("state is lost" in line for line in reopened.warnings)
    assert reopened.gc() == ()
    assert {line.digest for line in reopened.list()} == {DA, DB}
    reopened.activate(DA)
    reopened.activate(DB)
    assert reopened.warnings == ()
    assert reopened.rollback() == DA


def test_a_state_of_a_newer_version_is_not_taken_for_damage(store):
    path = newest(store)[0]
    document = json.loads(path.read_bytes())
    del document["sha256"]
    document |= {"format_version": 2, "something": "new"}
    document["sha256"] = state_module._checksum(document)
    path.write_text(json.dumps(document))
    with pytest.raises(FormatVersionError, match="version 2"):
        Store.open(store.root)


def test_a_pipe_in_place_of_a_state_file_is_damage(store):
    path = newest(store)[0]
    path.unlink()
    os.mkfifo(path)
    assert Store.open(store.root).active_digest() == DB
    store.activate("a")
    assert store.warnings == ()


# --- several processes ---------------------------------------------------------------------------


def test_a_second_process_gets_a_clear_error_and_readers_go_on(store):
    code = (
        "import sys; from pathlib import Path; from edge_tcur_runtime.store import Store\n"
        "store = Store.open(Path(sys.argv[1])); print(store.active_digest())\n"
        "try: store.activate('b')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    with (store.root / "lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = subprocess.run(
            [sys.executable, "-c", code, str(store.root)], capture_output=True, text=True, check=True
        )
    digest, error = done.stdout.splitlines()
    assert digest == DA
    assert error.startswith("BadInputError")
    assert "another process" in error
    assert store.activate("b") == DB


def test_a_read_only_store_can_be_read(store, monkeypatch):
    before = sorted(path.name for path in store.root.iterdir())

    def read_only(name, real):
        def call(path, flags=os.O_WRONLY, *rest, **options):
            if name != "open" or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
            return real(path, flags, *rest, **options)

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, read_only(name, getattr(os, name)))
    for create in (True, False):
        opened = Store.open(store.root, create=create)
        assert opened.active_digest() == DA
        assert opened.recover() is False
        assert loaded(opened) == A
        assert len(opened.list()) == 2
    for change in (lambda: opened.activate("b"), lambda: opened.install(C), opened.rollback, opened.gc):
        with pytest.raises(DiskError, match="Read-only"):
            change()
    assert sorted(path.name for path in store.root.iterdir()) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_write_permission_can_be_read(store):
    store.root.chmod(0o500)
    try:
        assert Store.open(store.root).active_digest() == DA
        with pytest.raises(DiskError):
            store.activate("b")
    finally:
        store.root.chmod(0o700)


def test_a_state_that_may_not_be_read_does_not_fall_back(store, monkeypatch):
    real = os.open

    def refuse(path, *rest, **options):
        if str(path).endswith("state-0.json"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(BadInputError, match="Permission denied"):
        Store.open(store.root)


# --- a device that fails -------------------------------------------------------------------------


class Cut(BaseException):
    """The process is killed: no handler of the code under test runs."""


class Faults:
    """Counts the calls of `os` and fails the one with the given number, before or after its effect."""

    def __init__(self, patch, number=0, error=None, *, after=False):
        self.count = 0
        for name in CALLS:
            patch.setattr(os, name, self.wrap(getattr(os, name), number, error, after))

    def wrap(self, real, number, error, after):
        def call(*arguments, **options):
            self.count += 1
            hit = self.count == number
            if hit and not after:
                raise error
            result = real(*arguments, **options)
            if hit:
                raise error
            return result

        return call


def actions():
    return {
        "install": lambda store: store.install(C, name="c"),
        "rename": lambda store: store.install(B, name="better"),
        "activate": lambda store: store.activate("b"),
        "trial": lambda store: store.activate("b", pending=True),
        "rollback": lambda store: store.rollback(),
        "remove": lambda store: store.remove("b"),
        "gc": lambda store: store.gc(),
    }


def fresh(root):
    store = Store.open(root)
    store.install(A, name="a")
    store.install(B, name="b")
    store.install(UNUSED)
    (root / ".state-1.json.0123456789ab.tmp").write_bytes(b"half")
    store.activate("b")
    store.activate("a")
    return store


def seen(store):
    """All that a store shows."""
    return store.state, tuple(store.list())


def faults():
    disk = [pytest.param(lambda n=n: OSError(n, os.strerror(n)), False, id=errno.errorcode[n]) for n in (
        errno.ENOSPC, errno.EIO, errno.EROFS)]  # fmt: skip
    return [*disk, pytest.param(Cut, False, id="killed-before"), pytest.param(Cut, True, id="killed-after")]


@pytest.mark.parametrize("action", sorted(actions()))
@pytest.mark.parametrize(("make_error", "after"), faults())
def test_a_fault_at_any_call_leaves_a_working_store_that_is_old_or_new(tmp_path, action, make_error, after):
    act = actions()[action]
    store = fresh(tmp_path / "count")
    old = seen(store)
    with pytest.MonkeyPatch.context() as patch:
        counter = Faults(patch)
        act(store)
    new = seen(store)
    assert counter.count >= 3
    for number in range(1, counter.count + 1):
        store = fresh(tmp_path / str(number))
        with pytest.MonkeyPatch.context() as patch:
            Faults(patch, number, make_error(), after=after)
            with contextlib.suppress(EdgeError, Cut):
                act(store)
        check_after_a_fault(Store.open(store.root), old, new)


def check_after_a_fault(store, old, new):
    state, lines = seen(store)
    assert state in (old[0], new[0])
    # An adapter that is there without its name yet, or no longer named but still there: files come
    # before the state that refers to them, and go after it.
    assert {line.digest for line in lines} in (
        {line.digest for line in old[1]},
        {line.digest for line in new[1]},
    )
    assert state.referenced <= {line.digest for line in lines}
    assert all(line.problem is None for line in lines)
    assert store.warnings == ()
    assert loaded(store) in (A, B)
    store.install(C, name="next")
    assert store.activate("next") == DC
    store.activate("base")
    assert store.rollback() == DC
    store.gc()
    assert not [path for path in store.root.rglob("*.tmp")]


def test_a_first_install_cut_anywhere_can_be_run_again(tmp_path):
    def first(root):
        store = Store.open(root)
        store.install(A, name="a")
        store.activate("a")

    with pytest.MonkeyPatch.context() as patch:
        counter = Faults(patch)
        first(tmp_path / "count")
    for number in range(1, counter.count + 1):
        root = tmp_path / str(number) / "store"
        with pytest.MonkeyPatch.context() as patch:
            Faults(patch, number, Cut(), after=number % 2 == 0)
            with contextlib.suppress(Cut):
                first(root)
        first(root)
        assert Store.open(root, create=False).active_digest() == DA


def test_a_state_that_cannot_be_read_just_now_is_not_written_over(store):
    real = os.open

    def failing(path, *rest, **options):
        if path == newest(store)[0]:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", failing)
        assert store.active_digest() == DB  # a reader has the other copy
        with pytest.raises(DiskError, match="Input/output"):
            store.activate("base")
    assert store.active_digest() == DA
    assert store.warnings == ()
