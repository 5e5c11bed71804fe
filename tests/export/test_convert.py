"""Adapters as ONNX Runtime and ExecuTorch read them, checked by readers that are not ours."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import flatbuffers
import numpy as np
import pytest
from flatbuffers.encode import Get
from flatbuffers.number_types import Int32Flags
from flatbuffers.packer import uoffset
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edge_tcur.errors import ExportError
from edge_tcur_export import executorch
from edge_tcur_export.convert import KINDS, convert_adapter, fill_rank
from edge_tcur_export.onnx_adapter import IDENTIFIER, adapter_file
from edge_tcur_runtime.engines.session import open_session
from edge_tcur_runtime.errors import BaseMismatchError, IncompatibleError, UsageError
from edge_tcur_runtime.feeds import build_feeds
from edge_tcur_runtime.formats.adapter import read_adapter
from edge_tcur_runtime.formats.bundle import open_bundle

DATA = Path(__file__).parents[1] / "data"
DTYPES = {1: "<f4", 2: "u1", 3: "i1", 6: "<i4", 7: "<i8", 9: "?"}
GOLDEN = {  # what ONNX Runtime 1.32.0 was given
    "g.core": np.arange(8, dtype=np.float32).reshape(2, 2, 2) - 3.5,
    "g.rows": np.array([[1, 5]], np.int32),
    "g.cols": np.array([[0, 2]], np.int32),
    "head.bias": np.array([0.25, -1.0, 3.0], np.float32),
    "scale": np.array(2.0, np.float32),
}


def read_file(raw, alignment=8):
    """Versions and tensors of an ``.onnx_adapter`` file, by FlatBuffers' own reader."""
    assert raw[4:8] == IDENTIFIER
    root = flatbuffers.table.Table(raw, Get(uoffset, raw, 0))

    def field(table, slot):
        return table.Offset(4 + 2 * slot)

    def number(table, slot):
        place = field(table, slot)
        return table.Get(Int32Flags, table.Pos + place) if place else 0

    def vector(table, slot, dtype):
        place = field(table, slot)
        start, count = table.Vector(place), table.VectorLen(place)
        assert start % alignment == 0
        return np.frombuffer(raw, dtype, count, start)

    tensors = {}
    for position in range(root.VectorLen(field(root, 3))):
        start = root.Vector(field(root, 3)) + 4 * position
        entry = flatbuffers.table.Table(raw, root.Indirect(start))
        name = entry.String(entry.Pos + field(entry, 0)).decode()
        dims, content = vector(entry, 1, "<i8"), vector(entry, 3, "u1")
        tensors[name] = content.view(DTYPES[number(entry, 2)]).reshape(dims)
    return [number(root, slot) for slot in range(3)], tensors


def same(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        np.testing.assert_array_equal(found[name], value)


def test_a_file_that_onnx_runtime_wrote_is_read_alike():
    # ONNX Runtime's own writer does not force the alignment that the schema asks for; ours does.
    versions, tensors = read_file((DATA / "factors-ort-1.32.onnx_adapter").read_bytes(), alignment=4)
    same(tensors, GOLDEN)
    assert versions == [1, 1, 1]
    assert read_file(adapter_file(GOLDEN))[0] == versions
    same(read_file(adapter_file(GOLDEN))[1], GOLDEN)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=12),
        st.sampled_from(list(DTYPES.values())).flatmap(
            lambda dtype: arrays.arrays(
                np.dtype(dtype), arrays.array_shapes(min_dims=0, max_dims=4, min_side=0)
            )
        ),
        max_size=5,
    )
)
def test_every_tensor_comes_back(tensors):
    found = read_file(adapter_file(tensors))[1]
    assert set(found) == set(tensors)
    for name, value in tensors.items():
        assert found[name].shape == value.shape
        assert found[name].tobytes() == value.tobytes()


@pytest.fixture(params=["bundle-v1", "sketch-v1"])
def bundle(request):
    return open_bundle(DATA / request.param)


def adapter_of(bundle):
    return read_adapter(bundle.path(bundle.manifest.adapter))


def inputs_of(bundle):
    ((name, spec),) = bundle.manifest.inputs.items()
    shape = [3 if isinstance(axis, str) else axis for axis in spec.shape]
    return {name: np.random.default_rng(1).normal(size=shape).astype(np.float32)}


def test_the_converted_adapter_is_what_the_graph_is_fed(bundle):
    """The tensors in the file, fed to the graph under their names, give the adapter's outputs."""
    adapter, inputs = adapter_of(bundle), inputs_of(bundle)
    _, tensors = read_file(convert_adapter(adapter, "onnx_adapter", bundle.manifest))
    session = open_session(bundle.graph("infer"), threads=1)
    expected = session.run(["logits"], {**inputs, **build_feeds(bundle.manifest, adapter)})[0]
    np.testing.assert_array_equal(session.run(["logits"], {**inputs, **tensors})[0], expected)
    assert np.abs(expected - session.run(["logits"], inputs)[0]).max() > 1e-4
    same(read_file(convert_adapter(adapter, "onnx_adapter"))[1], tensors)


STOCK = """
import json, sys
import numpy as np
import onnxruntime as ort
from onnxruntime import AdapterFormat, LoraAdapter, RunOptions
ort.set_default_logger_severity(3)
graph, file, arrays = sys.argv[1:]
content = np.load(arrays)
fed = {name[4:]: content[name] for name in content if name.startswith("fed/")}
inputs = {name[6:]: content[name] for name in content if name.startswith("input/")}
read = {name: value.numpy() for name, value in AdapterFormat.read_adapter(file).get_parameters().items()}
assert set(read) == set(fed)
equal = all(v.dtype == fed[n].dtype and np.array_equal(v, fed[n]) for n, v in read.items())
session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
adapter, options = LoraAdapter(), RunOptions()
adapter.Load(file)
options.add_active_adapter(adapter)
active = session.run(["logits"], inputs, options)[0]
given = session.run(["logits"], {**inputs, **fed})[0]
base = session.run(["logits"], inputs)[0]
del adapter  # the options hold no reference to it
dropped = session.run(["logits"], inputs, options)[0]
print(json.dumps({"version": ort.__version__, "equal": equal, "apart": float(np.abs(active - given).max()),
                  "moved": float(np.abs(active - base).max()),
                  "dropped": float(np.abs(dropped - base).max())}))
"""


def test_stock_onnx_runtime_takes_the_file(bundle, tmp_path):
    """The Python of an environment with onnxruntime 1.20 or newer, in EDGE_TCUR_STOCK_ORT."""
    python = os.environ.get("EDGE_TCUR_STOCK_ORT")
    if not python:
        pytest.skip("EDGE_TCUR_STOCK_ORT names no Python with a stock onnxruntime (1.20 or newer)")
    adapter, file = adapter_of(bundle), tmp_path / "a.onnx_adapter"
    file.write_bytes(convert_adapter(adapter, "onnx_adapter", bundle.manifest))
    content = {f"fed/{name}": value for name, value in adapter.feeds().items()}
    content |= {f"input/{name}": value for name, value in inputs_of(bundle).items()}
    np.savez(tmp_path / "arrays.npz", **content)
    command = [python, "-c", STOCK, bundle.graph("infer"), file, tmp_path / "arrays.npz"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["equal"]
    assert result["apart"] <= 1e-6
    assert result["moved"] > 1e-4
    assert result["dropped"] == 0  # silently the base: docs/deploy.md says that it must be kept


def test_an_adapter_of_another_base_is_refused(bundle):
    other = open_bundle(DATA / ("sketch-v1" if bundle.root.name == "bundle-v1" else "bundle-v1"))
    for kind in KINDS:
        with pytest.raises(BaseMismatchError):
            convert_adapter(adapter_of(other), kind, bundle.manifest)


def test_unknown_formats_are_refused(bundle):
    with pytest.raises(UsageError, match="onnx_adapter, ptd"):
        convert_adapter(adapter_of(bundle), "gguf")


def test_a_lower_rank_is_filled_up_and_changes_nothing(bundle):
    """Zeros around the core: the graph gives the same outputs at the bundle's rank."""
    manifest, inputs = bundle.manifest, inputs_of(bundle)
    feeds = adapter_of(bundle).feeds()
    for group in manifest.groups:
        for part in manifest.parts:
            axes = {"core": (1, 2), "rows": (1,), "cols": (1,), "left": (2,), "right": (1,)}[part]
            for axis in axes:
                feeds[f"{group}.{part}"] = feeds[f"{group}.{part}"].take([0], axis)
    filled = fill_rank(manifest, feeds)
    for group, spec in manifest.groups.items():
        assert filled[f"{group}.core"].shape[1:] == (spec.rank, spec.rank)
        assert feeds[f"{group}.core"].shape[1:] == (1, 1)
    session = open_session(bundle.graph("infer"), threads=1)
    found, expected = (session.run(["logits"], {**inputs, **fed})[0] for fed in (filled, feeds))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    over = spec.rank + 1
    too_high = {**feeds, f"{group}.core": np.zeros((len(spec.parameters), over, over), np.float32)}
    with pytest.raises(IncompatibleError, match=f"rank {over}; the bundle's .* rank {spec.rank}"):
        fill_rank(manifest, too_high)


def test_executorch_reads_the_ptd(bundle, kit):
    adapter = adapter_of(bundle)
    content = convert_adapter(adapter, "ptd", bundle.manifest)
    same(kit.read_ptd(content), build_feeds(bundle.manifest, adapter))


def test_without_executorch_the_extra_is_named(bundle, monkeypatch):
    monkeypatch.setattr(executorch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match="not installed") as caught:
        convert_adapter(adapter_of(bundle), "ptd")
    assert (caught.value.where, caught.value.exit_code) == ("--to ptd", 4)
    assert "edge-tcur[executorch]" in caught.value.hint
