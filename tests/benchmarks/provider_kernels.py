"""Which operators have a kernel in an execution provider of the installed ONNX Runtime:
``python tests/benchmarks/provider_kernels.py openvino [--json FILE]``.

Every node test of the `onnx` package that has one node of ONNX's own domain and a float or bool input is
loaded with that provider alone (`session.disable_cpu_ep_fallback`), its sizes, axes and indices as constants
of the graph, as exported models have them. An operator is listed where at least one of its tests loads. The
table of OpenVINO in `export/edge_tcur_export/providers.py` is made this way. Where a driver crashes or
hangs, the next model goes on in another process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import queue
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

OPSET = 20
SECONDS = 60.0
# Written out where the node tests have only newer forms, or outputs and inputs that no exported model has.
OWN = {
    "LayerNormalization": "(float[2, 4] x) => (float[2, 4] y) "
    "<float[4] w = {1,1,1,1}> {y = LayerNormalization(x, w)}",
    "Pad": "(float[2, 4] x) => (float[3, 4] y) <int64[4] p = {1, 0, 0, 0}> { y = Pad(x, p) }",
    "Unsqueeze": "(float[2, 4] x) => (float[2, 1, 4] y) <int64[1] a = {1}> { y = Unsqueeze(x, a) }",
}


def cases() -> Iterator[tuple[str, bytes]]:
    """Operator -> a model of that one node, at the opset that the bundles use."""
    from onnx.backend.test.case.node import collect_testcases

    for operator, text in OWN.items():
        own = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": {OPSET}]> own {text}')
        _add_neighbours(own.graph)
        yield operator, own.SerializeToString()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = collect_testcases(None)
    for case in found:
        model = case.model
        if model is None or len(model.graph.node) != 1 or model.graph.node[0].domain not in ("", "ai.onnx"):
            continue
        _fix_integers(model.graph, case.data_sets)
        kinds = {value.type.tensor_type.elem_type for value in model.graph.input}
        if not kinds & {onnx.TensorProto.FLOAT, onnx.TensorProto.BOOL}:
            continue
        moved = _moved(model)
        if moved.opset_import[0].version <= OPSET and len(moved.graph.node) == 1:
            moved.ir_version = 9
            _add_neighbours(moved.graph)
            yield model.graph.node[0].op_type, moved.SerializeToString()


def _moved(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model at the bundles' opset; as it is where the operator is newer or has no adapter."""
    try:
        return onnx.version_converter.convert_version(model, OPSET)
    except RuntimeError:
        return model


def _fix_integers(graph: onnx.GraphProto, data: Any) -> None:
    """Makes constants of the inputs that are whole numbers."""
    given = data[0][0] if data else []
    for value, content in zip(list(graph.input), given, strict=False):
        if value.type.tensor_type.elem_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32):
            graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(content), value.name))
            graph.input.remove(value)


def _add_neighbours(graph: onnx.GraphProto) -> None:
    """An Abs before a float input and one behind a float output, so that the node is inside a graph.

    OpenVINO leaves many an operator to the CPU where it is alone.
    """
    (node,) = graph.node
    before, behind = graph.input[0], graph.output[0]
    if before.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
        places = [place for place, name in enumerate(node.input) if name == before.name]
        for place in places:
            node.input[place] = "inside"
        graph.node.insert(0, onnx.helper.make_node("Abs", [before.name], ["inside"]))
    if behind.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
        graph.node.append(onnx.helper.make_node("Abs", [behind.name], ["outside"]))
        behind.name = "outside"


def loads(raw: bytes, provider: str) -> bool:
    """Whether the provider takes every node of the model."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    if not provider.startswith("CPU"):
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        ort.InferenceSession(raw, options, providers=[provider])
    except Exception:  # noqa: BLE001 - ONNX Runtime's own errors have no other base
        return False
    return True


def _chunk(provider: str, chunk: list[tuple[str, bytes]], done: multiprocessing.queues.Queue[str]) -> None:
    for operator, raw in chunk:
        done.put(operator if loads(raw, provider) else "")


def measure(provider: str) -> list[str]:
    """Names of the operators that the provider takes."""
    context, known = multiprocessing.get_context("spawn"), set()
    waiting = list(cases())
    while waiting:
        done: multiprocessing.queues.Queue[str] = context.Queue()
        worker = context.Process(target=_chunk, args=(provider, waiting, done))
        worker.start()
        count = 0
        while count < len(waiting):
            try:
                known.add(done.get(timeout=SECONDS))
            except queue.Empty:  # it crashed or hangs at this model: go on behind it
                count += 1
                break
            count += 1
        worker.kill()
        worker.join()
        waiting = waiting[count:]
    return sorted(known - {""})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("provider", help="as ONNX Runtime names it, without ExecutionProvider: OpenVINO, CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the names as JSON")
    options = parser.parse_args()
    names = measure(f"{options.provider}ExecutionProvider")
    print(", ".join(names))
    print(f"{len(names)} operators")
    if options.json:
        options.json.write_text(json.dumps(names) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
