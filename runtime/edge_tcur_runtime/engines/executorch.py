"""ExecuTorch's training program, through ``executorch.extension.training``, whose Python needs torch.

This is the one module of the runtime that imports torch; it is imported only where this engine was chosen.
The optimiser is ours (`edge_tcur_runtime.optimizer`), as on every engine: gradients are read from the
program, and what the optimiser makes of them is written into its parameters.
"""

from __future__ import annotations

import logging
import os
import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import numpy as np

from edge_tcur_runtime.cores import usable_cores
from edge_tcur_runtime.engines.engine import StepResult, require_executorch, require_program, trained_names
from edge_tcur_runtime.engines.session import require_names
from edge_tcur_runtime.engines.verified import require_unchanged
from edge_tcur_runtime.errors import ConfigError, IncompatibleError, MissingEngineError
from edge_tcur_runtime.formats.bundle import BASE_PTD, Bundle, ProgramSpec
from edge_tcur_runtime.tasks import find_device_task, mean_by_weight

TARGETS = "labels"
_PREFIX = "trained."  # of a parameter of the program, before the name of the core or extra
_METHOD = "forward"
_OUTPUTS = ("loss", "logits", "metric")
_COMPILER = "executorch.exir"


class ExecutorchEngine:
    """Runs ``train-xnnpack.pte``, or ``train.pte`` where that is not there, over ``base.ptd``.

    Args:
        threads: CPU threads; 0 takes all that this process may use.
        program: the training program to run in the place of that one.
    """

    name = "executorch"

    def __init__(self, bundle: Bundle, *, threads: int = 0, program: ProgramSpec | None = None) -> None:
        if threads < 0:
            raise ConfigError(f"{threads}; expected 0 or more", where="threads")
        program = program or require_program(bundle)
        self._path = bundle.path(program.file)
        self._torch, library, portable_lib = import_training()
        with _closed_stderr():
            portable_lib._unsafe_reset_threadpool(threads or usable_cores())
        try:
            module = load_program(bundle, program)
            with _quietly():
                self._module = library.TrainingModule(module)
            found = module.run_method(f"__et_training_fqn_{_METHOD}", ())
        except Exception as error:  # RuntimeError with an error number; its text went to stderr
            raise _cannot_load(error, self._path) from error
        require_unchanged(bundle.root, bundle.manifest.files, program.file, BASE_PTD)
        self._task = find_device_task(bundle.manifest.task)
        self._inputs, self._limits = program.inputs, program.limits
        self._axes = {name: spec.shape for name, spec in bundle.manifest.inputs.items()}
        self._ranks = {group: spec.rank for group, spec in bundle.manifest.groups.items()}
        self._trained = trained_names(bundle)
        fed = (*bundle.manifest.inputs, TARGETS)
        require_names(self._path, "input", fed, program.inputs)
        require_names(self._path, "output", _OUTPUTS, program.outputs)
        require_names(self._path, "parameter", self._trained, [name.removeprefix(_PREFIX) for name in found])

    def step(
        self, inputs: Mapping[str, np.ndarray], targets: np.ndarray, feeds: Mapping[str, np.ndarray]
    ) -> StepResult:
        """See `TrainingEngine.step`.

        A program reserves its memory for a largest batch; a larger one is computed in parts, each counting by
        its weight, as in the training loop.

        Raises:
            IncompatibleError: samples longer than the program was exported for, or a core of another rank.
        """
        self._require_length(inputs)
        self._require_rank(feeds)
        most, parts, weights = self._limits.get("batch", len(targets)), [], []
        for place in range(0, len(targets), most):
            part = slice(place, place + most)
            parts.append(self._pass({n: v[part] for n, v in inputs.items()}, targets[part], feeds))
            weights.append(self._task.weight(targets[part]))
        if len(parts) == 1:
            return parts[0]
        gradients = {
            name: _mean([found.gradients[name] for found in parts], weights) for name in self._trained
        }
        return StepResult(
            mean_by_weight([found.loss for found in parts], weights),
            np.concatenate([found.outputs for found in parts]),
            gradients,
            mean_by_weight([found.metric or 0.0 for found in parts], weights),
        )

    def _pass(
        self, inputs: Mapping[str, np.ndarray], targets: np.ndarray, feeds: Mapping[str, np.ndarray]
    ) -> StepResult:
        fed = {**inputs, TARGETS: targets, **feeds}
        # Copies: what is fed may be read-only, and torch warns of tensors over such arrays.
        arguments = [self._torch.from_numpy(np.array(fed[name], order="C")) for name in self._inputs]
        if self._module.named_params is None:  # they are known after a first pass only
            self._run(arguments)
        for name, parameter in self._module.named_parameters().items():
            value = np.array(feeds[name.removeprefix(_PREFIX)], np.float32)
            parameter.copy_(self._torch.from_numpy(value))
        loss, outputs, metric = self._run(arguments)
        gradients = {
            name.removeprefix(_PREFIX): value.numpy()
            for name, value in self._module.named_gradients().items()
        }
        return StepResult(float(loss), outputs.numpy(), gradients, float(metric))

    def _run(self, arguments: list[Any]) -> list[Any]:
        try:
            found: list[Any] = self._module.forward_backward(_METHOD, arguments)
        except RuntimeError as error:
            raise IncompatibleError(
                f"ExecuTorch cannot run the program: {_first_line(error)}",
                where=str(self._path),
                hint="use --engine ort-step, or export the bundle again",
            ) from error
        return found

    def _require_rank(self, feeds: Mapping[str, np.ndarray]) -> None:
        for group, rank in self._ranks.items():
            found = feeds[f"{group}.core"].shape[-1]
            if found != rank:
                raise IncompatibleError(
                    f"{group}.core has rank {found}; this bundle's training program is for rank {rank}",
                    where=str(self._path),
                    hint="use --engine ort-step, which trains any rank, or export a bundle from that run",
                )

    def _require_length(self, inputs: Mapping[str, np.ndarray]) -> None:
        for name, axes in self._axes.items():
            for axis, size in zip(axes, inputs[name].shape, strict=True):
                if isinstance(axis, str) and axis != "batch" and size > self._limits.get(axis, size):
                    raise IncompatibleError(
                        f"a {axis} of {size} is above the {self._limits[axis]} that the training program "
                        "reserves memory for",
                        where=str(self._path),
                        hint="use --engine ort-step, or export it again with a larger --max-length",
                    )


def load_program(bundle: Bundle, program: ProgramSpec) -> Any:
    """A program of a bundle over the base file (ExecuTorch's ExecuTorchModule).

    Its memory is reserved for the largest batch; the caller has verified the digests.

    Raises:
        RuntimeError: ExecuTorch cannot load it.
    """
    _, _, portable_lib = import_training()
    with _quietly():
        return portable_lib._load_for_executorch(str(bundle.path(program.file)), str(bundle.path(BASE_PTD)))


def import_training() -> tuple[Any, Any, Any]:
    """torch, `executorch.extension.training` and `executorch.extension.pybindings.portable_lib`, without
    ExecuTorch's compiler.

    A module of three lines in `executorch.exir` is imported by all of ExecuTorch's Python, and with it the
    package: the compiler and torchao, 7 s and 130 MiB. A bare package in its place, during the import alone,
    lets that module be imported directly.

    Raises:
        MissingEngineError: one of them is not installed or cannot be imported.
    """
    require_executorch()
    try:
        with _quietly(), _without_compiler():
            import torch
            from executorch.extension import training
            from executorch.extension.pybindings import portable_lib
    except ImportError as error:
        raise MissingEngineError(
            f"ExecuTorch cannot be imported: {_first_line(error)}",
            hint="install it again with the torch that it was built for; 'edge-tcur-device doctor' shows "
            "what is there",
        ) from error
    return torch, training, portable_lib


@contextmanager
def _without_compiler() -> Iterator[None]:
    if _COMPILER in sys.modules:
        yield
        return
    found = PathFinder.find_spec("executorch")
    folder = next(iter((found and found.submodule_search_locations) or ()), None)
    package = types.ModuleType(_COMPILER)
    package.__path__ = [str(Path(folder or "") / "exir")]
    sys.modules[_COMPILER] = package
    try:
        yield
    finally:
        if sys.modules.get(_COMPILER) is package:
            del sys.modules[_COMPILER]


@contextmanager
def _quietly() -> Iterator[None]:
    """Each of ExecuTorch's interfaces warns that it may change."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextmanager
def _closed_stderr() -> Iterator[None]:
    """ExecuTorch writes to the stderr of the process how it counts cores, and how many it takes."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def _mean(values: list[np.ndarray], weights: list[int]) -> np.ndarray:
    """Mean of f32 arrays by weight, summed in float64; zeros where nothing has a weight."""
    total = max(1, sum(weights))
    summed = sum(value.astype(np.float64) * weight for value, weight in zip(values, weights, strict=True))
    return np.asarray(summed / total, np.float32)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{(lines or [type(error).__name__])[0]:.240}"


def _cannot_load(error: Exception, path: Path) -> IncompatibleError:
    return IncompatibleError(
        f"ExecuTorch cannot load the program: {_first_line(error)}",
        where=str(path),
        hint="use the version of ExecuTorch that the bundle was exported with, or export the bundle again",
    )
