"""Parity of ExecuTorch's programs, in a process of its own: see `edge_tcur_export.parity`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edge_tcur_export.parity import (
    INFER,
    Case,
    compare_steps,
    distance,
    has_exported_rank,
    read_cases,
)
from edge_tcur_runtime.engines.executorch import ExecutorchEngine, import_training, load_program
from edge_tcur_runtime.formats.bundle import Bundle, ProgramSpec, open_bundle

# What ExecuTorch's runtime calls the delegates of a backend.
_BACKENDS = {"xnnpack": "XnnpackBackend", "vulkan": "VulkanBackend"}


def _compare_infer(bundle: Bundle, program: ProgramSpec, cases: list[Case]) -> dict[str, float]:
    torch, _, _ = import_training()
    module, worst = load_program(bundle, program), 0.0
    for case in cases:
        arguments = [torch.from_numpy(np.ascontiguousarray(case.feeds[name])) for name in program.inputs]
        (outputs,) = module.run_method("forward", arguments)
        worst = max(worst, distance(outputs.numpy(), case.outputs))
    return {"outputs": worst}


def compare_programs(
    bundle: Bundle, cases: list[Case], names: Sequence[str]
) -> dict[str, dict[str, float] | str]:
    """Program name -> quantity -> largest relative error over the cases of the exported rank, or why the
    program cannot be run on this machine."""
    usable = [case for case in cases if has_exported_rank(case, bundle)]
    errors: dict[str, dict[str, float] | str] = {}
    for name in names:
        program, missing = bundle.manifest.programs[name], missing_backend(name)
        if missing is not None:
            errors[name] = missing
        elif name.startswith(INFER):
            errors[name] = _compare_infer(bundle, program, usable)
        else:
            errors[name] = compare_steps(ExecutorchEngine(bundle, threads=1, program=program), bundle, usable)
    return errors


def missing_backend(name: str) -> str | None:
    """Why a program of this name cannot be run here, or None: its delegates need a backend that the
    installed ExecuTorch was built with."""
    needed = _BACKENDS.get(name.partition("-")[2])
    there = import_training()[2]._get_registered_backend_names()
    return None if needed is None or needed in there else f"no {needed} in this ExecuTorch"


if __name__ == "__main__":
    found = compare_programs(open_bundle(Path(sys.argv[1])), read_cases(Path(sys.argv[2])), sys.argv[3:])
    sys.stdout.write(json.dumps(found) + "\n")
