"""The store of adapters: content addressing, names, states in two copies, several processes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import subprocess
import sys

import pytest

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
from edge_tcur_runtime.store import Store
from stored import BASE, CALLS, DA, DB, DC, HEX, OTHER_BASE, A, B, C, adapter_bytes, loaded


@pytest.fixture
def store(tmp_path):
    """A store with `a` active after `b`: rollback goes to `b`."""
    opened = Store.open(tmp_path / "store")
    opened.install(A, name="a")
    opened.install(B, name="b")
    opened.activate("b")
    opened.activate("a")
    return opened


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
