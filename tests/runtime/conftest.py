"""The bundles of version 1 and the user's data, which most modules of the runtime's tests read."""

import contextlib
import os
from dataclasses import replace
from pathlib import Path

import pytest

from edge_tcur_runtime.data import load_dataset
from edge_tcur_runtime.formats.bundle import FileEntry, open_bundle
from edge_tcur_runtime.formats.digest import digest_file

DATA = Path(__file__).parents[1] / "data"
CALLS = ("open", "write", "fsync", "replace", "rename", "unlink", "remove", "symlink", "mkdir")
KILLED, DONE = 9, 0


@pytest.fixture(scope="module")
def bundle():
    return open_bundle(DATA / "bundle-v1")


@pytest.fixture(scope="module")
def sketched():
    return open_bundle(DATA / "sketch-v1")


@pytest.fixture(scope="module")
def user():
    return load_dataset(DATA / "user.npz", "image", image_size=(8, 8), channels=1)


@pytest.fixture(scope="session")
def resealed():
    """Opens a bundle that was changed, as if it had been exported so: the digests are those of its files."""

    def reseal(root):
        opened = open_bundle(root, verify=False)
        there = [root / name for name in opened.manifest.files if (root / name).exists()]
        entries = {path.name: FileEntry(path.stat().st_size, digest_file(path)) for path in there}
        files = {**opened.manifest.files, **entries}
        return replace(opened, manifest=replace(opened.manifest, files=files))

    return reseal


def _run_killed(act, number):
    """Runs `act` in a child that ends right before its n-th call; the exit status, and calls made."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        count, real_write = 0, os.write

        def wrap(function):
            def call(*arguments, **options):
                nonlocal count
                count += 1
                if count == number:
                    os._exit(KILLED)
                return function(*arguments, **options)

            return call

        for name in CALLS:
            setattr(os, name, wrap(getattr(os, name)))
        with contextlib.suppress(BaseException):
            act()
            real_write(write_end, str(count).encode())
            os._exit(DONE)
        os._exit(1)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), int(said or 0)


@pytest.fixture(scope="session")
def run_killed():
    """Runs a function in a child that ends before its n-th call of the system; 0 lets it end by itself."""
    return _run_killed
