"""A process that is killed at any call of an install or an activation: the store is old or new, and works.

`test_store_faults.py` raises an exception at each call, through which `finally` and `with` still run. Here
the process ends at once, with its locks and open files, as at a kill or a loss of power of the process.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edge_tcur_runtime.store import Store
from stored import DA, DC, A, B, C

KILLED, DONE = 9, 0
ACTIONS = {
    "install": lambda root: Store.open(root).install(C, name="c"),
    "activate": lambda root: Store.open(root).activate("b"),
    "trial": lambda root: Store.open(root).activate("b", pending=True),
    "rollback": lambda root: Store.open(root).rollback(),
}


def seen(store):
    """All that a store shows."""
    return store.state, tuple(line.digest for line in store.list())


@pytest.fixture
def saved(tmp_path):
    """A store in which B was in use before A."""
    store = Store.open(tmp_path / "saved")
    store.install(A, name="a")
    store.install(B, name="b")
    store.activate("b")
    store.activate("a")
    return store.root


@pytest.mark.parametrize("action", ACTIONS)
def test_killed_at_any_call_the_store_is_old_or_new_and_the_action_can_be_run_again(
    saved, tmp_path, run_killed, action
):
    old = seen(Store.open(saved))
    finished = Path(shutil.copytree(saved, tmp_path / "finished"))
    code, calls = run_killed(lambda: ACTIONS[action](finished), 0)
    assert (code, calls > 3) == (DONE, True)
    new = seen(Store.open(finished))
    assert new != old
    states = set()
    for number in range(1, calls + 1):
        root = Path(shutil.copytree(saved, tmp_path / str(number)))
        assert run_killed(lambda root=root: ACTIONS[action](root), number)[0] == KILLED, number
        store = Store.open(root)  # the lock went with the process
        state, digests = seen(store)
        assert state in (old[0], new[0]), number
        # A file comes before the state that names it.
        assert set(digests) in (set(old[1]), set(new[1])), number
        states.add(state == new[0])
        assert store.load("active") is not None
        store.activate("base")
        assert store.install(C, name="c") == DC
        assert store.activate("c") == DC
        assert not [line for line in store.list() if line.problem is not None]
    assert states == {False, True}


def test_killed_at_any_call_of_a_first_install_it_can_be_run_again(tmp_path, run_killed):
    def first(root):
        store = Store.open(root)
        store.install(A, name="a")
        store.activate("a")

    code, calls = run_killed(lambda: first(tmp_path / "finished"), 0)
    assert (code, calls > 5) == (DONE, True)
    for number in range(1, calls + 1):
        root = tmp_path / str(number)
        assert run_killed(lambda root=root: first(root), number)[0] == KILLED, number
        first(root)
        assert Store.open(root, create=False).active_digest() == DA, number
