"""Parity of ExecuTorch's programs, in a process of its own: see `edge_tcur_export.parity`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_tcur_export.executorch import BACKEND_NAMES, INFER, PREFIX
from edge_tcur_export.lowering import import_executorch
from edge_tcur_export.parity import (
    Case,
    compare_steps,
    distance,
    has_exported_rank,
    read_cases,
)
from edge_tcur_export.quiet import quiet_torch
from edge_tcur_runtime.engines import StepResult
from edge_tcur_runtime.formats.bundle import BASE_PTD, Bundle, ProgramSpec, open_bundle


def load_program(bundle: Bundle, program: ProgramSpec) -> Any:
    """A program of a bundle over the base file (ExecuTorch's ExecuTorchModule).

    Its memory is reserved for the largest batch; the caller has verified the digests.
    """
    import_executorch()
    with quiet_torch():
        from executorch.extension.pybindings.portable_lib import _load_for_executorch

        return _load_for_executorch(str(bundle.path(program.file)), str(bundle.path(BASE_PTD)))


class ProgramStepper:
    """Forward and backward by a training program, through ``executorch.extension.training``."""

    def __init__(self, bundle: Bundle, program: ProgramSpec) -> None:
        with quiet_torch():
            from executorch.extension.training import TrainingModule

            self._module = TrainingModule(load_program(bundle, program))
        self._inputs = program.inputs

    def step(
        self, inputs: Mapping[str, np.ndarray], targets: np.ndarray, feeds: Mapping[str, np.ndarray]
    ) -> StepResult:
        """See `edge_tcur_runtime.engines.TrainingEngine`."""
        fed = {**inputs, **feeds, "labels": targets}
        arguments = [torch.from_numpy(np.ascontiguousarray(fed[name])) for name in self._inputs]
        if self._module.named_params is None:  # they are known after a first pass only
            self._module.forward_backward("forward", arguments)
        for name, value in self._module.named_parameters().items():
            value.copy_(torch.from_numpy(feeds[name.removeprefix(PREFIX)]))
        loss, outputs, metric = self._module.forward_backward("forward", arguments)
        gradients = self._module.named_gradients()
        return StepResult(
            loss=float(loss),
            outputs=outputs.numpy().copy(),
            gradients={name.removeprefix(PREFIX): value.numpy() for name, value in gradients.items()},
            metric=float(metric),
        )


def _compare_infer(bundle: Bundle, program: ProgramSpec, cases: list[Case]) -> dict[str, float]:
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
            errors[name] = compare_steps(ProgramStepper(bundle, program), bundle, usable)
    return errors


def missing_backend(name: str) -> str | None:
    """Why a program of this name cannot be run here, or None: its delegates need a backend that the
    installed ExecuTorch was built with."""
    needed = BACKEND_NAMES.get(name.partition("-")[2])
    import_executorch()
    with quiet_torch():
        from executorch.runtime import Runtime

        there = Runtime.get().backend_registry.registered_backend_names
    return None if needed is None or needed in there else f"no {needed} in this ExecuTorch"


if __name__ == "__main__":
    found = compare_programs(open_bundle(Path(sys.argv[1])), read_cases(Path(sys.argv[2])), sys.argv[3:])
    sys.stdout.write(json.dumps(found) + "\n")
