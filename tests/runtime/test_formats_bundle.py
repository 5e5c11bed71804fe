"""The bundle: a flat directory in which every byte is promised by the manifest."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from edge_tcur_runtime.errors import (
    BadInputError,
    FileFormatError,
    FormatVersionError,
    IntegrityError,
)
from edge_tcur_runtime.formats import bundle as module
from edge_tcur_runtime.formats.adapter import read_adapter
from edge_tcur_runtime.formats.bundle import (
    BASE_FILE,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    open_bundle,
    parse_manifest,
    serialize_manifest,
)

DATA = Path(__file__).parents[1] / "data"
V1, SKETCH_V1 = DATA / "bundle-v1", DATA / "sketch-v1"
RAW = (V1 / MANIFEST).read_bytes()
FILES = sorted(path.name for path in V1.iterdir() if path.name != MANIFEST)
GROUP = "32x16"
SIZE = json.loads(RAW)["files"][BASE_FILE]["size"]
WEIGHT = json.loads(RAW)["groups"][GROUP]["parameters"][0]


@pytest.fixture
def root(tmp_path):
    """A bundle that a test may damage."""
    return shutil.copytree(V1, tmp_path / "bundle")


def refused(edit):
    """The error with which an edited manifest is refused."""
    document = json.loads(RAW)
    edit(document)
    with pytest.raises(FileFormatError) as caught:
        parse_manifest(json.dumps(document).encode(), "m.json")
    return caught.value


def put(*path_and_value):
    """An edit that sets the value at a path of keys."""
    *path, last, value = path_and_value

    def edit(document):
        for key in path:
            document = document[key]
        document[last] = value

    return edit


# --- every released version keeps opening ----------------------------------------------------------


def test_the_bundle_of_version_1_keeps_opening():
    bundle = open_bundle(V1)
    manifest = bundle.manifest
    assert manifest.base_digest.startswith("sha256:602d2cf7b2eafde9")
    assert set(manifest.files) == set(FILES)
    assert set(manifest.graphs) == set(module.GRAPHS)
    assert manifest.labels == ("0", "1", "2", "3")
    assert manifest.groups[GROUP].n1 == 32
    assert manifest.groups[GROUP].n2 == 16
    assert manifest.groups[GROUP].rank == 3
    assert (manifest.coupling, manifest.transform) == ("layer", "dft")
    assert {name: (len(spec.parameters), spec.blocks) for name, spec in manifest.groups.items()} == {
        "16x16": (8, 2), "32x16": (2, 2), "16x32": (2, 2),
    }  # fmt: skip
    assert manifest.factor_names() == [
        f"{group}.{part}" for group in manifest.groups for part in ("core", "rows", "cols")
    ]
    assert manifest.base_extras is None
    assert manifest.tensors[WEIGHT].shape == (16, 32)
    assert manifest.tensors[WEIGHT].transposed
    assert manifest.inputs["pixel_values"].shape == ("batch", 1, 8, 8)
    assert bundle.graph("infer") == V1 / "infer.onnx"
    assert bundle.path(BASE_FILE) == V1 / "base.bin"
    assert read_adapter(bundle.path(manifest.adapter)).header.base_digest == manifest.base_digest


def test_the_sketch_bundle_of_version_1_keeps_opening():
    bundle = open_bundle(SKETCH_V1)
    manifest = bundle.manifest
    assert set(manifest.graphs) == {"infer", "step"}
    assert manifest.parts == ("core", "left", "right")
    assert (manifest.coupling, manifest.transform) == ("none", "identity")
    assert all(spec.blocks == len(spec.parameters) for spec in manifest.groups.values())
    assert dict(manifest.extras) == {"module.classifier.bias": (4,), "module.classifier.weight": (4, 16)}
    assert manifest.factor_names()[-4:] == ["32x16.left", "32x16.right", *manifest.extras]
    own = load_file(bundle.path(manifest.base_extras))
    assert {name: value.shape for name, value in own.items()} == dict(manifest.extras)
    trained = read_adapter(bundle.path(manifest.adapter)).extras
    assert all((own[name] != trained[name]).any() for name in own)
    raw = (SKETCH_V1 / MANIFEST).read_bytes()
    assert serialize_manifest(parse_manifest(raw, "m.json")) == raw


def test_a_graph_that_was_not_exported_is_none():
    bundle = open_bundle(V1, verify=False)
    graphs = {role: name for role, name in bundle.manifest.graphs.items() if role != "step"}
    assert replace(bundle, manifest=replace(bundle.manifest, graphs=graphs)).graph("step") is None


def test_a_manifest_is_written_as_it_was_read():
    manifest = parse_manifest(RAW, "m.json")
    assert serialize_manifest(manifest) == RAW
    assert parse_manifest(serialize_manifest(manifest), "m.json") == manifest


def test_files_that_the_manifest_does_not_name_are_left_alone(root):
    (root / "notes.txt").write_text("mine")
    assert open_bundle(root).manifest.labels


@pytest.mark.parametrize("root", [V1, SKETCH_V1], ids=["indices", "sketch"])
def test_no_file_of_version_1_tells_where_it_was_made(root):
    for path in root.iterdir():
        for place in (b"/work", b"/tmp", b"/root", b"/home"):
            assert place not in path.read_bytes(), path.name


# --- every byte ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_an_altered_file_is_refused(root, name):
    path = root / name
    raw = bytearray(path.read_bytes())
    for position in {0, len(raw) // 2, len(raw) - 1}:
        raw[position] ^= 1
        path.write_bytes(raw)
        with pytest.raises(IntegrityError, match="altered") as caught:
            open_bundle(root)
        assert caught.value.where == str(path)
        assert caught.value.hint
        raw[position] ^= 1
    path.write_bytes(raw)
    open_bundle(root)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_length_is_refused_without_reading_it(root, name, monkeypatch):
    monkeypatch.setattr(module, "digest_file", lambda path: pytest.fail("read") if path.name == name else (
        module.open_bundle(V1, verify=False).manifest.files[path.name].sha256))  # fmt: skip
    path = root / name
    raw = path.read_bytes()
    for other in (b"", raw[:-1], raw + b"\0"):
        path.write_bytes(other)
        with pytest.raises(IntegrityError, match=f"{len(other)} bytes; the manifest says {len(raw)}"):
            open_bundle(root)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["missing", "link", "dangling", "directory", "fifo"])
def test_what_is_no_regular_file_is_refused(root, name, kind):
    path = root / name
    original = path.rename(root / "elsewhere")
    make = {
        "missing": lambda: None,
        "link": lambda: path.symlink_to(original),
        "dangling": lambda: path.symlink_to(root / "nowhere"),
        "directory": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
    }
    make[kind]()
    with pytest.raises(IntegrityError, match="missing, or not a regular file") as caught:
        open_bundle(root)
    assert caught.value.where == str(path)


def test_a_file_that_cannot_be_read_is_bad_input_and_no_defect(root, monkeypatch):
    def fail(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(module, "digest_file", fail)
    with pytest.raises(BadInputError, match="cannot read: Permission denied") as caught:
        open_bundle(root)
    assert caught.value.where == str(root / "adapter.safetensors")


def test_a_name_too_long_for_the_file_system_is_bad_input(root):
    document = json.loads(RAW)
    document["files"]["x" * 300] = {"size": 0, "sha256": "sha256:" + "0" * 64}
    (root / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(BadInputError, match="cannot read"):
        open_bundle(root)


# --- the manifest ----------------------------------------------------------------------------------


def test_a_directory_without_a_manifest_is_refused(tmp_path):
    for root in (tmp_path, tmp_path / "missing"):
        with pytest.raises(BadInputError, match="cannot read") as caught:
            open_bundle(root)
        assert caught.value.where == str(root / MANIFEST)


def test_a_manifest_that_is_no_regular_file_or_too_large_is_refused(root):
    path = root / MANIFEST
    with path.open("wb") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    with pytest.raises(FileFormatError, match="the limit is"):
        open_bundle(root)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(BadInputError, match="not a regular file"):
        open_bundle(root)


@pytest.mark.parametrize("raw", [b"", b"\xff", b"[]", b"{", b'{"a":1,"a":2}', b'{"format_version":1e999}'])
def test_a_manifest_that_is_no_plain_json_is_refused(raw):
    with pytest.raises(FileFormatError) as caught:
        parse_manifest(raw, "m.json")
    assert caught.value.where == "m.json"


def test_a_manifest_cut_anywhere_is_refused():
    for length in range(0, len(RAW) - 2, 7):
        with pytest.raises(FileFormatError):
            parse_manifest(RAW[:length], "m.json")


def test_a_newer_version_is_refused_as_newer_whatever_else_it_holds():
    document = {"format_version": 2, "kind": "edge-tcur-bundle", "shards": []}
    with pytest.raises(FormatVersionError, match="version 2 is newer than 1"):
        parse_manifest(json.dumps(document).encode(), "m.json")


@pytest.mark.parametrize("key", list(json.loads(RAW)))
def test_a_missing_field_is_named(key):
    if key in {"adapter", "canary", "device", "base_extras"}:
        document = json.loads(RAW)
        del document[key]
        assert getattr(parse_manifest(json.dumps(document).encode(), "m.json"), key) is None
    else:
        assert f"'{key}' is missing" in refused(lambda document: document.pop(key)).message


def test_an_unknown_field_suggests_the_nearest_one():
    error = refused(put("lables", []))
    assert error.message == "unknown field 'lables'"
    assert error.hint == "did you mean 'labels'?"
    assert refused(put("graphs", "trian", "train.onnx")).hint == "did you mean 'train'?"


@pytest.mark.parametrize(
    "name", ["../base.bin", "a/b", "..", ".", "", "/etc/passwd", "a\\b", "a\0b", MANIFEST, "a\nb", "\x1b[2J"]
)
def test_a_file_name_that_leaves_the_directory_is_refused(name):
    entry = {"size": 0, "sha256": "sha256:" + "0" * 64}
    assert "is not allowed" in refused(put("files", name, entry)).message


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put("kind", "wheel"), "expected one of edge-tcur-bundle"),
        (put("format_version", "1"), "must be an integer"),
        (put("files", []), "must be an object"),
        (put("files", BASE_FILE, "size", -1), "'size' is -1"),
        (put("files", BASE_FILE, "size", 2**60), "'size' is"),
        (put("files", BASE_FILE, "sha256", 1), "must be a string"),
        (put("files", BASE_FILE, "mode", 1), "unknown field 'mode'"),
        (lambda document: document["files"].pop(BASE_FILE), "'base.bin' is used but not listed"),
        (put("graphs", "infer", "other.onnx"), "'other.onnx' is used but not listed"),
        (put("graphs", "infer", "../infer.onnx"), "'../infer.onnx' is used but not listed"),
        (put("canary", "other"), "'other' is used but not listed"),
        (put("adapter", "../a.safetensors"), "is used but not listed"),
        (put("base_extras", "../a.safetensors"), "is used but not listed"),
        (put("base_extras", 1), "'base_extras' must be a string"),
        (put("inputs", "pixel_values", "dtype", "float16"), "expected one of float32, int64"),
        (put("inputs", "pixel_values", "shape", [1.5]), "sizes or axis names"),
        (put("groups", GROUP, "rank", 0), "'rank' is 0"),
        (put("groups", GROUP, "rank", 17), "the rank 17"),
        (put("groups", GROUP, "blocks", 0), "'blocks' is 0"),
        (put("groups", GROUP, "blocks", 3), "3 blocks do not divide 2 weights"),
        (put("groups", GROUP, "blocks", 4), "4 blocks do not divide 2 weights"),
        (put("coupling", "none"), "group '16x16': 2 blocks; coupling 'none' has 8"),
        (put("coupling", "all"), "group '16x16': 2 blocks; coupling 'all' has 1"),
        (put("groups", GROUP, "blocks", True), "must be an integer, not bool"),
        (lambda document: document["groups"][GROUP].pop("blocks"), "'blocks' is missing"),
        (put("parts", ["core"]), "'parts' are core"),
        (put("parts", []), "'parts' are "),
        (put("parts", ["core", "rows", "left"]), "'parts' are core, rows, left"),
        (put("parts", ["rows", "cols", "core"]), "'parts' are rows, cols, core"),
        (put("parts", "core"), "must be a list"),
        (put("groups", GROUP, "n1", 33), "missing from 'tensors' or is not (33, 16)"),
        (put("groups", GROUP, "parameters", []), "at least one weight"),
        (put("groups", GROUP, "parameters", [WEIGHT, WEIGHT]), "each once"),
        (put("groups", GROUP, "parameters", ["other", "more"]), "the weight 'other' is missing"),
        (lambda document: document["tensors"].pop(WEIGHT), f"the weight '{WEIGHT}' is missing"),
        (put("tensors", WEIGHT, "transposed", False), "or is not (32, 16)"),
        (put("tensors", WEIGHT, "transposed", 1), "must be true or false"),
        (put("tensors", WEIGHT, "shape", [16, -32]), "must hold sizes"),
        (put("tensors", WEIGHT, "shape", [16, True]), "must hold sizes"),
        (put("tensors", WEIGHT, "dtype", "float16"), "expected one of float32, int8, int4"),
        (put("tensors", WEIGHT, "dtype", "int8"), "'scales' is missing"),
        (put("precision", "int2"), "expected one of fp32, int8, int4"),
        (put("tensors", WEIGHT, "offset", -4), "'offset' is -4"),
        (put("tensors", WEIGHT, "offset", SIZE), "ends behind 'base.bin'"),
        (put("tensors", WEIGHT, "offset", SIZE - 2047), "ends behind 'base.bin'"),
        (put("extras", {"head": [-1]}), "must hold sizes"),
        (put("labels", ["a", 1]), "strings only"),
        (put("labels", ["a", "a"]), "'labels'"),
        (put("preprocessing", "image"), "must be an object"),
        (put("coupling", "ring"), "expected one of none, layer, all"),
        (put("transform", "wavelet"), "expected one of dft, dct, identity"),
        (put("opset", 0), "'opset' is 0"),
        (put("versions", "torch", 2), "must be a string"),
        (put("device", 3), "must be a string"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_refused_and_named(edit, message):
    assert message in str(refused(edit))
