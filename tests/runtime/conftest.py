"""The bundles of version 1 and the user's data, which most modules of the runtime's tests read."""

from pathlib import Path

import pytest

from edge_tcur_runtime.data import load_dataset
from edge_tcur_runtime.formats.bundle import open_bundle

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
