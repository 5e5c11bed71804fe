"""A bundle's file that is swapped after the bundle was opened: refused by whatever opens a session of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from edge_tcur_runtime.engines import open_engine, session, verified
from edge_tcur_runtime.engines.checks import run_pass
from edge_tcur_runtime.engines.providers import ON_CPU
from edge_tcur_runtime.errors import IntegrityError
from edge_tcur_runtime.formats.bundle import open_bundle
from edge_tcur_runtime.installed import OnnxRuntimeInstall, find_onnxruntime
from edge_tcur_runtime.predict import Model

V1 = Path(__file__).parents[1] / "data" / "bundle-v1"
INSTALLED = find_onnxruntime()
pytestmark = pytest.mark.skipif(INSTALLED is None, reason="ONNX Runtime is not installed")
needs_training = pytest.mark.skipif(
    INSTALLED is None or not INSTALLED.training,
    reason="the installed ONNX Runtime has no training interface (onnxruntime-training-cpu has)",
)
UNKNOWN_FIELD = b"\xba\x3e\x01a"  # number 999 of a message: ONNX Runtime loads the graph as before


def predicting(bundle):
    return Model(bundle, threads=1, check=False)


def stepping(bundle):
    return open_engine("ort-step", bundle, threads=1)


def training(bundle):
    return open_engine("ort-training", bundle, threads=1)


def self_checking(bundle):
    return run_pass(bundle, "infer", ON_CPU, 1)


USES = [
    pytest.param(predicting, "infer.onnx"),
    pytest.param(predicting, "base.bin"),
    pytest.param(stepping, "step.onnx"),
    pytest.param(stepping, "base.bin"),
    pytest.param(self_checking, "infer.onnx"),
    pytest.param(training, "train.onnx", marks=needs_training),
    pytest.param(training, "checkpoint", marks=needs_training),
    pytest.param(training, "base.bin", marks=needs_training),
]


def altered(name, raw):
    """The file of the bundle, altered so that a library still loads it."""
    if name != "base.bin":
        return raw + UNKNOWN_FIELD  # behind a checkpoint, a FlatBuffer, it is read by nobody
    changed = bytearray(raw)
    changed[len(raw) // 2] ^= 1
    return bytes(changed)


@pytest.mark.parametrize(("use", "name"), USES)
def test_a_file_that_was_swapped_after_the_check_is_refused(tmp_path, use, name):
    bundle = open_bundle(Path(shutil.copytree(V1, tmp_path / "bundle")))
    use(bundle)
    path = bundle.path(name)
    raw = altered(name, path.read_bytes())
    path.unlink()  # another file: the first session's mapping stays
    path.write_bytes(raw)
    with pytest.raises(IntegrityError) as caught:
        use(bundle)
    assert caught.value.where == str(path)


def test_the_altered_graph_would_have_been_loaded(tmp_path):
    root = Path(shutil.copytree(V1, tmp_path / "bundle"))
    path = root / "infer.onnx"
    path.write_bytes(path.read_bytes() + UNKNOWN_FIELD)
    assert session.open_session(path, threads=1).get_outputs()


class Options:
    """Takes a session's configuration."""

    def __init__(self):
        self.entries = {}

    def add_session_config_entry(self, key, value):
        self.entries[key] = value


def test_where_the_library_takes_bytes_the_verified_ones_are_handed_over(bundle, monkeypatch):
    """A file that is swapped and swapped back meanwhile was never read."""
    stock = OnnxRuntimeInstall("onnxruntime", "1.32.0", training=False)
    monkeypatch.setattr(verified, "require_onnxruntime", lambda: stock)
    options, path = Options(), bundle.graph("infer")
    source = verified.graph_source(path, bundle.manifest.files, options)
    assert source == path.read_bytes()
    assert options.entries == {"session.model_external_initializers_file_folder_path": str(bundle.root)}


def test_where_the_library_takes_bytes_altered_ones_are_refused_before(tmp_path, monkeypatch):
    stock = OnnxRuntimeInstall("onnxruntime", "1.32.0", training=False)
    monkeypatch.setattr(verified, "require_onnxruntime", lambda: stock)
    bundle = open_bundle(Path(shutil.copytree(V1, tmp_path / "bundle")))
    path = bundle.graph("infer")
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes(raw)
    with pytest.raises(IntegrityError, match="altered"):
        verified.graph_source(path, bundle.manifest.files, Options())


@pytest.mark.parametrize(
    ("version", "expected"), [("1.19.2", False), ("1.22.0", True), ("1.32.0", True), ("2.0", True)]
)
def test_which_versions_take_bytes(version, expected):
    assert verified.takes_bytes(version) is expected


def test_the_installed_library_answers_the_same_from_what_it_takes(bundle):
    """From bytes with the base's folder, or from the path: the same graph over the same base."""
    path = bundle.graph("infer")
    plain = session.open_session(path, threads=1)
    checked = session.open_session(path, threads=1, files=bundle.manifest.files)
    fed = {"pixel_values": np.ones((2, 1, 8, 8), np.float32)}
    np.testing.assert_array_equal(plain.run(["logits"], fed)[0], checked.run(["logits"], fed)[0])
