"""A bundle's file that is swapped after the bundle was opened: refused by whatever opens a session of it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from edge_tcur_runtime.canary import read_canary
from edge_tcur_runtime.engines import open_engine, session, verified
from edge_tcur_runtime.engines.checks import run_pass
from edge_tcur_runtime.engines.providers import ON_CPU
from edge_tcur_runtime.errors import FileFormatError, IntegrityError
from edge_tcur_runtime.formats import content
from edge_tcur_runtime.formats.adapter import parse_adapter, serialize_adapter
from edge_tcur_runtime.formats.bundle import FileEntry, ReferenceSpec, open_bundle, serialize_manifest
from edge_tcur_runtime.installed import OnnxRuntimeInstall, find_onnxruntime
from edge_tcur_runtime.origin import blank_adapter, bundle_adapter
from edge_tcur_runtime.predict import Model
from edge_tcur_runtime.preprocess import build_preprocessor
from edge_tcur_runtime.reference import read_reference, reference_tensors

DATA = Path(__file__).parents[1] / "data"
V1, SKETCH_V1 = DATA / "bundle-v1", DATA / "sketch-v1"
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


# --- files that are parsed here and not by a library -----------------------------------------------------


def answering(bundle):
    return Model(bundle, threads=1)


def own_adapter(bundle):
    return bundle_adapter(bundle)


def blank(bundle):
    return blank_adapter(bundle)


def other_adapter(raw):
    """A whole adapter file with other cores: its own digest inside is right."""
    own = parse_adapter(raw)
    factors = {group: part.with_core(part.core * np.float32(2)) for group, part in own.factors.items()}
    return serialize_adapter(replace(own, factors=factors))


def other_tensors(raw):
    """The same tensors with other numbers, of the same size."""
    tensors = safetensors.numpy.load(raw)
    return safetensors.numpy.save({name: value + value.dtype.type(1) for name, value in tensors.items()})


def other_tokenizer(raw):
    return raw.replace(b'"hello"', b'"olleh"')


@pytest.fixture
def rich(tmp_path, resealed):
    """A bundle with every small file that a device parses."""
    root = Path(shutil.copytree(SKETCH_V1, tmp_path / "bundle"))
    bundle = open_bundle(root)
    name = next(iter(bundle.manifest.extras))
    value = bundle_adapter(bundle).extras[name]
    (root / "extras.safetensors").write_bytes(safetensors.numpy.save({name: value}))
    inputs = {n: v for n, v in read_canary(root, bundle.manifest).inputs.items()}
    count = len(next(iter(inputs.values())))
    (root / "reference.safetensors").write_bytes(
        safetensors.numpy.save(reference_tensors(inputs, np.zeros(count, np.int64)))
    )
    words = {"[UNK]": 0, "hello": 1}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.save(str(root / "tokenizer.json"))
    manifest = replace(
        bundle.manifest,
        base_extras="extras.safetensors",
        reference=ReferenceSpec("reference.safetensors", count, "base", 0.5, 1.0),
        files={**bundle.manifest.files, **dict.fromkeys(SMALL, FileEntry(0, ""))},
    )
    (root / "manifest.json").write_bytes(serialize_manifest(manifest))
    return resealed(root)


SMALL = ("extras.safetensors", "reference.safetensors", "tokenizer.json")


def tokenizing(bundle):
    spec = {"kind": "text", "tokenizer": "tokenizer.json", "max_length": 8, "pad_id": 0,
            "inputs": ["input_ids"], "buckets": [8]}  # fmt: skip
    return build_preprocessor(spec, bundle.root, bundle.manifest.files)


@pytest.mark.parametrize(
    ("use", "name", "change"),
    [
        (answering, "canary.safetensors", other_tensors),
        (self_checking, "canary.safetensors", other_tensors),
        (self_checking, "adapter.safetensors", other_adapter),
        (own_adapter, "adapter.safetensors", other_adapter),
        (blank, "adapter.safetensors", other_adapter),
        (blank, "extras.safetensors", other_tensors),
        (read_reference, "reference.safetensors", other_tensors),
        (tokenizing, "tokenizer.json", other_tokenizer),
    ],
)
def test_a_small_file_that_was_swapped_for_another_whole_one_is_refused(rich, use, name, change):
    """Of the same size and format: only the digest of what is parsed tells."""
    use(rich)
    path = rich.path(name)
    raw = change(path.read_bytes())
    assert raw != path.read_bytes()
    path.write_bytes(raw)
    with pytest.raises(IntegrityError, match=r"altered|bytes; the manifest says") as caught:
        use(rich)
    assert caught.value.where == str(path)


@pytest.mark.parametrize("when", ["link", "gone", "longer"])
def test_a_small_file_that_is_no_file_of_its_size_any_more_is_refused(rich, when):
    path = rich.path("canary.safetensors")
    raw = path.read_bytes()
    path.unlink()
    if when == "link":
        (rich.root / "elsewhere").write_bytes(raw)
        path.symlink_to(rich.root / "elsewhere")
    elif when == "longer":
        path.write_bytes(raw + b"x")
    with pytest.raises(IntegrityError):
        read_canary(rich.root, rich.manifest)


def test_a_swap_between_the_check_and_the_read_is_seen(rich, monkeypatch):
    """What is digested is what was read, once."""
    path, real, reads = rich.path("canary.safetensors"), content.read_bounded, []

    def swapped(place, limit):
        raw = real(place, limit)
        reads.append(place)
        return other_tensors(raw) if place == path else raw

    monkeypatch.setattr(content, "read_bounded", swapped)
    with pytest.raises(IntegrityError, match="altered"):
        read_canary(rich.root, rich.manifest)
    assert reads == [path]


def test_a_tokenizer_that_the_manifest_does_not_list_is_not_read(rich):
    files = {name: entry for name, entry in rich.manifest.files.items() if name != "tokenizer.json"}
    with pytest.raises(FileFormatError, match=r"'tokenizer\.json' is used but not listed"):
        tokenizing(replace(rich, manifest=replace(rich.manifest, files=files)))
