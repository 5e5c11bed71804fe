"""A disk that is full, or not writable, at any call of an update: exit code 7, old or new, and a way on."""

from __future__ import annotations

import errno
import os
import shutil

import pytest

from edge_tcur_runtime.errors import EdgeError, ExitCode

CALLS = ("open", "write", "fsync", "replace", "unlink", "symlink", "mkdir")


class Failing:
    """Fails the n-th call of the named functions of `os` and every one after it."""

    def __init__(self, monkeypatch, number, code):
        self.count = 0
        for name in CALLS:
            monkeypatch.setattr(os, name, self.wrap(name, getattr(os, name), number, code))

    def wrap(self, name, real, number, code):
        def call(path, *arguments, **options):
            reading = name == "open" and not arguments[0] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if reading or (name == "write" and path <= 2):
                return real(path, *arguments, **options)
            self.count += 1
            if 0 < number <= self.count:
                raise OSError(code, os.strerror(code), None if isinstance(path, int) else str(path))
            return real(path, *arguments, **options)

        return call


def outcome(action):
    """The error that an action ends with; None where it ends well."""
    try:
        action()
    except EdgeError as error:
        return error
    return None


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_failing_disk_is_exit_code_7_and_leaves_old_or_new(simulator, device, adapters, tmp_path, code):
    first = simulator.add(adapters[0])
    simulator.publish()
    device.update(simulator)
    second = simulator.add(adapters[1])
    simulator.publish()
    saved = tmp_path / "saved"
    shutil.copytree(device.store_path, saved, symlinks=True)
    with pytest.MonkeyPatch.context() as patch:
        failing = Failing(patch, 0, code)
        device.update(simulator)
    assert failing.count > 30
    for number in range(1, failing.count + 1):
        shutil.rmtree(device.store_path)
        shutil.copytree(saved, device.store_path, symlinks=True)
        with pytest.MonkeyPatch.context() as patch:
            Failing(patch, number, code)
            failed = outcome(lambda: device.update(simulator))
        assert failed is None or (failed.exit_code is ExitCode.DISK and failed.hint), (number, failed)
        assert device.active in (first.digest, second.digest), number
        assert device.update(simulator).active == second.digest, number
