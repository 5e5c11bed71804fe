"""A graph with its inner values exposed, compared one by one with what torch computed. Runs without torch.

`edge_tcur_export.divergence` writes the reference and starts this module as a process of its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from safetensors.numpy import load_file

VALUE, FEED = "value/", "feed/"  # prefixes of the tensors in the reference file
_COPY = ".exposed.onnx"  # beside the graph: its external data lies in the same directory
_RESET = "lazy_reset_grad"  # of ONNX Runtime Training's graphs
_DTYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}


def distance(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference relative to the largest finite expected entry.

    Equal infinities and NaN in the same places count as equal; infinity for another shape.
    """
    if actual.shape != expected.shape:
        return float("inf")
    found, wanted = (np.asarray(value, np.float64) for value in (actual, expected))
    same = (found == wanted) | (np.isnan(found) & np.isnan(wanted))
    if same.all():
        return 0.0
    apart = np.abs(np.where(same, 0.0, found - np.where(same, 0.0, wanted)) * ~same)
    if not np.isfinite(apart).all():
        return float("inf")
    finite = np.abs(wanted[np.isfinite(wanted)])
    return float(apart.max()) / max(float(finite.max(initial=0.0)), 1e-6)


def first_difference(
    graph: Path,
    feeds: Mapping[str, np.ndarray],
    values: Mapping[str, np.ndarray],
    tolerances: tuple[float, float],
) -> dict[str, Any] | None:
    """The first node, in graph order, with a value that departs from the reference.

    Args:
        graph: on disk, beside its external data.
        feeds: graph inputs by name; of others (ONNX Runtime Training's buffers) zeros are fed.
        values: what torch computed, by value name; names that the graph lacks are passed over.
        tolerances: largest `distance` that is no difference, and a larger one. A value such as a reciprocal
            standard deviation may round beyond the first without harm, so the first node beyond the second
            is preferred.

    Returns:
        ``node``, ``operator``, ``value`` and ``error`` of it, or None where every value agrees.
    """
    model = onnx.load(str(graph), load_external_data=False)
    there = {value.name for value in model.graph.output}
    produced = [(node, name) for node in model.graph.node for name in node.output if name in values]
    for _, name in produced:
        if name not in there:
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    found = run_with_outputs(model, graph.with_name(_COPY), feeds, [name for _, name in produced])
    beyond = [
        {"node": node.name, "operator": node.op_type, "value": name, "error": error}
        for (node, name), value in zip(produced, found, strict=True)
        if not (error := distance(value, values[name])) <= tolerances[0]
    ]
    if not beyond:
        return None
    return next((entry for entry in beyond if not entry["error"] <= tolerances[1]), beyond[0])


def run_with_outputs(
    model: onnx.ModelProto, path: Path, feeds: Mapping[str, np.ndarray], names: list[str]
) -> list[np.ndarray]:
    """Runs a changed graph from a copy at `path`, beside its external data; the copy is removed."""
    from edge_tcur_runtime.engines.session import open_session

    try:
        path.write_bytes(model.SerializeToString())
        session = open_session(path, threads=1)
    finally:
        path.unlink(missing_ok=True)
    fed = {value.name: _feed(value, feeds) for value in session.get_inputs()}
    defaults = {value.name for value in session.get_overridable_initializers()}  # not among its inputs
    fed |= {name: value for name, value in feeds.items() if name in defaults}
    result: list[np.ndarray] = session.run(names, fed)
    return result


def _feed(value: Any, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    if value.name in feeds:
        return feeds[value.name]
    shape = [size if isinstance(size, int) else 1 for size in value.shape]
    return np.full(shape, value.name == _RESET, _DTYPES[value.type])


def _work(graph: Path, reference: Path, tolerances: tuple[float, float]) -> None:
    tensors = load_file(reference)
    feeds, values = (
        {name.removeprefix(kind): value for name, value in tensors.items() if name.startswith(kind)}
        for kind in (FEED, VALUE)
    )
    sys.stdout.write(json.dumps(first_difference(graph, feeds, values, tolerances)) + "\n")


if __name__ == "__main__":
    sys.modules["torch"] = None  # type: ignore[assignment]  # 200 MiB that are not needed here
    _work(Path(sys.argv[1]), Path(sys.argv[2]), (float(sys.argv[3]), float(sys.argv[4])))
