"""Predicted peak memory of a process that runs one of ExecuTorch's programs through its Python interface.

A program reserves the memory of its values once, for its largest batch, and reads all of `base.ptd`: the
peak is the same for every batch up to that one. XNNPACK has a workspace besides, which its delegates share
and which the program says nothing of: some values of the largest size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx

from edge_tcur_export.lowering import XNNPACK
from edge_tcur_export.memory_model import MemoryEstimate, activation_peak, execution_steps
from edge_tcur_export.shapes import value_bytes
from edge_tcur_runtime.formats.bundle import BASE_PTD, Manifest

# Measured with tests/benchmarks/memory_model.py: Python with numpy, torch 2.13 for CPUs and ExecuTorch 1.5.1;
# code and small values that stay after a first pass; and values of the largest size in XNNPACK's workspace.
LIBRARY_BYTES = 225 * 2**20
LOADED_BYTES = {"infer": 7 * 2**20, "train": 9 * 2**20}
WORKSPACE = {"infer": 1.5, "train": 3.0}
# Before it is written: bytes that it reserves for each byte alive in the ONNX graph of the same passes.
RESERVED = {"infer": 1.5, "train": 1.1}
GRAPHS = {"infer": "infer", "train": "step"}  # kind of a program -> role of that graph


def written_program(
    manifest: Manifest, name: str, model: onnx.ModelProto, inputs: Mapping[str, Sequence[int]]
) -> MemoryEstimate:
    """Of a program of a bundle: its manifest says what it reserves.

    Args:
        model: the ONNX graph of the same passes (`GRAPHS`), or another of the bundle's; without the base in
            memory.
        inputs: shapes of what is fed to it, at the largest batch and length of the program.
    """
    largest = max(_values(model, inputs).values())
    return _estimate(name, largest, manifest.files[BASE_PTD].size, manifest.programs[name].memory)


def expected_program(
    model: onnx.ModelProto, inputs: Mapping[str, Sequence[int]], name: str, base: int
) -> MemoryEstimate:
    """Of a program that is not lowered yet.

    Args:
        model, inputs: see `written_program`.
        name: of the program.
        base: bytes of the frozen tensors.
    """
    sizes, kind = _values(model, inputs), name.partition("-")[0]
    peak = activation_peak(execution_steps(model), sizes, {value.name for value in model.graph.output})
    return _estimate(name, max(sizes.values()), base, round(RESERVED[kind] * peak))


def _values(model: onnx.ModelProto, inputs: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Bytes of what the nodes make."""
    sizes = value_bytes(model, inputs)
    return {name: sizes[name] for node in model.graph.node for name in node.output if name in sizes}


def _estimate(name: str, largest: int, base: int, reserved: int) -> MemoryEstimate:
    kind, _, backend = name.partition("-")
    workspace = round(WORKSPACE[kind] * largest) if backend == XNNPACK else 0
    return MemoryEstimate(LIBRARY_BYTES, LOADED_BYTES[kind] + workspace, base, reserved)
