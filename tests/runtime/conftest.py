"""The bundles of version 1 and the user's data, which most modules of the runtime's tests read."""

from dataclasses import replace
from pathlib import Path

import pytest

from edge_tcur_runtime.data import load_dataset
from edge_tcur_runtime.formats.bundle import FileEntry, open_bundle
from edge_tcur_runtime.formats.digest import digest_file

DATA = Path(__file__).parents[1] / "data"


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
