"""The tables in a manifest: they are what the walk of the graph says, and every device can read them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from edge_tcur_export.memory_model import base_bytes, estimate_memory, input_shapes
from edge_tcur_export.memory_tables import TRAINING, _operations
from edge_tcur_export.shapes import ValueShape, value_bytes
from edge_tcur_runtime.errors import FileFormatError
from edge_tcur_runtime.formats.bundle import open_bundle, parse_manifest, serialize_manifest

DATA = Path(__file__).parents[1] / "data"


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_every_point_of_the_grid_is_what_the_walk_of_the_graph_says(name, request):
    exported = request.getfixturevalue(name)
    manifest = exported.bundle.manifest
    tables = manifest.memory
    assert set(tables.graphs) == set(TRAINING) & set(manifest.graphs) != set()
    assert tables.lengths == tuple(manifest.preprocessing.get("buckets", (0,)))
    ranks = {group: spec.rank for group, spec in manifest.groups.items()}
    for role, table in tables.graphs.items():
        model = exported.graph(role)
        for length, line in zip(tables.lengths, table.values, strict=True):
            for samples, value in zip(tables.samples[1::2], line[1::2], strict=True):
                shapes = input_shapes(model, manifest.inputs, samples, length, ranks)
                estimate = estimate_memory(model, shapes)
                assert value == pytest.approx(estimate.activations, rel=0.002, abs=256)
        assert table.nodes == len(model.graph.node)
        read = base_bytes(model, value_bytes(model, shapes))
        assert table.base + sum(rows.bytes for rows in table.rows) >= read


def test_work_grows_with_samples_and_tokens(bert):
    tables = bert.bundle.manifest.memory
    for table in tables.graphs.values():
        for line in table.work:
            assert 3 < line[-1] / line[2] < 33  # 128 samples against 4
        assert table.work[0][-1] < table.work[-1][-1]


def test_operations_of_products_and_convolutions():
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]>
        g (float[b, 3, 8] x, float[8, 5] w, float[7, 5] v, float[2, 4, 6, 6] p, float[9, 4, 3, 3] k)
        => (float[b, 3, 5] y, float[6, 7] z, float[2, 9, 4, 4] c) {
            y = MatMul(x, w)
            z = Gemm<transB = 1>(y, v)
            c = Conv(p, k)
        }"""
    )
    shapes = {"w": (8, 5), "v": (7, 5), "k": (9, 4, 3, 3), "y": (2, 3, 5), "z": (6, 7), "c": (2, 9, 4, 4)}
    found = _operations(model, {name: ValueShape(dims, 4) for name, dims in shapes.items()})
    assert found == 2 * (2 * 3 * 5 * 8 + 6 * 7 * 5 + 2 * 9 * 4 * 4 * 4 * 3 * 3)


def test_the_manifest_keeps_them_and_an_older_one_has_none(bert):
    manifest = bert.bundle.manifest
    assert parse_manifest(serialize_manifest(manifest), "m").memory == manifest.memory
    bare = serialize_manifest(replace(manifest, memory=None))
    assert "memory" not in json.loads(bare)
    assert parse_manifest(bare, "m").memory is None
    assert len(serialize_manifest(manifest)) - len(bare) < 8000
    assert open_bundle(DATA / "bundle-v1").manifest.memory is None


def wrong(manifest, change):
    document = json.loads(serialize_manifest(manifest))
    change(document["memory"])
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda memory: memory.update(more=1), "unknown field 'more'"),
        (lambda memory: memory.update(samples=[2, 4]), "must begin with 1"),
        (lambda memory: memory.update(lengths=[16, 8]), "increasing sizes"),
        (lambda memory: memory["graphs"]["step"].pop("base"), "'base' is missing"),
        (lambda memory: memory["graphs"]["step"]["values"].pop(), "lines of 7 growing numbers"),
        (lambda memory: memory["graphs"]["step"]["work"][0].reverse(), "lines of 7 growing numbers"),
        (lambda memory: memory["graphs"]["step"].update(rows=[3]), "must hold objects"),
        (lambda memory: memory["graphs"].update(step_last=memory["graphs"]["step"]), "does not have"),
    ],
)
def test_a_table_that_means_nothing_is_refused(bert, change, message):
    with pytest.raises(FileFormatError, match=message):
        parse_manifest(wrong(bert.bundle.manifest, change), "m")
