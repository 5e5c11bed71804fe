"""A power cut during an update, on a loop-mounted ext4: what the disk holds before and after every call.

The image is copied at every call, which is what a cut at that moment leaves: blocks that the kernel still
holds are not in it. Each different copy is then mounted, its journal replayed, and the device started.
Needs root and a kernel that mounts loop devices; elsewhere it is skipped.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess

import pytest

CALLS = ("open", "write", "fsync", "replace", "rename", "unlink", "remove", "symlink", "mkdir")


@contextlib.contextmanager
def mounted(image, place):
    done = subprocess.run(["mount", "-o", "loop", image, place], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no loop mounts here: {done.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.fixture
def disk(tmp_path):
    """An ext4 image of 8 MiB and the directory where it is mounted."""
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("needs root and mkfs.ext4")
    image, place = tmp_path / "disk.img", tmp_path / "disk"
    image.write_bytes(bytes(8 * 2**20))
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    place.mkdir()
    return image, place


def test_power_cut_at_every_call_leaves_old_or_new(simulator, device, adapters, disk, tmp_path):
    image, place = disk
    first = simulator.add(adapters[0])
    simulator.publish()
    device.store_path = place / "store"
    copies = []

    def copy(_name):
        digest = hashlib.sha256(image.read_bytes()).hexdigest()
        if not copies or copies[-1][0] != digest:
            path = tmp_path / f"cut-{len(copies)}.img"
            shutil.copyfile(image, path)
            copies.append((digest, path))

    with mounted(image, place):
        device.update(simulator)
        os.sync()
        second = simulator.add(adapters[1])
        simulator.publish()
        with pytest.MonkeyPatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, _watched(getattr(os, name), copy))
            device.update(simulator)
        copy("end")
    seen = []
    for _, path in copies:
        with mounted(path, place):
            active = device.active
            assert active in (first.digest, second.digest)
            device.store.load("active")
            seen.append(active)
            assert device.update(simulator).active == second.digest
    assert len(copies) > 5
    assert seen[0] == first.digest
    assert seen[-1] == second.digest  # what was reported as done is on the disk
    assert seen == sorted(seen, key=(first.digest, second.digest).index)  # no way back in between


def _watched(function, watch):
    inside = []

    def call(*arguments, **options):
        if inside:
            return function(*arguments, **options)
        inside.append(1)
        try:
            watch(function.__name__)
            result = function(*arguments, **options)
            watch(function.__name__)
            return result
        finally:
            inside.pop()

    return call
