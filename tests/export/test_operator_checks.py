"""`checks.onnx`: every operator of the graphs, with inputs that all of them take."""

import json
from collections import Counter

import numpy as np
import onnx

from edge_tcur_runtime.engines.checks import METADATA, check_operators, make_feeds, read_checks
from edge_tcur_runtime.engines.providers import ON_CPU
from edge_tcur_runtime.engines.session import open_session


def test_every_node_of_every_graph_is_of_one_kind(vit):
    path = vit.bundle.graph("checks")
    checks, _ = read_checks(open_session(path, threads=1, optimized=False), path)
    for role in ("infer", "step"):
        named = Counter(name for check in checks for name in check.nodes.get(role, ()))
        assert named == Counter(node.name for node in vit.graph(role).graph.node)
    kinds = {check.operator for check in checks}
    assert kinds == {node.op_type for role in ("infer", "step") for node in vit.graph(role).graph.node}


def test_no_weight_is_in_the_file(bert):
    graph = onnx.load(bert.bundle.graph("checks")).graph
    assert all(len(tensor.raw_data) < 64 * 1024 for tensor in graph.initializer)
    assert not any(tensor.external_data for tensor in graph.initializer)


def test_inputs_are_the_same_each_time_and_give_numbers(bert):
    path = bert.bundle.graph("checks")
    session = open_session(path, threads=1, optimized=False)
    _, ranges = read_checks(session, path)
    first, second = (make_feeds(session, ranges) for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    values = dict(zip([v.name for v in session.get_outputs()], session.run(None, first), strict=True))
    numbers = [value for value in values.values() if value.dtype.kind == "f"]
    assert sum(np.isfinite(value).all() for value in numbers) > 0.9 * len(numbers)
    assert check_operators(path, ON_CPU, ("step",), 1)[1] == ()


def test_the_metadata_is_what_the_documents_say(vit):
    model = onnx.load(vit.bundle.graph("checks"))
    document = json.loads({entry.key: entry.value for entry in model.metadata_props}[METADATA])
    assert set(document) == {"checks", "ranges"}
    defaults = {tensor.name for tensor in model.graph.initializer}
    assert set(document["ranges"]) == {value.name for value in model.graph.input} - defaults
