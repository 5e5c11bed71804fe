"""A store on a device that fails: at any call, it is left old or new, and works."""

from __future__ import annotations

import contextlib
import errno
import os

import pytest

from edge_tcur_runtime.errors import (
    EdgeError,
)
from edge_tcur_runtime.store import Store
from stored import CALLS, DA, DC, UNUSED, A, B, C, loaded


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
