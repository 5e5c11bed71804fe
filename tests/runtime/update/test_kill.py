"""A process that is killed at any call of an update: the device answers with the old or the new adapter,
and the next update finishes by itself."""

from __future__ import annotations

import shutil

import pytest

KILLED, DONE = 9, 0  # what `run_killed` of tests/runtime/conftest.py returns


@pytest.fixture
def second(simulator, device, adapters):
    """Version 1 is in use, version 2 is offered: the digests of both."""
    first = simulator.add(adapters[0])
    simulator.publish()
    device.update(simulator)
    offer = simulator.add(adapters[1])
    simulator.rotate("timestamp")
    simulator.publish()
    return first.digest, offer.digest


def test_killed_at_every_call_it_is_old_or_new_and_the_next_update_recovers(
    simulator, device, second, tmp_path, run_killed
):
    old, new = second
    saved = tmp_path / "saved"
    shutil.copytree(device.store_path, saved, symlinks=True)

    def restore():
        shutil.rmtree(device.store_path)
        shutil.copytree(saved, device.store_path, symlinks=True)

    code, calls = run_killed(lambda: device.update(simulator), 0)
    assert code == DONE
    assert device.active == new
    assert calls > 40
    seen = set()
    for number in range(1, calls + 1):
        restore()
        code, _ = run_killed(lambda: device.update(simulator), number)
        assert code == KILLED, number
        assert device.active in (old, new), number
        seen.add(device.active)
        device.store.load("active")  # whole, whichever it is
        result = device.update(simulator)
        assert (result.active, device.state["trying"]) == (new, None), number
        assert device.state["committed"]["digest"] == new
        assert not list(device.store_path.glob("update/metadata/tmp*"))
    assert seen == {old, new}


def test_killed_at_every_call_of_the_first_update(simulator, device, adapters, run_killed):
    """The device has no store yet: no kill leaves it without a way on."""
    offer = simulator.add(adapters[0])
    simulator.publish()
    code, calls = run_killed(lambda: device.update(simulator), 0)
    assert code == DONE
    for number in range(1, calls + 1, 4):
        shutil.rmtree(device.store_path)
        run_killed(lambda: device.update(simulator), number)
        assert device.active in (None, offer.digest), number
        assert device.update(simulator).active == offer.digest, number
