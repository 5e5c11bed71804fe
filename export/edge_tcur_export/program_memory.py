"""Predicted peak memory of a process that runs one of ExecuTorch's programs through its Python interface.

A program reserves the memory of its values once, for its largest batch, and reads all of `base.ptd`: the
peak is the same for every batch up to that one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx

from edge_tcur_export.memory_model import MemoryEstimate, activation_peak, execution_steps
from edge_tcur_export.shapes import value_bytes
from edge_tcur_runtime.formats.bundle import BASE_PTD, Manifest

# Measured with tests/benchmarks/memory_model.py: Python with numpy, torch 2.13 for CPUs and ExecuTorch 1.5.1.
LIBRARY_BYTES = 225 * 2**20
LOADED_BYTES = 15 * 2**19  # code and small values that stay after a first pass
FILE_FACTOR = 19  # bytes that a loaded program takes for each byte of its file, which lists every operator
# Before a program is written: bytes of its file for each node of the ONNX graph of the same passes, and bytes
# that it reserves for each byte of that graph's values.
FILE_BYTES = 290
RESERVED = {"infer": 1.6, "train": 1.15}
GRAPHS = {"infer": "infer", "train": "step"}  # kind of a program -> role of that graph


def written_program(manifest: Manifest, name: str) -> MemoryEstimate:
    """Of a program of a bundle: its manifest says what it reserves."""
    program = manifest.programs[name]
    base, size = manifest.files[BASE_PTD].size, manifest.files[program.file].size
    return _estimate(size, base, program.memory)


def expected_program(
    model: onnx.ModelProto, inputs: Mapping[str, Sequence[int]], kind: str, base: int
) -> MemoryEstimate:
    """Of a program that is not lowered yet.

    Args:
        model: the ONNX graph of the same passes (`GRAPHS`), without the base in memory.
        inputs: shapes of what is fed to it, at the largest batch and length of the program.
        kind: ``infer`` or ``train``.
        base: bytes of the frozen tensors.
    """
    steps = execution_steps(model)
    peak = activation_peak(steps, value_bytes(model, inputs), {value.name for value in model.graph.output})
    return _estimate(FILE_BYTES * len(steps), base, round(RESERVED[kind] * peak))


def _estimate(file: int, base: int, reserved: int) -> MemoryEstimate:
    return MemoryEstimate(LIBRARY_BYTES, LOADED_BYTES + FILE_FACTOR * file, base, reserved)
