"""ONNX Runtime Training's artifacts: training, eval and optimiser graphs, and a checkpoint of factors.

The base is in neither list of parameters: it stays outside as constants of the graphs, in the one
`base.bin`, so the checkpoint holds kilobytes and training never rewrites a frozen weight.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import onnx_ir as ir

from edge_tcur.errors import ExportError
from edge_tcur_export.base_file import BaseFile
from edge_tcur_export.frozen import name_each_reader, put_back, take_out
from edge_tcur_export.graph import IR_VERSION, declare_layer_norm_outputs, to_proto
from edge_tcur_export.operators import find_undifferentiable
from edge_tcur_export.saved import check_size, save_graph
from edge_tcur_runtime.formats.bundle import ADAMW, SGD
from edge_tcur_runtime.installed import find_onnxruntime

FILES = {
    "train": ("training_model.onnx", "train.onnx"),
    "eval": ("eval_model.onnx", "eval.onnx"),
    "optimizer": ("optimizer_model.onnx", "optimizer.onnx"),
}
CHECKPOINT = "checkpoint"
_OPTIMIZERS = {ADAMW: "AdamW", SGD: "SGD"}  # name -> that of the library's OptimType
_FORWARD = "forward.onnx"
_SHOWN = 4  # operators in one message
_HINT = (
    "use --target onnx --target step: the step graph has no such limit and trains on any ONNX Runtime, "
    "this one too"
)
_NO_GRADIENT = re.compile(r"gradient builder has not been registered: (\S+) for node (\S*)")


def require_training() -> None:
    """Checks that ONNX Runtime Training is installed.

    Raises:
        ExportError: it is not; says how to get it.
    """
    found = find_onnxruntime()
    if found is None or not found.training:
        there = (
            "no ONNX Runtime"
            if found is None
            else f"{found.distribution} {found.version}, which cannot train"
        )
        raise ExportError(
            f"ONNX Runtime Training is not installed; there is {there}",
            where="--target ort-training",
            hint="pip install 'edge-tcur-runtime[ort-training]', or leave this target out",
        )


def check_gradients(model: ir.Model, trained: Collection[str]) -> None:
    """Refuses a forward graph that ONNX Runtime Training cannot differentiate, before it is built.

    Raises:
        ExportError: operators without a gradient, with their nodes and modules.
    """
    found = find_undifferentiable(model, trained)
    if found:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ExportError(
            "ONNX Runtime Training has no gradient for " + ", ".join(map(str, found[:_SHOWN])) + more,
            hint=_HINT,
        )


def write_artifacts(
    model: ir.Model, trained: Collection[str], base_file: BaseFile, directory: Path, optimizer: str
) -> dict[str, str]:
    """Writes the artifacts of a forward graph (its first output is the loss).

    Args:
        model: the trained tensors are initializers of it, the base's tensors too (in memory).
        trained: names of the initializers that get gradients.
        base_file: where the frozen tensors are, or go.
        directory: the bundle being written.
        optimizer: out of the manifest's `OPTIMIZERS`, for ``optimizer.onnx``.

    Returns:
        role -> file name for the manifest.

    Raises:
        ExportError: ONNX Runtime Training cannot build the gradient, or what is trained is more than a
            protobuf file can hold.
        OSError: no space for the temporary files.
    """
    declare_layer_norm_outputs(model)
    name_each_reader(model, trained)
    frozen = take_out(model, trained)
    check_size(model, FILES["train"][1])
    with TemporaryDirectory() as work:
        _generate(to_proto(model), trained, Path(work), optimizer)
        for produced, name in (FILES["train"], FILES["eval"]):
            graph = ir.load(Path(work) / produced)
            graph.ir_version = IR_VERSION
            base_file.externalize(put_back(graph, frozen))
            save_graph(graph, directory / name)
        produced, name = FILES["optimizer"]
        update = onnx.load(str(Path(work) / produced))
        update.ir_version = IR_VERSION
        onnx.save(update, str(directory / name))
        (directory / CHECKPOINT).write_bytes((Path(work) / CHECKPOINT).read_bytes())
    return {**{role: name for role, (_, name) in FILES.items()}, "checkpoint": CHECKPOINT}


def _generate(proto: onnx.ModelProto, trained: Collection[str], directory: Path, optimizer: str) -> None:
    """Runs this module as a process of its own: the library prints every rewrite it makes."""
    onnx.save(proto, str(directory / _FORWARD))
    command = [sys.executable, "-m", __name__, str(directory), optimizer, *sorted(trained)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise _failure(done.stderr)


def _failure(stderr: str) -> Exception:
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        if os.strerror(code) in stderr:
            return OSError(code, os.strerror(code))
    known = _NO_GRADIENT.search(stderr)
    lines = [line for line in stderr.splitlines() if line.strip()]
    reason = (
        f"no gradient for {known[1]} (node {known[2]})"
        if known
        else lines[-1]
        if lines
        else "no reason given"
    )
    return ExportError(f"ONNX Runtime Training cannot build the gradient graph: {reason}", hint=_HINT)


def _work(directory: Path, optimizer: str, trained: list[str]) -> None:
    from onnxruntime.training import artifacts

    artifacts.generate_artifacts(
        onnx.load(str(directory / _FORWARD)),
        requires_grad=trained,
        frozen_params=[],
        loss=None,
        optimizer=artifacts.OptimType[_OPTIMIZERS[optimizer]],
        artifact_directory=str(directory),
    )


if __name__ == "__main__":
    _work(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
