"""A process that is killed at any call of an install or an activation: the store is old or new, and works.

`test_store.py` raises an exception at each call, through which `finally` and `with` still run. Here the
process ends at once, with its locks and open files, as at a kill or a loss of power of the process.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from edge_tcur_runtime.formats.adapter import Adapter, AdapterHeader, serialize_adapter
from edge_tcur_runtime.formats.digest import digest_bytes
from edge_tcur_runtime.formats.factors import Factors, GroupSpec
from edge_tcur_runtime.store import Store

KILLED, DONE = 9, 0


def adapter_bytes(seed):
    core = np.random.default_rng(seed).normal(size=(2, 2, 2)).astype(np.float32)
    factors = Factors(core, np.array([[0, 3]], np.int32), np.array([[1, 4]], np.int32))
    header = AdapterHeader(
        "sha256:" + "b" * 64, {"q": GroupSpec(("q.0", "q.1"), 4, 5)}, "text-classification", ("a", "b")
    )
    return serialize_adapter(Adapter(header, {"q": factors}))


A, B, C = (adapter_bytes(seed) for seed in range(3))
DA, DB, DC = map(digest_bytes, (A, B, C))
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
