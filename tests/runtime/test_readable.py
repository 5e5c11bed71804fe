"""Graphs of an opset or IR that the installed ONNX Runtime does not read."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from edge_tcur_runtime import doctor
from edge_tcur_runtime.cli import device
from edge_tcur_runtime.cli.framework import run
from edge_tcur_runtime.engines import readable
from edge_tcur_runtime.engines.engine import open_engine
from edge_tcur_runtime.engines.readable import Stamp, newest_readable, read_stamp
from edge_tcur_runtime.errors import IncompatibleError
from edge_tcur_runtime.formats.bundle import open_bundle, parse_manifest, serialize_manifest
from edge_tcur_runtime.formats.digest import digest_file
from edge_tcur_runtime.predict import Model


def graph_of(opset, ir_version):
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "g", [value("x", 1, [1])], [value("y", 1, [1])]
    )
    others = [helper.make_opsetid("com.microsoft", 1)]
    opsets = [helper.make_opsetid("", opset), *others]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)


def test_the_newest_versions_are_those_up_to_which_graphs_load():
    newest = newest_readable()
    assert newest.opset >= 20
    assert newest.ir_version >= 10

    def load(opset, ir_version):
        raw = graph_of(opset, ir_version).SerializeToString()
        return onnxruntime.InferenceSession(raw, providers=["CPUExecutionProvider"])

    load(newest.opset, newest.ir_version)
    for opset, ir_version in ((newest.opset + 1, 10), (20, newest.ir_version + 1)):
        with pytest.raises(Exception, match=r"opset|IR version"):
            load(opset, ir_version)


@given(st.integers(1, 2**31), st.integers(1, 2**31))
def test_versions_are_read_without_the_graph(tmp_path_factory, opset, ir_version):
    path = tmp_path_factory.getbasetemp() / "stamp.onnx"
    onnx.save(graph_of(opset, ir_version), path)
    assert read_stamp(path) == Stamp(opset, ir_version)


@given(st.binary(max_size=64))
def test_what_is_no_onnx_file_has_no_versions_that_stop_it(tmp_path_factory, raw):
    path = tmp_path_factory.getbasetemp() / "other.onnx"
    path.write_bytes(raw)
    read_stamp(path)  # says what is there, or nothing


@pytest.fixture
def restamped(bundle, tmp_path):
    """The bundle with a graph, or the manifest, of other versions; digests are right."""
    bundle_copy = tmp_path / "bundle"
    shutil.copytree(bundle.root, bundle_copy)

    def call(role=None, opset=20, ir_version=10):
        path = bundle_copy / "manifest.json"
        manifest = parse_manifest(path.read_bytes(), "manifest.json")
        if role is None:
            manifest = replace(manifest, opset=opset, ir_version=ir_version)
        else:
            graph = bundle_copy / manifest.graphs[role]
            model = onnx.load(str(graph), load_external_data=False)
            model.ir_version = ir_version
            next(entry for entry in model.opset_import if entry.domain == "").version = opset
            graph.write_bytes(model.SerializeToString())
            entry = replace(manifest.files[graph.name], size=graph.stat().st_size, sha256=digest_file(graph))
            manifest = replace(manifest, files={**manifest.files, graph.name: entry})
        path.write_bytes(serialize_manifest(manifest))
        return open_bundle(bundle_copy)

    return call


@pytest.mark.parametrize(
    ("role", "versions", "text"),
    [
        ("infer", {"opset": 99}, "opset of this file is 99"),
        ("infer", {"ir_version": 99}, "IR version of this file is 99"),
        (None, {"opset": 99}, "opset of this file is 99"),
    ],
)
def test_a_graph_that_is_too_new_is_refused_before_it_is_loaded(restamped, monkeypatch, role, versions, text):
    bundle = restamped(role, **versions)
    monkeypatch.setattr("edge_tcur_runtime.predict.open_session", None)
    with pytest.raises(IncompatibleError, match=text) as caught:
        Model(bundle)
    newest = newest_readable()
    limit = newest.opset if "opset" in versions else newest.ir_version
    assert f"{onnxruntime.__version__} reads {limit} at most" in caught.value.message
    assert caught.value.where == str(bundle.path("manifest.json" if role is None else "infer.onnx"))
    assert "update ONNX Runtime" in caught.value.hint
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(("engine", "role"), [("ort-step", "step"), ("ort-training", "train")])
def test_an_engine_refuses_it(restamped, engine, role):
    with pytest.raises(IncompatibleError, match="opset of this file is 99"):
        open_engine(engine, restamped(role, opset=99))


def test_a_library_that_does_not_say_stops_nothing(restamped, monkeypatch):
    bundle = restamped(None, opset=99, ir_version=99)
    monkeypatch.setattr(readable, "newest_readable", lambda: Stamp(None, None))
    Model(bundle)


def test_the_doctor_refuses_it(restamped, tmp_path, capsys):
    bundle = restamped("step", opset=99, ir_version=99)
    with pytest.raises(SystemExit) as caught:
        run(device, ["doctor", "--store", str(tmp_path), "--bundle", str(bundle.root), "--json"])
    assert caught.value.code == 4
    report = json.loads(capsys.readouterr().out)["bundle"]
    assert (report["ok"], report["exit_code"], report["engines"]) == (False, 4, [])
    assert "step.onnx: the opset of this file is 99" in report["problem"]
    assert "update ONNX Runtime" in report["problem"]


def test_a_library_that_cannot_be_asked():
    assert doctor.probe_newest("/nowhere/python") == (None, None)
    assert doctor.probe_newest("/bin/false") == (None, None)
